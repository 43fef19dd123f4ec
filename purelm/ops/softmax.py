"""Softmax and its logarithm, without overflow."""

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.ops.precision import accumulator

__all__ = ["log_softmax", "softmax"]


def softmax(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """p_i = exp(x_i - m) / sum_j exp(x_j - m), m = max(x); computed in fp32, returned in x's dtype.

    A row of -inf alone, where nothing is possible, gives zeros (torch.softmax gives NaN): a query that sees no key
    then attends to nothing, and its gradients are zeros too.

    >>> softmax(torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000]])
    """
    if x.shape[dim] == 0:
        return x  # no keys at all: there is no maximum of nothing
    wide = x.to(accumulator(x.dtype))
    # p does not change when a constant is taken from x, so m is rightly treated as one at every order of derivative.
    m = wide.detach().amax(dim, keepdim=True)
    e = torch.exp(wide - torch.where(m == -torch.inf, 0.0, m))
    total = e.sum(dim, keepdim=True)
    return (e / torch.where(total == 0.0, 1.0, total)).to(x.dtype)


def log_softmax(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """log p_i = x_i - m - log sum_j exp(x_j - m), m = max(x); computed in fp32, returned in x's dtype.

    A row of -inf alone gives -inf, the logarithm of `softmax`'s zeros.
    """
    if x.shape[dim] == 0:
        return x
    wide = x.to(accumulator(x.dtype))
    m = wide.detach().amax(dim, keepdim=True)
    shifted = wide - torch.where(m == -torch.inf, 0.0, m)
    total = torch.exp(shifted).sum(dim, keepdim=True)
    return (shifted - torch.log(torch.where(total == 0.0, 1.0, total))).to(x.dtype)
