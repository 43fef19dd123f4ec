"""Files without the lines that stand more than once in all of them: two passes, memory within a limit.

    exact_line_deduplication(["a.txt", "b.txt"], "out")    # CS336, assignment 4: out/a.txt, out/b.txt

A line's hash has 128 bits, two of 64: for each eight bytes as a number x, the lowest first and the last ones filled
with zeros, and in the end for the length in bytes: h <- (h ^ x) P mod 2^64, h <- h ^ (h >> 32), with other starts and
odd factors P. Taken for random, two different lines among N share one with probability N^2 / 2^129: 1.5e-19 for
N = 10^10. 64 bits would not do: N^2 / 2^65 is above 1 there, and 3e-8 for N = 10^6. Lines made to collide can be found.

Lines are bytes between line feeds; the last one may have none, and equals a line that has one.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from purelm.curate.external_sort import in_groups, least_memory, sorted_blocks
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
    return _compiled(data, 2)


def _compiled(data: bytes, columns: int) -> tuple[U64, NDArray[np.int64]]:
    """The same; columns from 2 on are for the caller to fill."""
    from purelm.curate.compiled.lines import hash_lines

    bytes_ = np.frombuffer(data, np.uint8)
    n = int(np.count_nonzero(bytes_ == 10)) + 1
    rows, ends = np.empty((n, columns), np.uint64), np.empty(n, np.int64)
    n = hash_lines(bytes_, FACTORS, rows, ends)
    return rows[:n], ends[:n]


def _plain(data: bytes) -> tuple[U64, NDArray[np.int64]]:
    rows, ends, mask, place = [], [], (1 << 64) - 1, 0
    starts, factors = FACTORS[:2].tolist(), FACTORS[2:].tolist()
    for line in _cut(data):
        text, both = line.removesuffix(b"\n"), []
        words = [int.from_bytes(text[i : i + 8], "little") for i in range(0, len(text), 8)]
        for h, factor in zip(starts, factors, strict=True):
            for word in (*words, len(text)):
                h = (h ^ word) * factor & mask
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

    Pass one hashes lines and sorts the hashes (in files, if they are many), then the numbers of the lines to leave out;
    pass two reads the files again. Outputs come into place one by one, when all of them are complete.

    Args:
        keep: of a line that stands more than once: "none", or the "first" in the order of files and lines.
        memory: bytes for sorting. Beside it some 30 MB, for blocks of 4 MiB; more where a line is longer.

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
        found = _left_out(_numbered(paths, engine), keep, staged / "hashes", memory // 2)
        numbers = sorted_blocks(found, 1, staged / "numbers", memory // 2)
        with closing(numbers):
            first, known = 0, np.zeros(0, np.int64)  # the block's first line; numbers from it on that were read
            for path in paths:
                with (staged / f"out-{path.name}").open("wb") as file:
                    for data in _blocks(path):
                        n = int(np.count_nonzero(np.frombuffer(data, np.uint8) == 10)) + (not data.endswith(b"\n"))
                        while not len(known) or known[-1] < first + n:
                            rows = next(numbers, None)
                            if rows is None:
                                break
                            known = np.concatenate([known, rows[:, 0].astype(np.int64)])
                        here = int(np.searchsorted(known, first + n))
                        file.write(_kept(data, known[:here] - first, engine))
                        first, known = first + n, known[here:]
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
            if engine == "python" or not has_numba():
                rows = np.pad(_plain(data)[0], ((0, 0), (0, 1)))
            else:
                rows = _compiled(data, 3)[0]
            rows[:, 2] = np.arange(n, n + len(rows), dtype=np.uint64)
            yield rows
            n += len(rows)


def _left_out(blocks: Iterable[U64], keep: Literal["none", "first"], folder: Path, memory: int) -> Iterator[U64]:
    """(any, 1): numbers of the lines whose hash comes more than once, with keep="first" but for the first of each."""
    for rows, first, place in in_groups(sorted_blocks(blocks, 3, folder, memory), 2):
        yield rows[place > 0, 2:]
        if keep == "none":
            yield first[place == 1, None]


def _kept(data: bytes, left_out: NDArray[np.int64], engine: Engine) -> bytes | memoryview:
    """The data without the lines of these numbers, ascending."""
    if not len(left_out):
        return data
    if engine == "python" or not has_numba():
        gone = set(left_out.tolist())
        return b"".join(line for i, line in enumerate(_cut(data)) if i not in gone)
    from purelm.curate.compiled.lines import kept_bytes

    bytes_, out = np.frombuffer(data, np.uint8), np.empty(len(data), np.uint8)
    return out.data[: kept_bytes(bytes_, np.flatnonzero(bytes_ == 10), left_out, out)]
