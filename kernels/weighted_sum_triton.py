"""Triton kernels of weighted_sum, commented line by line. Legend: G groups, R rows, D width.

A kernel is written for one program, which owns a tile of the result; the launcher starts one for each tile. Inside,
a value is a block of numbers whose shape is known when the kernel is compiled, a power of two along each axis, and
a mask says which of its places exist.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.launch import device_of

__all__ = ["backward", "forward"]


def config(D: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps (of 32 threads) of a program.

    4096 elements over 8 warps is 16 to a thread: enough bytes in flight to keep memory busy, few enough to stay in
    registers. Columns are the dense axis, so they come first: a warp reads 512 neighbouring bytes of bf16 at once.
    """
    columns = min(triton.next_power_of_2(D), 512)
    return 4096 // columns if columns >= 64 else 64, columns, 8 if columns >= 64 else 4


@triton.jit
def _forward(
    x_ptr, w_ptr, y_ptr,  # a tensor arrives as a pointer to its first element
    R, D, n_tiles,  # numbers: 1 and multiples of 16 are compiled for specially
    x_g, x_r, w_g,  # strides in elements: views are read in place, not copied
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # known when compiling: shapes of blocks
):  # fmt: skip
    """One program: ROWS numbers of y, of one group."""
    pid = tl.program_id(0)
    g = (pid // n_tiles).to(tl.int64)  # 64 bits before any product with a stride: a tensor may have over 2^31 elements
    r = ((pid % n_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    rows = x_ptr + g * x_g + r * x_r  # a block of ROWS pointers
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        mask = (r < R)[:, None] & (d < D)[None, :]
        # Where the mask is false nothing is read and the value is `other`: 0, so that sums are not disturbed.
        # To fp32 before any arithmetic: a bf16 product has 8 bits, and the interpreter has no bf16 arithmetic.
        x = tl.load(rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + g * w_g + d, mask=d < D, other=0.0).to(tl.float32)
        total += x * w[None, :]  # numbers are added up over tiles first, over columns once at the end
    y = tl.sum(total, 1)
    tl.store(y_ptr + g * R + r, y.to(y_ptr.dtype.element_ty), mask=r < R)


@triton.jit
def _backward(
    dy_ptr, x_ptr, w_ptr, dx_ptr, part_ptr,
    R, D, n_programs, n_columns, dy_g, dy_r, x_g, x_r, w_g,
    NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: one column of tiles, rows p, p + n_programs, ...: dx of these tiles, and its part of dw.

    dw is a sum over all rows, hence over programs, which run in no order. Atomic additions would give different
    bits in each run. So each program writes the sum of its own rows, and these are added up afterwards.
    """
    pid = tl.program_id(0)
    d = (pid % n_columns) * COLUMNS + tl.arange(0, COLUMNS)
    part = pid // n_columns
    g = (part // n_programs).to(tl.int64)
    w = tl.load(w_ptr + g * w_g + d, mask=d < D, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(part % n_programs, tl.cdiv(R, ROWS), n_programs):
        r = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (r < R)[:, None] & (d < D)[None, :]
        dy = tl.load(dy_ptr + g * dy_g + r * dy_r, mask=r < R, other=0.0).to(tl.float32)
        if NEED_DX:  # a tl.constexpr condition: what is not needed is not compiled
            dx = dy[:, None] * w[None, :]
            tl.store(dx_ptr + ((g * R + r) * D)[:, None] + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            x = tl.load(x_ptr + (g * x_g + r * x_r)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            dw += dy[:, None] * x
    if NEED_DW:  # the sum over rows comes last: it makes threads wait for each other
        tl.store(part_ptr + part.to(tl.int64) * D + d, tl.sum(dw, 0), mask=d < D)


# Launchers: plain functions of tensors. They allocate, choose tiles, and start the kernel.


def _dense(x: Tensor) -> Tensor:
    """x if its last axis is dense, as the kernels read it, else a copy. Never written to: x is the caller's."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """y (G, R) of x (G, R, D) and weight (G, D)."""
    G, R, D = x.shape
    x, weight = _dense(x), _dense(weight)
    y = x.new_empty(G, R)
    if x.numel() == 0:  # a grid may not be empty; a sum over nothing is 0
        return y.zero_()
    rows, columns, warps = config(D)
    n_tiles = triton.cdiv(R, rows)
    with device_of(x):  # Triton launches on the current device, which need not be x's
        # All tiles on axis 0 of the grid: the other axes end at 65,535.
        _forward[(G * n_tiles,)](
            x, weight, y, R, D, n_tiles, x.stride(0), x.stride(1), weight.stride(0),
            ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor]:
    """dx (G, R, D) and dw (G, D); an empty tensor for what is not needed."""
    G, R, D = x.shape
    dx = x.new_empty((G, R, D) if need_dx else (0,))
    dw = weight.new_empty((G, D) if need_dw else (0,))
    if x.numel() == 0 or not (need_dx or need_dw):
        return dx, dw.zero_()
    x, weight = _dense(x), _dense(weight)
    rows, columns, warps = config(D)
    n_columns = triton.cdiv(D, columns)
    # Enough programs to fill the GPU, and no more: each leaves a row of parts to be added up.
    n_sm = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    n_programs = min(triton.cdiv(R, rows), triton.cdiv(4 * n_sm, G * n_columns))
    parts = x.new_empty((G, n_programs, D) if need_dw else (0,), dtype=torch.float32)
    with device_of(x):
        _backward[(G * n_programs * n_columns,)](
            dy, x, weight, dx, parts, R, D, n_programs, n_columns, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1),
            weight.stride(0), NEED_DX=need_dx, NEED_DW=need_dw, ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
    # torch.sum adds in an order that depends on shapes alone: the same bits in each run.
    return dx, parts.sum(1).to(weight.dtype) if need_dw else dw
