"""Triton kernels of decode_attention_.

Legend: B rows, S slots, H query heads, G key/value heads, R = H / G heads that share one, K head dim, J = K / 2,
N slots of a tile, C chunks of slots.

A program has one chunk of CHUNK slots of one row and one key/value head, for all R query heads. Chunks begin at
multiples of CHUNK, whatever B and S, and are combined in order: a row's result is the same bits in every batch and in
every cache.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.launch import all_aligned, device_number, device_of, launch, relaunch

__all__ = ["forward_"]

CHUNK = 512
LOG2E = tl.constexpr(math.log2(math.e))


def config(K: int) -> tuple[int, int, int]:
    """(slots of a tile, warps, tiles in flight) for heads of K features; measured on an H200 in bf16.

    256 rows of 64 to 320 slots and 12 heads of 64 features: 45 us, 36 for the bytes at the speed of a copy. Programs
    of one warp are many, and what counts is how many loads are in flight.
    """
    return 32, 1, 3 if K <= 64 else 2


@triton.jit
def _turned(x_ptr, e, mask, cos_ptr, sin_ptr, J: tl.constexpr, ROPE: tl.constexpr):
    """Heads at x_ptr, rotated: ROPE 0 not at all, 1 pairs 2j with 2j + 1, 2 pairs j with j + J. In fp32, rounded to
    the dtype of x."""
    x = tl.load(x_ptr + e, mask=mask, other=0.0).to(tl.float32)
    if ROPE > 0:
        if ROPE == 1:
            first, other, j = e % 2 == 0, e ^ 1, e // 2
        else:
            first = e < J
            other, j = tl.where(first, e + J, e - J), tl.where(first, e, e - J)
        y = tl.load(x_ptr + other, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + j, mask=e < 2 * J, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + j, mask=e < 2 * J, other=0.0).to(tl.float32)
        x = x * cos + tl.where(first, -y, y) * sin
    return x.to(x_ptr.dtype.element_ty)


@triton.jit
def _capped(s, softcap, SOFTCAP: tl.constexpr):
    """softcap tanh(s / softcap), then in powers of two."""
    if SOFTCAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    return s * LOG2E


@triton.jit
def _decode(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, length_ptr, cos_ptr, sin_ptr, o_ptr, part_ptr, lse_ptr,
    S, G, C, window, scale, softcap,
    q_b, q_h, k_b, k_g, v_b, v_g, keys_b, keys_s, keys_g, values_b, values_s, values_g, cos_b, sin_b,
    R: tl.constexpr, K: tl.constexpr, J: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, ROPE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    g, c, b = pid % G, (pid // G) % C, (pid // G // C).to(tl.int64)
    n = tl.load(length_ptr + b)  # tokens before the new one
    begin, end = c * CHUNK, min((c + 1) * CHUNK, n)
    end = min(end, S)  # a full row that goes on has no slots beyond its last
    if WINDOW:
        begin = max(begin, (n - window) // N * N)
    own = (n >= c * CHUNK) & (n < (c + 1) * CHUNK)  # whether the new token lies in this chunk
    full = n >= S
    e = tl.arange(0, BLOCK_K)
    live = e < K
    cos_at, sin_at = cos_ptr + b * cos_b, sin_ptr + b * sin_b
    keys_at, values_at = keys_ptr + b * keys_b + g * keys_g, values_ptr + b * values_b + g * values_g
    k_new = _turned(k_ptr + b * k_b + g * k_g, e, live, cos_at, sin_at, J, ROPE).to(keys_ptr.dtype.element_ty)
    v_new = tl.load(v_ptr + b * v_b + g * v_g + e, mask=live, other=0.0).to(values_ptr.dtype.element_ty)
    if own & (n < S):
        tl.store(keys_at + n * keys_s + e, k_new, mask=live)
        tl.store(values_at + n * values_s + e, v_new, mask=live)

    at = tl.arange(0, N)
    r = tl.arange(0, BLOCK_R)
    heads = (r < R)[:, None] & live[None, :]
    q_at = q_ptr + b * q_b + ((g * R + r) * q_h)[:, None]
    q = _turned(q_at, e[None, :], heads, cos_at, sin_at, J, ROPE)
    new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
    new = tl.where(own, _capped(new, softcap, SOFTCAP), float("-inf"))
    m_R = new
    l_R = tl.where(own, 1.0, 0.0) + tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.where(own, 1.0, 0.0) * v_new.to(tl.float32)[None, :] + tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if WIDE:
        q = q.to(tl.float32)
    else:
        q = q.to(keys_ptr.dtype.element_ty)
    for start in tl.range(begin, end, N, num_stages=STAGES):
        s = (start + at).to(tl.int64)
        seen = s < end
        if WINDOW:
            seen = seen & (s >= n - window)
        mask = seen[:, None] & live[None, :]
        k = tl.load(keys_at + (s * keys_s)[:, None] + e[None, :], mask=mask, other=0.0)
        v = tl.load(values_at + (s * values_s)[:, None] + e[None, :], mask=mask, other=0.0)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        x = tl.where(seen[None, :], _capped(x, softcap, SOFTCAP), float("-inf"))
        m_new = tl.maximum(m_R, tl.max(x, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, p = tl.exp2(m_R - safe), tl.exp2(x - safe[:, None])
        l_R = l_R * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_R = m_new
    o = acc / tl.where(l_R > 0.0, l_R, 1.0)[:, None]
    lse = tl.where(l_R > 0.0, m_R + tl.log2(tl.where(l_R > 0.0, l_R, 1.0)), float("-inf"))
    if C == 1:
        o = tl.where(full, float("nan"), o)
        row = (b * G + g) * R + r
        tl.store(o_ptr + (row * K)[:, None] + e[None, :], o.to(o_ptr.dtype.element_ty), mask=heads)
    else:
        row = ((b * C + c) * G + g) * R + r
        tl.store(part_ptr + (row * K)[:, None] + e[None, :], o, mask=heads)
        tl.store(lse_ptr + row, tl.where(full, float("nan"), lse), mask=r < R)


@triton.jit
def _combine(part_ptr, lse_ptr, o_ptr, H, C, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """o_bh = sum_c part_bch 2^lse_bch / sum_c 2^lse_bch, chunks in order."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    e = tl.arange(0, BLOCK_K)
    m = tl.load(lse_ptr + b * C * H + h)
    for c in range(1, C):
        m = tl.maximum(m, tl.load(lse_ptr + (b * C + c) * H + h), propagate_nan=tl.PropagateNan.ALL)
    total = 0.0
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for c in range(0, C):
        row = (b * C + c) * H + h
        w = tl.exp2(tl.load(lse_ptr + row) - m)
        total += w
        # A chunk that no token lies in has weight 0, and its part is not read into the sum: it may hold anything.
        acc += tl.where(w == 0.0, 0.0, w * tl.load(part_ptr + row * K + e, mask=e < K, other=0.0))
    tl.store(o_ptr + (b * H + h) * K + e, (acc / total).to(o_ptr.dtype.element_ty), mask=e < K)


