"""Triton kernels of flash attention and their launchers; the maths and the public function are in flash_attention.py.

Three kernels: forward (o, lse); backward for dq, which also writes delta = rowsum(o do) - dlse; backward for dk and dv,
which reads delta. Two backward passes cost 7 matrix products instead of 5, and need no atomics: every number is the
sum of the same terms in the same order in each run.

Names: M a tile of queries, N a tile of keys, D head dim of q and k, E of v, both padded to powers of two. Tiles come
through tensor descriptors (TMA), which fill with zeros beyond the edges and cut stores there, or, where strides are no
multiples of 16 bytes, through pointers and masks. Scores are in units of log 2, because exp2 is what the chip has.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from purelm.kernels.flash_attention_tuned import Blocks, choose
from purelm.kernels.launch import all_aligned, device_number, device_of, launch, relaunch
from purelm.kernels.recipe import interpreted

__all__ = ["Request", "backward", "forward"]

LOG2E = math.log2(math.e)
L2_BYTES = 32 << 20  # of keys and values that are to stay in the second-level cache at a time (H100: 50 MB)


class Request(NamedTuple):
    """What is asked of the kernels besides tensors; window limits are of `purelm.ops.masks.span`."""

    left: int | None
    right: int | None
    scale: float
    softcap: float | None = None
    precision: str = "tf32x3"  # of products of fp32: "ieee", "tf32x3" or "tf32"


# --- tiles


@triton.jit
def _load(X, b, h, row, n_rows, n_heads, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Rows row.. of x[b, :, h, :], zeros beyond its edges; by pointers x must be dense."""
    if TMA:
        x = X.load([b, h, row, 0]).reshape([ROWS, WIDTH])
    else:
        rows = row + tl.arange(0, ROWS)
        cols = tl.arange(0, WIDTH)
        at = ((b.to(tl.int64) * n_rows + rows)[:, None] * n_heads + h) * width + cols[None, :]
        x = tl.load(X + at, mask=(rows < n_rows)[:, None] & (cols < width)[None, :], other=0.0)
    return x


