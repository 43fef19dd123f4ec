"""Files of a run: packed JSON lines, the same bytes for the same rows, and folders that appear whole or not at all."""

import gzip
import importlib.util
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from purelm.files import hold, remove_leftovers, sync

__all__ = [
    "append_packed", "best_compression", "packed_lines", "publishing", "read_json", "rows_at", "rows_in", "write_json",
]  # fmt: skip

Compression = Literal["auto", "zst", "gz"]
ZSTD_LEVEL, GZIP_LEVEL = 3, 6
WINDOW = 1 << 27  # bytes


def best_compression(asked: Compression) -> Literal["zst", "gz"]:
    """ "zst" or "gz"; auto: the first if zstandard is installed. ValueError for zst where it is not."""
    has_zstd = importlib.util.find_spec("zstandard") is not None
    if asked == "zst" and not has_zstd:
        raise ValueError("compression zst needs zstandard: pip install 'purelm[zstd]'; or give gz")
    if asked == "auto":
        return "zst" if has_zstd else "gz"
    return asked


@contextmanager
def append_packed(file: IO[bytes], compression: str) -> Iterator[IO[bytes]]:
    """A stream whose bytes go packed to the end of an open file, as one zstd frame or gzip member."""
    if compression == "zst":
        import zstandard

        with zstandard.ZstdCompressor(level=ZSTD_LEVEL).stream_writer(file, closefd=False) as out:
            yield out
    else:  # without name and time, which would differ from run to run
        with gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as out:
            yield out  # type: ignore[misc]


def packed_lines(file: IO[bytes], compression: str) -> Iterator[bytes]:
    """The lines of what `append_packed` wrote, from where the file stands."""
    if compression == "zst":
        import zstandard

        raw: Any = zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(file, read_across_frames=True)
        yield from io.BufferedReader(raw, 1 << 20)
    else:
        with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
            yield from unpacked


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl.zst or .jsonl.gz of this run."""
    with open(path, "rb") as file:
        yield from map(json.loads, packed_lines(file, path.suffix[1:]))


def rows_at(path: Path, numbers: NDArray[np.int64]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of these lines of such a file, ascending; others are not parsed, and without any it is not read."""
    if not len(numbers):
        return
    wanted = iter(numbers.tolist())
    number = next(wanted)
    with open(path, "rb") as file:
        for i, line in enumerate(packed_lines(file, path.suffix[1:])):
            if i == number:
                yield i, json.loads(line)
                number = next(wanted, None)
                if number is None:
                    return
    raise ValueError(f"{path}: has no line {number:,}; remove its folder and start again")


def write_json(path: Path, value: Any) -> None:
    """JSON in the order of its keys as given; not atomic, for folders that are."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=True)
        file.write("\n")


def read_json(path: Path) -> Any:
    """ValueError naming the file where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); remove its folder and start again") from None


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, synced and renamed to it on leaving, which replaces what was there.

    After an error, and after a kill at any moment, `folder` is as it was, or absent where it was to be replaced; the
    next call removes what was left. Of two writers at once, which make equal folders, one wins.
    """
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.(?P<id>[0-9a-f]{{16}})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent, pattern)
    staged, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(8)}") for _ in range(2))
    staged.mkdir()
    descriptor = os.open(staged, os.O_RDONLY)
    try:
        hold(descriptor)
        yield staged
        _sync_all(staged.iterdir())
        sync(staged)
        if folder.exists():
            os.rename(folder, old)
        os.rename(staged, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        os.close(descriptor)


def _sync_all(paths: Iterable[Path]) -> None:
    for path in paths:
        sync(path)
