"""The encoder of the compiled engine: splits, looks up and merges in the loops of `memo`.

A memo maps pieces of up to 64 bytes to their ids. It starts at 2 MB and grows to 32 MB of slots; when that is full it
is emptied, so that the pieces of a new domain find room. Threads may encode at once: a call takes a memo out of the
BPE's pool and puts it back, or makes one where the pool is empty, so no two calls ever share a memo.
"""

from collections import deque
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE
from purelm.tokenizer.compiled.classes import class_table
from purelm.tokenizer.compiled.memo import DONE, GROW, encode_some, fill_whole, rehash
from purelm.tokenizer.compiled.merging import fill_pairs
from purelm.tokenizer.cuts import SAFE_SPACE_BYTES
from purelm.tokenizer.normalize import is_plain, segments
from purelm.tokenizer.patterns import known_family
from purelm.tokenizer.splitting import special_matcher

_BLOCK = 1 << 18  # bytes a call of the loop: its buffers stay in the cache
_PADDING = bytes(16)  # the loop reads words of 8 bytes at any place of the text
_SLOTS, _MOST_SLOTS = 1 << 16, 1 << 20  # of 32 bytes; half of them are used at most


def encode_numba(bpe: BPE, data: bytes, allowed: frozenset[str]) -> np.ndarray:
    """The ids of UTF-8 `data` with the special tokens `allowed`; ValueError for a pattern that is not known."""
    known = known_family(bpe.pattern)
    pool = tables.once(bpe, "memos", lambda bpe: deque())
    try:
        memo = pool.pop()
    except IndexError:
        memo = _empty_memo()
    dtype = tables.dtype(bpe)
    data, found = _cut_out(bpe, data, allowed)
    parts = [_encode_block(bpe, data, spans, known, memo).astype(dtype) for spans in _blocks(data, found)]
    pool.append(memo)
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _cut_out(bpe: BPE, data: bytes, allowed: frozenset[str]) -> tuple[bytes, Iterable[tuple[int, int, int]]]:
    """(text, (start, end, id) of the special tokens in it): `data`, or where it has to change its normalized spans."""
    if bpe.normalizer is not None or bpe.normalized_tokens:
        text = data.decode()
        if not is_plain(bpe, text):
            parts, found, end = [], [], 0
            for part, token_id in segments(bpe, text, allowed):
                parts.append(part.encode())
                end += len(parts[-1])
                if token_id >= 0:
                    found.append((end, end, token_id))
            return b"".join(parts), found
    if not allowed:
        return data, ()
    ids = tables.once(bpe, "encoded_specials", _encoded_specials)
    return data, ((*match.span(), ids[match.group()]) for match in special_matcher(allowed, True).finditer(data))


def _blocks(data: bytes, found: Iterable[tuple[int, int, int]]):
    """Lists of (start, end, id of the special token that follows or -1), each list about _BLOCK bytes."""
    spans: list[tuple[int, int, int]] = []
    block_start = start = 0
    for end, after, token_id in chain(found, [(len(data), len(data), -1)]):
        while end - block_start > _BLOCK:
            cut = SAFE_SPACE_BYTES.search(data, max(start + 1, block_start + _BLOCK - 1), end)
            if cut is None:
                break
            spans.append((start, cut.start(), -1))
            yield spans
            spans, block_start, start = [], cut.start(), cut.start()
        spans.append((start, end, token_id))
        start = after
        if start - block_start >= _BLOCK:
            yield spans
            spans, block_start = [], start
    if spans:
        yield spans


def _encoded_specials(bpe: BPE) -> dict[bytes, int]:
    return {name.encode(): token_id for name, token_id in tables.special_ids(bpe).items()}