@triton.jit
def _store(X, x, b, h, row, n_rows, n_heads, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        X.store([b, h, row, 0], x.reshape([1, 1, ROWS, WIDTH]))
    else:
        rows = row + tl.arange(0, ROWS)
        cols = tl.arange(0, WIDTH)
        at = ((b.to(tl.int64) * n_rows + rows)[:, None] * n_heads + h) * width + cols[None, :]
        tl.store(X + at, x, mask=(rows < n_rows)[:, None] & (cols < width)[None, :])


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies the bit patterns of bf16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _dot_add(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tanh(x):
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _place(pid, n_tiles, n_heads, heads_at_once):
    """(tile, head) of a program: a few heads at a time, whose keys stay in the cache; tile by tile over those."""
    per = heads_at_once * n_tiles
    first = (pid // per) * heads_at_once
    n = tl.minimum(heads_at_once, n_heads - first)
    rest = pid % per
    return rest // n, first + rest % n


@triton.jit
def _seen(q_at, k_at, left, right, q_seg, kv_seg, n_keys, LEFT: tl.constexpr, RIGHT: tl.constexpr, SEG: tl.constexpr):
    """Whether the query at position q_at sees the key at k_at; the two broadcast against each other."""
    seen = (k_at < n_keys) & (q_at >= -(1 << 30))
    if RIGHT:
        seen = seen & (k_at - q_at <= right)
    if LEFT:
        seen = seen & (q_at - k_at <= left)
    if SEG:
        seen = seen & (q_seg == kv_seg)
    return seen


@triton.jit
def _key_range(m0, T, S, left, right, LO, HI, at, BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr,
               RIGHT: tl.constexpr, SEG: tl.constexpr):  # fmt: skip
    """Tiles of keys of a tile of queries: [lo, a) and [b, hi) need masks, [a, b) are seen by all its queries whole."""
    shift = S - T
    lo = 0
    hi = tl.cdiv(S, BN)
    a = 0
    b = S // BN
    if RIGHT:
        hi = tl.minimum(hi, tl.maximum(tl.cdiv(m0 + BM + shift + right, BN), 0))
        b = tl.minimum(b, tl.maximum(m0 + shift + right + 1, 0) // BN)
    if LEFT:
        lo = tl.maximum(m0 + shift - left, 0) // BN
        a = tl.cdiv(tl.maximum(m0 + BM - 1 + shift - left, 0), BN)
    if SEG:
        lo = tl.maximum(lo, tl.load(LO + at))
        hi = tl.minimum(hi, tl.load(HI + at))
        a = hi
    hi = tl.maximum(hi, lo)
    a = tl.minimum(tl.maximum(a, lo), hi)
    b = tl.minimum(tl.maximum(b, a), hi)
    return lo, a, b, hi


@triton.jit
def _query_range(n0, T, S, left, right, LO, HI, at, BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr,
                 RIGHT: tl.constexpr, SEG: tl.constexpr):  # fmt: skip
    """The same for the tiles of queries of a tile of keys."""
    shift = S - T
    lo = 0
    hi = tl.cdiv(T, BM)
    a = 0
    b = hi  # queries beyond T have lse = inf, so they count nothing and need no mask
    if RIGHT:
        lo = tl.maximum(n0 - right - shift, 0) // BM
        a = tl.cdiv(tl.maximum(n0 + BN - 1 - right - shift, 0), BM)
    if LEFT:
        hi = tl.minimum(hi, tl.maximum(tl.cdiv(n0 + BN + left - shift, BM), 0))
        b = tl.minimum(b, tl.maximum(n0 + left - shift + 1, 0) // BM)
    if SEG:
        lo = tl.maximum(lo, tl.load(LO + at))
        hi = tl.minimum(hi, tl.load(HI + at))
        a = hi
    hi = tl.maximum(hi, lo)
    a = tl.minimum(tl.maximum(a, lo), hi)
    b = tl.minimum(tl.maximum(b, a), hi)
    return lo, a, b, hi


# --- forward


@triton.jit
def _attend(acc, l, m, q, K, V, b, g, G, first, last, q_at, q_seg, KV_SEG, T, S, k_width, v_width, left, right, scale,
            cap, BN: tl.constexpr, D: tl.constexpr, E: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
            SEG: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
            UPCAST: tl.constexpr):  # fmt: skip
    """Online softmax over the tiles first..last of keys. scale is in units of log 2; with CAP, cap is too."""
    for j in tl.range(first, last):
        n0 = j * BN
        k = _load(K, b, g, n0, S, G, k_width, BN, D, TMA)
        s = _dot(q, tl.trans(k), PRECISION, UPCAST)
        if CAP:
            s = cap * _tanh(s * scale)
        if MASK:
            k_at = n0 + tl.arange(0, BN)
            kv_seg = 0
            if SEG:
                kv_seg = tl.load(KV_SEG + b.to(tl.int64) * S + k_at, mask=k_at < S, other=0)[None, :]
            seen = _seen(q_at[:, None], k_at[None, :], left, right, q_seg[:, None], kv_seg, S, LEFT, RIGHT, SEG)
            if not CAP:
                s = s * scale
            s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a query that has seen no key yet
            p = tl.exp2(s - base[:, None])
            alpha = tl.exp2(m - base)
        elif CAP:
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
            alpha = tl.exp2(m - m_new)
        else:
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - m_new[:, None])
            alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = _load(V, b, g, n0, S, G, v_width, BN, E, TMA)
        acc = _dot_add(p.to(v.dtype), v, acc, PRECISION, UPCAST)
        m = m_new
    return acc, l, m


@triton.jit
def _forward(Q, K, V, O, LSE, SINKS, Q_SEG, KV_SEG, LO, HI, B, H, R, T, S, k_width, v_width, heads_at_once, left,
             right, scale, cap, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
             LEFT: tl.constexpr, RIGHT: tl.constexpr, SEG: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
             TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    n_tiles = tl.cdiv(T, BM)
    tile, head = _place(tl.program_id(0), n_tiles, B * H, heads_at_once)
    if RIGHT:
        tile = n_tiles - 1 - tile  # the longest rows first: the end of the grid is then short ones
    b = head // H
    h = head % H
    G = H // R
    g = h // R
    m0 = tile * BM
    rows = m0 + tl.arange(0, BM)
    q_at = rows + (S - T)
    q = _load(Q, b, h, m0, T, H, k_width, BM, D, TMA)
    q_seg = rows
    if SEG:
        q_seg = tl.load(Q_SEG + b.to(tl.int64) * T + rows, mask=rows < T, other=0)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, E], tl.float32)
    lo, a, z, hi = _key_range(m0, T, S, left, right, LO, HI, b * n_tiles + tile, BM, BN, LEFT, RIGHT, SEG)
    if LEFT or SEG:
        acc, l, m = _attend(acc, l, m, q, K, V, b, g, G, lo, a, q_at, q_seg, KV_SEG, T, S,
                            k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, True, TMA,
                            PRECISION, UPCAST)  # fmt: skip
    if not SEG:
        acc, l, m = _attend(acc, l, m, q, K, V, b, g, G, a, z, q_at, q_seg, KV_SEG, T, S,
                            k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, False, TMA,
                            PRECISION, UPCAST)  # fmt: skip
        acc, l, m = _attend(acc, l, m, q, K, V, b, g, G, z, hi, q_at, q_seg, KV_SEG, T, S,
                            k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, True, TMA,
                            PRECISION, UPCAST)  # fmt: skip
    if SINK:  # one more key, of this score and without a value
        sink = tl.load(SINKS + h).to(tl.float32) * 1.4426950408889634
        m_new = tl.maximum(m, sink)
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.exp2(sink - m_new)
        acc = acc * alpha[:, None]
        m = m_new
    some = l > 0
    l = tl.where(some, l, 1.0)
    lse = tl.where(some, (m + tl.log2(l)) * 0.6931471805599453, float("-inf"))
    acc = acc / l[:, None]
    tl.store(LSE + head.to(tl.int64) * T + rows, lse, mask=rows < T)
    if TMA:
        o = acc.to(O.dtype)
    else:
        o = acc.to(O.dtype.element_ty)
    _store(O, o, b, h, m0, T, H, v_width, BM, E, TMA)


# --- backward


@triton.jit
def _collect_q(dq, q, do, lse, delta, K, V, b, g, G, first, last, q_at, q_seg, KV_SEG, T, S, k_width, v_width, left,
               right, scale, cap, BN: tl.constexpr, D: tl.constexpr, E: tl.constexpr, LEFT: tl.constexpr,
               RIGHT: tl.constexpr, SEG: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
               PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """dq += ds k over the tiles first..last of keys, ds = p (do v^T - delta)."""
    for j in tl.range(first, last):
        n0 = j * BN
        k = _load(K, b, g, n0, S, G, k_width, BN, D, TMA)
        s = _dot(q, tl.trans(k), PRECISION, UPCAST)
        if CAP:
            t = _tanh(s * scale)
            p = tl.exp2(cap * t - lse[:, None])
        else:
            p = tl.exp2(s * scale - lse[:, None])
        if MASK:
            k_at = n0 + tl.arange(0, BN)
            kv_seg = 0
            if SEG:
                kv_seg = tl.load(KV_SEG + b.to(tl.int64) * S + k_at, mask=k_at < S, other=0)[None, :]
            seen = _seen(q_at[:, None], k_at[None, :], left, right, q_seg[:, None], kv_seg, S, LEFT, RIGHT, SEG)
            p = tl.where(seen, p, 0.0)
        v = _load(V, b, g, n0, S, G, v_width, BN, E, TMA)
        dp = _dot(do, tl.trans(v), PRECISION, UPCAST)
        ds = p * (dp - delta[:, None])
        if CAP:
            ds = ds * (1.0 - t * t)
        dq = _dot_add(ds.to(k.dtype), k, dq, PRECISION, UPCAST)
    return dq


@triton.jit
def _backward_q(Q, K, V, O, DO, LSE, DLSE, DELTA, DQ, Q_SEG, KV_SEG, LO, HI, B, H, R, T, S, k_width, v_width,
                heads_at_once, left, right, scale, cap, out_scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
                E: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SEG: tl.constexpr, CAP: tl.constexpr,
                HAS_DLSE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
                UPCAST: tl.constexpr):  # fmt: skip
    n_tiles = tl.cdiv(T, BM)
    tile, head = _place(tl.program_id(0), n_tiles, B * H, heads_at_once)
    if RIGHT:
        tile = n_tiles - 1 - tile
    b = head // H
    h = head % H
    G = H // R
    g = h // R
    m0 = tile * BM
    rows = m0 + tl.arange(0, BM)
    at = head.to(tl.int64) * T + rows
    q_at = rows + (S - T)
    o = _load(O, b, h, m0, T, H, v_width, BM, E, TMA)
    do = _load(DO, b, h, m0, T, H, v_width, BM, E, TMA)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta = delta - tl.load(DLSE + at, mask=rows < T, other=0.0)
    tl.store(DELTA + at, delta, mask=rows < T)
    lse = tl.load(LSE + at, mask=rows < T, other=float("inf")) * 1.4426950408889634
    q = _load(Q, b, h, m0, T, H, k_width, BM, D, TMA)
    q_seg = rows
    if SEG:
        q_seg = tl.load(Q_SEG + b.to(tl.int64) * T + rows, mask=rows < T, other=0)
    dq = tl.zeros([BM, D], tl.float32)
    lo, a, z, hi = _key_range(m0, T, S, left, right, LO, HI, b * n_tiles + tile, BM, BN, LEFT, RIGHT, SEG)
    if LEFT or SEG:
        dq = _collect_q(dq, q, do, lse, delta, K, V, b, g, G, lo, a, q_at, q_seg, KV_SEG, T, S,
                        k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, True, TMA,
                        PRECISION, UPCAST)  # fmt: skip
    if not SEG:
        dq = _collect_q(dq, q, do, lse, delta, K, V, b, g, G, a, z, q_at, q_seg, KV_SEG, T, S,
                        k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, False, TMA,
                        PRECISION, UPCAST)  # fmt: skip
        dq = _collect_q(dq, q, do, lse, delta, K, V, b, g, G, z, hi, q_at, q_seg, KV_SEG, T, S,
                        k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, True, TMA,
                        PRECISION, UPCAST)  # fmt: skip
    dq = dq * out_scale
    if TMA:
        dq = dq.to(DQ.dtype)
    else:
        dq = dq.to(DQ.dtype.element_ty)
    _store(DQ, dq, b, h, m0, T, H, k_width, BM, D, TMA)


@triton.jit
def _collect_kv(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, head, H, first, last, k_at, kv_seg, Q_SEG, T, S, k_width,
                v_width, left, right, scale, cap, BM: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
                LEFT: tl.constexpr, RIGHT: tl.constexpr, SEG: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
                TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """dv += p^T do, dk += ds^T q over the tiles first..last of queries; scores are formed transposed, (N, M).

    Nothing that comes out of a product is transposed: some versions of Triton get that wrong on Hopper.
    """
    for i in tl.range(first, last):
        m0 = i * BM
        rows = m0 + tl.arange(0, BM)
        at = head.to(tl.int64) * T + rows
        q = _load(Q, b, h, m0, T, H, k_width, BM, D, TMA)
        lse = tl.load(LSE + at, mask=rows < T, other=float("inf")) * 1.4426950408889634
        s = _dot(k, tl.trans(q), PRECISION, UPCAST)
        if CAP:
            t = _tanh(s * scale)
            p = tl.exp2(cap * t - lse[None, :])
        else:
            p = tl.exp2(s * scale - lse[None, :])
        if MASK:
            q_at = rows + (S - T)
            q_seg = 0
            if SEG:
                q_seg = tl.load(Q_SEG + b.to(tl.int64) * T + rows, mask=rows < T, other=0)[None, :]
            seen = _seen(q_at[None, :], k_at[:, None], left, right, q_seg, kv_seg[:, None], S, LEFT, RIGHT, SEG)
            p = tl.where(seen, p, 0.0)
        do = _load(DO, b, h, m0, T, H, v_width, BM, E, TMA)
        dv = _dot_add(p.to(do.dtype), do, dv, PRECISION, UPCAST)
        dp = _dot(v, tl.trans(do), PRECISION, UPCAST)
        delta = tl.load(DELTA + at, mask=rows < T, other=0.0)
        ds = p * (dp - delta[None, :])
        if CAP:
            ds = ds * (1.0 - t * t)
        dk = _dot_add(ds.to(q.dtype), q, dk, PRECISION, UPCAST)
    return dk, dv


@triton.jit
def _backward_kv(Q, K, V, DO, LSE, DELTA, DK, DV, Q_SEG, KV_SEG, LO, HI, B, H, R, T, S, k_width, v_width,
                 heads_at_once, left, right, scale, cap, out_scale, BM: tl.constexpr, BN: tl.constexpr,
                 D: tl.constexpr, E: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SEG: tl.constexpr,
                 CAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    n_tiles = tl.cdiv(S, BN)
    G = H // R
    tile, group = _place(tl.program_id(0), n_tiles, B * G, heads_at_once)
    b = group // G
    g = group % G
    n0 = tile * BN
    k_at = n0 + tl.arange(0, BN)
    k = _load(K, b, g, n0, S, G, k_width, BN, D, TMA)
    v = _load(V, b, g, n0, S, G, v_width, BN, E, TMA)
    kv_seg = k_at
    if SEG:
        kv_seg = tl.load(KV_SEG + b.to(tl.int64) * S + k_at, mask=k_at < S, other=0)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, E], tl.float32)
    lo, a, z, hi = _query_range(n0, T, S, left, right, LO, HI, b * n_tiles + tile, BM, BN, LEFT, RIGHT, SEG)
    for r in range(0, R):
        h = g * R + r
        head = b * H + h
        if RIGHT or SEG:
            dk, dv = _collect_kv(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, head, H, lo, a, k_at,
                                 kv_seg, Q_SEG, T, S, k_width, v_width, left, right, scale, cap, BM, D, E, LEFT,
                                 RIGHT, SEG, CAP, True, TMA, PRECISION, UPCAST)  # fmt: skip
        if not SEG:
            dk, dv = _collect_kv(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, head, H, a, z, k_at,
                                 kv_seg, Q_SEG, T, S, k_width, v_width, left, right, scale, cap, BM, D, E, LEFT,
                                 RIGHT, SEG, CAP, False, TMA, PRECISION, UPCAST)  # fmt: skip
            if LEFT:
                dk, dv = _collect_kv(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, head, H, z, hi, k_at,
                                     kv_seg, Q_SEG, T, S, k_width, v_width, left, right, scale, cap, BM, D, E, LEFT,
                                     RIGHT, SEG, CAP, True, TMA, PRECISION, UPCAST)  # fmt: skip
    dk = dk * out_scale
    if TMA:
        dk = dk.to(DK.dtype)
        dv = dv.to(DV.dtype)
    else:
        dk = dk.to(DK.dtype.element_ty)
        dv = dv.to(DV.dtype.element_ty)
    _store(DK, dk, b, g, n0, S, G, k_width, BN, D, TMA)
    _store(DV, dv, b, g, n0, S, G, v_width, BN, E, TMA)


# --- launchers


def forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    segments: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None,
    request: Request,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """(o (B, T, H, E), lse (B, H, T) fp32)."""
    B, T, H, _ = q_BTHK.shape
    S, G, E = v_BSGK.shape[1:]
    o = torch.empty(B, T, H, E, dtype=q_BTHK.dtype, device=q_BTHK.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q_BTHK.device)
    if not lse.numel():
        return o, lse
    if not S:
        at_most = torch.full_like(lse, -torch.inf) if sinks is None else sinks.float()[None, :, None].expand_as(lse)
        return o.zero_(), at_most.contiguous()
    blocks, lo, hi = _cut("forward", blocks, q_BTHK, v_BSGK, segments, request)
    optional = (sinks, *(segments or ()), lo, hi)
    tensors = [q_BTHK, k_BSGK, v_BSGK, o, lse, *(x for x in optional if x is not None)]
    key = ("forward", _layout(*tensors[:3]), sinks is None, segments is None, request, blocks, all_aligned(tensors))
    with device_of(o):
        if relaunch(key, tensors):
            return o, lse
        blocks = blocks or _chosen("forward", q_BTHK, v_BSGK, request)
        tma, (q, k, v) = _prepared(q_BTHK, k_BSGK, v_BSGK)
        D, E, limits, scales, constants = _common(q, v, request)
        args = (
            _tile(q, blocks.m, D, tma), _tile(k, blocks.n, D, tma), _tile(v, blocks.n, E, tma),
            _tile(o, blocks.m, E, tma), lse, _or(sinks, lse), *_ids(segments, lse), _or(lo, lse), _or(hi, lse),
            B, H, H // G, T, S, q.shape[-1], v.shape[-1], _heads_at_once(k, v, H // G), *limits, *scales,
        )  # fmt: skip
        constants |= {"SINK": sinks is not None, "SEG": segments is not None, "TMA": tma}
        n = triton.cdiv(T, blocks.m) * B * H
        launch(key, tensors, _forward, n, args, *_constants(constants, blocks))
    return o, lse


def backward(
    do_BTHE: Tensor,
    dlse_BHT: Tensor | None,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    o_BTHE: Tensor,
    lse_BHT: Tensor,
    segments: tuple[Tensor, Tensor] | None,
    request: Request,
    blocks_q: Blocks | None = None,
    blocks_kv: Blocks | None = None,
    *,
    only_q: bool = False,
    only_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta (B, H, T) fp32); delta is what the gradient of the sinks is made of.

    only_q and only_kv launch one of the two passes, to time it: what it does not compute is left as it is.
    """
    B, T, H, _ = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTHK, k_BSGK, v_BSGK))
    delta = torch.zeros_like(lse_BHT) if not S else torch.empty_like(lse_BHT)
    if not delta.numel() or not S:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta
    dlse = None if dlse_BHT is None else dlse_BHT.to(torch.float32).contiguous()
    inputs = [do_BTHE, q_BTHK, k_BSGK, v_BSGK, o_BTHE, lse_BHT]
    shared = (_layout(do_BTHE, q_BTHK, k_BSGK, v_BSGK, o_BTHE), segments is None, dlse is None, request)
    with device_of(delta):
        if not only_kv:
            blocks_q, lo, hi = _cut("backward_q", blocks_q, q_BTHK, v_BSGK, segments, request)
            optional = (dlse, *(segments or ()), lo, hi)
            tensors = [*inputs, dq, delta, *(x for x in optional if x is not None)]
            key = ("backward_q", shared, blocks_q, all_aligned(tensors))
            if not relaunch(key, tensors):
                blocks_q = blocks_q or _chosen("backward_q", q_BTHK, v_BSGK, request)
                m, n = blocks_q.m, blocks_q.n
                tma, (do, q, k, v, o) = _prepared(*inputs[:5])
                D, E, limits, scales, constants = _common(q, v, request)
                args = (
                    _tile(q, m, D, tma), _tile(k, n, D, tma), _tile(v, n, E, tma), _tile(o, m, E, tma),
                    _tile(do, m, E, tma), lse_BHT, _or(dlse, delta), delta, _tile(dq, m, D, tma),
                    *_ids(segments, delta), _or(lo, delta), _or(hi, delta), B, H, H // G, T, S, q.shape[-1],
                    v.shape[-1], _heads_at_once(k, v, H // G), *limits, *scales, request.scale,
                )  # fmt: skip
                constants |= {"SEG": segments is not None, "HAS_DLSE": dlse is not None, "TMA": tma}
                n_programs = triton.cdiv(T, m) * B * H
                launch(key, tensors, _backward_q, n_programs, args, *_constants(constants, blocks_q))
        if not only_q:
            blocks_kv, lo, hi = _cut("backward_kv", blocks_kv, q_BTHK, v_BSGK, segments, request)
            optional = (*(segments or ()), lo, hi)
            tensors = [*inputs[:4], lse_BHT, delta, dk, dv, *(x for x in optional if x is not None)]
            key = ("backward_kv", shared, blocks_kv, all_aligned(tensors))
            if not relaunch(key, tensors):
                blocks_kv = blocks_kv or _chosen("backward_kv", q_BTHK, v_BSGK, request)
                m, n = blocks_kv.m, blocks_kv.n
                tma, (do, q, k, v) = _prepared(*inputs[:4])
                D, E, limits, scales, constants = _common(q, v, request)
                args = (
                    _tile(q, m, D, tma), _tile(k, n, D, tma), _tile(v, n, E, tma), _tile(do, m, E, tma), lse_BHT,
                    delta, _tile(dk, n, D, tma), _tile(dv, n, E, tma), *_ids(segments, delta), _or(lo, delta),
                    _or(hi, delta), B, H, H // G, T, S, q.shape[-1], v.shape[-1],
                    max(_heads_at_once(k, v, H // G) * G // H, 1), *limits, *scales, request.scale,
                )  # fmt: skip
                constants |= {"SEG": segments is not None, "TMA": tma}
                n_programs = triton.cdiv(S, n) * B * G
                launch(key, tensors, _backward_kv, n_programs, args, *_constants(constants, blocks_kv))
    return dq, dk, dv, delta


def _common(q: Tensor, v: Tensor, request: Request) -> tuple[int, int, tuple, tuple, dict[str, Any]]:
    """(D, E, window limits, scales, constants) of every launch."""
    D, E = _padded(q, v)
    capped = request.softcap is not None
    cap = request.softcap or 1.0
    constants: dict[str, Any] = {
        "D": D,
        "E": E,
        "LEFT": request.left is not None,
        "RIGHT": request.right is not None,
        "CAP": capped,
        "PRECISION": request.precision if q.dtype == torch.float32 else "tf32",  # 16 bits do not look at it
        "UPCAST": interpreted(),
    }
    scales = (request.scale / cap if capped else request.scale * LOG2E, cap * LOG2E)
    return D, E, (request.left or 0, request.right or 0), scales, constants


def _cut(
    which: str, blocks: Blocks | None, q: Tensor, v: Tensor, segments: tuple[Tensor, Tensor] | None, request: Request
) -> tuple[Blocks | None, Tensor | None, Tensor | None]:
    """(blocks, lo, hi): with segments the tiles of the other side that a tile meets, which needs blocks now."""
    if segments is None:
        return blocks, None, None
    blocks = blocks or _chosen(which, q, v, request)
    return blocks, *_tile_ranges(segments, blocks.m, blocks.n, of_keys=which == "backward_kv")


def _chosen(which: str, q: Tensor, v: Tensor, request: Request) -> Blocks:
    return choose(which, *_padded(q, v), q.dtype, request.right is not None, q.device)


def _heads_at_once(k: Tensor, v: Tensor, n_shared: int) -> int:
    """Query heads whose keys and values fit the cache together, in whole groups that share them."""
    one = k[0, :, 0].numel() * k.element_size() + v[0, :, 0].numel() * v.element_size()
    return max(1, L2_BYTES // max(one, 1)) * n_shared


def _padded(q: Tensor, v: Tensor) -> tuple[int, int]:
    """Head dims as the kernels see them."""
    return max(16, triton.next_power_of_2(q.shape[-1])), max(16, triton.next_power_of_2(v.shape[-1]))


def _layout(*tensors: Tensor) -> tuple[Any, ...]:
    """All but the addresses."""
    first = tensors[0]
    return (*((x.shape, x.stride()) for x in tensors), first.dtype, device_number(first))


def _prepared(*tensors: Tensor) -> tuple[bool, tuple[Tensor, ...]]:
    """(whether all can be read through descriptors, the tensors; if not, all dense, to be read by pointers)."""
    tma = all(map(_describable, tensors))
    return tma, tensors if tma else tuple(x.contiguous() for x in tensors)


def _describable(x: Tensor) -> bool:
    """Strides of whole 16 bytes, none of them 0, from an address of such; the last axis dense and of whole 16 bytes."""
    size = x.element_size()
    steps = [stride * size for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    dense = x.stride(-1) == 1 and x.shape[-1] * size % 16 == 0
    return dense and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _tile(x: Tensor, rows: int, width: int, tma: bool) -> Any:
    """A descriptor of tiles (1, 1, rows, width) of x as (B, heads, time, width), or x."""
    if not tma:
        return x
    y = x.transpose(1, 2)
    # The stride of an axis of size 1 may be anything: put what the hardware accepts.
    strides = [s if n > 1 else 16 * x.shape[-1] for n, s in zip(y.shape[:-1], y.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(y.shape), [*strides, 1], [1, 1, rows, width])


def _or(x: Tensor | None, unused: Tensor) -> Tensor:
    return unused if x is None else x


def _ids(segments: tuple[Tensor, Tensor] | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    return (unused, unused) if segments is None else segments


def _constants(constants: dict[str, Any], blocks: Blocks) -> tuple[dict[str, Any], dict[str, int]]:
    options = {"num_warps": blocks.n_warps, "num_stages": blocks.n_stages}
    return {"BM": blocks.m, "BN": blocks.n, **constants}, options


def _tile_ranges(
    segments: tuple[Tensor, Tensor] | None, BM: int, BN: int, *, of_keys: bool
) -> tuple[Tensor | None, Tensor | None]:
    """For each tile of queries (of_keys: of keys) the first and one past the last tile of the other side whose ids can
    meet its own: between their smallest and largest. int32 (B, tiles); tiles that meet none get (0, 0)."""
    if segments is None:
        return None, None
    low_q, high_q = _extremes(segments[0], BM)
    low_k, high_k = _extremes(segments[1], BN)
    meet = (low_q.unsqueeze(2) <= high_k.unsqueeze(1)) & (low_k.unsqueeze(1) <= high_q.unsqueeze(2))
    if of_keys:
        meet = meet.transpose(1, 2)
    number = torch.arange(meet.shape[-1], device=meet.device, dtype=torch.int32)
    hi = torch.where(meet, number + 1, 0).amax(-1)
    lo = torch.where(meet, number, meet.shape[-1]).amin(-1)
    return torch.minimum(lo, hi).contiguous(), hi.contiguous()


def _extremes(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    n = ids.shape[1]
    padded = torch.cat([ids, ids[:, -1:].expand(-1, -n % size)], 1).unflatten(1, (-1, size))
    return padded.amin(-1), padded.amax(-1)
