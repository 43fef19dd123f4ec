"""Log-probabilities and entropies of logits that are held, as another library's model gives them.

A Model of purelm has `model.log_probs(params, batch)`, which forms the logits of a few tokens at a time.
Legend: V vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["entropy", "target_log_probs"]


def entropy(logits: Float[Tensor, "*batch v"]) -> Float[Tensor, "*batch"]:
    """H = -sum_v p_v log p_v with p = softmax(logits), in nats; fp32, or fp64 where the logits are.

    An excluded token (-inf) adds 0, and has gradient 0.

    >>> entropy(torch.zeros(2, 8))  # log 8
    tensor([2.0794, 2.0794])
    """
    log_p = _log_p(logits)
    # 0 log 0 is 0: the product would be nan, and its gradient too.
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def target_log_probs(
    logits: Float[Tensor, "*batch v"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """log softmax(logits) at the targets, ids of 0..V-1; fp32, or fp64 where the logits are.

    >>> target_log_probs(torch.zeros(2, 8), torch.tensor([1, 5]))
    tensor([-2.0794, -2.0794])
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must have the logits' shape without V, {tuple(logits.shape[:-1])}, "
                         f"got {tuple(targets.shape)}")  # fmt: skip
    return _log_p(logits).gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)


def _log_p(logits: Tensor) -> Tensor:
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating, got {logits.dtype}")
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
