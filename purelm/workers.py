"""A function over many items by several workers: its results in order, and few of them in memory at a time.

    for path, n in in_threads(count, paths, check_workers(None)): ...              # count(path), which releases the GIL
    for path, n in in_processes(count_with, table, paths, check_workers(4)): ...   # count_with(table, path)
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any

__all__ = ["BYTES_PER_PROCESS", "check_workers", "in_processes", "in_threads"]

MOST_WORKERS = 1024
BYTES_PER_PROCESS = 32 << 20  # a process costs its start, 0.3 s and more


def check_workers(n_workers: int | None, n_bytes: int | None = None) -> int:
    """The number of workers meant; None is one for each processor that this process may use.

    n_bytes: the size of the input, where the workers are processes; then None is at most one for BYTES_PER_PROCESS.
    """
    if n_workers is None:
        processors = len(os.sched_getaffinity(0))
        return processors if n_bytes is None else min(processors, 1 + n_bytes // BYTES_PER_PROCESS)
    if not isinstance(n_workers, int) or isinstance(n_workers, bool) or not 1 <= n_workers <= MOST_WORKERS:
        raise ValueError(f"n_workers is {n_workers!r}: allowed is None or an int from 1, at most {MOST_WORKERS}")
    return n_workers


def in_threads(function: Callable[[Any], Any], items: Iterable, workers: int) -> Iterator[tuple[Any, Any]]:
    """(item, function(item)) in order, in threads; one worker is this thread. For functions that release the GIL."""
    if workers == 1:
        for item in items:
            yield item, function(item)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from _ahead(pool, function, items, 2 * workers)


def in_processes(
    function: Callable[[Any, Any], Any], shared: Any, items: Iterable, workers: int
) -> Iterator[tuple[Any, Any]]:
    """(item, function(shared, item)) in order, in processes; one worker is this process. `shared` is sent once to each.

    The processes are spawned, not forked: a fork of a process that has threads (torch's, say) can hang. A script that
    spawns processes needs `if __name__ == "__main__":` around what it does.
    """
    if workers == 1:
        for item in items:
            yield item, function(shared, item)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_remember, initargs=(function, shared)) as pool:
        yield from _ahead(pool, _apply, items, 2 * workers)


_TASK: list[Any] = []  # in a spawned process only: (function, shared)


def _remember(function: Callable, shared: Any) -> None:
    _TASK[:] = [function, shared]


def _apply(item: Any) -> Any:
    function, shared = _TASK
    return function(shared, item)


def _ahead(pool: Executor, function: Callable, items: Iterable, window: int) -> Iterator[tuple[Any, Any]]:
    items = iter(items)
    running = [(item, pool.submit(function, item)) for item in islice(items, window)]
    try:
        while running:
            item, future = running.pop(0)
            result = future.result()
            running += [(later, pool.submit(function, later)) for later in islice(items, 1)]
            yield item, result
    finally:  # after an error, or when the reader stops, what waits is not started
        for _, future in running:
            future.cancel()
