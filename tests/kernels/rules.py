"""The tolerance rule of all kernels: as near to float64 as the reference is in the same dtype, up to a factor."""

import torch
from torch import Tensor

from purelm.ops.precision import accumulator


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def floor_of(
    dtype: torch.dtype, scale: float, *, stored: float = 2.0, roundings: float = 2.0
) -> float:
    """What any computation of a result of size `scale` may be off by, however exact another one happens to be.

    Each operation is off by half an ulp of its result, u = eps / 2, so k in a row by k u of the size of what is added
    up, and two computations of the same thing by 2 k u = k eps from each other. That is a bound and not a fit:

        floor = (stored eps(dtype) + roundings eps(accumulator)) scale

    stored: values on the way that are held in the dtype itself: the result, and here what Triton's interpreter
        truncates and does not round, which is a whole ulp.
    roundings: operations in a row in the accumulator's dtype, from the inputs to the result. A sum of n terms counts
        as log2(n), the depth of the tree that it is (torch and Triton both add in blocks); exp(s) as |s|, since a score
        that is one rounding off moves it by |s| of them.
    scale: the size of what is added up, which is that of the result unless it cancels: x - x is 0, and its error is
        roundings of x.
    """
    return (stored * torch.finfo(dtype).eps + roundings * torch.finfo(accumulator(dtype)).eps) * scale


def assert_as_exact(
    kernel: Tensor,
    same_dtype: Tensor,
    exact: Tensor,
    *,
    factor: float = 2.0,
    stored: float = 2.0,
    roundings: float = 2.0,
    scale: float = 0.0,
) -> None:
    """max|kernel - exact| <= factor max|same_dtype - exact| + `floor_of` the largest value, or of `scale` if larger."""
    assert kernel.shape == exact.shape and kernel.dtype == same_dtype.dtype
    kernel, same_dtype, exact = (x.detach().cpu() for x in (kernel, same_dtype, exact))
    assert torch.isfinite(kernel).all(), "not finite"
    floor = floor_of(kernel.dtype, max(scale, largest(exact)), stored=stored, roundings=roundings)
    found, allowed = largest(kernel.double() - exact.double()), largest(same_dtype.double() - exact.double())
    assert found <= factor * allowed + floor, f"error {found:.3g}, the reference's own {allowed:.3g}, floor {floor:.3g}"


def attention_scales(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> tuple[list[float], float]:
    """(sizes of what is added up in o, dq, dk and dv, the largest score), for `assert_as_exact`.

    dq = scale sum_s p (dp - delta) k: where a query sees one key, dp - delta is 0 in exact arithmetic, and what is left
    of it are roundings of dp = do v. (delta is an average of dp's, and so no larger.)
    """
    q, k, v, do = (x.detach().double().cpu() for x in (q, k, v, do))
    heads = [x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v)]
    score = largest(torch.einsum("bthk,bshk->bhts", q, heads[0])) * scale
    dp = largest(torch.einsum("bthe,bshe->bhts", do, heads[1])) * scale
    return [largest(v), dp * largest(k), dp * largest(q), largest(do)], score
