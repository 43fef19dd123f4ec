"""Files without the lines that stand more than once in all of them: two passes, memory within a limit.

    exact_line_deduplication(["a.txt", "b.txt"], "out")    # CS336, assignment 4: out/a.txt, out/b.txt

A line's hash has 128 bits, two of 64: for each byte c, h <- (h ^ c) P mod 2^64, h <- h ^ (h >> 32), with other starts
and odd factors P. Taken for random, two different lines among N share one with probability N^2 / 2^129: 1.5e-19 for
N = 10^10. 64 bits would not do: N^2 / 2^65 is above 1 there, and 3e-8 for N = 10^6. Lines made to collide can be found.

Lines are bytes between line feeds; the last one may have none, and equals a line that has one.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from purelm.curate.external_sort import least_memory, sort_file, sorted_blocks
from purelm.curate.limits import check_several
from purelm.curate.shingles import U64
from purelm.data.checks import check_int
from purelm.files import refuse_overwrite, staging, sync
from purelm.tokenizer.engine import has_numba

__all__ = ["exact_line_deduplication", "line_hashes"]

BLOCK = 1 << 22  # bytes of a file that are hashed at a time
LEAST = 2 * least_memory(3)
# Starts and factors: parts of the golden ratio, of splitmix64 and of PCG's multiplier, all odd.
FACTORS = np.array([0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xBF58476D1CE4E5B9, 0x5851F42D4C957F2D], np.uint64)

Engine = Literal["auto", "python", "numba"]


def line_hashes(data: bytes, engine: Engine = "auto") -> tuple[U64, NDArray[np.int64]]:
    """(hashes (lines, 2), ends (lines,)): of each line without its line feed, and the place behind that.

    Both engines give equal hashes; "auto" is "numba" where it is installed (the extra `fast`), some 100 times as fast.

    >>> hashes, ends = line_hashes(b"a\\nb\\na", "python")
    >>> ends.tolist(), (hashes[0] == hashes[2]).all(), (hashes[0] == hashes[1]).any()
    ([2, 4, 5], np.True_, np.False_)
    """
    if engine not in ("auto", "python", "numba"):
        raise ValueError(f'engine={engine!r}; allowed: "auto", "python", "numba"')
    if engine == "numba" and not has_numba():
        raise ImportError("engine='numba' needs numba, which is not installed: pip install 'purelm[fast]'")
    if engine == "python" or not has_numba():
        return _plain(data)
    from purelm.curate.compiled.lines import hash_lines

    n = data.count(b"\n") + 1
    rows, ends = np.empty((n, 2), np.uint64), np.empty(n, np.int64)
    n = hash_lines(np.frombuffer(data, np.uint8), FACTORS, rows, ends)
    return rows[:n], ends[:n]


def _plain(data: bytes) -> tuple[U64, NDArray[np.int64]]:
    rows, ends, mask, place = [], [], (1 << 64) - 1, 0
    starts, factors = FACTORS[:2].tolist(), FACTORS[2:].tolist()
    for line in _cut(data):
        both = []
        for h, factor in zip(starts, factors, strict=True):
            for byte in line.removesuffix(b"\n"):
                h = (h ^ byte) * factor & mask
                h ^= h >> 32
            both.append(h)
        place += len(line)
        rows.append(both)
        ends.append(place)
    return np.array(rows, np.uint64).reshape(-1, 2), np.array(ends, np.int64)


def _cut(data: bytes) -> list[bytes]:
    """Lines with their line feeds."""
    *whole, rest = data.split(b"\n")
    return [*(line + b"\n" for line in whole), *([rest] if rest else [])]


def exact_line_deduplication(
    input_files: Sequence[str | os.PathLike],
    output_directory: str | os.PathLike,
    *,
    keep: Literal["none", "first"] = "none",
    memory: int = 1 << 30,
    engine: Engine = "auto",
) -> None:
    """Write each file under its own name to the folder, without lines that stand more than once in all files together.

    Pass one hashes and sorts (in files, if they are many) and leaves the hashes that repeat, with the place of the
    first; pass two reads the files again. Outputs come into place one by one, when all of them are complete.

    Args:
        keep: of a line that stands more than once: "none", or the "first" in the order of files and lines.
        memory: bytes for sorting. Beside it: blocks of some 4 MiB, or the longest line; the hashes that repeat, 24
            bytes each in a file that is mapped into memory, and 8 of each in memory itself.

    Lines that are empty, or of white space, are lines like others; "a\\r\\n" is another than "a\\n".

    Raises ValueError for two inputs of one name, one file under two names, an output that would replace an input or a
    folder, a missing file, and numbers out of range; nothing is written then.
    """
    if keep not in ("none", "first"):
        raise ValueError(f'keep={keep!r}; allowed: "none", "first"')
    check_int("memory", memory, LEAST)
    check_several("input_files", input_files)
    paths, folder = [Path(path) for path in input_files], Path(output_directory)
    _check_files(paths, folder)
    names = [path.name for path in paths]
    line_hashes(b"", engine)  # refuses a wrong engine before anything is written
    with staging(folder) as staged:
        repeated = _repeated(_numbered(paths, engine), staged, memory)
        firsts = np.ascontiguousarray(repeated[:, 0])  # a binary search of a column would copy it each time
        n = 0
        for path in paths:
            with (staged / f"out-{path.name}").open("wb") as file:
                for data in _blocks(path):
                    hashes, ends = line_hashes(data, engine)
                    first = _lookup(repeated, firsts, hashes)
                    kept = first < 0
                    if keep == "first":
                        kept |= first == np.arange(n, n + len(ends))
                    n += len(ends)
                    file.write(_kept(data, ends, kept, engine))
        for name in names:
            sync(staged / f"out-{name}")
        for name in names:
            os.replace(staged / f"out-{name}", folder / name)


def _check_files(paths: Sequence[Path], folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_directory {folder}: is no folder")
    names: set[str] = set()
    files: dict[tuple[int, int], Path] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if path.name in names:
            raise ValueError(f"{path}: another input is named {path.name} too, and outputs keep their names")
        names.add(path.name)
        status = path.stat()
        if (first := files.setdefault((status.st_dev, status.st_ino), path)) != path:
            raise ValueError(f"{path}: is the same file as {first}, so each of its lines would stand there twice")
        if (folder / path.name).is_dir():
            raise ValueError(f"{folder / path.name}: is a folder, and an output is to have that name")
    refuse_overwrite([folder / name for name in names], paths)


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in parts that end with a line."""
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            if not data.endswith(b"\n"):
                data += file.readline()
            yield data


