"""Softmax attention: multi-head, grouped-query, windowed, with or without rotary positions and norms of q and k.

    mixer = attention(d_model=64, n_heads=4, window=128)
    y_BTD = mixer.apply(mixer.config, params, x_BTD, ctx, ops)

Legend: B batch, T positions, S slots, D d_model, H query heads, G key/value heads, K head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.models.config import QKNorm
from purelm.models.context import Context
from purelm.models.leaves import Cut, Fill, Leaf, Params, with_prefix
from purelm.models.linear import apply_linear_out, apply_linears, linear_in, linear_out
from purelm.models.mixers import Cost, Mixer, Slots
from purelm.ops import Ops
from purelm.ops.rope import Layout

__all__ = ["KV", "Attention", "Reads", "attention", "reads", "visible_pairs"]


@dataclass(frozen=True)
class Attention:
    """The configuration of an attention layer."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    causal: bool = True
    window: int | None = None  # a query sees this many keys before its own (and after it if not causal); None: all
    scale: float | None = None  # 1 / sqrt(head_dim) when None
    softcap: float | None = None
    qk_norm: QKNorm = "none"  # RMS norm of q and k over each head's features (head) or over all heads' together (full)
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    rope_layout: Layout = "interleaved"

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads {self.n_heads}, got {self.n_kv_heads}")
        if self.qk_norm not in get_args(QKNorm):
            raise ValueError(f"qk_norm must be one of {', '.join(get_args(QKNorm))}, got {self.qk_norm!r}")


class KV(NamedTuple):
    """The state of a layer in a cache: a key (after norm and rope) and a value for each slot."""

    k: Tensor  # (B, S, G, K)
    v: Tensor


def attention(
    d_model: int, n_heads: int, n_kv_heads: int | None = None, head_dim: int | None = None, **options: Any
) -> Mixer:
    """Attention as a `Mixer`. options: further fields of `Attention`.

    n_kv_heads None: n_heads. head_dim None: d_model / n_heads.
    """
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    head_dim = d_model // n_heads if head_dim is None else head_dim
    config = Attention(d_model, n_heads, n_kv_heads, head_dim, **options)
    return Mixer(config, _leaves, _apply, _init_state, reads, _apply_cached, _cost)


def _leaves(c: Attention) -> dict[str, Leaf]:
    q_width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    queries, keys, part = (c.n_heads, "n_heads"), (c.n_kv_heads, "n_kv_heads"), "attention"
    leaves = {
        **linear_in("q_proj", q_width, c.d_model, part, queries, bias=c.qkv_bias),
        **linear_in("k_proj", kv_width, c.d_model, part, keys, bias=c.qkv_bias),
        **linear_in("v_proj", kv_width, c.d_model, part, keys, bias=c.qkv_bias),
        **linear_out("output_proj", c.d_model, q_width, part, queries, bias=c.out_bias),
    }
    if c.qk_norm == "none":
        return leaves
    for name, width in (("q_norm", q_width), ("k_norm", kv_width)):
        if c.qk_norm == "head":  # (K,), shared by all heads: whole on every process, whatever heads it has
            norm = Leaf((c.head_dim,), "norm", part, Fill(1.0), place="sublayer")
        else:
            never = Cut(0, 1, 'norm over all heads (qk_norm "full")')  # 1 unit: refused on more than one process
            norm = Leaf((width,), "norm", part, Fill(1.0), never, place="sublayer")
        leaves |= with_prefix(name, {"weight": norm})
    return leaves


def _apply(c: Attention, params: Params, x_BTD: Tensor, ctx: Context, ops: Ops) -> Float[Tensor, "b t d"]:
    q, k, v = _project(c, params, x_BTD, ctx, ops)
    o_BTHK = _attend(c, ops)(q, k, v, segment_ids=ctx.segment_ids)
    return apply_linear_out(params["output_proj"], o_BTHK.flatten(2), ops)


