"""Tree walks in plain Python: inside torch.compile, and wherever a path is needed.

Order and node types are optree's (dict, OrderedDict, defaultdict, list, tuple, NamedTuple, None). Other types
registered with optree are refused rather than taken for leaves.

While it traces, dynamo spends about 0.05 ms on each bytecode and 1 ms on each call: walks over a model's tree could
take longer to trace than its layers. So the functions here make one call for each container, not for each leaf, and
have no comprehensions, which are calls in Python 3.11.
"""

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """Form of a tree: the same containers with the leaf's number at each leaf."""

    index_tree: Any
    n_leaves: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and _same_form(self.index_tree, other.index_tree)

    __hash__ = None  # type: ignore[assignment]


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """`tree.flatten`, for dynamo to trace: the leaves in optree's order, and the form of the tree."""
    found: list[Any] = []

    def visit(path: str, leaf: Any) -> int:
        found.append(leaf)
        return len(found) - 1

    index_tree = walk(visit, "", tree, ())
    return found, Structure(index_tree, len(found))


def unflatten(structure: Structure, leaves: list[Any]) -> Any:
    """The tree of this form with these leaves: the inverse of `flatten`. ValueError if their number differs."""
    if len(leaves) != structure.n_leaves:
        raise ValueError(f"unflatten: got {len(leaves)} leaves, the structure has {structure.n_leaves}")
    return map(lambda i: leaves[i], structure.index_tree)


def leaves(tree: Any) -> list[Any]:
    """`tree.leaves`, for dynamo to trace: the leaves in optree's order."""
    found: list[Any] = []
    _collect(tree, found)
    return found


def map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`tree.map`, for dynamo to trace.

    Dynamo has a fast path for optree.tree_map over dicts, lists and plain tuples: it traces a map of 300 leaves in
    0.1 s, where `walk` takes 0.5 to 2 s. For NamedTuples it has none, and its slow path fails where f returns only
    constants: they have a branch of their own here.
    """
    if not torch.compiler.is_compiling():  # dynamo gave up tracing the caller, which runs as plain Python
        return walk(lambda path, *xs: f(*xs), "", tree, rest)
    children = list(tree.values()) if type(tree) is dict else tree if type(tree) is list or is_tuple(tree) else ()
    plain = not is_tuple(tree)
    for child in children:
        plain = plain and not isinstance(child, tuple)
    if plain:
        return optree.tree_map(f, tree, *rest)
    for other in rest:
        if type(other) is not type(tree) or len(other) != len(tree):
            raise ValueError(_mismatch("", tree, other))
    keys = list(tree) if type(tree) is dict else range(len(tree))
    items = []
    for k in keys:
        parts = []
        for other in rest:
            parts.append(other[k])
        items.append(map(f, tree[k], *parts))
    return dict(zip(keys, items, strict=True)) if type(tree) is dict else _like_sequence(tree, items)


def walk(f: Callable[..., Any], path: str, tree: Any, rest: tuple[Any, ...]) -> Any:
    """f(path, leaf, *parts of rest) at each leaf; ValueError with the path where `rest` differs from `tree`."""
    if isinstance(tree, Tensor):
        return f(path, tree, *rest)
    if is_dict(tree):
        for other in rest:
            if not is_dict(other) or other.keys() != tree.keys():
                raise ValueError(_mismatch(path, tree, other))
        done = {}
        for k in sorted_keys(tree):
            name = f"{path}.{k}" if path else str(k)
            parts = tuple([r[k] for r in rest]) if rest else ()
            child = tree[k]
            done[k] = f(name, child, *parts) if isinstance(child, Tensor) else walk(f, name, child, parts)
        return _like_dict(tree, done)
    if is_tuple(tree) or type(tree) is list:
        for other in rest:
            if type(other) is not type(tree) or len(other) != len(tree):
                raise ValueError(_mismatch(path, tree, other))
        names = tree._fields if hasattr(tree, "_fields") else range(len(tree))
        items = []
        for i, k in enumerate(names):
            name = f"{path}.{k}" if path else str(k)
            parts = tuple([r[i] for r in rest]) if rest else ()
            child = tree[i]
            items.append(f(name, child, *parts) if isinstance(child, Tensor) else walk(f, name, child, parts))
        return _like_sequence(tree, items)
    if tree is None:
        for other in rest:
            if other is not None:
                raise ValueError(_mismatch(path, None, other))
        return None
    _refuse_registered(path, tree)
    return f(path, tree, *rest)


def merge(path: str, a: Any, b: Any) -> Any:
    """The leaf of a or of b at each place; None in one gives way to whatever the other has there."""
    if a is None:
        return b
    if b is None:
        return a
    if _is_leaf(a) and _is_leaf(b):
        raise ValueError(f"combine: two trees have a leaf at {path or 'the root'}; one must have None there")
    if is_dict(a) and is_dict(b) and a.keys() == b.keys():
        done = {}
        for k in a:
            done[k] = merge(f"{path}.{k}" if path else str(k), a[k], b[k])
        return _like_dict(a, done)
    if (is_tuple(a) or type(a) is list) and type(a) is type(b) and len(a) == len(b):
        names = a._fields if hasattr(a, "_fields") else range(len(a))
        items = []
        for i, k in enumerate(names):
            items.append(merge(f"{path}.{k}" if path else str(k), a[i], b[i]))
        return _like_sequence(a, items)
    raise ValueError(_mismatch(path, a, b))


def sorted_keys(node: dict) -> list[Any]:
    """Keys in optree's order: sorted, except for an OrderedDict."""
    if type(node) is OrderedDict:
        return list(node)
    try:
        return sorted(node)
    except TypeError:  # keys of several types, as optree orders them
        return sorted(node, key=lambda k: (f"{type(k).__module__}.{type(k).__qualname__}", k))


