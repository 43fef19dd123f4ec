"""WARC and WET files, read by FastWARC, with what is damaged passed over.

A crawl's .gz file has one gzip member for each record. After bytes that cannot be read the reader looks for the next
place where a member begins, and goes on there if a record lies in it. So damage costs the records that it touches and
no others. A file of one gzip, zstd or lz4 stream is lost from the damage on.

Memory: one record, at most `most_bytes` before and as much after its encodings are undone.
"""

import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from purelm.curate.document import Document, Raw
from purelm.curate.http_message import body, response
from purelm.curate.skipped import Skipped

__all__ = ["warc_records"]

GZIP = b"\x1f\x8b\x08"
# What a file may begin with: gzip, zstd (also a skippable frame), lz4, a record as it is.
STARTS = (GZIP, b"\x28\xb5\x2f\xfd", *(bytes((0x50 + i, 0x2A, 0x4D, 0x18)) for i in range(16)), b"\x04\x22\x4d\x18")
PLAIN = b"WARC/"
PLAIN_NEXT = b"\r\n\r\nWARC/1."  # where a record begins in a file that is not packed
SEARCH_BYTES = 1 << 20
MOST_TRIES = 10_000  # of places that look like a member's beginning, one after the other, before giving up


def warc_records(
    path: str | Path, *, most_bytes: int, statuses: Collection[int] | None
) -> Iterator[Raw | Document | Skipped]:
    """The HTTP responses of a file as Raw, its WET conversions as Document, and what was skipped; see `records`."""
    try:
        from fastwarc.warc import ArchiveIterator
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "fastwarc":
            raise
        raise ModuleNotFoundError(f"{path}: needs fastwarc: pip install 'purelm[curate]'") from None
    with open(path, "rb") as file:
        start = file.read(8)
        if not start:
            return
        if not start.startswith((*STARTS, PLAIN)):
            yield Skipped("not a WARC file", f"{path}: its first bytes are no gzip, zstd, lz4 or WARC record")
            return
        mark = PLAIN_NEXT if start.startswith(PLAIN) else GZIP if start.startswith(GZIP) else None
        at: int | None = 0
        in_damage, tries = False, 0
        while at is not None:
            last, is_whole = at - 1, True
            file.seek(at)
            try:
                for record in ArchiveIterator(file, parse_http=False):
                    last, tries, in_damage = record.stream_pos, 0, False
                    item = _item(record, f"{path}, byte {last}", most_bytes, statuses)
                    yield item
                    if isinstance(item, Skipped) and item.reason == "truncated":
                        is_whole, in_damage = False, True  # it may have run into the next
                        break
            except (OSError, ValueError) as error:
                is_whole = False
                if not in_damage:
                    yield Skipped("damaged", f"{path}, after byte {max(last, 0)}: {error}")
                in_damage = True
            if is_whole:
                # FastWARC ends without a word at an empty gzip member, and where the header of the last record is cut.
                rest, is_behind_empty = (None, False) if in_damage or not mark else _rest(file, mark, last + 1)
                if rest is not None and is_behind_empty:
                    at = rest
                    continue
                if rest is not None:
                    yield Skipped("truncated", f"{path}, byte {rest}")
                return
            tries += 1
            at = _next(file, mark, max(last, at) + 1) if mark and tries < MOST_TRIES else None


def _rest(file: IO[bytes], mark: bytes, start: int) -> tuple[int | None, bool]:
    """Where a record begins that a reader, which ended, did not find; and whether an empty gzip member is before it."""
    at = _next(file, mark, start)
    is_behind_empty, tries = False, 0
    while at is not None and (found := _member(file, mark, at)) != "record" and tries < MOST_TRIES:
        is_behind_empty |= found == "empty"
        at, tries = _next(file, mark, at + 1), tries + 1
    return (at if tries < MOST_TRIES else None), is_behind_empty


def _member(file: IO[bytes], mark: bytes, at: int) -> Literal["record", "empty", "none"]:
    """What begins at a byte that has the mark."""
    if mark == PLAIN_NEXT:
        return "record"
    file.seek(at)
    member = zlib.decompressobj(31)
    try:
        data = member.decompress(file.read(1 << 12), 1 << 12)
    except zlib.error:
        return "none"  # the mark by chance, among packed bytes
    if not data:
        return "empty" if member.eof else "record"
    return "record" if data.startswith(PLAIN[: len(data)]) else "none"


def _next(file: IO[bytes], mark: bytes, start: int) -> int | None:
    """Where the next record begins at or after a byte, by its mark; None for nowhere."""
    file.seek(start)
    tail, base = b"", start
    while block := file.read(SEARCH_BYTES):
        window = tail + block
        if (found := window.find(mark)) >= 0:
            return base + found + max(0, mark.find(PLAIN))
        keep = min(len(window), len(mark) - 1)
        base += len(window) - keep
        tail = window[len(window) - keep :]
    return None


def _item(record: Any, where: str, most_bytes: int, statuses: Collection[int] | None) -> Raw | Document | Skipped:
    kind, size, headers = str(record.record_type), record.content_length, record.headers
    if kind not in ("response", "conversion"):
        return Skipped(f"type: {kind}", where)
    if size == 0:
        return Skipped("empty", where)
    if size > most_bytes:
        return Skipped("too large", where)
    content = record.reader.read(size)
    while len(content) < size and (more := record.reader.read(size - len(content))):
        content += more
    if len(content) < size or PLAIN_NEXT in content:  # the next record in it: its length is not true
        return Skipped("truncated", where)
    id = (headers.get("WARC-Record-ID") or where).strip("<>")
    url = headers.get("WARC-Target-URI") or ""
    meta = {"date": headers.get("WARC-Date"), "cut": headers.get("WARC-Truncated")}
    meta = {name: value for name, value in meta.items() if value}
    if kind == "conversion":
        languages = headers.get("WARC-Identified-Content-Language")
        meta |= {"languages": languages} if languages else {}
        return Document(id, content.decode("utf-8", "replace").removeprefix("\ufeff"), url, meta)
    found = response(content)
    if found is None:
        return Skipped("type: response that is not HTTP", where)
    if statuses is not None and found.status not in statuses:
        return Skipped(f"status: {found.status}", where)
    unpacked = body(found, most_bytes)
    if unpacked is None:
        return Skipped("damaged", where)
    if len(unpacked) > most_bytes:
        return Skipped("too large", where)
    if not unpacked:
        return Skipped("empty", where)
    return Raw(id, unpacked, url, found.content_type, found.charset, meta)
