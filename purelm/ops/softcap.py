"""A smooth bound."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["soft_cap"]


def soft_cap(x: Float[Tensor, "*shape"], cap: float | None) -> Float[Tensor, "*shape"]:
    """y = c tanh(x / c), which keeps small x and stays within (-c, c); None changes nothing.

    Used on attention scores and on final logits (Gemma 2, arXiv:2408.00118, section 2).
    """
    return x if cap is None else cap * torch.tanh(x / cap)
