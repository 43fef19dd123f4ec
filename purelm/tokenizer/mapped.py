"""A large text file as chunks that are cut safely; where it is not UTF-8, the place is named."""

import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from purelm.tokenizer.chunks import chunks


def read_chunks(
    path: str | os.PathLike, n_bytes: int, pattern: str, special_tokens: tuple[str, ...] = ()
) -> Iterator[tuple[int, bytes]]:
    """(byte offset, chunk) for the consecutive chunks of a file, cut as `chunks` says; the bytes are kept as they are.

    One chunk is in memory at a time. Nothing is decoded: CRLF and a byte order mark stay what they are.
    """
    for start, end in chunk_spans(path, n_bytes, pattern, special_tokens):
        yield start, read_span(path, start, end)


def chunk_spans(
    path: str | os.PathLike, n_bytes: int, pattern: str, special_tokens: tuple[str, ...] = ()
) -> Iterator[tuple[int, int]]:
    """(start, end) in bytes of those chunks, found without reading what lies between the cuts."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
            return
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield from chunks(data, n_bytes, pattern, special_tokens)
        # Not closed by hand: a match object of the search may still refer to the mapping.


def read_span(path: str | os.PathLike, start: int, end: int) -> bytes:
    """Bytes start..end of a file."""
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    if len(data) != end - start:
        raise ValueError(f"{os.fspath(path)}: shorter than when it was opened; it must not change while it is read")
    return data


def decode_chunk(chunk: bytes, name: str, offset: int = 0) -> str:
    """`chunk` as text, strictly; ValueError with file, byte offset and line where it is not UTF-8.

    name: what to call the text in the message; where it is the path of a file and `offset` the chunk's place in it, the
    line is counted from the beginning of the file.
    """
    try:
        return chunk.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        line = 1 + _newlines_before(name, offset) + chunk.count(b"\n", 0, error.start)
        raise ValueError(
            f"{name}: not UTF-8 at byte {at}, line {line}: {chunk[error.start : error.start + 4]!r} "
            f"({error.reason}); convert the file, for example with: iconv -f latin1 -t utf-8"
        ) from None


def _newlines_before(name: str, offset: int) -> int:
    count = 0
    if offset:
        with open(name, "rb") as file:
            while offset:
                block = file.read(min(offset, 1 << 24))
                count += block.count(b"\n")
                offset -= len(block)
    return count


def file_bytes(path: str | os.PathLike) -> int:
    """Size of a file in bytes; ValueError for what is no file (a pipe would be waited for, /dev/zero never ends)."""
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(path)}: is a folder, a pipe or a device; a file is expected")
    return status.st_size