def is_dict(x: Any) -> bool:
    """A dict, OrderedDict or defaultdict; not another subclass, which optree takes for a leaf."""
    return type(x) is dict or type(x) is OrderedDict or type(x) is defaultdict


def is_tuple(x: Any) -> bool:
    """A tuple or NamedTuple; not another subclass such as torch.Size, which optree takes for a leaf."""
    return isinstance(x, tuple) and (type(x) is tuple or hasattr(x, "_fields"))


def _collect(tree: Any, found: list[Any]) -> None:
    if is_dict(tree):
        children: Any = []
        for k in sorted_keys(tree):
            children.append(tree[k])
    elif is_tuple(tree) or type(tree) is list:
        children = tree
    else:
        if tree is not None:
            found.append(tree)
        return
    for child in children:
        if isinstance(child, Tensor):
            found.append(child)
        else:
            _collect(child, found)


def _same_form(a: Any, b: Any) -> bool:
    """Whether two trees of numbers have the same containers (written out, for dynamo compares no nested dicts)."""
    if is_dict(a):
        if type(a) is not type(b) or len(a) != len(b):
            return False
        for k in a:
            if k not in b or not _same_form(a[k], b[k]):
                return False
        return True
    if is_tuple(a) or type(a) is list:
        if type(a) is not type(b) or len(a) != len(b):
            return False
        for i, x in enumerate(a):
            if not _same_form(x, b[i]):
                return False
        return True
    return type(a) is type(b)


def _is_leaf(x: Any) -> bool:
    return not is_dict(x) and not is_tuple(x) and type(x) is not list


def _refuse_registered(path: str, x: Any) -> None:
    if isinstance(x, (bool, int, float, str)) or optree.register_pytree_node.get(type(x)) is None:  # type: ignore
        return
    raise ValueError(
        f"tree: {path or 'the root'} is a {type(x).__name__}, which only works without paths and outside "
        "torch.compile; use dicts, lists, tuples and NamedTuples"
    )


def _like_dict(node: dict, done: dict) -> dict:
    """The results in the node's own key order and type."""
    if type(node) is dict and list(node) == list(done):
        return done
    in_order = {k: done[k] for k in node}
    if isinstance(node, defaultdict):
        return defaultdict(node.default_factory, in_order)
    return OrderedDict(in_order) if isinstance(node, OrderedDict) else in_order


def _like_sequence(node: Any, parts: list[Any]) -> Any:
    if type(node) is list:
        return parts
    return tuple(parts) if type(node) is tuple else type(node)(*parts)


def _describe(x: Any) -> str:
    if is_dict(x):
        return f"dict with keys {sorted_keys(x)}"
    if is_tuple(x) or type(x) is list:
        return f"{type(x).__name__} of {len(x)}"
    return "None" if x is None else f"leaf of type {type(x).__name__}"


def _mismatch(path: str, expected: Any, given: Any) -> str:
    where = path or "the root"
    return f"tree: structures differ at {where}: {_describe(expected)} against {_describe(given)}"
