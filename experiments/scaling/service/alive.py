"""Whether the process of an attempt lives: it holds an flock on a file named by the run_id, which ends with it.

The lock outlasts neither kill -9 nor a restart of the machine, and it does not depend on numbers of processes, which
are given anew. A process takes it before it claims a run, so that no claimed run is without.
"""

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from purelm.files import hold

__all__ = ["Alive", "check_locks", "lives", "only_one", "remove_dead"]

FOLDER = "alive"


class Alive:
    """A new run_id, WORKER-RANDOM, held by this process until `end`."""

    def __init__(self, folder: Path, worker: str):
        (folder / FOLDER).mkdir(mode=0o700, exist_ok=True)
        self.run_id = f"{worker}-{secrets.token_hex(8)}"
        self.path = folder / FOLDER / self.run_id
        self._file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        if not hold(self._file):
            os.close(self._file)
            raise OSError(f"{self.path}: cannot be locked")

    def end(self) -> None:
        """Give the lock up."""
        self.path.unlink(missing_ok=True)
        os.close(self._file)


def lives(folder: Path, run_id: str) -> bool:
    """Whether a process holds the lock of this attempt. False is for ever: no run_id comes twice."""
    try:
        file = os.open(folder / FOLDER / run_id, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not hold(file)
    finally:
        os.close(file)


@contextmanager
def only_one(path: Path, leave: threading.Event) -> Iterator[bool]:
    """Wait until no other process is in the place of this name; False if asked to leave before."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        while not (mine := hold(file)) and not leave.wait(0.1):
            pass
        yield mine
    finally:
        os.close(file)


def remove_dead(folder: Path) -> None:
    """Remove the files of processes that are gone."""
    for path in (folder / FOLDER).iterdir() if (folder / FOLDER).is_dir() else ():
        if not lives(folder, path.name):
            path.unlink(missing_ok=True)


def check_locks(folder: Path) -> None:
    """ValueError where the file system has no locks, or one lock can be held twice."""
    mine = Alive(folder, "check")
    try:
        if not lives(folder, mine.run_id):
            raise ValueError(f"{folder}: the file system does not keep locks; use a folder on a local disk")
    finally:
        mine.end()
