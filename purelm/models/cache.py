"""Decoding with a cache: the states that the mixers of all layers keep of the tokens processed so far.

    cache = init_cache(cfg, batch=2, max_len=100)
    logits_BV, cache = prefill(params, prompts_BT, cache, cfg, lengths=lengths_B)
    logits_BV, cache = decode(params, tokens_B, cache, cfg)

Token t of a row lies in slot t, and each row has its own length: prompts of different lengths are padded on the right.
What stands in the slots after a row's last token is not seen, and is written over by the next tokens.
`purelm.models.cache_rows` moves rows between caches.
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

# (one layer's params, x_BTD, ctx, state, what its mixer's `reads` returned) -> (x_BTD, state)
CachedBlockFn = Callable[[Params, Tensor, Context, Any, Any], tuple[Tensor, Any]]


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Cache(NamedTuple):
    """The state of a model between decoding steps."""

    layers: tuple[Any, ...]  # the state of each layer's mixer, a tree of tensors whose first axis is the batch
    slots: Tensor  # (S,) int64: the slot indices 0 .. S-1
    length: Tensor  # int64: tokens of each row, (B,); or 0-d, where all rows have equally many

    # For `purelm.models.cache_rows`.

    def by_row(self) -> Any:
        """The leaves whose first axis is the batch, `length` among them."""
        states = tree.leaves(self.layers)
        length = self.length.repeat(states[0].shape[0]) if self.length.ndim == 0 and states else self.length
        return self.layers, length

    def with_rows(self, parts: Any) -> "Cache":
        """The cache of these leaves, as `by_row` gives them."""
        return Cache(parts[0], self.slots, parts[1])

    def emptied(self, rows_B: Tensor) -> "Cache":
        """The cache in which rows where rows_B is True hold nothing."""
        return self._replace(length=torch.where(rows_B, 0, self.length))

    def shortened(self, n: int) -> "Cache | None":
        """The cache of each row's first n tokens; None if a state has no axis of slots, as that of a recurrence."""
        if any(x.ndim < 2 or x.shape[1] != len(self.slots) for x in tree.leaves(self.layers)):
            return None
        return self._replace(length=torch.full_like(self.length, n))


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
    return Cache(states, slots, torch.zeros((), dtype=torch.int64, device=device))


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
    used: int | None = None,
    n_positions: int | None = None,
) -> tuple[Tensor, Cache]:
    """Processes T tokens a row at once and appends them to the cache; a long prompt may come in several chunks.

    Waits for the device, since the host needs the values of cache.length and lengths, unless `used` is given.

    Args:
        blocks: from `cached_blocks`; None: the blocks of cfg and ops without a wrapper.
        lengths: (B,): row b has its first lengths[b] tokens, 0 to T, and the rest is padding (any valid ids). The
            cache then has a length of its own for each row. None: all rows have T.
        last_only: logits of each row's own last token, (B, V); else of all, (B, T, V). Those at padding, and those of a
            row without a new token, mean nothing.
        used: tokens that every row has before, if the caller knows. On a GPU lengths are then taken as they are, and
            all T tokens must fit, padding too. None: is looked up.
        n_positions: the sequence length that dynamic_ntk scales by, the same for all rows; give `decode` the same
            number. None: the number of slots, which depends on the longest row of the batch.
    Returns:
        (logits, cache); the given cache is unchanged. ValueError when the tokens do not fit.
    """
    (n_rows, T), size = tokens_BT.shape, cache.slots.shape[0]
    _check_rows(cache, n_rows)
    if used is not None and (not isinstance(used, int) or isinstance(used, bool) or not 0 <= used <= size):
        raise ValueError(f"used must be an integer in 0..{size}, the cache's slots, got {used!r}")
    known = cache.length.device.type == "cpu" and not torch.compiler.is_compiling()
    before = [used] * n_rows if used is not None and not known else _lengths(cache, n_rows)
    if used is not None and set(before) - {used}:
        raise ValueError(f"used must be the number of tokens that every row has, {before}, got {used}")
    new = [T] * n_rows
    if lengths is not None and (lengths.shape != (n_rows,) or lengths.dtype not in INTEGERS):
        got = f"{str(lengths.dtype).removeprefix('torch.')} {tuple(lengths.shape)}"
        raise ValueError(f"lengths must be one integer for each of {n_rows} rows, got {got}")
    if lengths is not None and (used is None or lengths.device.type == "cpu"):
        new = _checked(lengths, before, T)
    for row, (n_before, n_new) in enumerate(zip(before, new, strict=True)):
        if n_before + n_new > size:
            where = "" if len(set(before)) == len(set(new)) == 1 else f" of row {row}"
            raise ValueError(f"cache: {n_new} tokens{where} do not fit, {n_before} of {size} slots are in use")
    longest = max(a + b for a, b in zip(before, new, strict=True))
    _check_positions(longest, cfg)
    blocks = cached_blocks(cfg, ops, lambda f: f) if blocks is None else blocks
    bounds = min(before), max(before)
    # Slots that padding alone would need may lie beyond the last one.
    level = bounds[0] == bounds[1] and bounds[1] + T <= size
    slots = _slots(cache, n_rows, T, bounds, level, one=False, in_place=False)
    h_BTD, cache = _run(params, tokens_BT, cache, slots, lengths, cfg, ops, blocks, n_positions)
    if last_only and lengths is None:
        h_BTD = h_BTD[:, -1]
    elif last_only:
        assert lengths is not None
        h_BTD = h_BTD[slots.rows_B, (lengths.to(h_BTD.device) - 1).clamp(min=0)]
    return readout(params, h_BTD, cfg, ops), cache


