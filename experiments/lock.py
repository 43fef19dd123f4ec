"""One process at a time writes into the folder of a run: a lock that is released when its holder ends in any way."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from experiments.console import say

LOCK = ".lock"


@contextmanager
def locked(run: Path, flag: str = "--run") -> Iterator[None]:
    """Hold the lock of the folder, which is made if need be; ValueError if another process holds it.

    It is an flock on a file in the folder, which the kernel releases when the process ends, after kill -9 too. If
    nothing else was written, the folder is removed at the end.

    flag: what the program calls the folder.
    """
    existed = run.exists()
    if existed and not run.is_dir():
        raise ValueError(f"run {run}: is a file, not a folder")
    file = _acquire(run, flag)
    try:
        yield
    finally:
        # Removed while locked: a process that waits for the old file sees that it is no longer in the folder.
        (run / LOCK).unlink(missing_ok=True)
        if not existed and run.is_dir() and not any(run.iterdir()):
            run.rmdir()
        file.close()


def held(run: Path) -> bool:
    """Whether a process holds the lock of the folder now."""
    try:
        file = open(run / LOCK, "rb")
    except (FileNotFoundError, NotADirectoryError):
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _acquire(run: Path, flag: str) -> IO[str]:
    while True:
        run.mkdir(parents=True, exist_ok=True)
        try:
            file = open(run / LOCK, "a+", encoding="utf-8")
        except FileNotFoundError:  # the holder removed the folder just now
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"run {run} is being written by {holder}: wait for it or end it, or give another {flag}"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                file.close()
                raise
            say(f"run {run}: its file system has no locks, so a second run in it would not be noticed")
            return file
        if _is_current(file, run / LOCK):
            file.truncate(0)
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name, too
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        file.close()


def _is_current(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one in the folder under this name."""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(file.fileno())
    return (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino)
