"""The step of generation as a CUDA graph, and what is compiled or recorded kept from one call to the next.

    wrap_step = reused(on_graph)
    generate(model, params, prompts, key, max_new_tokens=256, wrap_step=wrap_step)     # records
    generate(model, params, others, key, max_new_tokens=256, wrap_step=wrap_step)      # replays

What is kept belongs to this wrapper, and is freed with it.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import tree
from purelm.generate.rows import Rows, StepFn
from purelm.transforms import cuda_graph

__all__ = ["on_graph", "reused"]

MOST_KINDS = 4  # shapes of which a step's recording and memory are kept, as `cuda_graph` keeps recordings

WrapStep = Callable[[StepFn], StepFn]


def reused(wrap_step: WrapStep, *, n_kept: int = 4) -> WrapStep:
    """wrap_step, which gives the same function for equal steps: what it compiled or recorded serves the next call too.

    Steps of `generate` are equal where model, sampling, stop and draw are. The last n_kept are kept, with their
    memory: `on_graph`'s is the parameters, rows and cache of its last call.
    """
    if n_kept < 1:
        raise ValueError(f"n_kept must be at least 1, got {n_kept}")
    kept: list[tuple[StepFn, StepFn]] = []

    def wrapped(step: StepFn) -> StepFn:
        for known, made in kept:
            if known == step:
                return made
        made = wrap_step(step)
        kept.append((step, made))
        del kept[:-n_kept]
        return made  # and not the last that is kept: another thread may have added one

    return wrapped


class _Memory(NamedTuple):
    """Where the rows and the cache of a step lie that may be recorded."""

    leaves: list[Tensor]
    given: list[weakref.ref[Tensor]]  # the same as the caller has them

    def is_at(self, leaves: list[Tensor]) -> bool:
        return all(x.data_ptr() == y.data_ptr() for x, y in zip(self.leaves, leaves, strict=True))


def on_graph(step: StepFn) -> StepFn:
    """A `wrap_step` for a GPU: the step as one CUDA graph (`purelm.transforms.cuda_graph`).

    Rows and cache are donated. The graph reads the parameters where they are, so it is recorded anew for parameters
    elsewhere. Rows and cache of a new call are copied to where those of an earlier call of the same shapes lay, unless
    somebody still holds these. `generate` records the steps between two readings as one graph, and the computation of
    prompts that come later, both of which are launched more slowly than a GPU runs them. On a CPU the step runs as it
    is. Threads may share it: their calls take turns, and must be on one stream.
    """
    return _Graphed(step)


class _Graphed:
    """The step, and `many` steps, each a graph of the last parameters."""

    def __init__(self, step: StepFn):
        self.step = step
        self.lock = threading.RLock()  # a graph's arguments are copied to one place, and then it is launched
        self.place: Any = None
        # The last parameters, kept so that no others come to lie at their addresses. Graphs read them from here: those
        # that a graph was made with may be emptied since, by a donation to these.
        self.given: list[Any] = []
        self.graphs: dict[int, Callable[..., Any]] = {}
        self.others: list[tuple[Any, Callable[..., Any]]] = []
        self.memories: dict[Any, _Memory] = {}

    def __call__(self, params: Any, rows: Rows, cache: Any) -> tuple[Rows, Any]:
        return self.many(params, rows, cache, 1)

    def many(self, params: Any, rows: Rows, cache: Any, n: int) -> tuple[Rows, Any]:
        """n steps."""
        if not rows.n_B.is_cuda:
            return _repeated(self.step, n, [params], rows, cache)
        with self.lock:
            return self._many(params, rows, cache, n)

    def _many(self, params: Any, rows: Rows, cache: Any, n: int) -> tuple[Rows, Any]:
        self._of(params)
        if n not in self.graphs:
            f = partial(_repeated, self.step, n, self.given)
            self.graphs[n] = cuda_graph(f, donate=(0, 1), n_warmup=1)
        leaves, treedef = tree.flatten((rows, cache))
        kind = treedef, *[(x.shape, x.dtype) for x in leaves]
        memory = self.memories.pop(kind, None)
        if memory is not None and not memory.is_at(leaves) and all(ref() is None for ref in memory.given):
            with torch.no_grad():
                for x, y in zip(memory.leaves, leaves, strict=True):
                    x.copy_(y)
            rows, cache = tree.unflatten(treedef, [x.data for x in memory.leaves])
        out = self.graphs[n](rows, cache)
        given = tree.leaves(out)
        self.memories[kind] = _Memory([x.data for x in given], [weakref.ref(x) for x in given])
        if len(self.memories) > MOST_KINDS:
            del self.memories[next(iter(self.memories))]
        return out

    def recorded(self, f: Callable[..., Any], params: Any, *args: Any) -> Any:
        """f(params, *args) as a graph of its own, kept for functions that are equal to f."""
        with self.lock:
            self._of(params)
            graph = next((graph for known, graph in self.others if known == f), None)
            if graph is None:
                graph = cuda_graph(partial(_called, f, self.given), n_warmup=1)
                self.others = [*self.others, (f, graph)][-MOST_KINDS:]
            return graph(*args)

    def _of(self, params: Any) -> None:
        leaves = tree.leaves(params)
        place = [(x.data_ptr(), x.dtype, x.shape) for x in leaves]
        self.given[:] = [params]
        if place != self.place:
            self.place = place
            self.graphs.clear()
            self.others.clear()
            self.memories.clear()


def _repeated(step: StepFn, n: int, given: list[Any], rows: Rows, cache: Any) -> tuple[Rows, Any]:
    for _ in range(n):
        rows, cache = step(given[0], rows, cache)
    return rows, cache


def _called(f: Callable[..., Any], given: list[Any], *args: Any) -> Any:
    return f(given[0], *args)
