"""The Triton kernels of flash attention. The maths and the public function are in flash_attention.py, the launchers in
flash_attention_launch.py.

Three kernels: forward (o, lse); backward for dq, which also writes delta = rowsum(o do) - dlse; backward for dk and dv,
which reads delta. Two backward passes cost 7 matrix products instead of 5, and need no atomics: every element is the
sum of the same terms in the same order in each run. A bias that has a gradient takes a third pass, in which a program
owns a tile of that gradient and loops over all that is summed into it. With a bias or a mask every tile takes the
masked path; so does the forward pass on request, since the paths round differently: without masks the compiler joins
the scale and the maximum into one multiply-add.

Names: M a tile of queries, N a tile of keys, D head dim of q and k, E of v, both padded to powers of two. Tiles are
read and written through tensor descriptors (TMA), which read zeros beyond the edges and write nothing there; or, where
strides are no multiples of 16 bytes, through pointers and masks. Scores are in units of log 2, because the hardware has
exp2.
"""

import triton
import triton.language as tl

__all__ = ["backward_bias", "backward_kv", "backward_q", "forward"]

# --- tiles


@triton.jit
def _load(X, b, h, row, n_rows, n_heads, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """ROWS rows of x[b, :, h, :] from `row` on, zeros beyond its edges; without TMA x must be dense."""
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
    """(tile, head) of a program. Programs take all tiles of heads_at_once heads, whose keys fit the cache, and then
    those of the next heads."""
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
def _bias(BIAS, rows, cols, step_t, step_s, T, S):
    """Bias in units of log 2 at rows and cols, which broadcast together; BIAS points at a head's first element."""
    at = rows.to(tl.int64) * step_t + cols.to(tl.int64) * step_s
    return tl.load(BIAS + at, mask=(rows < T) & (cols < S), other=0.0).to(tl.float32) * 1.4426950408889634


@triton.jit
def _never(lse):
    """lse, with inf in place of -inf: where biases of -inf hide all keys of a query, exp(s - lse) must be 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _visible(VIS, rows, cols, step_t, step_s, T, S):
    """The mask at rows and cols, which broadcast together; VIS points at a head's first element."""
    at = rows.to(tl.int64) * step_t + cols.to(tl.int64) * step_s
    return tl.load(VIS + at, mask=(rows < T) & (cols < S), other=0) != 0


@triton.jit
def _key_range(m0, T, S, left, right, LO, HI, at, BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr,
               RIGHT: tl.constexpr, SEG: tl.constexpr):  # fmt: skip
    """The tiles of keys that a tile of queries sees: lo..hi-1. Those in [lo, a) and [b, hi) need masks; those in [a, b)
    are seen in full by all queries of the tile."""
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
    """The tiles of queries that see a tile of keys, in the form of `_key_range`."""
    shift = S - T
    lo = 0
    hi = tl.cdiv(T, BM)
    a = 0
    b = hi  # queries beyond T have lse = inf and so p = 0: they need no mask
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
def _attend(acc, l, m, q, K, V, b, g, G, first, last, q_at, q_seg, KV_SEG, T, S, n_keys, k_width, v_width, left, right,
            scale, cap, BN: tl.constexpr, D: tl.constexpr, E: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
            SEG: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
            UPCAST: tl.constexpr, BIAS, bias_t, bias_s, VIS, vis_t, vis_s, HAS_BIAS: tl.constexpr,
            HAS_VIS: tl.constexpr):  # fmt: skip
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
            seen = _seen(q_at[:, None], k_at[None, :], left, right, q_seg[:, None], kv_seg, n_keys, LEFT, RIGHT, SEG)
            if HAS_VIS:
                seen = seen & _visible(VIS, q_at[:, None] - (S - T), k_at[None, :], vis_t, vis_s, T, S)
            if not CAP:
                s = s * scale
            if HAS_BIAS:
                s = s + _bias(BIAS, q_at[:, None] - (S - T), k_at[None, :], bias_t, bias_s, T, S)
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
def forward(Q, K, V, O, LSE, SINKS, Q_SEG, KV_SEG, LO, HI, BIAS, bias_b, bias_h, bias_t, bias_s, VIS, vis_b, vis_h,
             vis_t, vis_s, LAST, B, H, R, T, S, k_width, v_width, heads_at_once, left, right, scale, cap,
             BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
             LEFT: tl.constexpr, RIGHT: tl.constexpr, SEG: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
             HAS_BIAS: tl.constexpr, HAS_VIS: tl.constexpr, ONE_PATH: tl.constexpr, HAS_LAST: tl.constexpr,
             TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One tile of queries of one head: o and lse. ONE_PATH: all tiles of keys are computed as those with masks are.
    HAS_LAST: the last key of row b is that at LAST[b]; what lies after it is not there. NaN where it is not below S."""
    n_tiles = tl.cdiv(T, BM)
    tile, head = _place(tl.program_id(0), n_tiles, B * H, heads_at_once)
    if RIGHT:
        tile = n_tiles - 1 - tile  # tiles with the most keys first, so that short ones fill the end of the grid
    b = head // H
    h = head % H
    G = H // R
    g = h // R
    m0 = tile * BM
    rows = m0 + tl.arange(0, BM)
    n_keys = S
    if HAS_LAST:
        n_keys = tl.load(LAST + b).to(tl.int32) + 1
    q_at = rows + (n_keys - T)
    q = _load(Q, b, h, m0, T, H, k_width, BM, D, TMA)
    q_seg = rows
    if SEG:
        q_seg = tl.load(Q_SEG + b.to(tl.int64) * T + rows, mask=rows < T, other=0)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, E], tl.float32)
    if HAS_BIAS:
        BIAS += b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
    if HAS_VIS:
        VIS += b.to(tl.int64) * vis_b + h.to(tl.int64) * vis_h
    lo, a, z, hi = _key_range(m0, T, n_keys, left, right, LO, HI, b * n_tiles + tile, BM, BN, LEFT, RIGHT, SEG)
    if HAS_BIAS or HAS_VIS or ONE_PATH:
        a = hi
    if LEFT or SEG or HAS_BIAS or HAS_VIS or ONE_PATH:
        acc, l, m = _attend(acc, l, m, q, K, V, b, g, G, lo, a, q_at, q_seg, KV_SEG, T, S, n_keys,
                            k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, True, TMA,
                            PRECISION, UPCAST, BIAS, bias_t, bias_s, VIS, vis_t, vis_s, HAS_BIAS,
                            HAS_VIS)  # fmt: skip
    if not (SEG or HAS_BIAS or HAS_VIS or ONE_PATH):
        acc, l, m = _attend(acc, l, m, q, K, V, b, g, G, a, z, q_at, q_seg, KV_SEG, T, S, n_keys,
                            k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, False, TMA,
                            PRECISION, UPCAST, BIAS, bias_t, bias_s, VIS, vis_t, vis_s, HAS_BIAS,
                            HAS_VIS)  # fmt: skip
        acc, l, m = _attend(acc, l, m, q, K, V, b, g, G, z, hi, q_at, q_seg, KV_SEG, T, S, n_keys,
                            k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, True, TMA,
                            PRECISION, UPCAST, BIAS, bias_t, bias_s, VIS, vis_t, vis_s, HAS_BIAS,
                            HAS_VIS)  # fmt: skip
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
    if HAS_LAST:
        acc = tl.where(n_keys > S, float("nan"), acc)
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
               PRECISION: tl.constexpr, UPCAST: tl.constexpr, BIAS, bias_t, bias_s, VIS, vis_t, vis_s,
               HAS_BIAS: tl.constexpr, HAS_VIS: tl.constexpr):  # fmt: skip
    """dq += ds k over the tiles first..last of keys, ds = p (do v^T - delta)."""
    for j in tl.range(first, last):
        n0 = j * BN
        k = _load(K, b, g, n0, S, G, k_width, BN, D, TMA)
        s = _dot(q, tl.trans(k), PRECISION, UPCAST)
        if CAP:
            t = _tanh(s * scale)
            s = cap * t
        if HAS_BIAS:
            at_k = n0 + tl.arange(0, BN)
            bias = _bias(BIAS, q_at[:, None] - (S - T), at_k[None, :], bias_t, bias_s, T, S)
            if not CAP:
                s = s * scale
            p = tl.exp2(s + bias - lse[:, None])
        elif CAP:
            p = tl.exp2(s - lse[:, None])
        else:
            p = tl.exp2(s * scale - lse[:, None])
        if MASK:
            k_at = n0 + tl.arange(0, BN)
            kv_seg = 0
            if SEG:
                kv_seg = tl.load(KV_SEG + b.to(tl.int64) * S + k_at, mask=k_at < S, other=0)[None, :]
            seen = _seen(q_at[:, None], k_at[None, :], left, right, q_seg[:, None], kv_seg, S, LEFT, RIGHT, SEG)
            if HAS_VIS:
                seen = seen & _visible(VIS, q_at[:, None] - (S - T), k_at[None, :], vis_t, vis_s, T, S)
            p = tl.where(seen, p, 0.0)
        v = _load(V, b, g, n0, S, G, v_width, BN, E, TMA)
        dp = _dot(do, tl.trans(v), PRECISION, UPCAST)
        ds = p * (dp - delta[:, None])
        if CAP:
            ds = ds * (1.0 - t * t)
        dq = _dot_add(ds.to(k.dtype), k, dq, PRECISION, UPCAST)
    return dq


@triton.jit
def backward_q(Q, K, V, O, DO, LSE, DLSE, DELTA, DQ, Q_SEG, KV_SEG, LO, HI, BIAS, bias_b, bias_h, bias_t, bias_s, VIS,
                vis_b, vis_h, vis_t, vis_s, B, H, R, T, S, k_width, v_width, heads_at_once, left, right, scale, cap,
                out_scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
                E: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SEG: tl.constexpr, CAP: tl.constexpr,
                HAS_DLSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_VIS: tl.constexpr, TMA: tl.constexpr,
                PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One tile of queries of one head: dq and delta."""
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
    if HAS_BIAS:
        lse = _never(lse)
    q = _load(Q, b, h, m0, T, H, k_width, BM, D, TMA)
    q_seg = rows
    if SEG:
        q_seg = tl.load(Q_SEG + b.to(tl.int64) * T + rows, mask=rows < T, other=0)
    dq = tl.zeros([BM, D], tl.float32)
    if HAS_BIAS:
        BIAS += b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
    if HAS_VIS:
        VIS += b.to(tl.int64) * vis_b + h.to(tl.int64) * vis_h
    lo, a, z, hi = _key_range(m0, T, S, left, right, LO, HI, b * n_tiles + tile, BM, BN, LEFT, RIGHT, SEG)
    if HAS_BIAS or HAS_VIS:
        a = hi
    if LEFT or SEG or HAS_BIAS or HAS_VIS:
        dq = _collect_q(dq, q, do, lse, delta, K, V, b, g, G, lo, a, q_at, q_seg, KV_SEG, T, S,
                        k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, True, TMA,
                        PRECISION, UPCAST, BIAS, bias_t, bias_s, VIS, vis_t, vis_s, HAS_BIAS, HAS_VIS)  # fmt: skip
    if not (SEG or HAS_BIAS or HAS_VIS):
        dq = _collect_q(dq, q, do, lse, delta, K, V, b, g, G, a, z, q_at, q_seg, KV_SEG, T, S,
                        k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, False, TMA,
                        PRECISION, UPCAST, BIAS, bias_t, bias_s, VIS, vis_t, vis_s, HAS_BIAS, HAS_VIS)  # fmt: skip
        dq = _collect_q(dq, q, do, lse, delta, K, V, b, g, G, z, hi, q_at, q_seg, KV_SEG, T, S,
                        k_width, v_width, left, right, scale, cap, BN, D, E, LEFT, RIGHT, SEG, CAP, True, TMA,
                        PRECISION, UPCAST, BIAS, bias_t, bias_s, VIS, vis_t, vis_s, HAS_BIAS, HAS_VIS)  # fmt: skip
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
                TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BIAS, bias_b, bias_h, bias_t, bias_s,
                VIS, vis_b, vis_h, vis_t, vis_s, HAS_BIAS: tl.constexpr, HAS_VIS: tl.constexpr):  # fmt: skip
    """dv += p^T do, dk += ds^T q over the tiles first..last of queries; scores are formed transposed, (N, M).

    Nothing that comes out of a product is transposed: some versions of Triton get that wrong on Hopper.
    """
    for i in tl.range(first, last):
        m0 = i * BM
        rows = m0 + tl.arange(0, BM)
        at = head.to(tl.int64) * T + rows
        q = _load(Q, b, h, m0, T, H, k_width, BM, D, TMA)
        lse = tl.load(LSE + at, mask=rows < T, other=float("inf")) * 1.4426950408889634
        if HAS_BIAS:
            lse = _never(lse)
        s = _dot(k, tl.trans(q), PRECISION, UPCAST)
        if CAP:
            t = _tanh(s * scale)
            s = cap * t
        if HAS_BIAS:
            at_head = b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
            bias = _bias(BIAS + at_head, rows[None, :], k_at[:, None], bias_t, bias_s, T, S)
            if not CAP:
                s = s * scale
            p = tl.exp2(s + bias - lse[None, :])
        elif CAP:
            p = tl.exp2(s - lse[None, :])
        else:
            p = tl.exp2(s * scale - lse[None, :])
        if MASK:
            q_at = rows + (S - T)
            q_seg = 0
            if SEG:
                q_seg = tl.load(Q_SEG + b.to(tl.int64) * T + rows, mask=rows < T, other=0)[None, :]
            seen = _seen(q_at[None, :], k_at[:, None], left, right, q_seg, kv_seg[:, None], S, LEFT, RIGHT, SEG)
            if HAS_VIS:
                at_vis = b.to(tl.int64) * vis_b + h.to(tl.int64) * vis_h
                seen = seen & _visible(VIS + at_vis, rows[None, :], k_at[:, None], vis_t, vis_s, T, S)
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
def backward_kv(Q, K, V, DO, LSE, DELTA, DK, DV, Q_SEG, KV_SEG, LO, HI, BIAS, bias_b, bias_h, bias_t, bias_s, VIS,
                 vis_b, vis_h, vis_t, vis_s, B, H, R, T, S, k_width, v_width, heads_at_once, left, right, scale, cap,
                 out_scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, E: tl.constexpr, LEFT: tl.constexpr,
                 RIGHT: tl.constexpr, SEG: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_VIS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One tile of keys of one key/value head: dk and dv, summed over the query heads that share it."""
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
    if HAS_BIAS or HAS_VIS:
        a = hi
    for r in range(0, R):
        h = g * R + r
        head = b * H + h
        if RIGHT or SEG or HAS_BIAS or HAS_VIS:
            dk, dv = _collect_kv(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, head, H, lo, a, k_at,
                                 kv_seg, Q_SEG, T, S, k_width, v_width, left, right, scale, cap, BM, D, E, LEFT,
                                 RIGHT, SEG, CAP, True, TMA, PRECISION, UPCAST, BIAS, bias_b, bias_h, bias_t, bias_s,
                                 VIS, vis_b, vis_h, vis_t, vis_s, HAS_BIAS, HAS_VIS)  # fmt: skip
        if not (SEG or HAS_BIAS or HAS_VIS):
            dk, dv = _collect_kv(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, head, H, a, z, k_at,
                                 kv_seg, Q_SEG, T, S, k_width, v_width, left, right, scale, cap, BM, D, E, LEFT,
                                 RIGHT, SEG, CAP, False, TMA, PRECISION, UPCAST, BIAS, bias_b, bias_h, bias_t, bias_s,
                                 VIS, vis_b, vis_h, vis_t, vis_s, HAS_BIAS, HAS_VIS)  # fmt: skip
            if LEFT:
                dk, dv = _collect_kv(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, head, H, z, hi, k_at,
                                     kv_seg, Q_SEG, T, S, k_width, v_width, left, right, scale, cap, BM, D, E, LEFT,
                                     RIGHT, SEG, CAP, True, TMA, PRECISION, UPCAST, BIAS, bias_b, bias_h, bias_t,
                                     bias_s, VIS, vis_b, vis_h, vis_t, vis_s, HAS_BIAS, HAS_VIS)  # fmt: skip
    dk = dk * out_scale
    if TMA:
        dk = dk.to(DK.dtype)
        dv = dv.to(DV.dtype)
    else:
        dk = dk.to(DK.dtype.element_ty)
        dv = dv.to(DV.dtype.element_ty)
    _store(DK, dk, b, g, n0, S, G, k_width, BN, D, TMA)
    _store(DV, dv, b, g, n0, S, G, v_width, BN, E, TMA)


@triton.jit
def backward_bias(Q, K, V, DO, LSE, DELTA, DBIAS, Q_SEG, KV_SEG, BIAS, bias_b, bias_h, bias_t, bias_s, VIS, vis_b,
                   vis_h, vis_t, vis_s, B, H, R, T, S, k_width, v_width, own_heads, own_t, own_s, shared_b, shared_h,
                   shared_i, shared_j, left, right, scale, cap, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
                   E: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SEG: tl.constexpr, CAP: tl.constexpr,
                   ONE_T: tl.constexpr, ONE_S: tl.constexpr, HAS_VIS: tl.constexpr, TMA: tl.constexpr,
                   PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """dbias = p (do v^T - delta), summed over the axes that the bias is broadcast along: a program owns a tile of it.

    own_heads, own_t, own_s: the bias's own sizes, 1 where it is broadcast. shared_b, .._h, .._i, .._j: how many batch
    entries, heads, tiles of queries and tiles of keys one program sums.
    """
    n_j = tl.cdiv(own_s, BN)
    n_i = tl.cdiv(own_t, BM)
    pid = tl.program_id(0)
    own_j = pid % n_j
    own_i = (pid // n_j) % n_i
    own_h = (pid // (n_j * n_i)) % own_heads
    own_b = pid // (n_j * n_i * own_heads)
    G = H // R
    acc = tl.zeros([BM, BN], tl.float32)
    for at_b in range(0, shared_b):
        b = own_b + at_b
        for at_h in range(0, shared_h):
            h = own_h + at_h
            g = h // R
            head = (b * H + h).to(tl.int64)
            at_bias = b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
            for at_j in range(0, shared_j):
                n0 = (own_j + at_j) * BN
                k_at = n0 + tl.arange(0, BN)
                k = _load(K, b, g, n0, S, G, k_width, BN, D, TMA)
                v = _load(V, b, g, n0, S, G, v_width, BN, E, TMA)
                kv_seg = 0
                if SEG:
                    kv_seg = tl.load(KV_SEG + b.to(tl.int64) * S + k_at, mask=k_at < S, other=0)[None, :]
                lo, _, _, hi = _query_range(n0, T, S, left, right, LSE, LSE, 0, BM, BN, LEFT, RIGHT, False)
                for i in range(tl.maximum(lo, own_i), tl.minimum(hi, own_i + shared_i)):
                    m0 = i * BM
                    rows = m0 + tl.arange(0, BM)
                    q = _load(Q, b, h, m0, T, H, k_width, BM, D, TMA)
                    do = _load(DO, b, h, m0, T, H, v_width, BM, E, TMA)
                    lse = tl.load(LSE + head * T + rows, mask=rows < T, other=float("inf")) * 1.4426950408889634
                    lse = _never(lse)
                    delta = tl.load(DELTA + head * T + rows, mask=rows < T, other=0.0)
                    s = _dot(q, tl.trans(k), PRECISION, UPCAST)
                    if CAP:
                        s = cap * _tanh(s * scale)
                    else:
                        s = s * scale
                    bias = _bias(BIAS + at_bias, rows[:, None], k_at[None, :], bias_t, bias_s, T, S)
                    p = tl.exp2(s + bias - lse[:, None])
                    q_seg = rows
                    if SEG:
                        q_seg = tl.load(Q_SEG + b.to(tl.int64) * T + rows, mask=rows < T, other=0)
                    q_at = rows + (S - T)
                    seen = _seen(q_at[:, None], k_at[None, :], left, right, q_seg[:, None], kv_seg, S, LEFT, RIGHT, SEG)
                    if HAS_VIS:
                        at_vis = b.to(tl.int64) * vis_b + h.to(tl.int64) * vis_h
                        seen = seen & _visible(VIS + at_vis, rows[:, None], k_at[None, :], vis_t, vis_s, T, S)
                    p = tl.where(seen, p, 0.0)
                    acc += p * (_dot(do, tl.trans(v), PRECISION, UPCAST) - delta[:, None])
    rows = own_i * BM + tl.arange(0, BM)
    cols = own_j * BN + tl.arange(0, BN)
    if ONE_T:  # into row 0
        acc = tl.where(tl.arange(0, BM)[:, None] == 0, tl.sum(acc, 0)[None, :], 0.0)
    if ONE_S:
        acc = tl.where(tl.arange(0, BN)[None, :] == 0, tl.sum(acc, 1)[:, None], 0.0)
    at = ((own_b * own_heads + own_h).to(tl.int64) * own_t + rows)[:, None] * own_s + cols[None, :]
    tl.store(DBIAS + at, acc.to(DBIAS.dtype.element_ty), mask=(rows < own_t)[:, None] & (cols < own_s)[None, :])
