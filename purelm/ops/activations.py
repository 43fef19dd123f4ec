"""Elementwise non-linearities of feed-forward layers."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["gelu", "relu2", "silu"]


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """y = x sigmoid(x) (Hendrycks and Gimpel 2016, arXiv:1606.08415; also called swish)."""
    return x * torch.sigmoid(x)


def gelu(x: Float[Tensor, "*shape"], tanh: bool = False) -> Float[Tensor, "*shape"]:
    """y = x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    Args:
        tanh: the paper's approximation x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which GPT-2 and Gemma use.
    """
    if tanh:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


def relu2(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """y = max(x, 0)^2 (So et al. 2021, arXiv:2109.08668)."""
    return torch.relu(x).square()
