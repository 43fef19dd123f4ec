"""A full disk: errors that mean it, waiting until it has room, and lines for logs that may lie on it.

What a service cannot write it does later. An error of `say` is none of the caller's: the log is what fills up, too.
"""

import contextlib
import errno
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

__all__ = ["Teller", "await_room", "has_room", "is_full", "reason"]

LEAST = 2**20  # bytes that are free before a run is begun
LEAST_FILES = 16
LOOK = 1.0  # seconds from one look at a full disk to the next
EVERY = 60.0  # seconds before a line is repeated
MOST_LINES = 64  # that are remembered
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the disk or the user's part of it is full.

    Those of other languages carry the system's number in their text alone, as safetensors' do.

    >>> is_full(OSError(28, "No space left on device")), is_full(RuntimeError("I/O error (os error 28)"))
    (True, True)
    >>> is_full(OSError(2, "No such file or directory"))
    False
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(f"(os error {number})" in str(error) for number in FULL) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def has_room(folder: Path) -> bool:
    """Whether the disk of the folder takes `LEAST` bytes and `LEAST_FILES` files more."""
    found = os.statvfs(folder)
    # Where files are made as they are needed, their number is told as 0.
    return found.f_bavail * found.f_frsize >= LEAST and (not found.f_files or found.f_favail >= LEAST_FILES)


def reason(error: sqlite3.Error, folder: Path) -> str:
    """An error of the database in words: of a full disk SQLite says that it can make no file, too."""
    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if "full" in str(error) or (kind in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and not has_room(folder)):
        return "the disk is full: free some space, and try again"
    return str(error)


def await_room(folder: Path, leave: threading.Event, say: Callable[[str], None]) -> bool:
    """Wait until the disk has room; False if asked to leave before."""
    while not has_room(folder):
        say(f"{folder}: less than {LEAST >> 20} MiB or {LEAST_FILES} files are free: waiting for room on the disk")
        if leave.wait(LOOK):
            return False
    return True


class Teller:
    """Say a line, unless the same was said in the last `every` seconds; one that cannot be written is left out."""

    def __init__(
        self,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
        every: float = EVERY,
        now: Callable[[], float] = time.monotonic,
    ):
        self._say, self._every, self._now = say, every, now
        self._said: OrderedDict[str, float] = OrderedDict()

    def __call__(self, text: str) -> None:
        now = self._now()
        if now - self._said.get(text, -self._every) < self._every:
            return
        self._said[text] = now
        self._said.move_to_end(text)
        while len(self._said) > MOST_LINES:
            self._said.popitem(last=False)
        with contextlib.suppress(OSError, ValueError):  # a full disk, a pipe without a reader; a closed file
            self._say(text)
