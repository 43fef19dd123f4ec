"""Walks over trees: leaves, paths, maps."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch

from purelm.caches import memo
from purelm.tree import traced

__all__ = [
    "Tree",
    "TreeDef",
    "flatten",
    "flatten_up_to",
    "leaves",
    "map",
    "map_with_path",
    "paths",
    "reduce",
    "structure",
    "unflatten",
]

Tree = Any
TreeDef = Any  # compared with ==; an optree.PyTreeSpec, or traced.Structure inside torch.compile


def flatten(tree: Tree) -> tuple[list[Any], TreeDef]:
    """The leaves in order, and the structure that `unflatten` needs to rebuild the tree.

    >>> flatten({"b": 2, "a": [1, None]})[0]
    [1, 2]
    """
    if torch.compiler.is_compiling():
        return traced.flatten(tree)
    return optree.tree_flatten(tree)


def flatten_up_to(tree: Tree, *rest: Tree) -> tuple[list[list[Any]], TreeDef]:
    """(columns, structure): the leaves of `tree`, then for each tree of `rest` what stands in the same places.

    `map` calls its function on the rows of these columns.

    >>> flatten_up_to({"w": 1, "b": 2}, {"w": [3, 4], "b": None})[0]
    [[2, 1], [None, [3, 4]]]
    """
    if torch.compiler.is_compiling():
        columns: list[list[Any]] = [[] for _ in range(1 + len(rest))]

        def visit(path: str, *xs: Any) -> None:
            for column, x in zip(columns, xs, strict=True):
                column.append(x)

        traced.walk(visit, "", tree, rest)
        return columns, traced.flatten(tree)[1]
    flat, treedef = optree.tree_flatten(tree)
    try:
        return [flat, *[treedef.flatten_up_to(r) for r in rest]], treedef
    except ValueError:
        traced.walk(lambda path, *xs: None, "", tree, rest)  # the same check; it names the path
        raise


def unflatten(treedef: TreeDef, leaves: Iterable[Any]) -> Tree:
    """The tree of structure `treedef` with these leaves; ValueError when their number is another."""
    if isinstance(treedef, traced.Structure):
        return traced.unflatten(treedef, list(leaves))
    return optree.tree_unflatten(treedef, leaves)


def structure(tree: Tree) -> TreeDef:
    """The structure of the tree without its leaves; equal (==) for trees of equal form."""
    return flatten(tree)[1]


def leaves(tree: Tree) -> list[Any]:
    """The leaves in order."""
    if torch.compiler.is_compiling():
        return traced.leaves(tree)
    return optree.tree_leaves(tree)


def paths(tree: Tree) -> list[str]:
    """The path of each leaf: dict keys, list indices and NamedTuple fields joined by dots.

    >>> paths({"layers": [{"ln1": {"weight": 1}}], "bias": 2})
    ['bias', 'layers.0.ln1.weight']
    """
    if torch.compiler.is_compiling():
        found: list[str] = []
        traced.walk(lambda path, leaf: found.append(path), "", tree, ())
        return found
    return list(_paths_of(optree.tree_structure(tree)))


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """f(leaf, *leaves of rest) at each leaf of `tree`, in a tree of the same structure.

    A tree of `rest` may go deeper than `tree`: f then gets what stands there where `tree` has a leaf (None
    included: so absent gradients reach f). Any other difference of form is a ValueError with the path.

    >>> map(lambda a, b: a + b, {"w": 1, "b": None}, {"w": 10, "b": None})
    {'w': 11, 'b': None}
    """
    if torch.compiler.is_compiling():
        return traced.map(f, tree, *rest)
    columns, treedef = flatten_up_to(tree, *rest)
    return treedef.unflatten([f(*xs) for xs in zip(*columns, strict=True)])


def map_with_path(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """f(path, leaf, *leaves of rest) at each leaf of `tree`; otherwise as `map`.

    >>> map_with_path(lambda path, x: path, {"layers": [1, 2]})
    {'layers': ['layers.0', 'layers.1']}
    """
    if torch.compiler.is_compiling():
        return traced.walk(f, "", tree, rest)
    columns, treedef = flatten_up_to(tree, *rest)
    return treedef.unflatten([f(*xs) for xs in zip(_paths_of(treedef), *columns, strict=True)])


def reduce(f: Callable[[Any, Any], Any], tree: Tree, initial: Any) -> Any:
    """f(... f(f(initial, leaf 0), leaf 1) ..., last leaf), in the order of the leaves; `initial` where there are none.

    >>> reduce(lambda total, x: total + x.numel(), {"w": torch.zeros(2, 3), "b": torch.zeros(3), "none": None}, 0)
    9
    """
    return functools.reduce(f, leaves(tree), initial)


@memo(128)
def _paths_of(treedef: optree.PyTreeSpec) -> tuple[str, ...]:
    """Cached: an optimizer with a mask needs the paths in every step, and 290 of them take 2 ms to put together."""
    found: list[str] = []
    traced.walk(lambda path, leaf: found.append(path), "", treedef.unflatten(range(treedef.num_leaves)), ())
    return tuple(found)
