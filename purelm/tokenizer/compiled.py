"""How the trainer's loops are compiled by numba. This module imports numba: import it inside functions only."""

from collections.abc import Callable

from numba import njit


def loop(function: Callable) -> Callable:
    """Compile for calls from Python, without the GIL; kept on disk where numba finds a folder that it may write to.

    For functions that make arrays. Those of `kernels` do not, and are compiled without reference counting.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # a read-only installation and home: compiled anew in each process
        return njit(nogil=True)(function)
