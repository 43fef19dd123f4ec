"""The contract of optimizers, and what those in this folder share.

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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from purelm import tree

Tree = Any
Mask = Callable[[str, Tensor], bool] | Tree | None

__all__ = [
    "Init",
    "Mask",
    "Optimizer",
    "Step",
    "Update",
    "apply_updates",
    "is_matrix",
    "step_of",
    "with_step",
]


class Init(Protocol):
    """The state before the first update."""

    def __call__(self, params: Tree, /) -> Any: ...


class Update(Protocol):
    """(updates, state): what `apply_updates` adds to params."""

    def __call__(self, grads: Tree, state: Any, params: Tree, lr: Tensor | float, /) -> tuple[Tree, Any]: ...


class Optimizer(NamedTuple):
    """A pair of pure functions; neither writes to its arguments.

    A copy is the same pair. A pickle is the call that made it (`made_by`), since functions that were made by functions
    cannot be pickled: so an optimizer can where its arguments can, masks among them, which must have a name.
    """

    init: Init
    update: Update

    def __copy__(self) -> "Optimizer":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Optimizer":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        call = getattr(self.update, "made_by", None)
        return (type(self), tuple(self)) if call is None else (_made_again, call)


def made_by(optimizer: Optimizer, maker: Callable[..., Optimizer], *args: Any, **kwargs: Any) -> Optimizer:
    """The optimizer, which remembers for pickles that maker(*args, **kwargs) makes it."""
    optimizer.update.made_by = (maker, args, kwargs)  # type: ignore[attr-defined]
    return optimizer


def _made_again(maker: Callable[..., Optimizer], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optimizer:
    return maker(*args, **kwargs)


class Step(Protocol):
    """(params, state) after one update, written over the memory of both."""

    def __call__(self, grads: Tree, state: Any, params: Tree, lr: Tensor | float, /) -> tuple[Tree, Any]: ...


def with_step(update: Update, step_: Step) -> Update:
    """The same function `update`, to which its second form is attached as an attribute:

        step_(grads, state, params, lr) -> (params', state')

    It equals `update` followed by `apply_updates`, to rounding, and writes the results over the memory of params and
    state. `jit(donate=0)` ends a training step with it, since there the old ones are given up anyway. Where an update
    has no second form (a user's own, say), `jit` compiles the whole update: slower to compile, the same result.
    """
    update.step_ = step_  # type: ignore[attr-defined]
    return update


def step_of(optimizer: Optimizer) -> Step | None:
    """The second form of the optimizer's update; None where it has none."""
    return getattr(optimizer.update, "step_", None)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, leaf by leaf: added in the wider of the two dtypes and rounded once to the parameter's.

    A parameter whose update is None is returned as it is.

    >>> apply_updates({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, -1.0])})
    {'w': tensor([1.5000, 1.0000])}
    """
    return tree.map(lambda p, u: p if u is None else (p + u).to(p.dtype), params, updates)


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
    """The step counter of a new state, on the device of the parameters; ValueError names a leaf that is no tensor."""
    flat = tree.leaves(params)
    for i, p in enumerate(flat):
        if not isinstance(p, Tensor):
            raise ValueError(
                f"init: params has a {type(p).__name__} at {tree.paths(params)[i] or 'the root'}; tensors are needed"
            )
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
