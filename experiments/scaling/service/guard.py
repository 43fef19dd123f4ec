"""Around the app: which hosts it answers for, how large a request may be, and headers of every answer."""

import json
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any

__all__ = ["LOOPBACK", "MAX_BODY", "Guard"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
MAX_BODY = 64 * 1024  # bytes; a configuration has some 800


class Guard:
    """An ASGI app around another.

    hosts: names a request may be for, any port; None: all. A page elsewhere whose name is made to lead here (DNS
        rebinding) sends its own.
    headers: of every answer, errors too, unless the app has set them.
    """

    def __init__(
        self, app: App, headers: Mapping[str, str], hosts: Collection[str] | None = LOOPBACK, max_body: int = MAX_BODY
    ):
        self.app = app
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.max_body = max_body
        self.headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                names = {name.lower() for name, _ in given}
                message = {**message, "headers": [*given, *(pair for pair in self.headers if pair[0] not in names)]}
            await send(message)

        headers = dict(scope["headers"])
        if self.hosts is not None and _host(headers.get(b"host", b"")) not in self.hosts:
            await _refuse(answer, 400, "this server does not answer for the host named in the request")
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_body:
            await _refuse(answer, 413, f"a request may have at most {self.max_body} bytes")
            return
        # Read here and whole: the app sees a body that is complete and small, whatever way it came.
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body:
                await _refuse(answer, 413, f"a request may have at most {self.max_body} bytes")
                return
        given = False

        async def whole() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self.app(scope, whole, answer)


async def _refuse(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # Whatever is left of the request is not read.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _host(value: bytes) -> str:
    """The name in a Host header, without port.

    >>> _host(b"LocalHost:8000"), _host(b"[::1]:80"), _host(b"127.0.0.1")
    ('localhost', '[::1]', '127.0.0.1')
    """
    host = value.decode("latin-1").lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
