"""Sorting more records than memory holds: sorted runs in files, then merges of many runs at a time.

    for rows in sorted_blocks(blocks, columns=2, folder=folder, memory=1 << 30):    # ascending over all blocks
        ...

A record is a row of `columns` numbers of 64 bits, without sign; rows are ordered by the first column, equal ones by the
second, and so on. Equal rows are all kept. Source: Knuth, The Art of Computer Programming 3, section 5.4.

Legend: N rows, C columns. Disk: 8 C N bytes, twice that while runs are merged in more than one round.
"""

import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from purelm.data.checks import check_int
from purelm.files import staging, sync
from purelm.tokenizer.engine import has_numba

__all__ = ["in_groups", "least_memory", "read_rows", "sort_file", "sorted_blocks", "sorted_rows"]

U64 = NDArray[np.uint64]
Engine = Literal["auto", "python", "numba"]

MERGED_ROWS = 1 << 14  # of a run that lie in memory while many are merged: reads of some 200 kB
COMPILED_FROM = 1 << 14  # rows in all, for which loading the machine code has paid after some blocks
GROUPED_ROWS = 1 << 16  # looked at at a time, so that what is made of them stays in a core's cache
MOST_RUNS = 128  # merged at a time: as many files are open


def least_memory(columns: int) -> int:
    """The smallest memory, bytes, that rows of `columns` can be sorted in: room for eight of them."""
    return 8 * _row_bytes(columns)


def _row_bytes(columns: int) -> int:
    """Bytes for each row that is sorted: the row itself, three copies, and three numbers of its place."""
    return 4 * 8 * columns + 24


def sorted_rows(rows_NC: U64, engine: Engine = "auto") -> U64:
    """The rows in ascending order: by the first column, and by all of them where it is equal.

    engine: "numba" deals rows out by their bits, most significant first, several times as fast as numpy's sorts where
    many rows share a first column; "auto" is "numba" for many rows, where it is installed (the extra `fast`).
    """
    if engine == "numba" or (engine == "auto" and len(rows_NC) >= COMPILED_FROM and has_numba()):
        from purelm.curate.compiled.sorting import sort_rows

        found, n = np.array(rows_NC, order="C"), rows_NC.shape[1]
        sort_rows(found, np.empty_like(found), np.empty(256, np.int64), np.empty((256 * 9 * n, 3), np.int64))
        return found
    if not len(rows_NC):
        return rows_NC.copy()
    found = rows_NC[np.argsort(rows_NC[:, 0])]
    equal = found[1:, 0] == found[:-1, 0]
    if equal.any():
        tied = np.zeros(len(found), bool)
        tied[1:] |= equal
        tied[:-1] |= equal
        part = found[tied]
        found[tied] = part[np.lexsort(part.T[::-1])]
    return found


def sorted_blocks(blocks: Iterable[U64], columns: int, folder: Path, memory: int) -> Generator[U64, None, None]:
    """All rows of all blocks in ascending order, as blocks again (none empty).

    Args:
        blocks: arrays (any n, columns) of uint64.
        folder: where a temporary folder for the runs is made. It is removed when the iterator ends or is closed, and so
            is what killed processes left there.
        memory: bytes for sorting and merging, of which a block of the input is no part; at least least_memory(columns).

    Raises ValueError for too little memory and for blocks of another shape or dtype.
    """
    check_int("columns", columns, 1, 64)
    check_int("memory", memory, least_memory(columns))
    return _sorted_blocks(blocks, columns, folder, memory)


