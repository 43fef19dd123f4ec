"""The dtype in which sums are held."""

import torch

__all__ = ["accumulator"]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16 and bfloat16, otherwise the dtype itself: sums never lose what the inputs carry.

    >>> accumulator(torch.bfloat16), accumulator(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)
