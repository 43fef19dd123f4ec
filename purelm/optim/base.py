"""The optimizer contract, and the functions that combine optimizers.

An optimizer is a pair of pure functions over trees:

    init(params) -> state
    update(grads, state, params, lr) -> (updates, state)

Updates are what `apply_updates` ADDS to the parameters: the learning rate and the sign are already in them. `lr` is
an argument of every update (a 0-d tensor, or a number), never part of the pair, so a schedule never recompiles.
A transformation of gradients (clipping, weight decay as L2) has the same form and ignores lr; `chain` puts such
functions before an optimizer. None is an absent leaf: frozen parameters are None in all trees alike, and a parameter
whose gradient alone is None keeps its value and its moments in that step.

An update function may carry a second form, `step_`, for parameters and state that are not needed any more: see
`with_step`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import tree

Tree = Any
Mask = Callable[[str, Tensor], bool] | Tree | None

__all__ = [
    "Mask",
    "Optimizer",
    "PartitionedState",
    "add_weight_decay",
    "apply_updates",
    "chain",
    "is_matrix",
    "partitioned",
    "scale_lr",
    "step_of",
    "with_step",
]


class Optimizer(NamedTuple):
    """A pair of pure functions; neither writes to its arguments."""

    init: Callable[[Tree], Any]  # params -> state
    update: Callable[[Tree, Any, Tree, Tensor | float], tuple[Tree, Any]]  # grads, state, params, lr


Step = Callable[[Tree, Any, Tree, Tensor | float], tuple[Tree, Any]]


def with_step(update: Step, step_: Step) -> Step:
    """`update`, which carries from now on its second form

        step_(grads, state, params, lr) -> (params', state')

    equal to `update` and `apply_updates` to rounding, but written over the memory of params and state. Under
    `jit(donate=0)` a training step ends with it: there the old ones are consumed anyway. An update without it (a
    user's own, or one around another's) is compiled there as a whole, which takes longer and gives the same.
    """
    update.step_ = step_  # type: ignore[attr-defined]
    return update


def step_of(optimizer: Optimizer) -> Step | None:
    """The second form of the optimizer's update; None where it has none."""
    return getattr(optimizer.update, "step_", None)


