"""Substrings that stand more than once in a corpus, cut out: exact substring deduplication.

    kept = without_repeats(texts, n_bytes=200)                          # str -> str
    spans = repeated_token_spans(tokens, n_tokens=50)                   # (spans, 2) for each array of tokens
    spans = repeated_spans_of_files(["a.txt", "b.txt"], "scratch", memory=1 << 30)

A window is n items in a row of one document. It repeats if an equal one, in another document or the same, does not
overlap it; of equal windows only the first and the others count. A span is a union of such windows. keep="first" cuts
the windows whose first equal ends before they begin; keep="none" cuts the first too. So nothing is cut for overlapping
itself: of a line of 1,000 dashes, n = 200, the first 200 stay. A first window may still lose items to another window
that overlaps it and repeats an earlier one.

Source: Lee et al. 2021, "Deduplicating Training Data Makes Language Models Better", section 4.1, with 50 BPE tokens,
there by a suffix array. Here windows are compared that can be equal, which takes far less memory:

1. Of the w = n - k + 1 runs of k = n/2 items in a window, the one of least hash: equal windows have equal ones, and a
   new one comes every (w + 1)/2 items (Schleimer et al. 2003, "Winnowing"; robust form, theorem 1). These are sorted.
2. Windows whose least hash came more than once: their own hashes, sorted with their places.
3. Each window is compared with the first of its hash, item by item; if they differ, 2. starts again with another base.

So the result is exact whatever the hashes. Memory: the text, 16/w bytes an item for 1., and some 90 bytes for each
window of 2. and 3., which are about as many as the items that repeat; with a folder, all three are sorted in files
within `memory`. Legend: N items, D documents.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from purelm.curate.external_sort import in_groups, least_memory, sort_file, sorted_blocks, sorted_rows
from purelm.curate.shingles import U64, mixed
from purelm.data.checks import check_int
from purelm.files import staging
from purelm.tokenizer.engine import has_numba

__all__ = [
    "repeated_spans",
    "repeated_spans_of_files",
    "repeated_token_spans",
    "repeats",
    "without_repeats",
    "without_spans",
]

LEAST = 2 * least_memory(2)
PIECE = 1 << 17  # windows of a document that are hashed at a time: their hashes stay in a core's cache
AT_ONCE = 1 << 20  # windows of all pieces of a call
COPIED = 1 << 22  # bytes
BASES = 16  # tried: one in some 2^60 fails for a pair of windows

Keep = Literal["first", "none"]
Engine = Literal["auto", "python", "numba"]
I64 = NDArray[np.int64]


def without_repeats(texts: Sequence[str], n_bytes: int = 200, *, keep: Keep = "first") -> list[str]:
    """The texts without substrings of at least n_bytes of UTF-8 that repeat. No character is cut in two.

    >>> without_repeats(["one, and two", "three, and two"], n_bytes=8)
    ['one, and two', 'thre']
    """
    data = [text.encode("utf-8", "surrogatepass") for text in texts]
    found = repeated_spans(data, n_bytes, keep=keep)
    pairs = zip(data, found, strict=True)
    return [without_spans(part, spans).decode("utf-8", "surrogatepass") for part, spans in pairs]


def without_spans(data: bytes, spans: I64) -> bytes:
    """What lies outside of the spans (any, 2), ascending and apart."""
    edges = [0, *spans.reshape(-1).tolist(), len(data)]
    return b"".join(data[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))


def repeated_spans(
    documents: Sequence[bytes], n_bytes: int = 200, *, keep: Keep = "first", engine: Engine = "auto"
) -> list[I64]:
    """For each document, UTF-8, the spans (any, 2) to cut: start and end, ascending and apart, at character borders.

    A span that begins or ends within a character is made smaller, by at most three bytes a side. Bytes that are no
    UTF-8 are cut as they are. Arguments and errors are those of `repeats`.
    """
    items, starts = _joined([np.frombuffer(data, np.uint8) for data in documents], np.uint8)
    return [
        _at_characters(np.frombuffer(data, np.uint8), spans)
        for data, spans in zip(documents, repeats(items, starts, n_bytes, keep=keep, engine=engine), strict=True)
    ]


def repeated_token_spans(
    tokens: Sequence[NDArray[Any]], n_tokens: int = 50, *, keep: Keep = "first", engine: Engine = "auto"
) -> list[I64]:
    """For each array of tokens (any,), of one dtype, the spans (any, 2) to cut. See `repeats`, also for one array."""
    items, starts = _joined(tokens, tokens[0].dtype if len(tokens) else np.uint16)
    return repeats(items, starts, n_tokens, keep=keep, engine=engine)


def repeated_spans_of_files(
    paths: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    *,
    n_bytes: int = 200,
    keep: Keep = "first",
    memory: int = 1 << 30,
    engine: Engine = "auto",
) -> list[I64]:
    """`repeated_spans` of files, each a document, for a corpus that memory does not hold.

    In the folder lie, for the time of the call, a copy of all files, which is mapped into memory, and what is sorted:
    some 48 bytes for each window that repeats. In memory: `memory`, some 30 MB, 8 bytes
    for each least hash that repeats, and the spans.
    """
    check_int("memory", memory, LEAST)
    files = [Path(path) for path in paths]
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    with staging(Path(folder)) as staged:
        starts = [0]
        with (staged / "all").open("wb") as out:
            for path in files:
                with path.open("rb") as file:
                    while data := file.read(COPIED):
                        out.write(data)
                starts.append(out.tell())
        items = np.memmap(staged / "all", np.uint8, "r") if starts[-1] else np.zeros(0, np.uint8)
        edges = np.array(starts, np.int64)
        found = repeats(items, edges, n_bytes, keep=keep, folder=staged / "sorts", memory=memory, engine=engine)
        return [
            _at_characters(items[start:end], spans)
            for start, end, spans in zip(starts[:-1], starts[1:], found, strict=True)
        ]


def repeats(
    items_N: NDArray[Any],
    starts: I64,
    n: int,
    *,
    keep: Keep = "first",
    folder: Path | None = None,
    memory: int = 1 << 30,
    engine: Engine = "auto",
) -> list[I64]:
    """For each document the spans (any, 2) of its own items to cut, ascending and apart. See the top of this file.

    Args:
        items_N: all documents one after the other, uint8, uint16 or uint32; may be mapped from a file.
        starts: (D + 1,) where each begins, and N.
        n: items of a window; the least length of a span, 2 or more.
        folder: for sorting in files within `memory` bytes; None: in memory.
        engine: "numba" (the extra `fast`); "python", some N n bytes of memory, for small inputs; "auto": the first if
            numba is installed. Results are equal.

    >>> repeats(np.frombuffer(b"abcdeXabcdY", np.uint8), np.array([0, 11]), 4)[0].tolist()
    [[6, 10]]
    """
    check_int("n", n, 2)
    check_int("memory", memory, LEAST)
    if keep not in ("first", "none"):
        raise ValueError(f'keep={keep!r}; allowed: "first", "none"')
    if engine not in ("auto", "python", "numba"):
        raise ValueError(f'engine={engine!r}; allowed: "auto", "python", "numba"')
    if engine == "numba" and not has_numba():
        raise ImportError("engine='numba' needs numba, which is not installed: pip install 'purelm[fast]'")
    if items_N.ndim != 1 or items_N.dtype not in (np.uint8, np.uint16, np.uint32):
        raise ValueError(f"items_N must be uint8, uint16 or uint32 (N,), got {items_N.dtype} {items_N.shape}")
    edges = np.asarray(starts, np.int64)
    if edges.ndim != 1 or not len(edges) or edges[0] or edges[-1] != len(items_N) or (np.diff(edges) < 0).any():
        raise ValueError(f"starts must ascend from 0 to {len(items_N)}, got {starts}")
    if engine == "python" or not has_numba():
        return _spans([_plain(items_N, edges, n, keep)], edges, n)
    return _spans(_found(np.asarray(items_N), edges, n, keep, folder, memory), edges, n)


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> tuple[NDArray[Any], I64]:
    for part in parts:
        if part.dtype != dtype or part.ndim != 1:
            raise ValueError(f"documents must be {np.dtype(dtype)} (n,) all, got {part.dtype} {part.shape}")
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)]).astype(np.int64)
    return np.concatenate([np.zeros(0, dtype), *parts]), starts


def _plain(items: NDArray[Any], edges: I64, n: int, keep: Keep) -> I64:
    """Places of the windows to cut, ascending: a dictionary of the windows themselves."""
    places: dict[bytes, list[int]] = {}
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        for p in range(start, end - n + 1):
            places.setdefault(items[p : p + n].tobytes(), []).append(p)
    cut: list[int] = []
    for found in places.values():
        if keep == "first":
            cut.extend(p for p in found if p >= found[0] + n)
        elif found[-1] >= found[0] + n:
            cut.extend(found)
    return np.array(sorted(cut), np.int64)


def _found(items: NDArray[Any], edges: I64, n: int, keep: Keep, folder: Path | None, memory: int) -> Iterator[I64]:
    """Places of the windows to cut, ascending, in blocks."""
    from purelm.curate.compiled.substrings import first_difference

    k = max(n // 2, 1)
    repeated = _repeated(_least(items, edges, n, k), folder, memory)
    for attempt in range(BASES):
        with nullcontext() if folder is None else staging(folder) as staged:
            pairs = _pairs(_hashed(items, edges, n, k, repeated, _base(attempt)), n, keep, staged, memory // 2)
            ordered = _ordered(pairs, staged, memory // 2)
            blocks = [ordered[i : i + AT_ONCE] for i in range(0, len(ordered), AT_ONCE)]
            # All are compared before the first is given out.
            if all(first_difference(items, rows[:, 0], rows[:, 1], n) < 0 for rows in blocks):
                for rows in blocks:
                    yield rows[:, 0].astype(np.int64)
                return
    raise RuntimeError(f"different windows of {n} items have one hash, for each of {BASES} bases")


def _base(attempt: int) -> np.uint64:
    """Of the windows' hash: below 2^61 - 1."""
    return mixed(np.array([attempt + 1], np.uint64))[0] >> np.uint64(4)


