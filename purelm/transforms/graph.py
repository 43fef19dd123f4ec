"""A function as one CUDA graph: recorded once, then replayed by a single call, whatever it launches.

The training step of a small model is hundreds of kernels of some microseconds each, and Python takes longer to launch
them than the GPU to run them. A replay needs no Python between the first kernel and the last.
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

MOST_RECORDS = 4  # of one function: each holds the memory of its intermediate results
MOST_COUNTS = 256  # kinds of arguments whose calls are counted


def cuda_graph(f: Callable[..., Any], donate: int | tuple[int, ...] = (), *, n_warmup: int = 3) -> Callable[..., Any]:
    """f, recorded as a CUDA graph at its (n_warmup + 1)th call with arguments of one kind, and replayed from then on.

    `donate` means what it means for `jit`, and a step has both: cuda_graph(jit(step, donate=0), donate=0). The graph
    works in the memory of the donated tensors, which receives the results; they are empty afterwards. Other
    tensors are copied into memory of the graph's own before each replay, and other results out of it afterwards, so
    that every result is the caller's. Results are those of f, to the bit.

    f must be pure, launch all of its work on one GPU, and never wait for it (no .item(), no copy from or to the host).
    Numbers are part of the kind of an argument, and so are shapes, strides and dtypes: for each kind f is first called
    n_warmup times as it is, so that everything is compiled and allocated. Donated tensors at other addresses (another
    model, a loaded checkpoint) are recorded anew. The last 4 recordings are kept, each with the memory of f's
    intermediate results. Without a tensor on a GPU, or inside a function that is being compiled, f is called as it is.

    ValueError: a donated tensor that matches no result or shares memory with another argument; a tensor that requires
    grad or is not on the GPU; a leaf that cannot be hashed. RuntimeError: f does what a graph cannot hold.

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
            raise ValueError(f"cuda_graph: donate is {donate}, but {len(args)} positional arguments came")
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
                    raise ValueError("cuda_graph: an argument requires grad, which ends at a graph; pass x.detach()")
                leaves[i] = x.contiguous()  # as it will lie in the graph's own memory
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
                records[key] = _Record(f, leaves, treedef, donated, args, donate)
            records.move_to_end(key)
            out = records[key].replay(leaves)
        consume(old, donated_type)
        return out

    return graphed


class _Record:
    """A graph, the tensors that it reads the arguments from, and where its results are."""

    def __init__(
        self,
        f: Callable[..., Any],
        leaves: list[Any],
        treedef: Any,
        donated: list[bool],
        args: tuple,
        donate: tuple[int, ...],
    ):
        device = next(x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda)
        for x in leaves:
            if isinstance(x, Tensor) and x.device != device:
                raise ValueError(f"cuda_graph: a tensor on {x.device} beside those on {device}: move it there first")
        aliases = _aliases(leaves, donated)
        inputs = [x.clone() if isinstance(x, Tensor) and not d else x for x, d in zip(aliases, donated, strict=True)]
        new_args, new_kwargs = treedef.unflatten([x.data if isinstance(x, Tensor) else x for x in inputs])
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            try:
                # Other threads may allocate memory meanwhile; autograd's own are told of the recording by torch.
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    results, self.treedef = optree.tree_flatten(f(*new_args, **new_kwargs))
                    self.slots, unmatched = _store(inputs, donated, results)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "cuda_graph: the function does what a CUDA graph cannot hold, such as waiting for the device "
                    f"(.item(), .cpu(), a copy from the host); call it without cuda_graph. {error}"
                ) from error
        if unmatched:
            raise ValueError(unmatched_message("cuda_graph", args, donate, unmatched))
        self.inputs = [x if isinstance(x, Tensor) and not d else None for x, d in zip(inputs, donated, strict=True)]
        # What lies in donated memory is the caller's: holding it here would keep a dropped model alive.
        self.results = [x if slot is None else None for x, slot in zip(results, self.slots, strict=True)]

    def replay(self, leaves: list[Any]) -> Any:
        for x, mine in zip(leaves, self.inputs, strict=True):
            if mine is not None:
                mine.copy_(x)
        self.graph.replay()
        out = []
        for x, slot in zip(self.results, self.slots, strict=True):
            if slot is not None:
                out.append(leaves[slot].data)
            else:
                out.append(x.clone() if isinstance(x, Tensor) else x)
        return self.treedef.unflatten(out)


def _store(inputs: list[Any], donated: list[bool], results: list[Any]) -> tuple[list[int | None], list[int]]:
    """Copy results into the donated tensors that have none yet.

    For each result, the leaf in whose memory it is; and the numbers, among donated leaves, of those left without.
    """
    places = {_place(x): i for i, x in enumerate(inputs) if donated[i] and isinstance(x, Tensor)}
    slots: list[int | None] = []
    for x in results:  # those that f itself stored, or passed on
        slots.append(places.pop(_place(x), None) if isinstance(x, Tensor) else None)
    free = sorted(places.values())
    storages = {x.untyped_storage().data_ptr() for i, x in enumerate(inputs) if donated[i] and isinstance(x, Tensor)}
    moves = []
    for k, x in enumerate(results):
        if not isinstance(x, Tensor) or slots[k] is not None:
            continue
        if x.untyped_storage().data_ptr() in storages:
            x = results[k] = x.clone()  # it is read before anything there is overwritten
        for position, i in enumerate(free):
            if x.shape == inputs[i].shape and x.dtype == inputs[i].dtype:
                slots[k] = free.pop(position)
                moves.append((i, x))
                break
    for i, x in moves:
        inputs[i].copy_(x)
    numbers = [i for i, d in enumerate(donated) if d]
    return slots, [numbers.index(i) for i in free]


def _aliases(leaves: list[Any], donated: list[bool]) -> list[Any]:
    """The leaves, with other tensor objects for those that are donated: f may empty them, and may also fail."""
    return [x.data if d and isinstance(x, Tensor) else x for x, d in zip(leaves, donated, strict=True)]


def _n_leaves(arg: Any) -> int:
    return optree.tree_structure(arg).num_leaves


def _kind(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x)


def _place(x: Tensor) -> Any:
    return x.data_ptr(), x.shape, x.stride(), x.dtype