class PartitionedState(NamedTuple):
    """State of `partitioned`: each part's own, over a tree with None where the other part has the leaf."""

    yes: Any
    no: Any


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, leaf by leaf: added in the wider of the two dtypes and rounded once to the parameter's.

    A parameter whose update is None is returned as it is.

    >>> apply_updates({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, -1.0])})
    {'w': tensor([1.5000, 1.0000])}
    """
    return tree.map(lambda p, u: p if u is None else (p + u).to(p.dtype), params, updates)


def chain(*optimizers: Optimizer) -> Optimizer:
    """Each one's updates are the next one's gradients; the state is the tuple of their states.

    All of them see the same params and lr, so at most one may be a full optimizer: the last.

    >>> from purelm.optim import adamw, clip_by_global_norm
    >>> optimizer = chain(clip_by_global_norm(1.0), adamw(weight_decay=0.1))
    """

    def init(params: Tree) -> tuple[Any, ...]:
        return tuple([o.init(params) for o in optimizers])

    def update(grads: Tree, state: tuple[Any, ...], params: Tree, lr: Tensor | float) -> tuple[Tree, Any]:
        if len(state) != len(optimizers):
            raise ValueError(f"chain: state has {len(state)} entries, the chain has {len(optimizers)} optimizers")
        new_state = []
        for i, o in enumerate(optimizers):
            grads, s = o.update(grads, state[i], params, lr)
            new_state.append(s)
        return grads, tuple(new_state)

    last = step_of(optimizers[-1]) if optimizers else None
    if last is None:
        return Optimizer(init, update)

    def step_(grads: Tree, state: tuple[Any, ...], params: Tree, lr: Tensor | float) -> tuple[Tree, Any]:
        new_state = []
        for o, s in zip(optimizers[:-1], state, strict=False):
            grads, s = o.update(grads, s, params, lr)
            new_state.append(s)
        params, s = last(grads, state[-1], params, lr)
        return params, (*new_state, s)

    return Optimizer(init, with_step(update, step_))


def partitioned(predicate: Mask, yes: Optimizer, no: Optimizer) -> Optimizer:
    """`yes` updates the parameters that `predicate(path, param)` chooses, `no` all the others.

    Each sees a tree with None in place of the other's leaves. `predicate` may also be a tree of bools. More than two
    kinds: let `no` be a `partitioned` again.

    >>> from purelm.optim import adamw, sgd
    >>> optimizer = partitioned(lambda path, p: "embeddings" in path, sgd(), adamw())
    """

    def split(chosen: Tree, t: Tree) -> tuple[Tree, Tree]:
        # The choice is made on params alone, so a predicate may look at values and dtypes, not only at paths.
        return (
            tree.map(lambda c, x: x if c else None, chosen, t),
            tree.map(lambda c, x: None if c else x, chosen, t),
        )

    def init(params: Tree) -> PartitionedState:
        p_yes, p_no = split(chosen_by(predicate, params), params)
        return PartitionedState(yes.init(p_yes), no.init(p_no))

    def update(grads: Tree, state: PartitionedState, params: Tree, lr: Tensor | float) -> tuple[Tree, PartitionedState]:
        chosen = chosen_by(predicate, params)
        (g_yes, g_no), (p_yes, p_no) = split(chosen, grads), split(chosen, params)
        u_yes, s_yes = yes.update(g_yes, state.yes, p_yes, lr)
        u_no, s_no = no.update(g_no, state.no, p_no, lr)
        return tree.combine(u_yes, u_no), PartitionedState(s_yes, s_no)

    first, second = step_of(yes), step_of(no)
    if first is None or second is None:
        return Optimizer(init, update)

    def step_(grads: Tree, state: PartitionedState, params: Tree, lr: Tensor | float) -> tuple[Tree, PartitionedState]:
        chosen = chosen_by(predicate, params)
        (g_yes, g_no), (p_yes, p_no) = split(chosen, grads), split(chosen, params)
        p_yes, s_yes = first(g_yes, state.yes, p_yes, lr)
        p_no, s_no = second(g_no, state.no, p_no, lr)
        return tree.combine(p_yes, p_no), PartitionedState(s_yes, s_no)

    return Optimizer(init, with_step(update, step_))


def scale_lr(optimizer: Optimizer, factor: float) -> Optimizer:
    """The optimizer with lr * factor: one schedule for parts that need different learning rates."""
    step = step_of(optimizer)

    def update(grads: Tree, state: Any, params: Tree, lr: Tensor | float) -> tuple[Tree, Any]:
        return optimizer.update(grads, state, params, lr * factor)

    if step is None:
        return Optimizer(optimizer.init, update)

    def step_(grads: Tree, state: Any, params: Tree, lr: Tensor | float) -> tuple[Tree, Any]:
        return step(grads, state, params, lr * factor)

    return Optimizer(optimizer.init, with_step(update, step_))


def add_weight_decay(weight_decay: float, mask: Mask = None) -> Optimizer:
    """Gradient of an L2 penalty: g + weight_decay * p (coupled decay; `adamw` and `lion` have the decoupled one).

    `chain(add_weight_decay(0.1), adam())` is torch.optim.Adam(weight_decay=0.1).
    """

    def update(grads: Tree, state: tuple[()], params: Tree, lr: Tensor | float) -> tuple[Tree, tuple[()]]:
        def leaf(rate: float, p: Tensor, g: Tensor | None) -> tuple:
            return (g if g is None or not rate else g.add(p, alpha=rate).to(g.dtype),)

        (decayed,) = unzip(1, leaf, params, grads, weight_decay=weight_decay, mask=mask)
        return decayed, state

    return Optimizer(lambda params: (), update)


def is_matrix(path: str, leaf: Tensor) -> bool:
    """Two or more dimensions: the usual mask for weight decay, which spares norms and biases."""
    return leaf.ndim >= 2


# Helpers of the optimizers in this folder.


def chosen_by(mask: Mask, params: Tree) -> Tree:
    """A tree of bools of the form of params."""
    if mask is None:
        return tree.map(lambda p: True, params)
    if callable(mask):
        return tree.map_with_path(lambda path, p: bool(mask(path, p)), params)
    return tree.map(lambda p, m: bool(m), params, mask)


def unzip(
    n: int, f: Callable[..., tuple], params: Tree, *rest: Tree, weight_decay: float = 0.0, mask: Mask = None
) -> tuple[Tree, ...]:
    """n trees from f(rate, p, *leaves of rest), which returns n things for one parameter p.

    rate is weight_decay where the mask chooses p, else 0.0. One walk does it all: under torch.compile each walk over
    a hundred leaves costs most of a second.
    """
    columns: tuple[list, ...] = tuple([[] for _ in range(n)])
    masks = () if mask is None or callable(mask) else (mask,)

    def visit(path: str, p: Tensor, *xs: Any) -> int:
        if mask is None:
            chosen = True
        elif masks:
            chosen, xs = bool(xs[-1]), xs[:-1]
        else:
            chosen = bool(mask(path, p))
        for column, x in zip(columns, f(weight_decay if chosen else 0.0, p, *xs), strict=True):
            column.append(x)
        return len(columns[0]) - 1

    index = tree.map_with_path(visit, params, *rest, *masks)
    return tuple([tree.map(lambda i, column=column: column[i], index) for column in columns])


def compute_dtype(param: Tensor) -> torch.dtype:
    """fp32, or fp64 for an fp64 parameter: what a leaf's arithmetic is done in, whatever it is stored in."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def per_dtype(f: Callable[[torch.dtype], Any]) -> Callable[[torch.dtype], Any]:
    """f, called once for each dtype that is asked for: one or both of those of `compute_dtype`."""
    found: dict[torch.dtype, Any] = {}

    def of_dtype(dtype: torch.dtype) -> Any:
        if dtype not in found:
            found[dtype] = f(dtype)
        return found[dtype]

    return of_dtype


