"""Decoding with cached keys and values.

    cache = init_cache(cfg, batch=2, max_len=100)
    logits_BV, cache = prefill(params, prompts_BT, cache, cfg, lengths=lengths_B)
    logits_BV, cache = decode(params, tokens_B, cache, cfg)

Prompts of different lengths are padded on the left, so that all rows write to the same slot; `start` says where each
row begins. Legend: B batch, T positions, S slots, G key/value heads, K head dim, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.models.config import Config
from purelm.models.layers import attend_all, block, context, embed, norm, readout
from purelm.ops import REFERENCE, Ops

__all__ = ["KVCache", "decode", "decode_", "init_cache", "prefill"]

Params = dict[str, Any]
Write = Callable[[Tensor, int, Tensor, Tensor], Tensor]


class KVCache(NamedTuple):
    """Keys (turned by their positions) and values of what a model has read."""

    k: tuple[Tensor, ...]  # one (B, S, G, K) for each layer
    v: tuple[Tensor, ...]
    length: Tensor  # 0-d int64: slots in use, the padding's too
    start: Tensor | None  # (B,) int64: first slot of each row; None when no row is padded


def init_cache(
    cfg: Config,
    batch: int,
    max_len: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> KVCache:
    """An empty cache with `max_len` slots: 2 B S G K elements a layer."""
    if not cfg.causal:
        raise ValueError("cfg.causal must be True for cached decoding: a bidirectional model changes its past")
    if max_len < 1 or batch < 1:
        raise ValueError(f"batch and max_len must be at least 1, got {batch} and {max_len}")
    shape = (batch, max_len, cfg.kv_heads, cfg.head_width)

    def fresh() -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(cfg.n_layers))

    return KVCache(fresh(), fresh(), torch.zeros((), dtype=torch.int64, device=device), None)


def prefill(
    params: Params,
    tokens_BT: Int[Tensor, "b t"],
    cache: KVCache,
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    lengths: Int[Tensor, " b"] | None = None,
    last_only: bool = True,
    n_positions: int | None = None,
) -> tuple[Tensor, KVCache]:
    """Reads T tokens at once, after what the cache holds; a long prompt may come in several chunks.

    Reads cache.length on the host.

    Args:
        lengths: tokens that count in each row, the last ones; what stands before them is padding (any valid id).
            Only for the first chunk, which must hold all padding.
        last_only: logits (B, V) of the last position; else (B, T, V), where padding's are of no meaning.
        n_positions: what dynamic_ntk takes for the length of each row, here and in `decode`; the cache's size when
            None, which is a matter of the longest row.
    Returns:
        (logits, cache); the cache that was given is unchanged. ValueError when the tokens do not fit.
    """
    T = tokens_BT.shape[1]
    used, size = int(cache.length), cache.k[0].shape[1]
    if used + T > size:
        raise ValueError(f"cache: {T} tokens do not fit, {used} of {size} slots are in use")
    if lengths is not None:
        if used:
            raise ValueError(f"lengths must be None unless the cache is empty, and it holds {used} slots")
        if lengths.shape != tokens_BT.shape[:1] or not bool(((lengths >= 1) & (lengths <= T)).all()):
            raise ValueError(f"lengths must be one number in 1..{T} for each row, got {lengths.tolist()}")
        cache = cache._replace(start=T - lengths)
    _check_positions(used + T, cache.start, cfg)
    segment_ids = None
    if cache.start is not None:
        real = (torch.arange(used + T, device=tokens_BT.device) >= cache.start.unsqueeze(-1)).to(torch.int64)
        segment_ids = (real[:, used:], real)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = attend_all(cfg, ops, cfg.window_of(layer))
        k, v = (x[:, : used + T].to(q.dtype) for x in (k, v))
        return attention(q, k, v, segment_ids=segment_ids)

    slots_T = torch.arange(used, used + T, device=tokens_BT.device)
    h_BTD, cache = _run(params, tokens_BT, cache, cfg, ops, slots_T, n_positions, attend, torch.Tensor.index_copy)
    return readout(params, h_BTD[:, -1] if last_only else h_BTD, cfg, ops), cache


def decode(
    params: Params,
    tokens_B: Int[Tensor, " b"],
    cache: KVCache,
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    used: int | None = None,
    n_positions: int | None = None,
) -> tuple[Float[Tensor, "b v"], KVCache]:
    """Reads one token a row; logits of the next.

    Under torch.compile all slots are attended to, with a mask, so that one graph serves every length.

    Args:
        used: cache.length, for a caller who knows it: only those slots are read then, with no wait for the device.
            In eager mode on a CPU it is looked up when None.
        n_positions: as for `prefill`.
    Returns:
        (logits_BV, cache); the cache that was given is unchanged (`decode_` writes into it and saves the copy).
        A full cache is a ValueError; where its length is not known, it is an index error of the write.
    """
    return _decode(params, tokens_B, cache, cfg, ops, used, n_positions, torch.Tensor.index_copy)


def decode_(
    params: Params,
    tokens_B: Int[Tensor, " b"],
    cache: KVCache,
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    used: int | None = None,
    n_positions: int | None = None,
) -> tuple[Float[Tensor, "b v"], KVCache]:
    """`decode`, writing into the cache's memory; without gradients.

    The cache that was given keeps its length, beyond which the new keys lie.
    """
    with torch.no_grad():
        return _decode(params, tokens_B, cache, cfg, ops, used, n_positions, torch.Tensor.index_copy_)


def _decode(
    params: Params,
    tokens_B: Tensor,
    cache: KVCache,
    cfg: Config,
    ops: Ops,
    used: int | None,
    n_positions: int | None,
    write: Write,
) -> tuple[Tensor, KVCache]:
    size = cache.k[0].shape[1]
    if not torch.compiler.is_compiling() and cache.length.device.type == "cpu":
        length = int(cache.length)
        if used not in (None, length):
            raise ValueError(f"used must be the cache's length {length}, got {used}")
        used = length
        _check_positions(used + 1, cache.start, cfg)
    if used is not None and used >= size:
        raise ValueError(f"cache: full, all of its {size} slots are in use")

    reads = {w: _reads(cache, used, w) for w in {cfg.window_of(i) for i in range(cfg.n_layers)}}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots, seen_BS = reads[cfg.window_of(layer)]
        # One query that stands after all that it sees: neither causality nor a window adds anything.
        return ops.attention(
            q,
            k[:, slots].to(q.dtype),
            v[:, slots].to(q.dtype),
            causal=False,
            segment_ids=None if seen_BS is None else (torch.ones_like(seen_BS[:, :1]), seen_BS),
            scale=cfg.attention_scale,
            softcap=cfg.attention_softcap,
        )

    slot_1 = cache.length.reshape(1)
    h_B1D, cache = _run(params, tokens_B.unsqueeze(-1), cache, cfg, ops, slot_1, n_positions, attend, write)
    return readout(params, h_B1D[:, 0], cfg, ops), cache


def _reads(cache: KVCache, used: int | None, window: int | None) -> tuple[slice, Int[Tensor, "b s"] | None]:
    """The slots that the next token reads, and 1 for those of them that it sees, else 0 (None: all of them)."""
    size, device = cache.k[0].shape[1], cache.length.device
    seen = None
    if used is None:
        slots = slice(0, size)
        slot_S = torch.arange(size, device=device)
        seen = slot_S <= cache.length
        if window is not None:
            seen = seen & (slot_S >= cache.length - window)
    else:
        slots = slice(0 if window is None else max(0, used - window), used + 1)
    if cache.start is not None:
        begun = torch.arange(slots.start, slots.stop, device=device) >= cache.start.unsqueeze(-1)
        seen = begun if seen is None else seen & begun
    return slots, None if seen is None else seen.to(torch.int64).expand(cache.k[0].shape[0], -1)


def _check_positions(n_slots: int, start: Tensor | None, cfg: Config) -> None:
    """Learned positions end: ValueError where a row in `n_slots` slots is longer than the context."""
    if cfg.position == "learned" and (start is None or start.device.type == "cpu"):
        longest = n_slots - (0 if start is None else int(start.min()))
        if longest > cfg.context_length:
            raise ValueError(
                f"cache: a row of {longest} tokens is longer than context_length {cfg.context_length}, where learned "
                "positions end"
            )


def _run(
    params: Params,
    tokens_BT: Tensor,
    cache: KVCache,
    cfg: Config,
    ops: Ops,
    slots_T: Tensor,
    n_positions: int | None,
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    write: Write,
) -> tuple[Tensor, KVCache]:
    """Final states of tokens that stand in `slots_T`, and the cache with them."""
    n_rows = cache.k[0].shape[0]
    if tokens_BT.shape[0] != n_rows:
        raise ValueError(f"tokens must have the {n_rows} rows of the cache, got {tokens_BT.shape[0]}")
    positions = slots_T
    if cache.start is not None:
        positions = (slots_T - cache.start.unsqueeze(-1)).clamp(min=0)
    x = embed(params, tokens_BT, positions, cfg, ops)
    ctx = context(positions, None, cfg, length=n_positions or cache.k[0].shape[1], dtype=x.dtype)
    new_k, new_v = [], []
    for i, layer in enumerate(params["layers"]):

        def attend_cached(q: Tensor, k: Tensor, v: Tensor, *, segment_ids: Any, layer_index: int = i) -> Tensor:
            new_k.append(write(cache.k[layer_index], 1, slots_T, k.to(cache.k[layer_index].dtype)))
            new_v.append(write(cache.v[layer_index], 1, slots_T, v.to(cache.v[layer_index].dtype)))
            return attend(layer_index, q, new_k[-1], new_v[-1])

        x = block(layer, x, ctx, cfg=cfg, ops=ops, attend=attend_cached)
    length = cache.length + tokens_BT.shape[1]
    return norm(params.get("ln_final"), x, cfg, ops), KVCache(tuple(new_k), tuple(new_v), length, cache.start)
