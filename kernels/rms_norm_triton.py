"""Triton kernels of rms_norm. Legend: G groups, R rows, D width; tensors (G, R, D), weights (G, D), rstd (G, R).

A tile is ROWS whole rows of up to ONE_BLOCK elements, held in registers, so each element is read once. Longer rows are
read in blocks of LONG_BLOCK elements, twice; the second time from the L2 cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.launch import all_aligned, device_number, device_of, launch, relaunch

__all__ = ["backward", "forward"]

ONE_BLOCK = 16384  # widest row that one program holds
LONG_BLOCK = 8192
SHARED_BYTES = 192 << 10  # of shared memory of an SM, for tiles that are being loaded
SUM_PARTS, SUM_BLOCK, SUM_STAGES = 128, 8, 5  # a tile of the sum over parts, and how many are loaded ahead


class Config(NamedTuple):
    """How rows of one width are divided among programs."""

    rows: int  # of a tile
    block: int  # elements of a row that a tile holds: D rounded up to a power of two
    num_warps: int
    num_stages: int = 1  # of the backward pass: tiles in flight, the one in use included
    programs_per_sm: int = 0  # of the backward pass, which loops over tiles


def config(D: int) -> Config:
    """Forward: tiles of about 4096 elements, 16 to a thread: 8 KiB of bf16 in flight for each tensor read.

    The same for any number of rows, so that a row is summed in the same order in every batch.
    """
    block = min(triton.next_power_of_2(D), ONE_BLOCK)
    rows = min(max(1, 4096 // block), 64)
    return Config(rows, block, min(max(rows * block // 512, 1), 32))


def config_backward(D: int, R: int, itemsize: int, n_tensors: int) -> Config:
    """Backward: tiles of 1024 elements, or one longer row, since dw takes as many registers again; 16 warps an SM.

    Measured on an H100 at D 768 to 8192. Tiles that are loaded ahead take shared memory, which the programs of an SM
    divide.
    """
    block = min(triton.next_power_of_2(D), ONE_BLOCK)
    rows = min(max(1, 1024 // block), triton.next_power_of_2(max(R, 1)))
    warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    per_sm = 16 // warps
    ahead = SHARED_BYTES // (per_sm * n_tensors * rows * block * itemsize)
    return Config(rows, block, warps, max(1, min(ahead, 4 if block <= 1024 else 3)), per_sm)


@triton.jit
def _forward(
    x_ptr, residual_ptr, w_ptr, y_ptr, sum_ptr, rstd_ptr,
    R, n_tiles, x_g, x_r, residual_g, residual_r, w_g, eps,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    g = (pid // n_tiles).to(tl.int64)
    r = ((pid % n_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = (r < R)[:, None] & (d < D)[None, :]
    out = ((g * R + r) * D)[:, None] + d[None, :]
    x = tl.load(x_ptr + (g * x_g + r * x_r)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        at = (g * residual_g + r * residual_r)[:, None] + d[None, :]
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        # Normalises the sum as rounded, which is what the backward pass reads.
        kept = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, kept, mask=mask)
        x = kept.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(rstd_ptr + g * R + r, rstd, mask=r < R)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        w = tl.load(w_ptr + g * w_g + d, mask=d < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
        y *= w[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_long(
    x_ptr, residual_ptr, w_ptr, y_ptr, sum_ptr, rstd_ptr,
    R, x_g, x_r, residual_g, residual_r, w_g, eps,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g, r = row // R, row % R
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + g * x_g + r * x_r + d, mask=d < D, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + g * residual_g + r * residual_r + d, mask=d < D, other=0.0).to(tl.float32)
            x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + g * x_g + r * x_r + d, mask=d < D, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:  # read again, not from sum_ptr: other threads of the program may not have written it yet
            x += tl.load(residual_ptr + g * residual_g + r * residual_r + d, mask=d < D, other=0.0).to(tl.float32)
            kept = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * D + d, kept, mask=d < D)
            x = kept.to(tl.float32)
        y = x * rstd
        if HAS_WEIGHT:
            y *= tl.load(w_ptr + g * w_g + d, mask=d < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
        tl.store(y_ptr + row * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _backward(
    dy_ptr, dsum_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, part_ptr,
    R, n_tiles, n_programs, dy_g, dy_r, dsum_g, dsum_r, x_g, x_r, w_g,
    D: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    g = (pid // n_programs).to(tl.int64)
    d = tl.arange(0, BLOCK)
    if HAS_WEIGHT and NEED_DX:
        w = tl.load(w_ptr + g * w_g + d, mask=d < D, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)  # added up over rows at the end: within the loop threads would wait
    for tile in tl.range(pid % n_programs, n_tiles, n_programs, num_stages=STAGES):
        r = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (r < R)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + (g * x_g + r * x_r)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + (g * dy_g + r * dy_r)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + g * R + r, mask=r < R, other=0.0)
        n = x * rstd[:, None]
        if NEED_DW:
            dw += dy * n
        if NEED_DX:
            h = dy
            if HAS_WEIGHT:
                h = dy * w[None, :]
            mean = tl.sum(h * n, 1) / D
            dx = (h - n * mean[:, None]) * rstd[:, None]
            if HAS_DSUM:
                at = (g * dsum_g + r * dsum_r)[:, None] + d[None, :]
                dx += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
            out = ((g * R + r) * D)[:, None] + d[None, :]
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEED_DW:
        tl.store(part_ptr + pid.to(tl.int64) * D + d, tl.sum(dw, 0), mask=d < D)


@triton.jit
def _backward_long(
    dy_ptr, dsum_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr,
    R, dy_g, dy_r, dsum_g, dsum_r, x_g, x_r, w_g,
    D: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of one row."""
    row = tl.program_id(0).to(tl.int64)
    g, r = row // R, row % R
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        n = tl.load(x_ptr + g * x_g + r * x_r + d, mask=d < D, other=0.0).to(tl.float32) * rstd
        h = tl.load(dy_ptr + g * dy_g + r * dy_r + d, mask=d < D, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            h *= tl.load(w_ptr + g * w_g + d, mask=d < D, other=0.0).to(tl.float32)
        products += h * n
    mean = tl.sum(products, 0) / D
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        n = tl.load(x_ptr + g * x_g + r * x_r + d, mask=d < D, other=0.0).to(tl.float32) * rstd
        h = tl.load(dy_ptr + g * dy_g + r * dy_r + d, mask=d < D, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            h *= tl.load(w_ptr + g * w_g + d, mask=d < D, other=0.0).to(tl.float32)
        dx = (h - n * mean) * rstd
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + g * dsum_g + r * dsum_r + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + d, dx.to(dx_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _weight_long(
    dy_ptr, x_ptr, rstd_ptr, part_ptr,
    R, n_programs, n_columns, dy_g, dy_r, x_g, x_r,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Parts of dw: one program adds up a column of tiles, and rows p, p + n_programs, ... of it."""
    pid = tl.program_id(0)
    d = (pid % n_columns) * BLOCK + tl.arange(0, BLOCK)
    part = pid // n_columns
    g = (part // n_programs).to(tl.int64)
    dw = tl.zeros((BLOCK,), tl.float32)
    for tile in range(part % n_programs, tl.cdiv(R, ROWS), n_programs):
        r = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (r < R)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + (g * x_g + r * x_r)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + (g * dy_g + r * dy_r)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        dw += tl.sum(dy * x * tl.load(rstd_ptr + g * R + r, mask=r < R, other=0.0)[:, None], 0)
    tl.store(part_ptr + part.to(tl.int64) * D + d, dw, mask=d < D)


@triton.jit
def _sum_parts(
    part_ptr, dw_ptr, n_parts, n_columns, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dw_gd = sum_p part_gpd, always in the same order; later parts are loaded while earlier ones are added."""
    pid = tl.program_id(0)
    g = (pid // n_columns).to(tl.int64)
    d = (pid % n_columns) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for start in tl.range(0, n_parts, PARTS, num_stages=STAGES):
        p = start + tl.arange(0, PARTS)
        mask = (p < n_parts)[:, None] & (d < D)[None, :]
        total += tl.load(part_ptr + ((g * n_parts + p) * D)[:, None] + d[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + g * D + d, tl.sum(total, 0).to(dw_ptr.dtype.element_ty), mask=d < D)


def _rows_of(x: Tensor) -> Tensor:
    """x if the elements of a row are neighbours, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _n_sm(x: Tensor) -> int:
    """Number of SMs; 2 in the interpreter, so that programs loop there, too."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def _key(*tensors: Tensor | None) -> tuple:
    """All that a launch depends on except the tensors' addresses; see purelm.kernels.launch."""
    given = [x for x in tensors if x is not None]
    layout = tuple([None if x is None else (x.dtype, x.shape, x.stride()) for x in tensors])
    return device_number(given[0]), layout, all_aligned(given)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum x + residual (x itself without one), rstd."""
    G, R, D = x.shape
    x = _rows_of(x)
    residual = None if residual is None else _rows_of(residual)
    weight = None if weight is None else _rows_of(weight)
    y = x.new_empty(G, R, D)
    total = x if residual is None else x.new_empty(G, R, D)
    rstd = x.new_empty(G, R, dtype=torch.float32)
    if x.numel() == 0:
        return y, total, rstd

    def plan() -> tuple[int, tuple, dict, dict]:
        res, w = x if residual is None else residual, x if weight is None else weight
        c = config(D)
        n_tiles = triton.cdiv(R, c.rows)
        pointers = x, res, w, y, total, rstd
        numbers = x.stride(0), x.stride(1), res.stride(0), res.stride(1), w.stride(0), eps
        flags = {"D": D, "HAS_RESIDUAL": residual is not None, "HAS_WEIGHT": weight is not None}
        if D > ONE_BLOCK:
            return G * R, (*pointers, R, *numbers), {**flags, "BLOCK": LONG_BLOCK}, {"num_warps": 16}
        tile = {"ROWS": c.rows, "BLOCK": c.block}
        return G * n_tiles, (*pointers, R, n_tiles, *numbers), {**flags, **tile}, {"num_warps": c.num_warps}

    tensors = [t for t in (x, residual, weight, y, None if residual is None else total, rstd) if t is not None]
    with device_of(x):
        key = _key(x, residual, weight), eps
        kernel = _forward_long if D > ONE_BLOCK else _forward
        if not relaunch(kernel, key, tensors):
            launch(kernel, key, tensors, *plan())
    return y, total, rstd


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """dx (plus dsum) and dw; an empty tensor for what is not needed."""
    G, R, D = x.shape
    need_dw = need_dw and weight is not None
    dx = x.new_empty((G, R, D) if need_dx else (0,))
    dw = (x if weight is None else weight).new_empty((G, D) if need_dw else (0,))
    if x.numel() == 0 or not (need_dx or need_dw):
        return dx, dw.zero_()
    x, dy, rstd = _rows_of(x), _rows_of(dy), rstd.contiguous()
    weight = None if weight is None else _rows_of(weight)
    dsum = None if dsum is None else _rows_of(dsum)
    c = config_backward(D, R, x.element_size(), 2 if dsum is None else 3)
    long = D > ONE_BLOCK
    rows, columns = (4, triton.cdiv(D, 1024)) if long else (c.rows, 1)
    n_tiles = triton.cdiv(R, rows)
    n_programs = min(n_tiles, triton.cdiv(_n_sm(x) * c.programs_per_sm, G * columns))
    parts = x.new_empty((G, n_programs, D) if need_dw else (0,), dtype=torch.float32)
    w, extra = x if weight is None else weight, x if dsum is None else dsum
    strides = *dy.stride()[:2], *extra.stride()[:2], *x.stride()[:2], w.stride(0)
    flags = {"D": D, "HAS_DSUM": dsum is not None, "HAS_WEIGHT": weight is not None}

    def plan() -> tuple[int, tuple, dict, dict]:
        args = dy, extra, x, w, rstd, dx, parts, R, n_tiles, n_programs, *strides
        tile = {"ROWS": rows, "BLOCK": c.block, "STAGES": c.num_stages}
        constants = {**flags, "NEED_DX": need_dx, "NEED_DW": need_dw, **tile}
        return G * n_programs, args, constants, {"num_warps": c.num_warps}

    def plan_sum() -> tuple[int, tuple, dict, dict]:
        n_columns = triton.cdiv(D, SUM_BLOCK)
        constants = {"D": D, "PARTS": SUM_PARTS, "BLOCK": SUM_BLOCK, "STAGES": SUM_STAGES}
        return G * n_columns, (parts, dw, n_programs, n_columns), constants, {"num_warps": 4}

    tensors = [t for t in (dy, dsum, x, weight, rstd, dx, parts) if t is not None]
    with device_of(x):
        if not long:
            key = _key(dy, dsum, x, weight, rstd), need_dx, need_dw
            if not relaunch(_backward, key, tensors):
                launch(_backward, key, tensors, *plan())
        if long and need_dx:
            _backward_long[(G * R,)](dy, extra, x, w, rstd, dx, R, *strides, **flags, BLOCK=LONG_BLOCK, num_warps=16)
        if long and need_dw:
            _weight_long[(G * n_programs * columns,)](
                dy, x, rstd, parts, R, n_programs, columns, *dy.stride()[:2], *x.stride()[:2],
                D=D, ROWS=rows, BLOCK=1024, num_warps=4,
            )  # fmt: skip
        if need_dw:
            sum_key = _key(parts, dw)
            if not relaunch(_sum_parts, sum_key, [parts, dw]):
                launch(_sum_parts, sum_key, [parts, dw], *plan_sum())
    return dx, dw