def forward_(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, window: int | None, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """o (B, H, K); keys and values get the new token."""
    B, H, K = q.shape
    S, G = keys.shape[1], keys.shape[2]
    o = q.new_empty(q.shape)
    if o.numel() == 0:
        return o
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError("decode_attention_: the last axis of the cache must be dense")
    length = length.contiguous()  # rows of one length come expanded
    R, C = H // G, triton.cdiv(S, CHUNK)
    part = o if C == 1 else torch.empty(B, C, H, K, dtype=torch.float32, device=q.device)
    lse = o if C == 1 else torch.empty(B, C, H, dtype=torch.float32, device=q.device)
    cos_, sin_ = (q, q) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
    rope = 0 if cos is None else 1 if interleaved else 2
    tables = (0, 0) if cos is None else (0 if cos_.shape[0] == 1 else K // 2,) * 2
    tensors = [q, k, v, keys, values, length, *([] if cos is None else [cos_, sin_]), o]
    tensors += [] if C == 1 else [part, lse]
    layout = tuple([(x.dtype, x.shape, x.stride()) for x in (q, k, v, keys, values, cos_)])
    key = device_number(q), layout, interleaved, rope, window, scale, softcap, all_aligned(tensors)
    with device_of(q):
        if not relaunch(_decode, key, tensors):
            args = (
                q, k, v, keys, values, length, cos_, sin_, o, part, lse,
                S, G, C, 0 if window is None else window, scale, 1.0 if softcap is None else softcap,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *tables,
            )  # fmt: skip
            n, warps, stages = config(K)
            wide = torch.float32 in (q.dtype, keys.dtype) or q.dtype != keys.dtype
            constants = {
                "R": R, "K": K, "J": K // 2, "BLOCK_R": max(16, triton.next_power_of_2(R)),
                "BLOCK_K": max(16, triton.next_power_of_2(K)), "N": n, "CHUNK": CHUNK,
                "ROPE": rope, "WINDOW": window is not None, "SOFTCAP": softcap is not None, "WIDE": wide,
                "STAGES": stages,
            }  # fmt: skip
            launch(_decode, key, tensors, B * C * G, args, constants, {"num_warps": warps})
        if C > 1:
            again = (part, lse, o)
            of_parts = device_number(q), o.dtype, tuple(part.shape), all_aligned(again)
            if not relaunch(_combine, of_parts, again):
                constants = {"K": K, "BLOCK_K": max(16, triton.next_power_of_2(K))}
                launch(_combine, of_parts, again, B * H, (part, lse, o, H, C), constants, {"num_warps": 1})
    return o