def _pieces(edges: I64, n: int) -> Iterator[tuple[I64, I64]]:
    """(starts, ends) of ranges of windows, by where they begin, each in one document; AT_ONCE windows at a time."""
    firsts: list[int] = []
    ends: list[int] = []
    size = 0
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        for first in range(start, end - n + 1, PIECE):
            firsts.append(first)
            ends.append(min(first + PIECE, end - n + 1))
            size += ends[-1] - first
            if size + PIECE > AT_ONCE:
                yield np.array(firsts, np.int64), np.array(ends, np.int64)
                firsts, ends, size = [], [], 0
    if size:
        yield np.array(firsts, np.int64), np.array(ends, np.int64)


def _least(items: NDArray[Any], edges: I64, n: int, k: int) -> Iterator[U64]:
    """(any, 1): the least hash of each window, once for each place."""
    from purelm.curate.compiled.substrings import least_runs

    hashes = np.empty(PIECE + n, np.uint64)
    found = np.empty(AT_ONCE, np.uint64)
    for firsts, ends in _pieces(edges, n):
        m = least_runs(items, firsts, ends, n, k, hashes, found)
        yield found[:m, None].copy()


def _hashed(items: NDArray[Any], edges: I64, n: int, k: int, repeated: U64, base: np.uint64) -> Iterator[U64]:
    """(any, 2): hash and place of the windows whose least hash is a repeated one."""
    from purelm.curate.compiled.substrings import windows

    hashes = np.empty(PIECE + n, np.uint64)
    rows = np.empty((AT_ONCE, 2), np.uint64)
    for firsts, ends in _pieces(edges, n) if len(repeated) else ():
        m = windows(items, firsts, ends, n, k, hashes, repeated, base, rows)
        yield rows[:m].copy()


