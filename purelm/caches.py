"""Results that functions keep for equal arguments, and `clear_caches`, which forgets them all (as jax.clear_caches).

    @memo(64)
    def table(cfg): ...            # computed once for each of the last 64 configurations

A memo changes no result, only what the next call costs. Every table in purelm whose entries depend on what a user gave
is made by `memo`, so a long process that saw many tokenizers, patterns or configurations can release them all. Not
emptied: what torch.compile and Triton have compiled (torch.compiler.reset does that), and what is to happen once in a
process, a warning for instance.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

__all__ = ["clear_caches", "memo", "on_clear"]

T = TypeVar("T")

_CLEARS: list[Callable[[], None]] = []


def memo(maxsize: int | None) -> "Callable[[Callable[..., T]], functools._lru_cache_wrapper[T]]":
    """functools.lru_cache(maxsize), emptied by `clear_caches`; None is no limit. For functions of a module.

    It returns functools' own object, which torch.compile knows: it traces the function inside, with a warning (so what
    is called while compiling should call the plain function, as models.layers.kinds_of does). The function is kept as
    long as the process lives, so a table for one call only, made inside of a function, should be functools' own.

    >>> @memo(2)
    ... def square(x):
    ...     return x * x
    >>> square(3), square(3), square.cache_info().hits
    (9, 9, 1)
    >>> clear_caches()
    >>> square(3), square.cache_info().hits
    (9, 0)
    """

    def keep(function: Callable[..., T]) -> "functools._lru_cache_wrapper[T]":
        table = functools.lru_cache(maxsize)(function)
        on_clear(table.cache_clear)
        return table

    return keep


def on_clear(clear: Callable[[], None]) -> Callable[[], None]:
    """Have `clear_caches` call `clear`, which empties a table of another kind; returns it, so it is a decorator too."""
    _CLEARS.append(clear)
    return clear


def clear_caches() -> None:
    """Empty every memo table of the library. The next calls compute again, with equal results.

    >>> clear_caches()
    """
    for clear in list(_CLEARS):  # another thread may import a module, which adds one
        clear()
