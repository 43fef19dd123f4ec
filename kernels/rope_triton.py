"""The Triton kernel of rope. Legend: B batch, T positions, H heads of q, G heads of k, K head dim, J = K / 2 pairs.

A program rotates all heads at TOKENS positions, first of q and then of k, so it reads its rows of the tables once.
"""

import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.launch import all_aligned, device_number, device_of, launch, relaunch

__all__ = ["turn"]


def config(H: int, G: int, K: int) -> tuple[int, int, int, int]:
    """(positions of a program, heads of q in a tile, heads of k, warps): 1024 elements, or one larger position."""
    width = triton.next_power_of_2(K)
    heads_q, heads_k = (max(1, min(triton.next_power_of_2(n), 4096 // width)) for n in (H, G))
    tokens = max(1, min(16, 1024 // (heads_q * width)))
    return tokens, heads_q, heads_k, min(8, max(1, tokens * heads_q * width // 512))


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, start_x, start_y, x_h, cos, sin, live,
    H: tl.constexpr, J: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_J: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of TOKENS positions, which begin at start_x in x and at start_y in the result."""
    for first in range(0, H, HEADS):
        h = (first + tl.arange(0, HEADS)).to(tl.int64)
        at_x = x_ptr + start_x[:, None, None] + (h * x_h)[None, :, None]
        at_y = y_ptr + start_y[:, None, None] + (h * (2 * J))[None, :, None]
        heads = live[:, None, None] & (h < H)[None, :, None]
        if INTERLEAVED:
            # Whole heads are read and written in order; the pairs are split in registers.
            k = tl.arange(0, 2 * BLOCK_J)[None, None, :]
            mask = heads & (k < 2 * J)
            x = tl.load(at_x + k, mask=mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (TOKENS, HEADS, BLOCK_J, 2)))
            y = tl.join(a * cos - b * sin, a * sin + b * cos)
            y = tl.reshape(y, (TOKENS, HEADS, 2 * BLOCK_J))
            tl.store(at_y + k, y.to(y_ptr.dtype.element_ty), mask=mask)
        else:
            j = tl.arange(0, BLOCK_J)[None, None, :]
            mask = heads & (j < J)
            a = tl.load(at_x + j, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(at_x + J + j, mask=mask, other=0.0).to(tl.float32)
            tl.store(at_y + j, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(at_y + J + j, (a * sin + b * cos).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    n_tokens, T, q_b, q_t, q_h, k_b, k_t, k_h, cos_b, cos_t, sin_b, sin_t,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = token < n_tokens
    b, t = token // T, token % T
    j = tl.arange(0, BLOCK_J)
    mask = live[:, None] & (j < J)[None, :]
    cos = tl.load(cos_ptr + (b * cos_b + t * cos_t)[:, None] + j[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + (b * sin_b + t * sin_t)[:, None] + j[None, :], mask=mask, other=0.0)
    cos, sin = cos.to(tl.float32)[:, None, :], sin.to(tl.float32)[:, None, :]
    if INVERSE:
        sin = -sin
    _turn_heads(
        q_ptr, q_out_ptr, b * q_b + t * q_t, token * (H * 2 * J), q_h, cos, sin, live,
        H, J, TOKENS, HEADS_Q, BLOCK_J, INTERLEAVED,
    )  # fmt: skip
    if G > 0:
        _turn_heads(
            k_ptr, k_out_ptr, b * k_b + t * k_t, token * (G * 2 * J), k_h, cos, sin, live,
            G, J, TOKENS, HEADS_K, BLOCK_J, INTERLEAVED,
        )  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    """x if its last axis is dense, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _table_strides(table: Tensor) -> tuple[int, int]:
    """Strides of batch and position; that of batch is 0 for a table that all rows share."""
    return 0 if table.shape[0] == 1 else table.stride(0), table.stride(1)


def turn(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated (an empty tensor if k is None); tables (1 or B, T, J)."""
    B, T, H, K = q.shape
    G = 0 if k is None else k.shape[2]
    q_out, k_out = q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out
    q, cos, sin = _dense(q), _dense(cos), _dense(sin)
    k = None if k is None else _dense(k)

    tensors = [x for x in (q, k, cos, sin, q_out, k_out) if x is not None]
    layout = tuple([None if x is None else (x.dtype, x.shape, x.stride()) for x in (q, k, cos, sin)])
    key = device_number(q), layout, interleaved, inverse, all_aligned(tensors)
    with device_of(q):
        if not relaunch(_rope, key, tensors):
            tokens, heads_q, heads_k, warps = config(H, G, K)
            keys = q if k is None else k
            args = (
                q, keys, cos, sin, q_out, k_out, B * T, T, *q.stride()[:3], *keys.stride()[:3],
                *_table_strides(cos), *_table_strides(sin),
            )  # fmt: skip
            constants = {
                "H": H, "G": G, "J": K // 2, "INTERLEAVED": interleaved, "INVERSE": inverse,
                "TOKENS": tokens, "HEADS_Q": heads_q, "HEADS_K": heads_k, "BLOCK_J": triton.next_power_of_2(K // 2),
            }  # fmt: skip
            launch(_rope, key, tensors, triton.cdiv(B * T, tokens), args, constants, {"num_warps": warps})
    return q_out, k_out
