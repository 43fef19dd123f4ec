"""Documents from text files, archives, folders and the Hugging Face hub, as a stream of strings.

archives.py says which files of a folder or an archive are read. A .txt file is split at "<|endoftext|>"; each line of a
.jsonl file is an object whose `field` is one document. The text between two delimiters is kept as it is, white space
included; documents of nothing but white space are dropped, and so is a byte order mark at the head of a file.
Memory is a few times max_document_bytes at most: a .txt document that is longer is cut at the last newline before that
limit, and the rest is a new document. A line of a .jsonl file that is longer than MOST_LINE_BYTES is an error.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from purelm.data.archives import Stream, allowed_endings, streams
from purelm.data.checks import check_int

__all__ = ["DELIMITER", "cut_point", "documents", "hub_records", "lines", "parse_hub"]

DELIMITER = "<|endoftext|>"
MOST_DOCUMENT_BYTES = 1 << 23  # a long book has 4 MB; encoding a text of one repeated letter takes 90 times its bytes
MOST_LINE_BYTES = 1 << 26
HUB_SPLITS = ("train", "validation", "valid", "dev", "test")


def documents(
    source: str | os.PathLike,
    *,
    field: str = "text",
    encoding: str | tuple[str, ...] = "utf-8",
    max_document_bytes: int = MOST_DOCUMENT_BYTES,
) -> Iterator[str]:
    """Stream the documents of `source`.

    Args:
        source: a .txt, .jsonl, .gz, .zst or .zip file, a folder of such, or "hub:owner/name[:config][:split]"
            (streamed with `datasets`; the split is "train" unless given; one extra part is the split where it is a
            usual name of one, else the config).
        field: of JSON lines and of hub records.
        encoding: of .txt and .jsonl files; of several, each document or line is read with the first that fits it.
        max_document_bytes: see the head of this file.

    Raises ValueError naming file, line and byte offset for text in another encoding, bad JSON, a missing field or a
    damaged archive; FileNotFoundError for nothing there; ModuleNotFoundError naming the extra to install.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "two.txt")
        >>> _ = path.write_text("One story.<|endoftext|>Another.")
        >>> list(documents(path))
        ['One story.', 'Another.']
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ValueError(f"source={source!r}: give a path or hub:owner/name")
    if not isinstance(field, str):
        raise ValueError(f"field={field!r}: give the name of a field")
    if not isinstance(encoding, str | Iterable) or isinstance(encoding, bytes):
        raise ValueError(f"encoding={encoding!r}: give the name of an encoding, or several")
    encodings = (encoding,) if isinstance(encoding, str) else tuple(encoding)
    if not encodings or not all(isinstance(name, str) for name in encodings):
        raise ValueError(f"encoding={encodings!r}: give the name of an encoding, or several")
    for name in encodings:
        try:  # lines and delimiters are found in the undecoded bytes, so they must look as in ASCII
            fits = (DELIMITER + "\n").encode(name) == (DELIMITER + "\n").encode()
        except (LookupError, ValueError):  # a ValueError for a name with a zero byte
            raise ValueError(f"encoding={name!r}: Python knows no such encoding") from None
        if not fits:
            raise ValueError(f"encoding={name!r}: allowed are encodings that write ASCII as ASCII")
    check_int("max_document_bytes", max_document_bytes, 4)  # the longest character
    name = os.fspath(source)
    return _documents(name, field, encodings, max_document_bytes)


def _documents(source: str, field: str, encodings: tuple[str, ...], limit: int) -> Iterator[str]:
    if source.startswith("hub:"):
        yield from _pieces(_hub(source, field))
        return
    found = False
    for stream in streams(Path(source), source):
        found = True
        if stream.name.endswith(".jsonl"):
            yield from _pieces(_jsonl(stream, field, encodings))
        else:
            yield from _pieces(_text(stream, encodings, limit))
    if not found:
        raise ValueError(f"{source}: no text in it; files that end in {allowed_endings()} are read")


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        # A JSON string may contain the delimiter, but a document must not.
        for piece in text.split(DELIMITER) if DELIMITER in text else (text,):
            if piece and not piece.isspace():
                yield piece


# --- streams of bytes -> texts


class _Place(NamedTuple):
    """Where in a stream a piece of bytes begins."""

    label: str
    offset: int  # bytes
    line: int  # from 1


def _decode(data: bytes, place: _Place, encodings: tuple[str, ...]) -> str:
    error = None
    for encoding in encodings:
        try:
            text = data.decode(encoding)
            return text.removeprefix("\ufeff") if place.offset == 0 else text
        except UnicodeDecodeError as caught:
            error = error or caught
    assert error is not None
    line = place.line + data.count(b"\n", 0, error.start)
    raise ValueError(
        f"{place.label}: not {encodings[0]} at byte {place.offset + error.start} (line {line}, byte value "
        f"0x{data[error.start]:02x}); convert the file, or name its encoding, such as encoding=('utf-8', 'cp1252')"
    )


