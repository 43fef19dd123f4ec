"""The tree walks in plain Python, for use inside torch.compile and wherever a path is needed.

Same order and same node types as optree (dict, OrderedDict, defaultdict, list, tuple, NamedTuple, None).
Other types registered with optree are refused rather than taken for leaves.
"""

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch

DICTS = (dict, OrderedDict, defaultdict)


@dataclasses.dataclass(frozen=True)
class Structure:
    """Form of a tree: the same containers with the leaf's number at each leaf."""

    index_tree: Any
    n_leaves: int


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    found: list[Any] = []

    def visit(path: str, leaf: Any) -> int:
        found.append(leaf)
        return len(found) - 1

    index_tree = walk(visit, "", tree, ())
    return found, Structure(index_tree, len(found))


def unflatten(structure: Structure, leaves: list[Any]) -> Any:
    if len(leaves) != structure.n_leaves:
        raise ValueError(f"unflatten: got {len(leaves)} leaves, the structure has {structure.n_leaves}")
    return walk(lambda path, i: leaves[i], "", structure.index_tree, ())


def walk(f: Callable[..., Any], path: str, tree: Any, rest: tuple[Any, ...]) -> Any:
    """f(path, leaf, *parts of rest) at each leaf; ValueError with the path where `rest` differs from `tree`."""
    if isinstance(tree, torch.Tensor):
        return f(path, tree, *rest)
    if tree is None:
        for other in rest:
            if other is not None:
                raise ValueError(_mismatch(path, None, other))
        return None
    if type(tree) in DICTS:
        keys = sorted_keys(tree)
        for other in rest:
            if type(other) not in DICTS or other.keys() != tree.keys():
                raise ValueError(_mismatch(path, tree, other))
        done = {k: walk(f, _join(path, k), tree[k], tuple([r[k] for r in rest])) for k in keys}
        return _like_dict(tree, done)
    if is_sequence(tree):
        for other in rest:
            if type(other) is not type(tree) or len(other) != len(tree):
                raise ValueError(_mismatch(path, tree, other))
        names = _entry_names(tree)
        parts = [
            walk(f, _join(path, name), tree[i], tuple([r[i] for r in rest])) for i, name in enumerate(names)
        ]
        return _like_sequence(tree, parts)
    if not isinstance(tree, (bool, int, float, str)) and is_registered(tree):
        raise ValueError(
            f"tree: {path or 'the root'} is a {type(tree).__name__}, which only works without paths and outside "
            "torch.compile; use dicts, lists, tuples and NamedTuples"
        )
    return f(path, tree, *rest)


def merge(path: str, a: Any, b: Any) -> Any:
    """The leaf of a or of b at each place; None in one gives way to a leaf (not a container) in the other."""
    a_is_leaf, b_is_leaf = _is_leaf(a), _is_leaf(b)
    if a is None and (b is None or b_is_leaf):
        return b
    if b is None and a_is_leaf:
        return a
    if a_is_leaf and b_is_leaf:
        raise ValueError(f"combine: two trees have a leaf at {path or 'the root'}; one must have None there")
    if type(a) in DICTS and type(b) in DICTS and a.keys() == b.keys():
        return _like_dict(a, {k: merge(_join(path, k), a[k], b[k]) for k in sorted_keys(a)})
    if is_sequence(a) and type(a) is type(b) and len(a) == len(b):
        parts = [merge(_join(path, name), a[i], b[i]) for i, name in enumerate(_entry_names(a))]
        return _like_sequence(a, parts)
    raise ValueError(_mismatch(path, a, b))


def sorted_keys(node: dict) -> list[Any]:
    """Keys in optree's order: sorted, except for an OrderedDict."""
    if isinstance(node, OrderedDict):
        return list(node)
    try:
        return sorted(node)
    except TypeError:  # keys of several types, as optree orders them
        return sorted(node, key=lambda k: (f"{type(k).__module__}.{type(k).__qualname__}", k))


def is_sequence(x: Any) -> bool:
    """A list, tuple or NamedTuple; not a subclass such as torch.Size, which optree takes for a leaf."""
    return type(x) is list or type(x) is tuple or (isinstance(x, tuple) and hasattr(x, "_fields"))


def is_registered(x: Any) -> bool:
    """Whether optree takes x for a node."""
    return optree.register_pytree_node.get(type(x)) is not None  # type: ignore[attr-defined]


def _is_leaf(x: Any) -> bool:
    return x is not None and type(x) not in DICTS and not is_sequence(x)


def _entry_names(node: Any) -> Iterable[Any]:
    return node._fields if hasattr(node, "_fields") else range(len(node))


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _like_dict(node: dict, done: dict) -> dict:
    """The results in the node's own key order and type."""
    in_order = {k: done[k] for k in node}
    if isinstance(node, defaultdict):
        return defaultdict(node.default_factory, in_order)
    return OrderedDict(in_order) if isinstance(node, OrderedDict) else in_order


def _like_sequence(node: Any, parts: list[Any]) -> Any:
    if isinstance(node, list):
        return parts
    return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)


def _describe(x: Any) -> str:
    if type(x) in DICTS:
        return f"dict with keys {sorted_keys(x)}"
    if is_sequence(x):
        return f"{type(x).__name__} of {len(x)}"
    return "None" if x is None else f"leaf of type {type(x).__name__}"


def _mismatch(path: str, expected: Any, given: Any) -> str:
    where = path or "the root"
    return f"tree: structures differ at {where}: {_describe(expected)} against {_describe(given)}"
