"""The compiled encoder: split, look up, merge what is new, in loops of `purelm.tokenizer.kernels` (numba).

A memo maps pieces of up to 64 bytes to their ids. It compares the bytes of the piece, never a hash alone; it starts at
2 MB, grows to 32 MB of slots, and is emptied when that is full, so the pieces of a new domain find room. Threads may
encode at once without the GIL: a call takes a memo out of the BPE's pool and puts it back, and a call that finds none
makes one, so no two calls ever share a memo.
"""

import re
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE
from purelm.tokenizer.classes import class_table
from purelm.tokenizer.patterns import family

_BLOCK = 1 << 18  # bytes a kernel call: its buffers stay in the cache
_PADDING = bytes(16)  # the kernel reads words of 8 bytes at any place of the text
_SLOTS, _MOST_SLOTS = 1 << 16, 1 << 20  # of 32 bytes; half of them are used at most
# A cut before a space is safe where the character before it is not white space (see chunks.py). Every white-space
# character outside ASCII ends in one of the bytes left out here.
_SAFE = re.compile(rb"(?<=[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf]) ")


def encode_numba(bpe: BPE, data: bytes, names: Mapping[bytes, int], matcher: re.Pattern | None) -> np.ndarray:
    """The ids of UTF-8 `data`; special tokens are what `matcher` finds, with the ids `names`.

    Raises ValueError when the pattern is not one that the compiled splitter knows.
    """
    known = family(bpe.pattern)
    if known is None:
        raise ValueError(f"pattern {bpe.pattern!r} has no compiled splitter: use engine='python'")
    pool = tables.once(bpe, "memos", lambda bpe: deque())
    try:
        memo = pool.pop()
    except IndexError:
        memo = _empty_memo()
    dtype = tables.dtype(bpe)
    parts = [_encode_block(bpe, data, spans, known, memo).astype(dtype) for spans in _blocks(data, names, matcher)]
    pool.append(memo)
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _blocks(data: bytes, names: Mapping[bytes, int], matcher: re.Pattern | None):
    """Lists of (start, end, id of the special token that follows or -1), each list about _BLOCK bytes."""
    spans: list[tuple[int, int, int]] = []
    block_start = start = 0
    for end, after in _special_spans(data, matcher):
        while end - block_start > _BLOCK:
            cut = _SAFE.search(data, max(start, block_start + _BLOCK - 1), end)
            if cut is None or cut.start() >= end:
                break
            spans.append((start, cut.start(), -1))
            yield spans
            spans, block_start, start = [], cut.start(), cut.start()
        spans.append((start, end, names[data[end:after]] if after > end else -1))
        start = after
        if start - block_start >= _BLOCK:
            yield spans
            spans, block_start = [], start
    if spans:
        yield spans


def _special_spans(data: bytes, matcher: re.Pattern | None):
    """(start, end) of each special token, then of the end of the text."""
    if matcher is not None:
        for match in matcher.finditer(data):
            yield match.span()
    yield len(data), len(data)


def _encode_block(bpe: BPE, data: bytes, spans: list, known: tuple[int, int], memo: dict[str, Any]) -> np.ndarray:
    """The ids of the spans, a view of the memo's buffer."""
    from purelm.tokenizer import kernels

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
        status = kernels.encode_some(
            text, words, bounds, progress, memo["ends"], class_table(), *known, byte_ids, pairs, whole, whole_bytes,
            memo["slots"], memo["bytes"], memo["ids"], *scratch, out,
        )  # fmt: skip
        if status == kernels.DONE:
            return out[: progress[2]]
        if status == kernels.GROW:
            _make_room(memo)
        else:
            scratch = _scratch(int(progress[6]))  # not kept: such pieces are rare, and may be megabytes


def _empty_memo() -> dict[str, Any]:
    return {
        "slots": np.zeros((_SLOTS, 4), np.uint64),
        "bytes": np.empty(_SLOTS * 4, np.uint8),
        "ids": np.empty(_SLOTS * 2, np.int32),
        "progress": np.zeros(7, np.int64),  # see kernels.encode_some
        "ends": np.empty(4096, np.int64),
        "scratch": _scratch(1024),
        "out": np.empty(_BLOCK + 4096, np.uint32),
    }


def _scratch(n: int) -> tuple[np.ndarray, ...]:
    """What merging a piece of n bytes needs: places, values, heap of kernels.merge_long."""
    return np.empty((3, n), np.int64), np.empty(n, np.uint64), np.empty(3 * n, np.uint64)


def _make_room(memo: dict[str, Any]) -> None:
    """Four times the memo, or an empty one where it has its greatest size."""
    from purelm.tokenizer import kernels

    slots = memo["slots"]
    if len(slots) >= _MOST_SLOTS:
        slots[:] = 0
        memo["progress"][3:6] = 0
        return
    memo["slots"] = np.zeros((4 * len(slots), 4), np.uint64)
    kernels.rehash(slots, memo["slots"])
    for name in ("bytes", "ids"):
        old = memo[name]
        memo[name] = np.empty(4 * len(old), old.dtype)
        memo[name][: len(old)] = old


def _arrays(bpe: BPE) -> tuple[np.ndarray, ...]:
    """(ids of the single bytes, table of merges, table of whole tokens or no rows, their bytes)."""
    from purelm.tokenizer import kernels

    ids = tables.token_ids(bpe)
    n = len(bpe.merges)
    left = np.fromiter((ids[left] for left, _ in bpe.merges), np.int64, n)
    right = np.fromiter((ids[right] for _, right in bpe.merges), np.int64, n)
    result = np.fromiter((ids[left + right] for left, right in bpe.merges), np.uint64, n)
    values = np.array(tables.ranks(bpe), np.uint64) << np.uint64(32) | result
    pairs = np.zeros((_table_size(n), 2), np.uint64)
    kernels.fill_pairs(pairs, left, right, values)
    tokens = tables.whole_tokens(bpe)
    whole = np.zeros((_table_size(len(tokens)) if tokens else 0, 3), np.uint64)
    whole_bytes = np.frombuffer(b"".join(tokens) or b"\0", np.uint8)
    if tokens:
        ends = np.cumsum([len(token) for token in tokens])
        kernels.fill_whole(whole, whole_bytes, ends, np.array(list(tokens.values()), np.int64))
    return np.array(tables.byte_ids(bpe), np.int64), pairs, whole, whole_bytes


def _table_size(n: int) -> int:
    """A power of 2, at most half of which n entries fill."""
    return 1 << (2 * n + 1).bit_length()
