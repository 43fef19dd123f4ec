"""Log-probabilities and entropies of tokens. Legend: N tokens, D d_model, V vocabulary."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.ops.chunks import by_chunks
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

    H = -sum_v p_v log p_v is the entropy. Both are differentiable, and fp64 where hidden is.

    Args:
        softcap: bounds the logits first, as `purelm.ops.softcap`.
        temperature: above 0.
        chunk: tokens whose logits are held at a time, which are then formed again in backward. None holds all N x V.
        ignore_index: a token with this target has 0 and 0, and no gradient.

    A target outside of 0..V-1 that is not ignore_index is an index error.

    >>> log_prob, entropy = log_probs(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([1, 5]))
    >>> log_prob, entropy  # -log 8 and log 8
    (tensor([-2.0794, -2.0794]), tensor([2.0794, 2.0794]))
    """
    check_positive("temperature", temperature)

    def of_tokens(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits = linear(h_ND, w_VD)
        log_p = torch.log_softmax(soft_cap(logits.to(accumulator(logits.dtype)), softcap) / temperature, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        if ignore_index is None:
            return log_p.gather(-1, targets_N.long().unsqueeze(-1)).squeeze(-1), entropy
        dead = targets_N == ignore_index
        log_prob = log_p.gather(-1, torch.where(dead, 0, targets_N.long()).unsqueeze(-1)).squeeze(-1)
        return torch.where(dead, 0.0, log_prob), torch.where(dead, 0.0, entropy)

    if chunk is None:
        return of_tokens(hidden, unembedding_VD, targets)
    return by_chunks(of_tokens, hidden, unembedding_VD, targets, chunk)
