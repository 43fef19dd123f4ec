"""Gated linear units: one projection decides how much of another passes (Shazeer 2020, arXiv:2002.05202)."""

from jaxtyping import Float
from torch import Tensor

from purelm.ops.activations import gelu, silu

__all__ = ["geglu", "swiglu"]


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """y = silu(gate) * up; the layer is W2 swiglu(W1 x, W3 x)."""
    return silu(gate) * up


def geglu(
    gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"], tanh: bool = False
) -> Float[Tensor, "*shape"]:
    """y = gelu(gate) * up; `tanh` as in `gelu`."""
    return gelu(gate, tanh) * up
