"""Decoding with a cache: the states that the mixers of all layers keep of the tokens processed so far.

    cache = init_cache(cfg, batch=2, max_len=100)
    logits_BV, cache = prefill(params, prompts_BT, cache, cfg, lengths=lengths_B)
    logits_BV, cache = decode(params, tokens_B, cache, cfg)

A slot holds one token of each row. Prompts of different lengths are padded on the left, so that the next token of every
row goes into the same slot; `Cache.start` is the first slot of each row that is not padding.
Legend: B batch, T positions, S slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm import tree
from purelm.models.block import Layer, apply_norm, block_cached
from purelm.models.config import Config
from purelm.models.context import Context, contexts
from purelm.models.embedding import embed, readout
from purelm.models.layers import kinds_of
from purelm.models.leaves import Params
from purelm.models.mixers import Slots
from purelm.ops import REFERENCE, Ops

__all__ = ["Cache", "CachedBlockFn", "cached_blocks", "decode", "decode_", "init_cache", "prefill"]

Write = Callable[[Tensor, int, Tensor, Tensor], Tensor]  # as `Slots.write`
# (one layer's params, x_BTD, ctx, state, what its mixer's `reads` returned) -> (x_BTD, state)
CachedBlockFn = Callable[[Params, Tensor, Context, Any, Any], tuple[Tensor, Any]]


class Cache(NamedTuple):
    """The state of a model between decoding steps."""

    layers: tuple[Any, ...]  # the state of each layer's mixer, a tree of tensors whose first axis is the batch
    slots: Tensor  # (S,) int64: the slot indices 0 .. S-1
    length: Tensor  # 0-d int64: slots in use, including those of padding
    start: Tensor | None  # (B,) int64: first slot of each row that is not padding; None when no row is padded


def init_cache(
    cfg: Config,
    batch: int,
    max_len: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Cache:
    """An empty cache with `max_len` slots; attention takes 2 B S G K elements a layer."""
    if max_len < 1 or batch < 1:
        raise ValueError(f"batch and max_len must be at least 1, got {batch} and {max_len}")
    kinds = kinds_of(cfg)
    mixers = [kinds.layers[k].mixer for k in kinds.of]
    states = tuple(m.init_state(m.config, batch, max_len, dtype, device) for m in mixers)
    slots = torch.arange(max_len, device=device)
    return Cache(states, slots, torch.zeros((), dtype=torch.int64, device=device), None)


def cached_blocks(
    cfg: Config, ops: Ops, wrap_block: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> list[CachedBlockFn]:
    """The cached block function of each kind of layer (`layers.kinds_of`), wrapped by wrap_block."""

    def cached(layer: Layer) -> CachedBlockFn:
        def run(params: Params, x_BTD: Tensor, ctx: Context, state: Any, reads: Any) -> tuple[Tensor, Any]:
            return block_cached(layer, params, x_BTD, ctx, ops, state, reads)

        return wrap_block(run)

    return [cached(layer) for layer in kinds_of(cfg).layers]


def prefill(
    params: Params,
    tokens_BT: Int[Tensor, "b t"],
    cache: Cache,
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    blocks: Sequence[CachedBlockFn] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
    last_only: bool = True,
    n_positions: int | None = None,
) -> tuple[Tensor, Cache]:
    """Processes T tokens a row at once and appends them to the cache; a long prompt may come in several chunks.

    Waits for the device, since the host needs the value of cache.length.

    Args:
        blocks: from `cached_blocks`; None: the blocks of cfg and ops without a wrapper.
        lengths: row b's prompt is its last lengths[b] tokens, and the tokens before those are padding (any valid ids).
            Allowed for the first chunk only, which must hold all of the padding.
        last_only: logits of the last position, (B, V); else of all, (B, T, V), meaningless at padding.
        n_positions: the sequence length that dynamic_ntk scales by, the same for all rows; give `decode` the same
            number. None: the number of slots, which depends on the longest row of the batch.
    Returns:
        (logits, cache); the given cache is unchanged. ValueError when the tokens do not fit.
    """
    T = tokens_BT.shape[1]
    used, size = int(cache.length), cache.slots.shape[0]
    if used + T > size:
        raise ValueError(f"cache: {T} tokens do not fit, {used} of {size} slots are in use")
    if lengths is not None:
        if used:
            raise ValueError(f"lengths must be None unless the cache is empty, and it holds {used} slots")
        if lengths.shape != tokens_BT.shape[:1] or not bool(((lengths >= 1) & (lengths <= T)).all()):
            raise ValueError(f"lengths must be one number in 1..{T} for each row, got {lengths.tolist()}")
        cache = cache._replace(start=T - lengths)
    _check_positions(used + T, cache.start, cfg)
    blocks = cached_blocks(cfg, ops, lambda f: f) if blocks is None else blocks
    write = torch.Tensor.index_copy
    h_BTD, cache = _run(params, tokens_BT, cache, cfg, ops, blocks, n_positions, used, False, write)
    return readout(params, h_BTD[:, -1] if last_only else h_BTD, cfg, ops), cache


def decode(
    params: Params,
    tokens_B: Int[Tensor, " b"],
    cache: Cache,
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    blocks: Sequence[CachedBlockFn] | None = None,
    used: int | None = None,
    n_positions: int | None = None,
) -> tuple[Float[Tensor, "b v"], Cache]:
    """Processes one token a row and appends it to the cache; returns the logits of the next token.

    Args:
        used: cache.length as an int, if the caller knows it; attention then reads only the slots in use. None: in eager
            mode on a CPU the value is taken from cache.length; on a GPU and under torch.compile attention reads all
            slots under a mask, so that the host does not wait and one graph serves every length.
        blocks, n_positions: as for `prefill`.
    Returns:
        (logits_BV, cache); the given cache is unchanged (`decode_` writes into its memory and saves the copy).
        A full cache raises ValueError if its length is known on the host, else an index error from the write.
    """
    return _decode(params, tokens_B, cache, cfg, ops, blocks, used, n_positions, torch.Tensor.index_copy)


def decode_(
    params: Params,
    tokens_B: Int[Tensor, " b"],
    cache: Cache,
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    blocks: Sequence[CachedBlockFn] | None = None,
    used: int | None = None,
    n_positions: int | None = None,
) -> tuple[Float[Tensor, "b v"], Cache]:
    """`decode` that writes into the memory of the given cache; without gradients.

    The given cache stays valid: its `length` is unchanged, and the new entries lie in the slots after it.
    """
    with torch.no_grad():
        return _decode(params, tokens_B, cache, cfg, ops, blocks, used, n_positions, torch.Tensor.index_copy_)


def _decode(
    params: Params,
    tokens_B: Tensor,
    cache: Cache,
    cfg: Config,
    ops: Ops,
    blocks: Sequence[CachedBlockFn] | None,
    used: int | None,
    n_positions: int | None,
    write: Write,
) -> tuple[Tensor, Cache]:
    size = cache.slots.shape[0]
    if not torch.compiler.is_compiling() and cache.length.device.type == "cpu":
        length = int(cache.length)
        if used not in (None, length):
            raise ValueError(f"used must be the cache's length {length}, got {used}")
        used = length
        _check_positions(used + 1, cache.start, cfg)
    if used is not None and used >= size:
        raise ValueError(f"cache: full, all of its {size} slots are in use")
    blocks = cached_blocks(cfg, ops, lambda f: f) if blocks is None else blocks
    tokens_B1 = tokens_B.unsqueeze(-1)
    h_B1D, cache = _run(params, tokens_B1, cache, cfg, ops, blocks, n_positions, used, True, write)
    return readout(params, h_B1D[:, 0], cfg, ops), cache


def _check_positions(n_slots: int, start: Tensor | None, cfg: Config) -> None:
    """ValueError where positions are learned and the longest row in `n_slots` slots exceeds context_length."""
    if cfg.position == "learned" and (start is None or start.device.type == "cpu"):
        longest = n_slots - (0 if start is None else int(start.min()))
        if longest > cfg.context_length:
            raise ValueError(
                f"cache: a row of {longest} tokens is longer than context_length {cfg.context_length}, the number of "
                "learned positions"
            )


def _run(
    params: Params,
    tokens_BT: Tensor,
    cache: Cache,
    cfg: Config,
    ops: Ops,
    blocks: Sequence[CachedBlockFn],
    n_positions: int | None,
    used: int | None,
    one: bool,
    write: Write,
) -> tuple[Tensor, Cache]:
    """Final states of the new tokens, and the cache extended by them.

    one: T is 1, and the token sees every earlier one (within its window), so that no causal mask is needed.
    """
    n_rows, T = tokens_BT.shape
    if (states := tree.leaves(cache.layers)) and states[0].shape[0] != n_rows:
        raise ValueError(f"tokens must have the {states[0].shape[0]} rows of the cache, got {n_rows}")
    if one:
        new_T = cache.length.reshape(1)
    else:
        assert used is not None
        new_T = cache.slots[used : used + T]
    slots = Slots(new_T, cache.slots, cache.length, cache.start, used, n_rows, one, write)
    positions = new_T
    if cache.start is not None:
        positions = (new_T - cache.start.unsqueeze(-1)).clamp(min=0)
    x = embed(params, tokens_BT, positions, cfg, ops)
    kinds = kinds_of(cfg)
    length = n_positions or cache.slots.shape[0]
    by_kind = contexts(positions, None, cfg, kinds.ropes, length=length, dtype=x.dtype)
    reads = [layer.mixer.reads(layer.mixer.config, slots) for layer in kinds.layers]
    states = []
    for kind, layer, state in zip(kinds.of, params["layers"], cache.layers, strict=True):
        x, state = blocks[kind](layer, x, by_kind[kind], state, reads[kind])
        states.append(state)
    h = ops.final(apply_norm(kinds.norm, params, "ln_final", x, ops))
    return h, Cache(tuple(states), cache.slots, cache.length + T, cache.start)
