"""Log-probabilities of given tokens and entropies, of hidden states against an unembedding."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.ops.linear import linear
from purelm.ops.precision import accumulator
from purelm.ops.softcap import check_positive, soft_cap

__all__ = ["log_probs"]


def log_probs(
    hidden: Float[Tensor, "*batch d"],
    unembedding_VD: Float[Tensor, "v d"],
    targets: Int[Tensor, "*batch"],
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    ignore_index: int | None = None,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """(log p_i[target_i], H(p_i)) per token, p = softmax(cap(hidden @ unembedding^T) / temperature); nats, fp32.

    Both are differentiable. A token whose target is ignore_index has 0 and 0.
    """
    check_positive("temperature", temperature)
    logits = linear(hidden, unembedding_VD)
    log_p = torch.log_softmax(soft_cap(logits.to(accumulator(logits.dtype)), softcap) / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    if ignore_index is None:
        return log_p.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1), entropy
    dead = targets == ignore_index
    log_prob = log_p.gather(-1, torch.where(dead, 0, targets.long()).unsqueeze(-1)).squeeze(-1)
    return torch.where(dead, 0.0, log_prob), torch.where(dead, 0.0, entropy)
