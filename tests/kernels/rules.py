"""The tolerance rule of all kernels: as near to float64 as the reference is in the same dtype, up to a factor."""

import torch
from torch import Tensor


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_as_exact(
    kernel: Tensor, same_dtype: Tensor, exact: Tensor, *, factor: float = 2.0, ulps: float = 2.0, atol: float = 0.0
) -> None:
    """max|kernel - exact| <= factor max|same_dtype - exact| + ulps roundings of the largest value in kernel's dtype.

    The last term is for references that happen to be exact: a result of this dtype may always be a rounding away.
    atol is added to it, for results that are 0 by cancellation.
    """
    assert kernel.shape == exact.shape and kernel.dtype == same_dtype.dtype
    kernel, same_dtype, exact = (x.detach().cpu() for x in (kernel, same_dtype, exact))
    assert torch.isfinite(kernel).all(), "not finite"
    atol = atol + ulps * torch.finfo(kernel.dtype).eps * largest(exact)
    found, allowed = largest(kernel.double() - exact.double()), largest(same_dtype.double() - exact.double())
    assert found <= factor * allowed + atol, f"error {found:.3g}, the reference's own {allowed:.3g}, atol {atol:.3g}"
