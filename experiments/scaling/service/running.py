"""The server's process: a socket, the app on it, and the supervisor beside, until it is told to end."""

import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from experiments.scaling.service.guard import Guard
from experiments.scaling.service.supervisor import GRACE, Supervisor

__all__ = ["bind", "serve"]


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; ValueError where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from None


def serve(
    app: Guard, supervisor: Supervisor, sock: socket.socket, *, grace: float = GRACE,
    ready: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Serve until SIGTERM or Ctrl-C, then have the workers put their runs aside.

    After kill -9 the workers leave by themselves, since their pipe from here is closed.
    """

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on",
        proxy_headers=False,  # X-Forwarded-For would let a client choose its address, by which wrong keys are counted
        server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=5,
    )  # fmt: skip
    old = signal.signal(signal.SIGTERM, leave)
    try:
        supervisor.start()
        ready()
        uvicorn.Server(config).run(sockets=[sock])  # passes the signal that ended it on to the handlers from before
    finally:
        supervisor.stop(grace)
        signal.signal(signal.SIGTERM, old)
        sock.close()
