"""The Triton kernel of linear_cross_entropy, beside those of cross_entropy: a gradient times the upstream scalar."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.launch import device_of

__all__ = ["scale"]

BLOCK = 4096


@triton.jit
def _scale_kernel(x, out, factor, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=at < n)


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor (0-d fp32 on the device), multiplied in fp32 and rounded once: torch would round the factor first."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        with device_of(x):
            _scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, factor, x.numel(), BLOCK, num_warps=8)
    return out
