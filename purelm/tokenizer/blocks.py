"""A corpus as blocks: the stretches of a file, or the texts, that one worker takes at a time.

Bytes are kept as they are: CRLF stays, a byte order mark too. Errors name the file, the byte and the line.
"""

import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from purelm.tokenizer.cuts import chunks
from purelm.tokenizer.patterns import Pattern

BLOCK_BYTES = 1 << 20  # the arrays that counting or encoding a block needs stay in the second-level cache


class Block(NamedTuple):
    """Some text: `texts`, or where that is None the bytes start..end of the file `name`."""

    name: str
    start: int
    end: int
    texts: list[bytes] | None = None


def file_blocks(path: str | os.PathLike, pattern: Pattern, special_tokens: tuple[str, ...]) -> Iterator[Block]:
    """A file in blocks of about BLOCK_BYTES, cut where that changes no piece (see `cuts`)."""
    for start, end in chunk_spans(path, BLOCK_BYTES, pattern, special_tokens):
        yield Block(os.fspath(path), start, end)


def text_blocks(texts: Iterable[str], what: str = "text") -> Iterator[Block]:
    """Texts gathered into blocks of about BLOCK_BYTES; what: how errors call a text."""
    held: list[bytes] = []
    n_bytes = done = 0
    for number, text in enumerate(texts):
        try:
            held.append(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} {number} holds a lone surrogate at character {error.start}, which UTF-8 cannot hold"
            ) from None
        except AttributeError:
            raise ValueError(f"{what} {number} is {type(text).__name__}: an iterable of str is expected") from None
        n_bytes += len(held[-1])
        if n_bytes >= BLOCK_BYTES:
            yield Block("texts", done, done + n_bytes, held)
            done += n_bytes
            held, n_bytes = [], 0
    if held:
        yield Block("texts", done, done + n_bytes, held)


def look_ahead(blocks: Iterator[Block], n_bytes: int) -> tuple[int, Iterator[Block]]:
    """(bytes of the first blocks, of which it reads as many as hold n_bytes, or all; an iterator of all blocks)."""
    head: list[Block] = []
    known = 0
    while known < n_bytes and (block := next(blocks, None)) is not None:
        head.append(block)
        known += block.end - block.start
    return known, chain(head, blocks)


def block_texts(block: Block) -> list[bytes]:
    """The texts of a block, read from its file where they lie there; ValueError where that is not UTF-8."""
    if block.texts is not None:
        return block.texts
    data = read_span(block.name, block.start, block.end)
    if not data.isascii():
        decode_chunk(data, block.name, block.start)
    return [data]


def chunk_spans(
    path: str | os.PathLike, n_bytes: int, pattern: Pattern, special_tokens: tuple[str, ...] = ()
) -> Iterator[tuple[int, int]]:
    """(start, end) in bytes of the `chunks` of a file, found without reading what lies between the cuts."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
            return
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield from chunks(data, n_bytes, pattern, special_tokens)
        # Not closed here: a match object of the search may still refer to the mapping.


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

    name: how the message calls the text. With an `offset` it is the path of the file in which the chunk lies there, so
    that the line can be counted from the beginning of the file.
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
    if not offset:
        return 0
    with open(name, "rb") as file:
        sizes = (min(offset - start, 1 << 24) for start in range(0, offset, 1 << 24))
        return sum(file.read(size).count(b"\n") for size in sizes)


def file_bytes(path: str | os.PathLike) -> int:
    """Size of a file in bytes; ValueError for a folder, a pipe (reading would wait) or a device (might never end)."""
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(path)}: is a folder, a pipe or a device; a file is expected")
    return status.st_size