def moments_like(params: Tree, dtype: torch.dtype | None) -> Tree:
    """Zeros for one moment; dtype None is fp32, or fp64 where the parameter is fp64."""
    return tree.map(lambda p: torch.zeros_like(p, dtype=dtype or compute_dtype(p)), params)


def first_step(params: Tree) -> Tensor:
    """The step counter of a new state, on the device of the parameters."""
    flat = tree.leaves(params)
    return torch.zeros((), dtype=torch.int64, device=flat[0].device if flat else None)


def scalar(x: Tensor | float, like: Tensor) -> Tensor:
    """x as a 0-d fp64 tensor; a number goes to the device of `like`.

    What depends on the step alone (lr, bias corrections) is computed once a step in fp64, as torch.optim does with
    Python floats: 1 - beta2**t loses four digits in fp32 at t = 1.
    """
    if isinstance(x, Tensor):
        return x.to(torch.float64)
    return torch.full((), x, dtype=torch.float64, device=like.device)


def settle(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The 0-d tensor in `dtype`, as a value in memory.

    A compiler would otherwise repeat the fp64 arithmetic of a scalar for every element of every parameter. It never
    fuses a reduction into the element-wise kernels that read it, and the maximum of equal numbers is exact.
    """
    x = x.to(dtype)
    return x.expand(16).amax() if torch.compiler.is_compiling() else x


def check_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low <= value < high."""
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join([repr(a) for a in allowed])}, got {value!r}")