def _text(stream: Stream, encodings: tuple[str, ...], limit: int) -> Iterator[str]:
    delimiter = DELIMITER.encode()
    pending = bytearray()
    place = _Place(stream.label, 0, 1)

    def take(length: int, skip: int) -> str:
        nonlocal place
        data = bytes(pending[:length])
        text = _decode(data, place, encodings)
        place = place._replace(offset=place.offset + length + skip, line=place.line + data.count(b"\n"))
        del pending[: length + skip]
        return text

    for block in stream.blocks:
        searched = max(0, len(pending) - len(delimiter) + 1)
        pending += block
        while (at := pending.find(delimiter, searched)) >= 0:
            while at > limit:
                cut = cut_point(pending, limit)
                yield take(cut, 0)
                at -= cut
            yield take(at, len(delimiter))
            searched = 0
        while len(pending) > limit + len(delimiter):  # the last bytes may be the beginning of a delimiter
            yield take(cut_point(pending, limit), 0)
    while len(pending) > limit:
        yield take(cut_point(pending, limit), 0)
    if pending:
        yield take(len(pending), 0)


def cut_point(data: bytes | bytearray, limit: int) -> int:
    """Where to cut UTF-8 bytes, from 1 to limit: after the last newline, else after the last space (of the second half
    of the first `limit` bytes), else between two characters."""
    for mark in (b"\n", b" "):
        at = data.rfind(mark, 0, limit) + 1
        if at > limit // 2:
            return at
    at = limit
    while at > max(1, limit - 3) and at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _jsonl(stream: Stream, field: str, encodings: tuple[str, ...]) -> Iterator[str]:
    place = _Place(stream.label, 0, 1)
    for raw in lines(stream.blocks, stream.label):
        if raw.strip():
            yield _json_text(raw, place, field, encodings)
        place = place._replace(offset=place.offset + len(raw), line=place.line + 1)


def lines(blocks: Iterable[bytes], label: str) -> Iterator[bytes]:
    """The lines of a stream, each with its newline; ValueError for one longer than MOST_LINE_BYTES."""
    parts: list[bytes] = []  # of a line longer than a block; joined when it is complete
    for block in blocks:
        if sum(map(len, parts)) > MOST_LINE_BYTES:
            raise ValueError(f"{label}: a line is longer than {MOST_LINE_BYTES >> 20} MiB: not JSON lines?")
        *complete, rest = block.split(b"\n")
        for line in complete:
            yield b"".join((*parts, line, b"\n")) if parts else line + b"\n"
            parts = []
        if rest:
            parts.append(rest)
    if parts:
        yield b"".join(parts)


def _json_text(raw: bytes, place: _Place, field: str, encodings: tuple[str, ...]) -> str:
    where = f"{place.label}: line {place.line}"
    line = _decode(raw, place, encodings)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    text = _field(record, field, where)
    if b"\\u" in raw:  # an escape may be half a surrogate pair, which UTF-8 cannot encode
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: field {field!r} is no valid Unicode: {error}") from None
    return text


def _field(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: an object with the field {field!r} was expected, found {type(record).__name__}")
    if field not in record:
        raise ValueError(f"{where}: no field {field!r}; there are: {', '.join(map(str, record)) or 'none'}")
    if not isinstance(record[field], str):
        raise ValueError(f"{where}: field {field!r} holds {type(record[field]).__name__}, not a string")
    return record[field]


# --- the hub


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """("owner/name", config or None, split) of "hub:owner/name[:config][:split]"."""
    name, *rest = source.removeprefix("hub:").split(":")
    if name.count("/") != 1 or not all(name.split("/")) or len(rest) > 2 or not all(rest) or "[" in source:
        raise ValueError(
            f"source={source!r}: allowed is hub:owner/name[:config][:split] (a stream has no slices such as [:1%])"
        )
    if len(rest) == 2:
        return name, rest[0], rest[1]
    if rest and rest[0] not in HUB_SPLITS:
        return name, rest[0], "train"
    return name, None, rest[0] if rest else "train"


def _hub(source: str, field: str) -> Iterator[str]:
    for where, record in hub_records(source):
        yield _field(record, field, where)


def hub_records(source: str) -> Iterator[tuple[str, Any]]:
    """(where, record) of each record of "hub:owner/name[:config][:split]", streamed; errors: as in `documents`."""
    name, config, split = parse_hub(source)
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ModuleNotFoundError(f"{source}: needs datasets: pip install 'purelm[hub]'") from None
    index = 0
    records = None
    while True:
        try:
            if records is None:
                records = iter(datasets.load_dataset(name, config, split=split, streaming=True))
            record = next(records)
        except StopIteration:
            return
        except Exception as error:  # datasets lets through what its many back ends raise
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                f"{source}: cannot be read ({type(error).__name__}: {reason}); "
                "is there a network, and is the name right?"
            ) from error
        yield f"{source}: record {index}", record
        index += 1