def _sorted_blocks(blocks: Iterable[U64], columns: int, folder: Path, memory: int) -> Generator[U64, None, None]:
    most = memory // _row_bytes(columns)
    with staging(folder) as staged:
        runs: list[Path] = []
        n = 0
        engine: Engine = "python"
        last: U64 | None = None  # a run that need not be written if it is the only one
        for rows in _filled(blocks, columns, most):
            if last is not None:
                runs.append(_written(staged / f"0-{len(runs)}", [last]))
            n += len(rows)
            engine = "numba" if n >= COMPILED_FROM and has_numba() else "python"
            last = sorted_rows(rows, engine)
        if last is None:
            return
        if not runs:
            yield last
            return
        runs.append(_written(staged / f"0-{len(runs)}", [last]))
        last = None
        fan = min(max(most // MERGED_ROWS, 2), MOST_RUNS)
        level = 1
        while len(runs) > fan:
            merged: list[Path] = []
            for i in range(0, len(runs), fan):
                group = runs[i : i + fan]
                merged.append(_written(staged / f"{level}-{len(merged)}", _merged(group, columns, most, engine)))
                for path in group:
                    path.unlink()
            runs, level = merged, level + 1
        yield from _merged(runs, columns, most, engine)


def _filled(blocks: Iterable[U64], columns: int, most: int) -> Iterator[U64]:
    """The rows in arrays of `most`, the last of fewer; each is valid until the next is asked for."""
    buffer = np.empty((0, columns), np.uint64)
    n = 0
    for block in blocks:
        if block.dtype != np.uint64 or block.ndim != 2 or block.shape[1] != columns:
            raise ValueError(f"blocks must be uint64 (n, {columns}), got {block.dtype} {block.shape}")
        while len(block):
            if n == len(buffer) < most:  # grows with what comes: a small input takes little memory
                grown = np.empty((min(max(2 * n, len(block)), most), columns), np.uint64)
                grown[:n] = buffer
                buffer = grown
            taken = min(len(buffer) - n, len(block))
            buffer[n : n + taken] = block[:taken]
            n, block = n + taken, block[taken:]
            if n == most:
                yield buffer
                n = 0
    if n:
        yield buffer[:n]


def _written(path: Path, blocks: Iterable[U64]) -> Path:
    with path.open("wb") as file:
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<u8").data)
    return path


def read_rows(path: Path, columns: int, n_rows: int) -> Iterator[U64]:
    """The rows of a file in blocks of at most n_rows. ValueError for a file that ends within a row."""
    check_int("columns", columns, 1, 64)
    check_int("n_rows", n_rows, 1)
    size = path.stat().st_size
    if size % (8 * columns):
        raise ValueError(f"{path}: {size} bytes are no whole number of rows of {8 * columns}")
    with path.open("rb") as file:
        while len(found := np.fromfile(file, "<u8", n_rows * columns)):
            yield found.astype(np.uint64, copy=False).reshape(-1, columns)


def _merged(paths: list[Path], columns: int, most: int, engine: Engine) -> Iterator[U64]:
    """Of each run some rows are in memory. Up to the least of their last rows, all rows that exist are among them."""
    n_rows = max(most // len(paths), 1)
    runs = [read_rows(path, columns, n_rows) for path in paths]
    heads = [next(run) for run in runs]  # no run is empty
    while heads:
        bound = min(head[-1].tolist() for head in heads)
        cuts = [_n_up_to(head, bound) for head in heads]
        yield sorted_rows(np.concatenate([head[:cut] for head, cut in zip(heads, cuts, strict=True)]), engine)
        left = []
        for i, (head, cut) in enumerate(zip(heads, cuts, strict=True)):
            left.append(head[cut:] if cut < len(head) else next(runs[i], None))
        runs = [run for run, head in zip(runs, left, strict=True) if head is not None]
        heads = [head for head in left if head is not None]


def _n_up_to(rows_NC: U64, bound: list[int]) -> int:
    """How many of the sorted rows are at most `bound`."""
    low, high = 0, len(rows_NC)
    for column, value in enumerate(bound):
        part = rows_NC[low:high, column]
        low, high = (low + int(np.searchsorted(part, np.uint64(value), side)) for side in ("left", "right"))
    return high


def in_groups(blocks: Iterable[U64], n_keys: int) -> Iterator[tuple[U64, U64, NDArray[np.uint8]]]:
    """Sorted rows and their groups, which are equal in the first n_keys columns; a group may go on in the next block.

    Yields (rows, first, place), some rows at a time. first (n,): the last column of the first row of each one's group.
    place (n,): 0 for that row, 1 for the second one of the group, 2 for all after it.

    >>> (found,) = in_groups([np.array([[3, 5], [3, 6], [4, 0]], np.uint64)], 1)
    >>> found[1].tolist(), found[2].tolist()
    ([5, 5, 0], [0, 1, 0])
    """
    held: tuple[U64, U64, int] | None = None  # the last row's key, first and place
    for block in blocks:
        for start in range(0, len(block), GROUPED_ROWS):
            rows = block[start : start + GROUPED_ROWS]
            again = np.ones(len(rows), bool)
            for column in rows[:, :n_keys].T:
                again[1:] &= column[1:] == column[:-1]
            again[0] = held is not None and bool((rows[0, :n_keys] == held[0]).all())
            place = again.astype(np.uint8)
            place[1:] += again[1:] & again[:-1]
            firsts = rows[~again, -1]
            if held is not None and again[0]:
                firsts = np.append(held[1], firsts)
                place[0] = min(held[2] + 1, 2)
            new = ~again
            new[0] = True
            first = firsts[np.cumsum(new) - 1]
            held = rows[-1, :n_keys].copy(), first[-1:], int(place[-1])
            yield rows, first, place


def sort_file(blocks: Iterable[U64], output: Path, columns: int, memory: int) -> int:
    """Write the rows in ascending order, little-endian, to `output` at once or not at all; returns how many.

    Arguments and errors are those of `sorted_blocks`; temporary files lie beside the output.
    """
    n = 0
    ordered = sorted_blocks(blocks, columns, output.parent, memory)
    with staging(output.parent) as staged:
        path = staged / "sorted"
        with path.open("wb") as file:
            for block in ordered:
                file.write(np.ascontiguousarray(block, "<u8").data)
                n += len(block)
        sync(path)
        os.replace(path, output)
    return n
