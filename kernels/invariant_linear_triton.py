"""The Triton kernel of the batch-invariant linear. Legend: M rows, N output features, K input features.

Every element is one chain of tensor core products over k, 16 at a time and in order, whatever tile it lies in: tiles of
different sizes give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.launch import all_aligned, device_number, device_of, launch, relaunch

__all__ = ["linear"]

BLOCK_K = 64


def config(M: int, N: int, size: int) -> tuple[int, int, int, int]:
    """(rows of a tile, output features, warps, tiles in flight): small ones where large ones would not fill a GPU."""
    if size > 2:  # fp32 is multiplied without tensor cores
        return 32, 32, 4, 2
    if M * N >= 128 * 128 * 132:
        return 128, 128, 8, 3
    return 64, 64, 4, 4


@triton.jit
def _linear(
    x_ptr, w_ptr, b_ptr, y_ptr, M, N, K, x_m, w_n,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Programs that run at a time share rows and weights: GROUP tiles of rows for each tile of features.
    first = pid // (GROUP * tiles_n) * GROUP
    size = min(tiles_m - first, GROUP)
    tile_m, tile_n = first + pid % (GROUP * tiles_n) % size, pid % (GROUP * tiles_n) // size
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (m * x_m)[:, None] + k[None, :]
    w_at = w_ptr + (n * w_n)[None, :] + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at + start, mask=(m < M)[:, None], other=0.0)
            w = tl.load(w_at + start, mask=(n < N)[None, :], other=0.0)
        else:
            inside = start + k < K
            x = tl.load(x_at + start, mask=(m < M)[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_at + start, mask=(n < N)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + (m * N)[:, None] + n[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (M, N) = x (M, K) weight^T (N, K) + bias (N,)."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    tensors = (x, weight, y) if bias is None else (x, weight, bias.contiguous(), y)
    strides = x.stride(0), weight.stride(0)
    key = device_number(x), x.dtype, M, N, K, strides, bias is None, all_aligned(tensors)
    with device_of(x):
        if not relaunch(_linear, key, tensors):
            block_m, block_n, warps, stages = config(M, N, x.element_size())
            constants = {
                "HAS_BIAS": bias is not None, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": BLOCK_K, "GROUP": 8,
                "EVEN_K": K % BLOCK_K == 0,
            }  # fmt: skip
            args = x, weight, y if bias is None else tensors[2], y, M, N, K, *strides
            options = {"num_warps": warps, "num_stages": stages}
            launch(_linear, key, tensors, triton.cdiv(M, block_m) * triton.cdiv(N, block_n), args, constants, options)
    return y
