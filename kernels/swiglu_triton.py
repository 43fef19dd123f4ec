"""Triton kernels of swiglu: element by element over flat tensors."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.launch import all_aligned, device_number, device_of, launch, relaunch

__all__ = ["backward", "forward"]


def config(n: int) -> tuple[int, int]:
    """Elements of a program, and its warps: 4 elements a thread, so that many threads have loads in flight."""
    block = min(1024, max(64, triton.next_power_of_2(n)))
    return block, max(1, block // 128)


@triton.jit
def _forward(gate_ptr, up_ptr, y_ptr, n, D, gate_r, up_r, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if DENSE:
        gate_at, up_at = at, at
    else:
        row, column = at // D, at % D
        gate_at, up_at = row * gate_r + column, row * up_r + column
    gate = tl.load(gate_ptr + gate_at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_at, mask=at < n, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _backward(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=at < n)
    tl.store(dup_ptr + at, (dy * gate * s).to(dup_ptr.dtype.element_ty), mask=at < n)


def _launch(kernel: Any, tensors: tuple[Tensor, ...]) -> None:
    """Launch the kernel on contiguous tensors of one shape and dtype."""
    x = tensors[0]
    n = x.numel()
    if n == 0:
        return

    key = device_number(x), x.dtype, n, all_aligned(tensors)
    with device_of(x):
        if not relaunch(kernel, key, tensors):
            block, warps = config(n)
            args = *tensors, n
            launch(kernel, key, tensors, triton.cdiv(n, block), args, {"BLOCK": block}, {"num_warps": warps})


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) * up. Halves of a joint projection are read where they are."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    n = y.numel()
    if n == 0:
        return y
    rows = [_row_stride(x) for x in (gate, up)]
    dense = None in rows or (gate.is_contiguous() and up.is_contiguous())
    if dense:
        gate, up, rows = gate.contiguous(), up.contiguous(), [0, 0]
    tensors = gate, up, y
    D = gate.shape[-1] if gate.ndim else 1
    key = device_number(gate), gate.dtype, n, D, *rows, all_aligned(tensors)
    with device_of(gate):
        if not relaunch(_forward, key, tensors):
            block, warps = config(n)
            args, constants = (*tensors, n, D, *rows), {"DENSE": dense, "BLOCK": block}
            launch(_forward, key, tensors, triton.cdiv(n, block), args, constants, {"num_warps": warps})
    return y


def _row_stride(x: Tensor) -> int | None:
    """The distance of rows, if x is rows of dense elements at one distance from each other; else None."""
    if x.ndim < 2 or x.stride(-1) != 1:
        return None
    for i in range(x.ndim - 2):
        if x.shape[i] != 1 and x.stride(i) != x.stride(i + 1) * x.shape[i + 1]:
            return None
    return x.stride(-2)


def backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _launch(_backward, (dy, gate, up, dgate, dup))
    return dgate, dup
