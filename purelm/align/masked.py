"""Sums and means over the tokens that a mask chooses, with denominators that are arguments.

A mean over the chosen tokens of a part of a batch is not a part of the batch's mean. So where a batch is divided, into
microbatches or over processes, give the denominator of the whole: then parts add up to the whole, in any division.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["masked_mean", "masked_normalize", "masked_sum"]

Axis = int | tuple[int, ...] | None


def masked_sum(x: Float[Tensor, "*shape"], mask: Tensor, dim: Axis = None) -> Tensor:
    """sum of x where the mask is not 0, times the mask: sum_i m_i x_i.

    What x is where the mask is 0 does not matter, not even nan or inf, and has gradient 0.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([1, 1, 0]))
    tensor(3.)
    """
    _check(x, mask)
    kept = torch.where(mask == 0, torch.zeros((), dtype=x.dtype, device=x.device), x)
    return (kept * mask.to(x.dtype)).sum() if dim is None else (kept * mask.to(x.dtype)).sum(dim)


def masked_mean(
    x: Float[Tensor, "*shape"],
    mask: Tensor,
    dim: Axis = None,
    *,
    denominator: Tensor | float | None = None,
    empty: float = 0.0,
) -> Tensor:
    """sum_i m_i x_i / d with d = sum_i m_i, over all axes or `dim`.

    Args:
        denominator: in place of sum_i m_i, for a part of a batch: that of the whole batch.
        empty: the mean of no token at all, where sum_i m_i is 0 (and no denominator is given). A response of no tokens
            so adds nothing; give float("nan") to see it.

    >>> masked_mean(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 1], [0, 0]]), 1)
    tensor([1.5000, 0.0000])
    """
    total = masked_sum(x, mask, dim)
    if denominator is not None:
        return total / _positive(denominator)
    count = masked_sum(torch.ones_like(x), mask, dim)
    mean = total / torch.where(count == 0, torch.ones_like(count), count)
    return torch.where(count == 0, torch.full_like(mean, empty), mean)


def masked_normalize(
    x: Float[Tensor, "*shape"], mask: Tensor, normalize_constant: Tensor | float, dim: Axis = None
) -> Tensor:
    """sum_i m_i x_i / C for a constant C, such as the longest response that is sampled (Dr. GRPO, arXiv:2503.20783).

    >>> masked_normalize(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 1], [1, 0]]), 2.0, 1)
    tensor([1.5000, 1.5000])
    """
    return masked_sum(x, mask, dim) / _positive(normalize_constant)


def _check(x: Any, mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.is_complex() or mask.shape != x.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a tensor of x's shape {tuple(x.shape)}, got {found}")


def _positive(denominator: Tensor | float) -> Tensor | float:
    if not isinstance(denominator, Tensor) and not 0 < denominator < float("inf"):
        raise ValueError(f"the denominator must be above 0 and finite, got {denominator}")
    return denominator
