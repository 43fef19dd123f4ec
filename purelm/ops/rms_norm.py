"""Root-mean-square normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.ops.precision import accumulator

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(
    x: Float[Tensor, "*batch d"], weight_D: Float[Tensor, " d"] | None = None, eps: float = 1e-5
) -> Float[Tensor, "*batch d"]:
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis; computed in fp32, returned in x's dtype.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4, with eps inside the root.

    >>> rms_norm(torch.tensor([3.0, 4.0]), eps=0.0)
    tensor([0.8485, 1.1314])
    """
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    wide = x.to(accumulator(x.dtype))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight_D is not None:
        y = y * weight_D
    return y.to(x.dtype)


def add_rms_norm(
    x: Float[Tensor, "*batch d"],
    residual: Float[Tensor, "*batch d"],
    weight_D: Float[Tensor, " d"] | None = None,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d"]]:
    """(rms_norm(x + residual), x + residual): a block's residual sum and the next norm.

    >>> add_rms_norm(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.0]), eps=0.0)
    (tensor([0.8485, 1.1314]), tensor([3., 4.]))
    """
    total = x + residual
    return rms_norm(total, weight_D, eps), total
