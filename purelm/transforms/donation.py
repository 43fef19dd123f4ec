"""Compilation with donation: the storage of donated arguments receives the results.

Results are written into donated memory without a second copy only if one graph both computes and stores them. If f's
graph breaks inside of f, as a train step's does around the gradient, f's last graph returns the results first. There
are two remedies. `in_stages` cuts f at the breaks, and each stage is compiled by itself, on every version of torch. For
other functions dynamo's nested graph breaks help, from torch 2.13 on (in 2.11 they resume with the globals of the wrong
module).
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor

from purelm import tree
from purelm.transforms.boundary import own_cache, own_code
from purelm.transforms.torch_versions import keep_writes_behind_reads, nested_graph_breaks
from purelm.tree import traced

__all__ = [
    "check_memory",
    "consume",
    "consuming",
    "donated_type_of",
    "in_stages",
    "jit",
    "jitted_as",
    "unmatched_message",
]

F = TypeVar("F", bound=Callable[..., Any])


def in_stages(*stages: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """The function (state, x) -> last(state, ...(second(state, first(state, x)))), which `jit` compiles stage by stage.

    Every stage gets the same state; only the last one may consume it. A stage marked with torch.compiler.disable (for
    collectives, say) stays plain Python.

    >>> f = in_stages(lambda state, x: x + 1, lambda state, y: state * y)
    >>> f(3, 4)
    15
    """
    if not stages:
        raise ValueError("in_stages: at least one stage is needed")

    def staged(state: Any, x: Any) -> Any:
        for stage in stages:
            x = stage(state, x)
        return x

    staged.stages_of_purelm = stages  # type: ignore[attr-defined]
    return staged


def jitted_as(stage: F, make: Callable[[tuple[int, ...], dict[str, Any]], Callable[..., Any] | None]) -> F:
    """`stage`, marked so that jit(stage, donate, **options) is make(donate, options), or the usual if that is None.

    For stages of which only a part is worth compiling: an optimizer's update of one leaf, say, called for every leaf.
    """
    stage.jitted_of_purelm = make  # type: ignore[attr-defined]
    return stage


def consuming(f: Callable[..., Any], f_: Callable[..., Any]) -> Callable[..., Any]:
    """A substitute for jit(f, donate=0) that calls f_ and compiles nothing.

    f_ returns what f does, but writes it into the memory of its first argument.
    """
    donated_type = donated_type_of(f"jit({getattr(f, '__name__', type(f).__name__)})")

    @functools.wraps(f, updated=())
    def consumes(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return f(*args)
        old, treedef = optree.tree_flatten(args[0])
        check_memory("jit", old, args, {}, (0,))
        out = f_(treedef.unflatten([x.data if isinstance(x, Tensor) else x for x in old]), *args[1:])
        consume(old, donated_type)
        return out

    return consumes


def jit(f: Callable[..., Any], donate: int | tuple[int, ...] = (), **compile_options: Any) -> Callable[..., Any]:
    """torch.compile(f, **compile_options), with JAX's meaning of donation.

    The storage of the positional arguments `donate` (trees of tensors) receives the results: each donated tensor is
    matched with a result of equal shape, dtype and device, with itself if f returns it, else in order. The compiled
    code writes results into that storage, so that a train step holds one copy of parameters and optimizer state.
    Afterwards the donated tensors are empty, and any use of them raises RuntimeError. Results without a match are new
    tensors; arguments that are not donated are unchanged. f must be pure.

    ValueError, with all arguments intact, for a donated tensor that matches no result, requires grad, or shares memory
    with another leaf of the arguments. Tensors in f's closure are not checked.
    Pass values that change from call to call as tensors: each new Python number may compile f again. Inside a function
    that is itself being compiled, the jitted f is f.

    >>> step = jit(lambda state, x: ({"w": state["w"] + x}, x.sum()), donate=0)
    >>> state, total = step(state, x)  # doctest: +SKIP
    """
    donate = (donate,) if isinstance(donate, int) else tuple(sorted(donate))
    if len(set(donate)) != len(donate) or any(i < 0 for i in donate):
        raise ValueError(f"jit: donate is {donate}; distinct positions from 0 are needed")
    own = getattr(f, "jitted_of_purelm", None)
    if own is not None and (its_own := own(donate, compile_options)) is not None:
        return its_own
    stages: tuple[Any, ...] = getattr(f, "stages_of_purelm", ())
    if len(stages) > 1 and set(donate) <= {0}:
        plain = [getattr(stage, "_torchdynamo_disable", False) for stage in stages[:-1]]
        first = [s if p else jit(s, **compile_options) for s, p in zip(stages, plain, strict=False)]
        return in_stages(*first, jit(stages[-1], donate, **compile_options))
    name = getattr(f, "__name__", type(f).__name__)
    traced = own_code(f)

    def run(args: tuple, kwargs: dict, always: list[Tensor], numbers: tuple) -> tuple[list[Any], Any]:
        views: list[Tensor] = []
        vectors: list[Tensor] = []
        if numbers:
            args = _as_numbers(args, donate, numbers, views, vectors)
        out = traced(*args, **kwargs)
        return _store(args, donate, out, always, views, vectors) if donate else ([], out)

    compiled = torch.compile(own_cache(run, name), **compile_options)
    donated_type = donated_type_of(f"jit({name})")
    true_on: dict[torch.device, Tensor] = {}

    @functools.wraps(f, updated=())
    def jitted(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return f(*args, **kwargs)
        if not donate:
            with nested_graph_breaks():
                return compiled(args, kwargs, [], ())[1]
        old, treedef = optree.tree_flatten(_donated(args, donate))
        check_memory("jit", old, args, kwargs, donate)
        # Compiled code gets aliases of the donated tensors and returns those that it stored a result in. Then `consume`
        # empties the caller's tensors, but not the aliases.
        aliases = treedef.unflatten([_alias(x) for x in old])
        are_numbers = [_is_number(x) for x in old]
        numbers = tuple(treedef.unflatten(are_numbers)) if any(are_numbers) else ()
        new_args = list(args)
        for i, arg in zip(donate, aliases, strict=True):
            new_args[i] = arg
        for x in old:
            if isinstance(x, Tensor) and x.device not in true_on:
                true_on[x.device] = torch.ones((), dtype=torch.bool, device=x.device)
        keep_writes_behind_reads()
        with nested_graph_breaks():
            unmatched, out = compiled(tuple(new_args), kwargs, list(true_on.values()), numbers)
        if unmatched:
            at = [i for i, left in enumerate(optree.tree_leaves(unmatched)) if left]
            raise ValueError(unmatched_message("jit", args, donate, at))
        consume(old, donated_type)
        return out

    return jitted


def _is_number(x: Any) -> bool:
    """Whether x is 0-d fp64: dynamo turns such arguments into Python floats, and writes into them are lost (2.13)."""
    return isinstance(x, Tensor) and x.ndim == 0 and x.dtype == torch.float64


def _alias(x: Any) -> Any:
    """An alias of x that shares its memory; for 0-d fp64 one of shape (1,), which dynamo does not turn into a float."""
    return x.data.view(1) if _is_number(x) else x.data if isinstance(x, Tensor) else x


def _as_numbers(
    args: tuple, donate: tuple[int, ...], numbers: tuple, views: list[Tensor], vectors: list[Tensor]
) -> tuple:
    """The arguments, with 0-d views in place of the (1,) vectors that `_alias` made of 0-d fp64 leaves.

    The vectors and their views are appended to `vectors` and `views`. numbers: for each donated argument a tree of
    bools, true at these leaves. (Indices of leaves would not do: under dynamo trees are walked in another order.)
    """

    def restored(x: Any, is_number: bool) -> Any:
        if not is_number:
            return x
        vectors.append(x)
        views.append(x.view(()))
        return views[-1]

    new_args = list(args)
    for i, are in zip(donate, numbers, strict=True):
        new_args[i] = traced.map(restored, args[i], are)
    return tuple(new_args)


def consume(leaves: list[Any], donated_type: type[Tensor]) -> None:
    """Empty the tensors among the leaves, whose memory now belongs to the results, and make them of `donated_type`."""
    empty: dict[Any, Tensor] = {}
    for x in leaves:
        if isinstance(x, Tensor):
            kind = (x.dtype, x.device)
            if kind not in empty:
                empty[kind] = torch.empty(0, dtype=x.dtype, device=x.device)
            x.data = empty[kind]
            x.__class__ = donated_type


def _donated(args: tuple, donate: tuple[int, ...]) -> tuple:
    if max(donate) >= len(args):
        raise ValueError(f"jit: donate is {donate}, but {len(args)} positional arguments were given")
    return tuple(args[i] for i in donate)


def _store(
    args: tuple,
    donate: tuple[int, ...],
    out: Any,
    always: list[Tensor],
    views: list[Tensor],
    vectors: list[Tensor],
) -> tuple[list[Any], Any]:
    """Write the results into the donated tensors: ([], results), with the donated tensor in place of a matched result.

    If a donated tensor matches no result nothing is written, and the return value is (trees of bools, None): for each
    donated argument a tree that is true at these tensors.
    A 0-d fp64 result is written into the vector that its donated tensor is a view of: after a graph break the view is
    an argument of the next graph, and a write into it would be lost (see `_is_number`).
    Dynamo traces this function, so it takes few operations a leaf, and linear time if results come in donated order.
    """
    old: list[Any] = []
    new: list[Any] = []
    for i in donate:
        traced.map(old.append, args[i])
    traced.map(new.append, out)
    place: dict[Any, int] = {}
    for i, x in enumerate(old):
        if isinstance(x, Tensor):
            place[x] = i  # by identity
    # A donated tensor that is itself a result needs no copy, at whatever position among the results.
    slots: list[int | None] = []
    for x in new:
        slots.append(place.pop(x, None) if isinstance(x, Tensor) else None)
    free = list(place.values())
    for k, x in enumerate(new):
        if isinstance(x, Tensor) and slots[k] is None:
            for position, i in enumerate(free):
                y = old[i]
                if x.dtype == y.dtype and x.shape == y.shape and x.device == y.device:
                    slots[k] = free.pop(position)
                    break
    if free:
        left = set(free)
        where = iter(range(len(old)))
        return [traced.map(lambda x: next(where) in left, args[i]) for i in donate], None
    # A result may be a view of a donated tensor, or a clone of one that Inductor removes, and that tensor is about to
    # be overwritten: read all results before writing any.
    for k, x in enumerate(new):
        slot = slots[k]
        if isinstance(x, Tensor) and (slot is None or x is not old[slot]):
            new[k] = _read(x.detach(), always)
    vector_of: dict[Any, Tensor] = {}
    for x, y in zip(views, vectors, strict=True):
        vector_of[x] = y
    for k, slot in enumerate(slots):
        if slot is None:
            continue
        vector = vector_of.get(old[slot]) if views else None
        if new[k] is not old[slot]:
            (old[slot] if vector is None else vector).copy_(new[k])
        new[k] = old[slot] if vector is None else vector.view(())
    # partial(next, iterator)(leaf) is the iterator's next item; a lambda would be one more call to trace at each leaf.
    return [], traced.map(functools.partial(next, iter(new)), out)


def _read(x: Tensor, always: list[Tensor]) -> Tensor:
    """A copy of x that Inductor does not remove, though it may fuse it with the code before and after.

    Inductor removes clone() as a no-op, even where x is overwritten before the clone is read: torch 2.11 and 2.13
    compile x, y = b.clone(), a.clone(); a.copy_(x); b.copy_(y) to code that loses a. It does not remove
    torch.where(true, x, 0) with a `true` that is known only at run time. `always` has one such tensor for each device;
    they are arguments of the graph, since constants could be folded.
    """
    for true in always:
        if true.device == x.device:
            return torch.where(true, x, torch.zeros((), dtype=x.dtype, device=x.device))
    return x.clone()  # no donated tensor is on this device, so nothing that x reads is overwritten


def check_memory(
    who: str, old: list[Any], args: tuple, kwargs: dict, donate: tuple[int, ...], others: list[Any] | None = None
) -> None:
    """ValueError if a donated tensor requires grad, or overlaps in memory with another donated tensor or argument.

    old: the donated leaves. others: the leaves that are not donated; None: they are found in args and kwargs.
    """
    donated, storages = [], []
    for x in old:
        if isinstance(x, Tensor):
            if x.requires_grad:
                raise ValueError(f"{who}: a donated tensor requires grad; donate detached tensors")
            storage = _storage(x)
            if storage:
                donated.append(x)
                storages.append(storage)
    unique = set(storages)
    if others is None:
        others = [x for i, arg in enumerate(args) if i not in donate for x in optree.tree_leaves(arg)]
        others += optree.tree_leaves(kwargs)
    suspects = [y for y in others if isinstance(y, Tensor) and _storage(y) in unique]
    if len(unique) == len(storages) and not suspects:
        return
    for i, x in enumerate(donated):
        for y in donated[:i] + suspects:
            if storages[i] == _storage(y) and _overlap(x, y):
                raise ValueError(_alias_message(who, args, kwargs, x, y))


def _storage(x: Tensor) -> int:
    """Address of the tensor's storage; 0 if it has no elements or is not strided."""
    return x.untyped_storage().data_ptr() if x.layout == torch.strided and x.numel() else 0


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges from first to last element overlap; interleaved views count, though disjoint."""
    begin_a, begin_b = a.data_ptr(), b.data_ptr()
    return begin_a < begin_b + _extent(b) and begin_b < begin_a + _extent(a)


def _extent(x: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _alias_message(who: str, args: tuple, kwargs: dict, a: Tensor, b: Tensor) -> str:
    everything = {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
    names = []
    tree.map_with_path(lambda path, x: names.append(path) if x is a or x is b else None, everything)
    return (
        f"{who}: arguments {' and '.join(names)} share memory (paths begin with the argument), and one of them is "
        "donated: its results would overwrite the other; pass a clone of one"
    )


def unmatched_message(who: str, args: tuple, donate: tuple[int, ...], unmatched: list[int]) -> str:
    """The error message for donated leaves without a result; unmatched: their indices among all donated leaves."""
    found: list[str] = []

    def describe(path: str, x: Any) -> None:
        found.append(f"{path} {tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else path)

    for i in sorted(donate):
        tree.map_with_path(describe, {str(i): args[i]})
    names = ", ".join(found[i] for i in unmatched)
    return f"{who}: donated tensors match no result in shape, dtype and device (donate less): {names}"


def donated_type_of(call: str) -> type[Tensor]:
    """The class that tensors get when they are donated to `call`, a name for messages such as "jit(step)"."""
    message = f"this tensor was donated to {call} and is empty now: use the result of that call"

    class Donated(Tensor):
        """A donated tensor: every use raises RuntimeError, except repr, str and format."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise RuntimeError(message)

        def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
            return f"<donated to {call}>"

        __str__ = __repr__

        def __format__(self, spec: str) -> str:
            return repr(self)

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise RuntimeError(message)

    return Donated