def _numbered(paths: Iterable[Path], engine: Engine) -> Iterator[U64]:
    """(hash, hash, number of the line) of all lines."""
    n = 0
    for path in paths:
        for data in _blocks(path):
            hashes, _ = line_hashes(data, engine)
            yield np.column_stack([hashes, np.arange(n, n + len(hashes), dtype=np.uint64)])
            n += len(hashes)


def _repeated(blocks: Iterable[U64], folder: Path, memory: int) -> U64:
    """(repeated, 3): hash and first number of each hash that comes more than once, ascending; mapped from a file."""

    def heads() -> Iterator[U64]:
        last: U64 = np.zeros((0, 3), np.uint64)  # the first row of the last hash, twice if it came more than once
        for rows in sorted_blocks(blocks, 3, folder, memory // 2):
            rows = np.concatenate([last, rows])
            new = np.ones(len(rows), bool)
            new[1:] = (rows[1:, :2] != rows[:-1, :2]).any(1)
            starts = np.flatnonzero(new)
            many = np.diff(np.append(starts, len(rows))) > 1
            yield rows[starts[:-1][many[:-1]]]
            last = rows[[starts[-1]] * (2 if many[-1] else 1)]
        if len(last) == 2:
            yield last[:1]

    path = folder / "repeated"
    n = sort_file(heads(), path, 3, memory // 2)
    return np.memmap(path, "<u8", "r", shape=(n, 3)) if n else np.zeros((0, 3), np.uint64)


def _lookup(repeated: U64, firsts: U64, hashes: U64) -> NDArray[np.int64]:
    """(lines,): the number of the first line of each hash that repeats, -1 for one that does not."""
    first = np.full(len(hashes), -1, np.int64)
    if not len(repeated):
        return first
    at = np.searchsorted(firsts, hashes[:, 0])
    left = np.flatnonzero(firsts[np.minimum(at, len(firsts) - 1)] == hashes[:, 0])
    while len(left):  # one round, but for different hashes whose first halves are equal
        left = left[at[left] < len(repeated)]
        rows = repeated[at[left]]
        left, rows = (x[rows[:, 0] == hashes[left, 0]] for x in (left, rows))
        hit = rows[:, 1] == hashes[left, 1]
        first[left[hit]] = rows[hit, 2].astype(np.int64)
        left = left[~hit]
        at[left] += 1
    return first


def _kept(data: bytes, ends: NDArray[np.int64], kept: NDArray[np.bool_], engine: Engine) -> bytes | memoryview:
    if kept.all():
        return data
    if engine == "python" or not has_numba():
        starts = np.concatenate([[0], ends[:-1]])
        pairs = zip(starts[kept].tolist(), ends[kept].tolist(), strict=True)
        return b"".join(data[start:end] for start, end in pairs)
    from purelm.curate.compiled.lines import kept_bytes

    out = np.empty(len(data), np.uint8)
    return out.data[: kept_bytes(np.frombuffer(data, np.uint8), ends, kept, out)]
