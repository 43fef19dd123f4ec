"""The Triton kernel of adamw: one launch over many tensors.

A launch takes a table of addresses, a row of COLUMNS numbers for each leaf. Leaves are cut into chunks, one a program;
`first` is the number of a leaf's first chunk, and a program finds its leaf by counting how many begin before it: one
read of the whole column, instead of a search of dependent reads or a second table as long as the grid.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.launch import device_of

__all__ = ["step"]

COLUMNS = 10  # first, numel, decays, and the addresses of p, g, m, v, update or new p, new m, new v
BLOCK, BLOCKS_PER_PROGRAM, NUM_WARPS = 1024, 8, 4  # 8 elements a thread: two 16-byte loads of each fp32 tensor
CHUNK = BLOCK * BLOCKS_PER_PROGRAM
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(row + column)
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:  # of a loaded address the compiler knows nothing; without this hint each element is a load of its own
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _step(
    table_ptr, scalars_ptr, n_leaves,
    ONE_MINUS_B1: tl.constexpr, B2: tl.constexpr, ONE_MINUS_B2: tl.constexpr, EPS: tl.constexpr,
    HAS_ROOT: tl.constexpr, OUTSIDE: tl.constexpr, BEFORE: tl.constexpr, APPLY: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr,
    LEAVES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i = tl.arange(0, LEAVES)
    firsts = tl.load(table_ptr + i * WIDTH, mask=i < n_leaves, other=0)
    leaf = tl.sum(((firsts <= pid) & (i < n_leaves)).to(tl.int32), 0) - 1
    row = table_ptr + leaf * WIDTH
    start = (pid - tl.load(row)) * (BLOCK * BLOCKS)
    n, decays = tl.load(row + 1), tl.load(row + 2) != 0
    if ALIGNED:
        n = tl.multiple_of(n, 16)  # a mask that ends within a 16-byte load would break it up
    p_ptr, g_ptr = _pointer(row, 3, P, ALIGNED), _pointer(row, 4, G, ALIGNED)
    m_ptr, v_ptr = _pointer(row, 5, M, ALIGNED), _pointer(row, 6, V, ALIGNED)
    out_ptr = _pointer(row, 7, P if APPLY else tl.float32, ALIGNED)
    new_m_ptr, new_v_ptr = _pointer(row, 8, M, ALIGNED), _pointer(row, 9, V, ALIGNED)
    neg_step_size = tl.load(scalars_ptr).to(tl.float32)
    root_scale = tl.load(scalars_ptr + 1).to(tl.float32)
    root_shift = tl.load(scalars_ptr + 2).to(tl.float32)
    keep = tl.load(scalars_ptr + 3).to(tl.float32)
    lose = tl.load(scalars_ptr + 4).to(tl.float32)
    for block in range(0, BLOCKS):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        live = at < n
        g = tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=live, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=live, other=0.0).to(tl.float32)
        # The two forms of torch.lerp, equal but for rounding: one is exact at weight 0, the other at weight 1.
        if ONE_MINUS_B1 < 0.5:
            m = m + ONE_MINUS_B1 * (g - m)
        else:
            m = g - (g - m) * (1.0 - ONE_MINUS_B1)
        v = v * B2 + ONE_MINUS_B2 * g * g
        # Rounded to nearest, as in torch; Triton's faster forms are off by more than the last bit.
        root = tl.sqrt_rn(v + root_shift) if HAS_ROOT else tl.sqrt_rn(v)
        if OUTSIDE:
            root = tl.div_rn(root, root_scale)
        u = tl.div_rn(m * neg_step_size, root + EPS)
        # Read only where it is needed: for decay, or for new parameters.
        p = tl.load(p_ptr + at, mask=live & (decays | APPLY), other=0.0).to(tl.float32)
        whole = p if BEFORE else p + u
        whole = whole * keep if OUTSIDE else whole - lose * whole
        if BEFORE:
            whole += u
        u = tl.where(decays, whole - p, u)
        if APPLY:
            tl.store(out_ptr + at, (p + u).to(P), mask=live)
        else:
            tl.store(out_ptr + at, u, mask=live)
        tl.store(new_m_ptr + at, m.to(M), mask=live)
        tl.store(new_v_ptr + at, v.to(V), mask=live)


def _launch(
    rows: list[int], n_programs: int, scalars: Tensor, hyper: tuple, device: torch.device, dtypes: tuple, aligned: bool
) -> None:
    """One launch over the leaves of a table, all of these dtypes, all aligned or not."""
    if not n_programs:  # all empty
        return
    cuda, n_leaves = device.type == "cuda", len(rows) // COLUMNS
    if cuda and torch.cuda.is_current_stream_capturing():
        table = by_arguments(rows, device)
    else:
        # The copy does not wait for the device, and pinned memory is not reused before the copy is done.
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=cuda).to(device, non_blocking=True)
    one_minus_b1, b2, one_minus_b2, eps, has_root, outside, before, apply = hyper
    with device_of(table):
        _step[(n_programs,)](
            table, scalars, n_leaves, ONE_MINUS_B1=one_minus_b1, B2=b2, ONE_MINUS_B2=one_minus_b2, EPS=eps,
            HAS_ROOT=has_root, OUTSIDE=outside, BEFORE=before, APPLY=apply,
            P=DTYPES[dtypes[0]], G=DTYPES[dtypes[1]], M=DTYPES[dtypes[2]], V=DTYPES[dtypes[3]], ALIGNED=aligned,
            LEAVES=triton.next_power_of_2(n_leaves), WIDTH=COLUMNS, BLOCK=BLOCK, BLOCKS=BLOCKS_PER_PROGRAM,
            num_warps=NUM_WARPS,
        )  # fmt: skip


def by_arguments(rows: list[int], device: torch.device) -> Tensor:
    """The table as what kernels are given as arguments, some 100 numbers a launch: a CUDA graph holds these, while it
    would read anew the host's memory that a copy was made from."""
    table = torch.zeros(len(rows), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), rows)
    return table


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    scalars: Tensor,
    decays: Sequence[bool],
    *hyper: float | bool,
    in_place: bool = False,
) -> list[Tensor]:
    """Updates (fp32; with `apply` new parameters), new m and new v of all leaves.

    One launch for each device and set of dtypes.

    Leaves whose length is no multiple of 16, or whose address is not aligned to 16 bytes, go in a launch of their own:
    they would slow down all the others.

    hyper: 1 - b1, b2, 1 - b2, eps, whether there is eps_root, eps "outside", decay "before", apply.
    in_place: the results are written over params, m and v, which must be contiguous. A program reads each element
    before it writes it.
    """
    apply = hyper[-1]
    if in_place:
        out_u, out_m, out_v = list(params), list(m), list(v)
    else:
        out_u = [x.new_empty(x.shape, dtype=x.dtype if apply else torch.float32) for x in params]
        out_m, out_v = [x.new_empty(x.shape) for x in m], [x.new_empty(x.shape) for x in v]
    inputs = [[x.contiguous() for x in column] for column in (params, grads, m, v)]  # kept alive until launched
    tables: dict[tuple, tuple[list[int], int]] = {}  # by launch: its rows, and the number of its programs so far
    for i, (p, g, m_, v_) in enumerate(zip(*inputs, strict=True)):
        n = p.numel()
        to_p, to_g, to_m, to_v = p.data_ptr(), g.data_ptr(), m_.data_ptr(), v_.data_ptr()
        new = (to_p, to_m, to_v) if in_place else (out_u[i].data_ptr(), out_m[i].data_ptr(), out_v[i].data_ptr())
        aligned = not (n | to_p | to_g | to_m | to_v) % 16
        key = p.device, aligned, p.dtype, g.dtype, m_.dtype, v_.dtype
        rows, first = tables.get(key) or ([], 0)
        rows += (first, n, decays[i], to_p, to_g, to_m, to_v, *new)
        tables[key] = rows, first - (-n // CHUNK)
    for (device, aligned, *dtypes), (rows, n_programs) in tables.items():
        _launch(rows, n_programs, scalars, hyper, device, tuple(dtypes), aligned)
    return [*out_u, *out_m, *out_v]
