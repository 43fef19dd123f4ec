"""Trees as flat dicts {path: leaf}, the form of a state_dict, and back."""

from collections.abc import Mapping
from typing import Any

from purelm.tree.walks import Tree, leaves, paths

__all__ = ["from_flat", "to_flat"]


def to_flat(tree: Tree) -> dict[str, Any]:
    """{path: leaf} in the order of the leaves; None and empty containers have no leaves, so that they are left out.

    ValueError where two leaves have one path, since a key has a dot. A tree that is one leaf has the path "".

    >>> to_flat({"layers": [{"w": 1}, {"w": 2}], "bias": 3})
    {'bias': 3, 'layers.0.w': 1, 'layers.1.w': 2}
    """
    flat: dict[str, Any] = {}
    for path, leaf in zip(paths(tree), leaves(tree), strict=True):
        if path in flat:
            raise ValueError(f"to_flat: two leaves have the path {path!r}: a key has a dot in it")
        flat[path] = leaf
    return flat


def from_flat(flat: Mapping[str, Any]) -> Tree:
    """The tree of nested dicts and lists whose leaves have these paths: the inverse of `to_flat`.

    Names joined by dots become keys of dicts; where the names at one place are 0 to n - 1, they become a list of n
    (so that tuples and NamedTuples come back as lists and dicts).
    ValueError names a number that is missing (layers.0 and layers.2 without layers.1), a path that is a leaf and a
    container at once ("w" beside "w.scale"), and an empty name.

    >>> from_flat({"layers.0.w": 1, "layers.1.w": 2, "bias": 3})
    {'layers': [{'w': 1}, {'w': 2}], 'bias': 3}
    """
    for path in flat:
        if not isinstance(path, str):
            raise ValueError(f"from_flat: the path {path!r} is a {type(path).__name__}; strings are needed")
        if "" in path.split(".") and (path or len(flat) > 1):
            raise ValueError(f"from_flat: the path {path!r} has an empty name")
    return _nested([(path.split(".") if path else [], leaf) for path, leaf in flat.items()], "")


def _nested(items: list[tuple[list[str], Any]], path: str) -> Tree:
    """The tree of (names that are left, leaf) below `path`."""
    here = [leaf for names, leaf in items if not names]
    if here:
        if len(items) > 1:
            raise ValueError(f"from_flat: {path!r} is a leaf, and other paths lead through it")
        return here[0]
    groups: dict[str, list[tuple[list[str], Any]]] = {}
    for (name, *rest), leaf in items:
        groups.setdefault(name, []).append((rest, leaf))
    below = {name: _nested(group, f"{path}.{name}" if path else name) for name, group in groups.items()}
    if not below or not all(_is_index(name) for name in below):
        return below
    numbers = {int(name) for name in below}
    first = next(i for i in range(len(numbers) + 1) if i not in numbers)
    if first < len(numbers):
        where = f"{path}.{first}" if path else str(first)
        raise ValueError(f"from_flat: {where!r} is missing: {path or 'the root'} has the numbers {sorted(numbers)}")
    return [below[str(i)] for i in range(len(below))]


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name
