"""Layer normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.ops.precision import accumulator

__all__ = ["layer_norm"]


def layer_norm(
    x: Float[Tensor, "*batch d"],
    weight_D: Float[Tensor, " d"] | None = None,
    bias_D: Float[Tensor, " d"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch d"]:
    """y = w * (x - mean(x)) / sqrt(var(x) + eps) + b over the last axis; computed in fp32, returned in x's dtype.

    var is the biased one (divides by D), taken of the centred values. Source: Ba et al. 2016 (arXiv:1607.06450).
    """
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    wide = x.to(accumulator(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight_D is not None:
        y = y * weight_D
    if bias_D is not None:
        y = y + bias_D
    return y.to(x.dtype)