def _sorted(blocks: Iterable[U64], columns: int, folder: Path | None, memory: int) -> Iterator[U64]:
    if folder is not None:
        return sorted_blocks(blocks, columns, folder, memory)
    rows = sorted_rows(np.concatenate([np.zeros((0, columns), np.uint64), *blocks]))
    return iter([rows] if len(rows) else [])


def _repeated(blocks: Iterable[U64], folder: Path | None, memory: int) -> U64:
    """The hashes that come more than once, ascending."""
    found = [rows[place == 1, 0] for rows, _, place in in_groups(_sorted(blocks, 1, folder, memory), 1)]
    return np.concatenate([np.zeros(0, np.uint64), *found])


def _pairs(blocks: Iterable[U64], n: int, keep: Keep, folder: Path | None, memory: int) -> Iterator[U64]:
    """(any, 2): each window to cut, and the first of the same hash; for the first, the last."""
    held: U64 = np.zeros((0, 2), np.uint64)
    for rows in _sorted(blocks, 2, folder, memory):
        rows = np.concatenate([held, rows])
        first = int(np.searchsorted(rows[:, 0], rows[-1, 0]))  # of the last hash: the next block may go on with it
        yield _pairs_of(rows[:first], n, keep)
        held = rows[first:]
    yield _pairs_of(held, n, keep)