def _checked(lengths: Tensor, before: list[int], T: int) -> list[int]:
    """The lengths as a list; ValueError unless each is 0 to T, and 1 to T in a row that has no tokens yet."""
    found = lengths.tolist()
    for row, (n, n_before) in enumerate(zip(found, before, strict=True)):
        least = 0 if n_before else 1
        if not least <= n <= T:
            raise ValueError(f"lengths must be in {least}..{T} in row {row}, which has {n_before} tokens, got {found}")
    return found


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
        used: tokens of the longest row before this one, if the caller knows; attention then reads only the slots in
            use. On a GPU, for rows of different lengths, an upper bound will do. None: in eager mode on a CPU the value
            is taken from cache.length; on a GPU and under torch.compile attention reads all slots under a mask, so that
            the host does not wait and one graph serves all lengths.
        blocks, n_positions: as for `prefill`.
    Returns:
        (logits_BV, cache); the given cache is unchanged (`decode_` writes into its memory and saves the copy).
        A full cache raises ValueError if its length is known on the host, else an index error from the write.
    """
    return _decode(params, tokens_B, cache, cfg, ops, blocks, used, n_positions, in_place=False)


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
        return _decode(params, tokens_B, cache, cfg, ops, blocks, used, n_positions, in_place=True)


def _decode(
    params: Params,
    tokens_B: Tensor,
    cache: Cache,
    cfg: Config,
    ops: Ops,
    blocks: Sequence[CachedBlockFn] | None,
    used: int | None,
    n_positions: int | None,
    in_place: bool,
) -> tuple[Tensor, Cache]:
    n_rows, size, level = tokens_B.shape[0], cache.slots.shape[0], cache.length.ndim == 0
    _check_rows(cache, n_rows)
    bounds = None if used is None else (used if level else 0, used)
    if not torch.compiler.is_compiling() and cache.length.device.type == "cpu":
        before = _lengths(cache, n_rows)
        bounds = min(before), max(before)
        if used not in (None, bounds[1]):
            raise ValueError(f"used must be the cache's length {bounds[1]}, got {used}")
        level = bounds[0] == bounds[1]
        _check_positions(bounds[1] + 1, cfg)
    if bounds is not None and bounds[1] >= size:
        raise ValueError(f"cache: full, all of its {size} slots are in use")
    blocks = cached_blocks(cfg, ops, lambda f: f) if blocks is None else blocks
    slots = _slots(cache, n_rows, 1, bounds, level, one=True, in_place=in_place)
    h_B1D, cache = _run(params, tokens_B.unsqueeze(-1), cache, slots, None, cfg, ops, blocks, n_positions)
    return readout(params, h_B1D[:, 0], cfg, ops), cache


def _check_rows(cache: Cache, n_rows: int) -> None:
    states = tree.leaves(cache.layers)
    held = cache.length.shape[0] if cache.length.ndim else states[0].shape[0] if states else n_rows
    if held != n_rows:
        raise ValueError(f"tokens must have the {held} rows of the cache, got {n_rows}")


def _lengths(cache: Cache, n_rows: int) -> list[int]:
    """The tokens of each row, on the host."""
    return cache.length.tolist() if cache.length.ndim else [int(cache.length)] * n_rows


def _check_positions(longest: int, cfg: Config) -> None:
    """ValueError where positions are learned and a row would be longer than the context."""
    if cfg.position == "learned" and longest > cfg.context_length:
        raise ValueError(
            f"cache: a row of {longest} tokens is longer than context_length {cfg.context_length}, the number of "
            "learned positions"
        )


def _slots(
    cache: Cache, n_rows: int, T: int, used: tuple[int, int] | None, level: bool, *, one: bool, in_place: bool
) -> Slots:
    length = cache.length[0] if level and cache.length.ndim else cache.length.expand(n_rows if not level else ())
    if not level:
        new_T = length.unsqueeze(-1) + torch.arange(T, device=length.device)
    elif one:
        new_T = length.reshape(1)
    else:
        assert used is not None
        new_T = cache.slots[used[1] : used[1] + T]
    rows_B = torch.arange(n_rows, device=length.device)
    return Slots(new_T, cache.slots, length, used, rows_B, one, in_place)


def _run(
    params: Params,
    tokens_BT: Tensor,
    cache: Cache,
    slots: Slots,
    lengths: Tensor | None,
    cfg: Config,
    ops: Ops,
    blocks: Sequence[CachedBlockFn],
    n_positions: int | None,
) -> tuple[Tensor, Cache]:
    """Final states of the new tokens, and the cache extended by them."""
    positions = slots.new_T
    if cfg.position == "learned" and not slots.one:
        positions = positions.clamp(max=cfg.context_length - 1)  # of padding, which may reach beyond
    x = embed(params, tokens_BT, positions, cfg, ops)
    kinds = kinds_of(cfg)
    n = n_positions or cache.slots.shape[0]
    by_kind = contexts(positions, None, cfg, kinds.ropes, length=n, dtype=x.dtype)
    reads = [layer.mixer.reads(layer.mixer.config, slots) for layer in kinds.layers]
    states = []
    for kind, layer, state in zip(kinds.of, params["layers"], cache.layers, strict=True):
        x, state = blocks[kind](layer, x, by_kind[kind], state, reads[kind])
        states.append(state)
    h = ops.final(apply_norm(kinds.norm, params, "ln_final", x, ops))
    length = cache.length + (tokens_BT.shape[1] if lengths is None else lengths.to(cache.length))
    return h, Cache(tuple(states), cache.slots, length)
