"""What each law of `check_optimizer` is given, and what they compare: kinds of leaves, memory, halves of a tree."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.optim.base import Optimizer
from purelm.testing.laws import draw_like, require
from purelm.tree import Tree

__all__ = [
    "Case",
    "any_change",
    "halves",
    "holding_out",
    "of_function",
    "owner",
    "packed",
    "require_apart",
    "require_fit",
    "require_same_kinds",
]


@dataclass(frozen=True)
class Case:
    """What `check_optimizer` was given."""

    optimizer: Optimizer
    params: Tree
    lr: float
    smooth: bool
    dtypes: tuple[torch.dtype, ...]
    rtol: float
    atol: float
    seed: int

    def drawn(self, number: int, like: Tree = None) -> Tree:
        """Standard normal values of the form, dtypes and strides of params, or of `like`; others for each number."""
        form = self.params if like is None else like
        return tree.map(lambda p, x: torch.empty_like(p).copy_(x), form, draw_like(form, 1000 * self.seed + number))

    def rate(self, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """lr * factor as a 0-d tensor on the device of params."""
        return torch.tensor(self.lr * factor, dtype=dtype, device=tree.leaves(self.params)[0].device)

    def begun(self, params: Tree = None, rate: Tensor | float | None = None) -> Any:
        """The state after one step, whose moments are not zero any more."""
        p = self.params if params is None else params
        return self.optimizer.update(self.drawn(0, p), self.optimizer.init(p), p, self.lr if rate is None else rate)[1]


@contextlib.contextmanager
def of_function(name: str) -> Iterator[None]:
    """Puts the function's name before what `unchanged` says of its arguments."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{name}: {str(error).replace('argument 0.', 'argument ')}") from error


def _storages(named: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for path, x in zip(tree.paths(named), tree.leaves(named), strict=True):
        if isinstance(x, Tensor) and x.numel():
            yield path, x.untyped_storage().data_ptr()


def require_apart(results: dict[str, Any], args: dict[str, Any]) -> None:
    """AssertionError where a tensor of results lies in the memory of one of args; both are trees by name."""
    old = {at: path for path, at in _storages(args)}
    for path, at in _storages(results):
        require(at not in old, f"{path} shares memory with {old.get(at)}")


def require_fit(updates: Tree, params: Tree) -> None:
    """AssertionError unless each update has its parameter's place, shape and device, or is None."""
    try:
        (ps, us), _ = tree.flatten_up_to(params, updates)
    except ValueError as error:
        raise AssertionError(f"updates have another structure than params: {error}") from error
    for path, p, u in zip(tree.paths(params), ps, us, strict=True):
        if u is None:
            continue
        require(isinstance(u, Tensor), f"the update at {path} is a {type(u).__name__}")
        require(
            u.shape == p.shape and u.device == p.device and u.is_floating_point(),
            f"the update at {path} is {tuple(u.shape)} {u.dtype} on {u.device}, the parameter {tuple(p.shape)} "
            f"{p.dtype} on {p.device}",
        )


def require_same_kinds(new: Any, old: Any, step: int) -> None:
    """AssertionError unless both states are tensors in one structure, of equal shapes, dtypes and devices."""
    a, b = tree.structure(new), tree.structure(old)
    require(a == b, f"step {step} changes the structure of the state: {b} becomes {a}")
    for path, x, y in zip(tree.paths(old), tree.leaves(new), tree.leaves(old), strict=True):
        for z in (y, x):
            require(
                isinstance(z, Tensor),
                f"the state has a {type(z).__name__} at {path}; with anything but tensors a compiled step is compiled "
                "again when it changes",
            )
        kinds = [f"{tuple(z.shape)} {z.dtype} on {z.device}" for z in (y, x)]
        require(kinds[0] == kinds[1], f"step {step} changes the state at {path}: {kinds[0]} becomes {kinds[1]}")


def halves(params: Tree) -> tuple[set[str], set[str]]:
    """The paths of two halves of the parameters, with elements in either."""
    halves: tuple[set[str], set[str]] = set(), set()
    filled = 0
    for path, p in zip(tree.paths(params), tree.leaves(params), strict=True):
        halves[filled % 2].add(path)
        filled += bool(p.numel())
    return halves


def holding_out(t: Tree, held: set[str]) -> Tree:
    """The tree with None at the paths `held`."""
    return tree.map_with_path(lambda path, x: None if path in held else x, t)


def packed(t: Tree) -> Tree:
    """The tree without its absent leaves, at the same paths: lists become dicts of numbers."""
    if type(t) in (list, tuple):
        t = dict(enumerate(t))
    if isinstance(t, dict):
        return {key: packed(x) for key, x in t.items() if x is not None}
    return t


def owner(path: str, paths: set[str]) -> str | None:
    """The parameter whose path a leaf of the state ends with; None if there is none."""
    return max((p for p in paths if path == p or path.endswith(f".{p}")), key=len, default=None)


def any_change(olds: list[Tensor], news: list[Tensor]) -> bool:
    """Whether any of the tensors differs from the one in its place."""
    return any(not torch.equal(a, b) for a, b in zip(olds, news, strict=True))
