"""Atomic files: written under a temporary name and renamed; leftovers of killed writers are found and removed."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["hold", "refuse_overwrite", "remove_leftovers", "staging", "sync"]

_STAGED = re.compile(r"\.new-(?P<id>[0-9a-f]{16})")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk: a rename must not reach it before the data does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed or the process ends; False where another process has the lock.

    Also False where the file system has no locks, so that `remove_leftovers` removes nothing there.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def remove_leftovers(folder: Path, name: re.Pattern, keep: Iterable[str | None] = ()) -> None:
    """Remove the files and folders in `folder` whose whole name matches and that no writer `hold`s any more.

    Args:
        name: a pattern with a group "id". Files of one id are removed together, or not at all if one of them is held.
        keep: ids that are not removed.
    """
    kept = set(keep)
    groups: dict[str, list[Path]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = name.fullmatch(path.name)
        if match and match["id"] not in kept:
            groups.setdefault(match["id"], []).append(path)
    for paths in groups.values():
        opened: list[int] = []
        try:
            opened += [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in paths]
            if all([hold(descriptor) for descriptor in opened]):
                for path in paths:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:  # another process removed it first, or we lack the permission
            pass
        finally:
            for descriptor in opened:
                os.close(descriptor)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`: files are written there and renamed into place when all of them are done.

    It is removed on leaving, and so is `folder` where it was made here and is empty. What killed processes left of
    this kind is removed first.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, _STAGED)
    staged = folder / f".new-{secrets.token_hex(8)}"
    staged.mkdir()
    descriptor = os.open(staged, os.O_RDONLY)
    try:
        hold(descriptor)
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        os.close(descriptor)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def refuse_overwrite(outputs: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike]) -> None:
    """ValueError where writing an output would replace an input: one path, or two names of one file."""
    given = [Path(path) for path in inputs]
    for output in map(Path, outputs):
        for path in given:
            same = output.resolve() == path.resolve()
            if same or (output.exists() and path.exists() and os.path.samefile(output, path)):
                raise ValueError(f"{path}: is an input, and the output {output} would replace it; write elsewhere")
