"""A function as one CUDA graph: its kernels are recorded once, and then all launched by a single call.

The training step of a small model is hundreds of kernels of some microseconds each, and Python takes longer to launch
them than the GPU to run them. A replay runs no Python between the first kernel and the last.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from purelm.transforms.donation import check_memory, consume, donated_type_of, unmatched_message

__all__ = ["cuda_graph"]

MOST_RECORDS = 4  # recordings of one function; each holds memory for its arguments and results
MOST_COUNTS = 256  # kinds of arguments for which warm-up calls are counted


def cuda_graph(f: Callable[..., Any], donate: int | tuple[int, ...] = (), *, n_warmup: int = 3) -> Callable[..., Any]:
    """f, recorded as a CUDA graph at its (n_warmup + 1)th call with arguments of one kind, and replayed from then on.

    `donate` means what it means for `jit`; a compiled step takes it twice: cuda_graph(jit(step, donate=0), donate=0).
    The graph reads donated tensors where they are and writes matching results into their memory; the donated tensors
    are empty afterwards. Other tensors are copied into the graph's own memory before each replay, and other results
    copied out of it, so that no later replay overwrites a result. Results are bitwise those of f.

    f must be pure, launch all of its work on one GPU, and never wait for it (no .item(), no copy from or to the host).
    The kind of the arguments is their tree with each tensor's shape, strides, dtype and device, and the value of every
    other leaf. For each kind f is first called n_warmup times without a graph, to compile and allocate everything. A
    recording is valid for donated tensors at the same addresses: another model or a loaded checkpoint is recorded anew.
    The 4 most recent recordings are kept; they share the memory of f's intermediate results, so that all calls must be
    on one stream. Without a tensor on a GPU, and inside a function that is being compiled, f is called without a graph.

    ValueError: a donated tensor matches no result or shares memory with another argument; a tensor requires grad or is
    not on the GPU; a leaf cannot be hashed. RuntimeError: f does something that cannot be recorded.

    >>> step = cuda_graph(jit(make_step(loss, optimizer, schedule), donate=0), donate=0)  # doctest: +SKIP
    """
    donate = (donate,) if isinstance(donate, int) else tuple(donate)
    if n_warmup < 1:
        raise ValueError(f"cuda_graph: n_warmup is {n_warmup}; at least one call must come before the recording")
    if len(set(donate)) != len(donate) or any(i < 0 for i in donate):
        raise ValueError(f"cuda_graph: donate is {donate}; distinct positions from 0 are needed")
    records: OrderedDict[Any, _Record] = OrderedDict()
    n_calls: OrderedDict[Any, int] = OrderedDict()
    donated_type = donated_type_of(f"cuda_graph({getattr(f, '__name__', type(f).__name__)})")

    @functools.wraps(f, updated=())
    def graphed(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return f(*args, **kwargs)
        if donate and max(donate) >= len(args):
            raise ValueError(f"cuda_graph: donate is {donate}, but {len(args)} positional arguments were given")
        leaves, treedef = optree.tree_flatten((args, kwargs))
        if not any(isinstance(x, Tensor) and x.is_cuda for x in leaves):
            return f(*args, **kwargs)
        donated = [i in donate for i, arg in enumerate(args) for _ in range(_n_leaves(arg))]
        donated += [False] * (len(leaves) - len(donated))
        old = [x for x, d in zip(leaves, donated, strict=True) if d]
        check_memory("cuda_graph", old, args, kwargs, donate)
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and not donated[i]:
                if x.requires_grad:
                    raise ValueError("cuda_graph: an argument requires grad, but a graph has none: pass x.detach()")
                leaves[i] = x.contiguous()  # the strides that its copy in the graph's own memory has
        kind = treedef, *[_kind(x) for x in leaves]
        try:
            hash(kind)
        except TypeError as error:
            raise ValueError(f"cuda_graph: arguments are trees of tensors and of hashable values: {error}") from error
        if n_calls.get(kind, 0) < n_warmup:
            n_calls[kind] = n_calls.get(kind, 0) + 1
            if len(n_calls) > MOST_COUNTS:
                n_calls.popitem(last=False)
            new_args, new_kwargs = treedef.unflatten(_aliases(leaves, donated))
            out = f(*new_args, **new_kwargs)
        else:
            key = kind, *[x.data_ptr() for x in old if isinstance(x, Tensor)]
            if key not in records:
                if len(records) >= MOST_RECORDS:
                    records.popitem(last=False)
                records[key] = _Record(f, leaves, treedef, donated, args, donate, list(records.values()))
            records.move_to_end(key)
            out = records[key].replay(leaves)
        consume(old, donated_type)
        return out

    return graphed


class _Record:
    """A recorded graph, the tensors from which it reads its arguments, and those into which it writes its results."""

    def __init__(
        self,
        f: Callable[..., Any],
        leaves: list[Any],
        treedef: Any,
        donated: list[bool],
        args: tuple,
        donate: tuple[int, ...],
        others: "list[_Record]",
    ):
        self.device = device = next(x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda)
        for x in leaves:
            if isinstance(x, Tensor) and x.device != device:
                raise ValueError(f"cuda_graph: a tensor is on {x.device} and another on {device}: move it there first")
        aliases = _aliases(leaves, donated)
        inputs = [x.clone() if isinstance(x, Tensor) and not d else x for x, d in zip(aliases, donated, strict=True)]
        new_args, new_kwargs = treedef.unflatten([x.data if isinstance(x, Tensor) else x for x in inputs])
        self.graph = torch.cuda.CUDAGraph()
        # Between two replays nothing is read that lies there: arguments are copied in, and results out.
        pool = next((other.graph.pool() for other in others if other.device == device), None)
        with torch.cuda.device(device):
            try:
                # thread_local: other threads may allocate memory meanwhile; torch tells autograd's own of the capture.
                with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                    results, self.treedef = optree.tree_flatten(f(*new_args, **new_kwargs))
                    self.slots, unmatched = _store(inputs, donated, results)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "cuda_graph: the function does something that a CUDA graph cannot record, such as waiting for the "
                    f"device (.item(), .cpu(), a copy from the host); call it without cuda_graph. {error}"
                ) from error
        if unmatched:
            raise ValueError(unmatched_message("cuda_graph", args, donate, unmatched))
        self.inputs = [x if isinstance(x, Tensor) and not d else None for x, d in zip(inputs, donated, strict=True)]
        self._own = [x for x in self.inputs if x is not None]
        # Results in donated memory are not kept here: that would keep the memory of a model alive after its last use.
        self.results = [x if slot is None else None for x, slot in zip(results, self.slots, strict=True)]

    def replay(self, leaves: list[Any]) -> Any:
        _copy([x for x, mine in zip(leaves, self.inputs, strict=True) if mine is not None], self._own)
        self.graph.replay()
        out = [torch.empty_like(x) if isinstance(x, Tensor) else x for x in self.results]
        _copy(*([x for x in xs if isinstance(x, Tensor)] for xs in (self.results, out)))
        for i, slot in enumerate(self.slots):
            if slot is not None:
                out[i] = leaves[slot].data
        return self.treedef.unflatten(out)


def _store(inputs: list[Any], donated: list[bool], results: list[Any]) -> tuple[list[int | None], list[int]]:
    """Match results with donated tensors as `jit` does, and copy each into its tensor unless f has written it there.

    Returns for each result the index of the leaf in whose memory it is (None: no donated one), and for each donated
    tensor without a result its index among the donated leaves.
    """
    places = {_place(x): i for i, x in enumerate(inputs) if donated[i] and isinstance(x, Tensor)}
    slots: list[int | None] = []
    for x in results:  # results that are already in donated memory: f stored them there, or returned the argument
        slots.append(places.pop(_place(x), None) if isinstance(x, Tensor) else None)
    free = sorted(places.values())
    storages = {x.untyped_storage().data_ptr() for i, x in enumerate(inputs) if donated[i] and isinstance(x, Tensor)}
    moves = []
    for k, x in enumerate(results):
        if not isinstance(x, Tensor) or slots[k] is not None:
            continue
        if x.untyped_storage().data_ptr() in storages:
            x = results[k] = x.clone()  # before the copies below overwrite the memory that x is a view of
        for position, i in enumerate(free):
            if x.shape == inputs[i].shape and x.dtype == inputs[i].dtype:
                slots[k] = free.pop(position)
                moves.append((i, x))
                break
    for i, x in moves:
        inputs[i].copy_(x)
    numbers = [i for i, d in enumerate(donated) if d]
    return slots, [numbers.index(i) for i in free]


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Each source into its target, in a few launches: one for each of hundreds of leaves takes milliseconds."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        for of_one, x in zip(by_dtype.setdefault(source.dtype, ([], [])), (target, source), strict=True):
            of_one.append(x)
    with torch.no_grad():
        for some in by_dtype.values():
            torch._foreach_copy_(*some)


def _aliases(leaves: list[Any], donated: list[bool]) -> list[Any]:
    """The leaves, with aliases of the donated ones: f may empty the aliases and fail, and the arguments are intact."""
    return [x.data if d and isinstance(x, Tensor) else x for x, d in zip(leaves, donated, strict=True)]


def _n_leaves(arg: Any) -> int:
    return optree.tree_structure(arg).num_leaves


def _kind(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x)


def _place(x: Tensor) -> Any:
    return x.data_ptr(), x.shape, x.stride(), x.dtype