def _attend(c: Attention, ops: Ops) -> Callable[..., Tensor]:
    """ops.attention with the options of c; if not causal, the window reaches to both sides."""
    sides = c.window if c.causal or c.window is None else (c.window, c.window)
    return partial(ops.attention, causal=c.causal, window=sides, scale=c.scale, softcap=c.softcap)


def _project(
    c: Attention, params: Params, x_BTD: Tensor, ctx: Context, ops: Ops, *, turned: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B,T,H,K), k and v (B,T,G,K): projections of x, after the norm of q and k and rope, where the model has them.

    turned: False leaves rope out.
    H and G come from the shapes of params: with tensor parallelism a process has only some of the heads.
    """
    h_BTD = ops.enter(x_BTD)
    q, k, v = apply_linears([params[name] for name in ("q_proj", "k_proj", "v_proj")], h_BTD, ops)
    if c.qk_norm == "full":
        q, k = _qk_norm(c, params, q, k, ops)
    q, k, v = (x.unflatten(-1, (-1, c.head_dim)) for x in (q, k, v))
    if c.qk_norm == "head":
        q, k = _qk_norm(c, params, q, k, ops)
    if turned and ctx.cos is not None and ctx.sin is not None:
        q, k = (ops.rope(x, ctx.cos, ctx.sin, c.rope_layout) for x in (q, k))
    return q, k, v


def _qk_norm(c: Attention, params: Params, q: Tensor, k: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
    q = ops.rms_norm(q, params["q_norm"]["weight"], c.norm_eps)
    return q, ops.rms_norm(k, params["k_norm"]["weight"], c.norm_eps)


# With a cache.


class Reads(NamedTuple):
    """Which slots of the cache every attention layer reads in one pass."""

    slots: Slots
    read: slice | Tensor  # the slots whose keys and values are read: the same in all rows, or (B, N) int64
    segment_ids: Any  # ids for ops.attention that hide some of them, such as those after a row's end; None: none

    def take(self, x_BS: Tensor) -> Tensor:
        """Of x (B, S, ...), one entry a slot, the entries that are read."""
        if isinstance(self.read, slice):
            return x_BS[:, self.read]
        return x_BS[self.slots.rows_B.unsqueeze(-1), self.read]


def _init_state(c: Attention, batch: int, n_slots: int, dtype: torch.dtype, device: Any) -> KV:
    if not c.causal:
        raise ValueError("cfg.causal must be True for cached decoding: a bidirectional model changes its past")
    shape = (batch, n_slots, c.n_kv_heads, c.head_dim)
    return KV(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def reads(c: Any, slots: Slots) -> Reads:
    """`Mixer.reads` of attention, and of any mixer that keeps one entry a slot and whose config c has a `window`."""
    if slots.one:
        read, seen_BS = _by_one(c, slots)
        ids = None if seen_BS is None else (torch.ones_like(seen_BS[:, :1]), seen_BS)
        return Reads(slots, read, ids)
    assert slots.used is not None
    T, longest = slots.new_T.shape[-1], slots.used[1]
    if slots.length.ndim == 0:
        return Reads(slots, slice(0, longest + T), None)  # padding comes after all tokens of its row, which see none
    # Keys are read in such an order that those of the new tokens are the last T of every row, where causal attention
    # and windows expect them; a shorter row has no keys in front.
    at_BN = torch.arange(-longest, T, device=slots.every_S.device) + slots.length.unsqueeze(-1)
    real_BN = (at_BN >= 0).to(torch.int64)
    return Reads(slots, at_BN.clamp(0, slots.every_S.shape[0] - 1), (torch.ones_like(real_BN[:, :T]), real_BN))


def _by_one(c: Any, slots: Slots) -> tuple[slice, Int[Tensor, "b s"] | None]:
    """For one new token: the slots to read, and for each of them 1 if the token sees it, else 0 (None: sees all)."""
    least, most = (0, slots.every_S.shape[0] - 1) if slots.used is None else slots.used
    read = slice(0 if c.window is None else max(0, least - c.window), most + 1)
    if slots.used is not None and slots.length.ndim == 0:
        return read, None
    last, at = slots.length.unsqueeze(-1), slots.every_S[read]
    seen = at <= last
    if c.window is not None:
        seen = seen & (at >= last - c.window)
    return read, seen.to(torch.int64).expand(slots.rows_B.shape[0], -1)


def _apply_cached(
    c: Attention, params: Params, x_BTD: Tensor, ctx: Context, ops: Ops, state: KV, reads: Reads
) -> tuple[Float[Tensor, "b t d"], KV]:
    slots = reads.slots
    if slots.one and slots.in_place and ops.decode_attention_ is not None:
        return _apply_one(c, params, x_BTD, ctx, ops, state, slots), state
    q, k, v = _project(c, params, x_BTD, ctx, ops)
    state = KV(*[slots.write(x, new.to(x.dtype)) for x, new in zip(state, (k, v), strict=True)])
    keys, values = (reads.take(x).to(q.dtype) for x in state)
    if slots.one:
        # The query comes after all keys that were read, and `reads` applied the window: segment_ids is the only mask.
        o = ops.attention(
            q, keys, values, causal=False, segment_ids=reads.segment_ids, scale=c.scale, softcap=c.softcap
        )
    else:
        o = _attend(c, ops)(q, keys, values, segment_ids=reads.segment_ids)
    return apply_linear_out(params["output_proj"], o.flatten(2), ops), state


def _apply_one(
    c: Attention, params: Params, x_B1D: Tensor, ctx: Context, ops: Ops, state: KV, slots: Slots
) -> Float[Tensor, "b 1 d"]:
    """`_apply_cached` for one new token, in the memory of the state: rope, the write and attention are one op."""
    assert ops.decode_attention_ is not None
    q, k, v = (x.squeeze(1) for x in _project(c, params, x_B1D, ctx, ops, turned=False))
    # Tables are (1, J) where rows are level, else (B, 1, J).
    cos, sin = (None if t is None else t.flatten(0, -2) for t in (ctx.cos, ctx.sin))
    o_BHK = ops.decode_attention_(
        q, k, v, state.k, state.v, slots.length.expand(slots.rows_B.shape[0]),
        cos_BJ=cos, sin_BJ=sin, layout=c.rope_layout, window=c.window, scale=c.scale, softcap=c.softcap,
    )  # fmt: skip
    return apply_linear_out(params["output_proj"], o_BHK.flatten(1).unsqueeze(1), ops)


def _cost(
    c: Attention, batch: int, length: int, *, bytes_per_element: int = 4, flash: bool = False, skip_masked: bool = False
) -> Cost:
    q_width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    N, e, square = batch * length, bytes_per_element, c.n_heads * batch * length**2
    pairs = visible_pairs(length, causal=c.causal, window=c.window) if skip_masked else length**2
    flops = {
        "qkv": 2 * N * c.d_model * (q_width + 2 * kv_width),
        "scores": 2 * batch * pairs * q_width,
        "values": 2 * batch * pairs * q_width,
        "output": 2 * N * q_width * c.d_model,
    }
    activations = {
        "qkv": N * (q_width + 2 * kv_width) * e,
        "scores": 0 if flash else square * e,
        "softmax": c.n_heads * N * 4 if flash else square * e,
        "values": N * q_width * e,
        "output": N * c.d_model * e,
    }
    return Cost(flops, activations, 2 * batch * length * kv_width)


def visible_pairs(length: int, *, causal: bool = True, window: int | None = None) -> int:
    """Number of (query, key) pairs that see each other among `length` positions; window as in Config.

    >>> visible_pairs(4), visible_pairs(4, window=1), visible_pairs(4, causal=False)
    (10, 7, 16)
    """
    reach = length if window is None else min(window + 1, length)
    to_the_left = reach * (reach + 1) // 2 + (length - reach) * reach  # own position included
    return to_the_left if causal else 2 * to_the_left - length
