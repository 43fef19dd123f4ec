"""HTTP responses as they lie in WARC records: status, headers, and the body with its encodings undone.

Written for what crawls hold, so lenient: lines may end in a bare newline, and a header line without a colon is passed
over. RFC 9112 is the grammar, RFC 9110 section 8.4 the content encodings.
"""

import io
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Response", "body", "response"]

STATUS = re.compile(rb"HTTP/\d(?:\.\d)? +(\d{3})(?: |$)")
END_OF_HEADER = re.compile(rb"\r?\n\r?\n")
CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\n]{0,200})?\r?\n")
MOST_HEADER_BYTES = 1 << 16  # servers refuse what is longer than 8 to 64 KiB


class Response(NamedTuple):
    """A response, its body still encoded."""

    status: int
    headers: Mapping[str, str]  # names in lower case; of several of one name the last
    content: bytes

    @property
    def content_type(self) -> str:
        """In lower case, without parameters; empty where there is none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def charset(self) -> str:
        """As it was declared, in lower case; empty where it was not."""
        found = re.search(r"""charset\s*=\s*["']?([^\s"';,]+)""", self.headers.get("content-type", ""), re.IGNORECASE)
        return found[1].lower() if found else ""


def response(message: bytes) -> Response | None:
    """Status, headers and body of a message; None for bytes that are no HTTP response."""
    end = END_OF_HEADER.search(message, 0, MOST_HEADER_BYTES)
    head = message[: end.start()] if end else message[:MOST_HEADER_BYTES]
    first, *rest = head.split(b"\n")
    status = STATUS.match(first.rstrip(b"\r"))
    if status is None or (end is None and len(message) > MOST_HEADER_BYTES):
        return None
    headers = {}
    for line in rest:
        name, colon, value = line.decode("latin-1").partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return Response(int(status[1]), headers, message[end.end() :] if end else b"")


def body(found: Response, most_bytes: int) -> bytes | None:
    """The body without its transfer and content encodings (chunked; gzip, deflate, br, zstd).

    At most most_bytes + 1 bytes are unpacked: a longer result says that the body is too large. None for a body that
    cannot be unpacked. One that does not begin as its header says, as where the crawler unpacked it already, is taken
    as it is.
    """
    content = found.content
    if "chunked" in found.headers.get("transfer-encoding", "").lower() and CHUNK.match(content):
        joined = _joined(content)
        if joined is None:
            return None
        content = joined
    codings = [c.strip().lower() for c in found.headers.get("content-encoding", "").split(",")]
    for coding in reversed(codings):
        coding = coding.removeprefix("x-")
        if coding == "gzip" and not content.startswith(b"\x1f\x8b"):
            continue
        if coding == "deflate" and not (len(content) > 1 and content[0] & 15 == 8 and _is_zlib(content)):
            continue
        if coding == "zstd" and not content.startswith(b"\x28\xb5\x2f\xfd"):
            continue
        if coding == "br" and b"<" in content[:64].lstrip()[:1]:
            continue
        if coding in ("gzip", "deflate", "br", "zstd"):
            unpacked = _unpacked(coding, content, most_bytes + 1)
            if unpacked is None:
                return None
            content = unpacked
    return content[: most_bytes + 1]


def _joined(content: bytes) -> bytes | None:
    """The chunks of RFC 9112, 7.1; None where they do not end as they should."""
    parts: list[bytes] = []
    at = 0
    while chunk := CHUNK.match(content, at):
        size = int(chunk[1], 16)
        if size == 0:
            return b"".join(parts)
        at = chunk.end() + size
        parts.append(content[chunk.end() : at])
        if content[at : at + 1] == b"\r":
            at += 1
        if content[at : at + 1] != b"\n":
            return None
        at += 1
    return None


def _is_zlib(content: bytes) -> bool:
    return (content[0] << 8 | content[1]) % 31 == 0  # RFC 1950, 2.2


def _unpacked(coding: str, content: bytes, most: int) -> bytes | None:
    from fastwarc import stream_io

    source = io.BytesIO(content)
    reader: Any
    try:
        if coding == "br":
            reader = stream_io.BrotliReader(source)
        elif coding == "zstd":
            reader = stream_io.ZstdReader(source)
        else:
            reader = stream_io.GzipReader(source, zlib=coding == "deflate")
        parts: list[bytes] = []
        left = most
        while left > 0 and (part := reader.read(left)):
            parts.append(part)
            left -= len(part)
    except (OSError, ValueError, EOFError):
        return None
    return b"".join(parts)