def _pairs_of(rows: U64, n: int, keep: Keep) -> U64:
    """The same of whole groups, sorted by (hash, place)."""
    if not len(rows):
        return rows
    heads = np.flatnonzero(np.append(True, rows[1:, 0] != rows[:-1, 0]))
    sizes = np.diff(np.append(heads, len(rows)))
    place = rows[:, 1]
    first, last = np.repeat(place[heads], sizes), np.repeat(place[heads + sizes - 1], sizes)
    far = place - first >= n
    cut = far if keep == "first" else last - first >= n
    other = np.where(place != first, first, last)
    return np.stack([place[cut], other[cut]], 1)


def _ordered(pairs: Iterable[U64], folder: Path | None, memory: int) -> U64:
    """The rows by their first column; mapped from a file if there is a folder."""
    if folder is None:
        return next(_sorted(pairs, 2, None, memory), np.zeros((0, 2), np.uint64))
    n = sort_file(pairs, folder / "pairs", 2, memory)
    return np.memmap(folder / "pairs", "<u8", "r", shape=(n, 2)) if n else np.zeros((0, 2), np.uint64)


def _spans(blocks: Iterable[I64], edges: I64, n: int) -> list[I64]:
    """For each document the unions of windows that overlap or touch, counted from its start."""
    starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for places in blocks:
        if not len(places):
            continue
        document = np.searchsorted(edges, places, "right")
        new = np.append(True, (np.diff(places) > n) | (np.diff(document) > 0))
        first, last = places[new], places[np.append(new[1:], True)] + n
        if len(ends[-1]) and first[0] <= ends[-1][-1] and starts[-1][-1] >= edges[document[0] - 1]:
            ends[-1][-1] = last[0]
            first, last = first[1:], last[1:]
        if len(first):
            starts.append(first)
            ends.append(last)
    spans = np.stack([np.concatenate(starts), np.concatenate(ends)], 1)
    # An empty document has the place of the next one: it gets no span.
    cuts = np.searchsorted(spans[:, 0], edges)
    return [spans[a:b] - edge for a, b, edge in zip(cuts[:-1], cuts[1:], edges[:-1], strict=True)]


def _at_characters(data: NDArray[np.uint8], spans: I64) -> I64:
    """Spans whose ends are no continuation bytes (10xxxxxx) of UTF-8: later starts, earlier ends, by 3 at most."""
    if not len(spans):
        return spans
    start, end = spans[:, 0].copy(), spans[:, 1].copy()
    for side, step in ((start, 1), (end, -1)):
        for _ in range(3):
            inside = side < len(data)
            inside[inside] = data[side[inside]] & 0xC0 == 0x80
            side[inside] += step
    return np.stack([start, end], 1)[start < end]