def _encode_block(bpe: BPE, data: bytes, spans: list, known: tuple[int, int], memo: dict[str, Any]) -> np.ndarray:
    """The ids of the spans, a view of the memo's buffer."""
    start, stop = spans[0][0], spans[-1][1]
    block = data[start:stop] + _PADDING
    n = stop - start
    bounds = np.array(spans, np.int64)
    bounds[:, :2] -= start
    words = np.ndarray((n + 8,), np.uint64, block, strides=(1,))
    size = n + len(spans) + 2
    out = memo["out"] if size <= len(memo["out"]) else np.empty(size, np.uint32)
    byte_ids, pairs, whole, whole_bytes = tables.once(bpe, "arrays", _arrays)
    progress = memo["progress"]
    progress[:3] = 0, bounds[0, 0], 0
    text = np.frombuffer(block, np.uint8)
    scratch = memo["scratch"]
    while True:
        status = encode_some(
            text, words, bounds, progress, memo["ends"], class_table(), *known, byte_ids, pairs, whole, whole_bytes,
            memo["slots"], memo["bytes"], memo["ids"], *scratch, out,
        )  # fmt: skip
        if status == DONE:
            return out[: progress[2]]
        if status == GROW:
            _make_room(memo)
        else:
            scratch = _scratch(int(progress[6]))  # not kept: such pieces are rare and may be megabytes


def _empty_memo() -> dict[str, Any]:
    return {
        "slots": np.zeros((_SLOTS, 4), np.uint64),
        "bytes": np.empty(_SLOTS * 4, np.uint8),
        "ids": np.empty(_SLOTS * 2, np.int32),
        "progress": np.zeros(7, np.int64),  # see memo.encode_some
        "ends": np.empty(4096, np.int64),
        "scratch": _scratch(1024),
        "out": np.empty(_BLOCK + 4096, np.uint32),
    }


def _scratch(n: int) -> tuple[np.ndarray, ...]:
    """What merging a piece of n bytes needs: places, values, heap of merging.merge_long."""
    return np.empty((3, n), np.int64), np.empty(n, np.uint64), np.empty(3 * n, np.uint64)


def _make_room(memo: dict[str, Any]) -> None:
    """Four times the memo, or an empty one where it has its greatest size."""
    slots = memo["slots"]
    if len(slots) >= _MOST_SLOTS:
        slots[:] = 0
        memo["progress"][3:6] = 0
        return
    memo["slots"] = np.zeros((4 * len(slots), 4), np.uint64)
    rehash(slots, memo["slots"])
    for name in ("bytes", "ids"):
        old = memo[name]
        memo[name] = np.empty(4 * len(old), old.dtype)
        memo[name][: len(old)] = old


def _arrays(bpe: BPE) -> tuple[np.ndarray, ...]:
    """(ids of the single bytes or -1, table of merges, table of whole tokens or no rows, their bytes)."""
    ids = tables.token_ids(bpe)
    n = len(bpe.merges)
    left = np.fromiter((ids[left] for left, _ in bpe.merges), np.int64, n)
    right = np.fromiter((ids[right] for _, right in bpe.merges), np.int64, n)
    result = np.fromiter((ids[left + right] for left, right in bpe.merges), np.uint64, n)
    values = np.array(tables.ranks(bpe), np.uint64) << np.uint64(32) | result
    pairs = np.zeros((_table_size(n), 2), np.uint64)
    fill_pairs(pairs, left, right, values)
    tokens = tables.whole_tokens(bpe)
    whole = np.zeros((_table_size(len(tokens)) if tokens else 0, 3), np.uint64)
    whole_bytes = np.frombuffer(b"".join(tokens) or b"\0", np.uint8)
    if tokens:
        ends = np.cumsum([len(token) for token in tokens])
        fill_whole(whole, whole_bytes, ends, np.array(list(tokens.values()), np.int64))
    return np.array(tables.byte_ids(bpe), np.int64), pairs, whole, whole_bytes


def _table_size(n: int) -> int:
    """A power of 2, at most half of which n entries fill."""
    return 1 << (2 * n + 1).bit_length()
