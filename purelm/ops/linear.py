"""Matrix product of a feature axis. Legend: I input features, O output features."""

from jaxtyping import Float
from torch import Tensor

__all__ = ["linear"]


def linear(
    x: Float[Tensor, "*batch i"], weight_OI: Float[Tensor, "o i"], bias_O: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*batch o"]:
    """y = x W^T + b, with one row of W for each output feature.

    >>> import torch
    >>> linear(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    tensor([3., 6.])
    """
    y = x @ weight_OI.mT
    return y if bias_O is None else y + bias_O
