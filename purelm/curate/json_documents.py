"""Documents from JSON lines, with lines that cannot be read passed over.

`purelm.data.json_lines` refuses a file for one bad line, which is right for a data set and wrong for a crawl.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from purelm.curate.document import Document
from purelm.curate.skipped import Skipped
from purelm.data.archives import file_blocks

__all__ = ["document_of", "json_documents"]

BLOCK_BYTES = 1 << 20


def json_documents(path: Path, *, most_bytes: int, field: str) -> Iterator[Document | Skipped]:
    """A document of each line of a file, which is unpacked where its name ends in .gz or .zst; see `records`."""
    gzipped = path.name.lower().endswith(".gz")
    blocks = _gunzip(path) if gzipped else file_blocks(path, str(path))
    number = 0
    try:
        for line in _lines(blocks, most_bytes):
            number += 1
            where = f"{path}, line {number}"
            if line is None:
                yield Skipped("too large", where)
            elif line.strip():
                yield _document(line, where, field)
    except ValueError as error:
        reason = "truncated" if "truncated" in str(error) else "damaged"
        yield Skipped(reason, f"{path}, after line {number}: {error}")


def document_of(row: Mapping[str, Any], where: str, field: str) -> Document | Skipped:
    """A row as a document: its id and url, and what else it holds as meta."""
    text = row.get(field)
    if not isinstance(text, str):
        return Skipped("no text", where)
    if not text:
        return Skipped("empty", where)
    inner = row.get("metadata")
    url = row.get("url") or (inner.get("url") if isinstance(inner, Mapping) else None)
    meta = {name: value for name, value in row.items() if name not in (field, "id", "url")}
    id = row.get("id")
    return Document(where if id is None or id == "" else str(id), text, url if isinstance(url, str) else "", meta)


def _document(line: bytes, where: str, field: str) -> Document | Skipped:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # some programs begin a file with a byte order mark
        found = document_of(row, where, field) if isinstance(row, dict) else Skipped("damaged", where)
        if isinstance(found, Document) and b"\\u" in line:
            for value in (found.text, found.id, found.url):
                value.encode()  # an escape may be half a surrogate pair, which no file can hold
        return found
    except (ValueError, RecursionError):
        return Skipped("damaged", where)


def _lines(blocks: Iterable[bytes], most: int) -> Iterator[bytes | None]:
    """The lines of a stream; None for one longer than `most` bytes, of which no more than that is held."""
    parts: list[bytes] = []
    size = 0  # of the line so far, the parts that were let go included
    for block in blocks:
        *complete, rest = block.split(b"\n")
        for line in complete:
            size += len(line)
            yield b"".join((*parts, line)) if size <= most else None
            parts, size = [], 0
        size += len(rest)
        parts = [*parts, rest] if size <= most else []
    if size:
        yield b"".join(parts) if size <= most else None


def _gunzip(path: Path) -> Iterator[bytes]:
    """The blocks of a .gz file, all that lie before a damage included, which the gzip module holds back."""
    with open(path, "rb") as file:
        member = zlib.decompressobj(31)
        begun = False
        while block := file.read(BLOCK_BYTES):
            while block:
                if member.eof:
                    block = block.lstrip(b"\0")  # padding between members
                    if not block:
                        break
                    member = zlib.decompressobj(31)
                begun = True
                try:
                    data = member.decompress(block, BLOCK_BYTES)
                except zlib.error as error:
                    raise ValueError(f"{path}: damaged archive: {error}") from None
                block = member.unconsumed_tail or member.unused_data
                if data:
                    yield data
        while begun and not member.eof and (data := member.decompress(member.unconsumed_tail, BLOCK_BYTES)):
            yield data
        if begun and not member.eof:
            raise ValueError(f"{path}: truncated archive")
