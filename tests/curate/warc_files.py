"""WARC files made by hand, by ISO 28500 and RFC 9112."""

import gzip

PAGE = b"<html><body><p>Page %d of them.</p></body></html>"


def record(content, kind="response", id="1", url="http://example.org/", extra="", length=None):
    """A record as it is stored; length: what it says, where that is not true."""
    media = "text/plain" if kind == "conversion" else f"application/http; msgtype={kind}"
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{id}>\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2024-01-02T03:04:05Z\r\nContent-Type: {media}\r\n{extra}"
        f"Content-Length: {len(content) if length is None else length}\r\n\r\n"
    )
    return head.encode() + content + b"\r\n\r\n"


def http(body, status=200, content_type="text/html; charset=utf-8", extra=""):
    """A response."""
    return f"HTTP/1.1 {status} OK\r\nContent-Type: {content_type}\r\n{extra}\r\n".encode() + body


def pages(n):
    """n records, each of another page."""
    return [record(http(PAGE % i), id=str(i), url=f"http://example.org/{i}") for i in range(n)]


def packed(records):
    """A gzip member for each record, without the time in it."""
    return b"".join(gzip.compress(r, mtime=0) for r in records)
