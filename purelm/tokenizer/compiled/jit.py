"""How the loops are compiled: two decorators, `part` for what is inlined into loops, `loop` for what Python calls."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.options import DefaultOptions

from purelm.caches import memo

# _nrt=False: no counting of references to the arrays that one function hands another. The atomic counting costs five
# times as much as the work itself, and only functions that make arrays need it. It is no public option of numba: should
# a version come without it, the code is still right, and slower.
_UNCOUNTED = {"_nrt": False} if hasattr(DefaultOptions, "_nrt") else {}


def part(function: Callable) -> Callable:
    """Compile for calls from compiled code, inlined by LLVM. For functions that make no arrays."""
    return njit(**_UNCOUNTED, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def loop(function: Callable | None = None, *, makes_arrays: bool = False) -> Callable:
    """Compile for calls from Python, without the GIL; kept on disk where numba finds a folder that it may write to."""
    if function is None:
        return partial(loop, makes_arrays=makes_arrays)
    options = {"nogil": True, **({} if makes_arrays else _UNCOUNTED)}
    try:
        dispatcher = njit(cache=True, **options)(function)
    except RuntimeError:  # a read-only installation and home: compiled anew in each process
        return njit(**options)(function)
    _watch_folder(dispatcher, Path(function.__code__.co_filename).parent)
    return dispatcher


def _watch_folder(dispatcher, folder: Path) -> None:
    """Make the machine code on disk stale when any file in `folder` changes.

    A loop's machine code contains the functions that it calls, and numba looks at the file of the loop alone: after a
    change of another file it would go on with the old code. The stamp is no public part of numba's: should a version
    come without it, delete __pycache__ after changing these files.
    """
    cache_file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = (cache_file._source_stamp, _stamp(folder))


@memo(1)
def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time of change (ns) and size of each file."""
    files = sorted(folder.glob("*.py"))
    return tuple((file.name, (status := file.stat()).st_mtime_ns, status.st_size) for file in files)
