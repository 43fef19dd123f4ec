"""The manifest of a checkpoint: the form of trees as JSON and back, and checks of every field before it is used.

A tree is written as {"dict": {...}}, {"int_dict": {...}} (whose keys are numbers), {"list": [...]}, {"tuple": [...]},
null or "leaf". Fields of the two formats: see `purelm.checkpoint.shards`.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.checkpoint.shards import DTYPES, NAMES

__all__ = [
    "below",
    "check_leaves",
    "check_manifest",
    "check_meta",
    "check_skeleton",
    "check_structure",
    "is_finite",
    "leaf_paths",
    "rebuild",
    "skeleton",
]


def skeleton(node: Any) -> Any:
    """The tree's form as JSON; NamedTuples become dicts by field. ValueError for keys that JSON could not give back."""
    if node is None:
        return None
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return {"dict": {k: skeleton(v) for k, v in zip(node._fields, node, strict=True)}}
    if isinstance(node, Mapping):
        kinds = {type(k) for k in node}
        if kinds == {int}:
            return {"int_dict": {str(k): skeleton(v) for k, v in node.items()}}
        if not kinds <= {str}:
            odd = next(k for k in node if type(k) is not str)
            raise ValueError(f"keys of a dict must all be strings, or all integers; {odd!r} is among them")
        return {"dict": {k: skeleton(v) for k, v in node.items()}}
    if isinstance(node, tuple | list):
        return {"list" if isinstance(node, list) else "tuple": [skeleton(v) for v in node]}
    return "leaf"


def rebuild(shape: Any, leaves: Mapping[str, Any], path: str = "") -> Any:
    """The tree of this skeleton, its leaves taken from a dict by path; ValueError names a leaf that is missing."""
    if shape is None:
        return None
    if shape == "leaf":
        if path not in leaves:
            raise ValueError(f"lacks the leaf {path!r}, which its tree has")
        return leaves[path]
    ((kind, children),) = shape.items()
    join = (lambda k: f"{path}.{k}") if path else str
    if kind == "dict":
        return {k: rebuild(v, leaves, join(k)) for k, v in children.items()}
    if kind == "int_dict":
        return {int(k): rebuild(v, leaves, join(k)) for k, v in children.items()}
    built = [rebuild(v, leaves, join(i)) for i, v in enumerate(children)]
    return built if kind == "list" else tuple(built)


def below(shape: Any, path: str) -> Any:
    """The skeleton of the subtree at `path`; ValueError names the part of the path that exists, and the keys there."""
    deepest, shape_there = "", shape

    def find(shape: Any, at: str) -> list[Any]:
        """The subtrees at `path`. Keys may contain dots, so a path can be read in several ways: all are tried."""
        nonlocal deepest, shape_there
        if len(at) >= len(deepest):
            deepest, shape_there = at, shape
        if at == path:
            return [shape]
        ways = [(f"{at}.{k}" if at else k, v) for k, v in _children(shape).items()]
        return [x for here, v in ways if f"{path}.".startswith(f"{here}.") for x in find(v, here)]

    found = find(shape, "")
    if not found:
        keys = list(_children(shape_there))
        held = f"holds {keys}" if keys else "is a leaf" if shape_there == "leaf" else "is empty"
        raise ValueError(f"has no {path!r}: {deepest or 'the root'} {held}")
    return found[0]


def leaf_paths(shape: Any, path: str = "") -> list[str]:
    """The paths of the leaves of a skeleton that lies at `path`."""
    if shape == "leaf":
        return [path]
    return [p for k, v in _children(shape).items() for p in leaf_paths(v, f"{path}.{k}" if path else k)]


def _children(shape: Any) -> dict[str, Any]:
    if shape is None or shape == "leaf":
        return {}
    (children,) = shape.values()
    return children if isinstance(children, dict) else {str(i): v for i, v in enumerate(children)}


def check_structure(name: Any, value: Any) -> None:
    """ValueError unless `name` can name a file, and the tree can be rebuilt from its skeleton and its leaf paths."""
    if not isinstance(name, str) or not name or any(c in name for c in "/\\\0"):
        raise ValueError(f"save: {name!r} cannot name a tree: it becomes part of a file's name")
    paths = list(tree.paths(value))
    if twice := [path for path, n in Counter(paths).items() if n > 1]:
        raise ValueError(f"save: two leaves of {name} have the path {twice[0]!r}: a key of theirs has a dot")
    for path in paths:
        if path == "__metadata__":  # https://github.com/huggingface/safetensors, "Format"
            raise ValueError(f"save: a leaf of {name} is called {path!r}, which safetensors files keep for themselves")
        if not path.isprintable():
            raise ValueError(f"save: {name} has a path that cannot be written as text: {path!r}")
    try:
        built = rebuild(json.loads(json.dumps(skeleton(value))), {path: path for path in paths})
        same = sorted(paths) == sorted(tree.leaves(built)) == sorted(tree.paths(built))
    except ValueError as error:
        raise ValueError(f"save: {name} would not come back as it is: {error}") from None
    if not same:
        raise ValueError(f"save: {name} would not come back as it is: dicts, lists, tuples and NamedTuples do")


def check_leaves(name: str, value: Any) -> None:
    """ValueError names a leaf that is no tensor, or of a dtype, layout or device that cannot be stored."""
    for path, x in zip(tree.paths(value), tree.leaves(value), strict=True):
        what = f"save: {name}.{path}" if path else f"save: {name}"
        if not isinstance(x, Tensor):
            raise ValueError(f"{what} is {x!r:.80}, a {type(x).__name__}: leaves are tensors (numbers go into meta)")
        if x.layout != torch.strided or x.device.type == "meta" or x.dtype not in NAMES:
            raise ValueError(f"{what} is {x.dtype}, {x.layout}, on {x.device}, which cannot be stored")


def is_finite(trees: Any) -> bool:
    """Whether no floating leaf has an inf or a nan; the host waits once for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for x in tree.leaves(trees):
        by_device.setdefault(x.device, []).append(x)
    return all(bool(tree.all_finite(some)) for some in by_device.values())


def check_meta(meta: Mapping[str, Any] | None, step: int | None = None) -> dict[str, Any]:
    """meta after a round trip through JSON (keys become strings); ValueError for what JSON cannot hold."""
    if meta is None:
        return {}
    try:
        text = json.dumps(meta)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"save: meta must be JSON values: {error}") from None
    if step is not None and isinstance(meta, Mapping) and meta.get("step", step) != step:
        raise ValueError(f'save: meta["step"] is {meta["step"]!r}, but the checkpoint is of step {step}')
    return json.loads(text)


def check_manifest(path: Path, manifest: Mapping[str, Any], *, sharded: bool) -> None:
    """ValueError that names the field which is missing, of another type, or leads out of the folder."""

    def has(where: str, fields: Any, name: str, kind: type) -> Any:
        value = fields.get(name) if isinstance(fields, Mapping) else None
        negative = isinstance(value, int) and value < 0
        if not isinstance(value, kind) or negative or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{path}: {where}{name} is {value!r:.80}, not a {kind.__name__}")
        return value

    def check_file(where: str, entry: Any) -> int:
        name = has(where, entry, "file", str)
        if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise ValueError(f"{path}: {where}file is {name!r:.80}, not the name of a file in this folder")
        has(where, entry, "sha256", str)
        return has(where, entry, "bytes", int)

    has("", manifest, "step", int)
    has("", manifest, "meta", dict)
    if "finite" in manifest:
        has("", manifest, "finite", bool)
    files = has("", manifest, "files", dict)
    shards = has("", manifest, "shards", list) if sharded else []
    n_bytes = sum(check_file(f"shards.{i}.", shard) for i, shard in enumerate(shards))
    for name, entry in files.items():
        where = f"files.{name}."
        check_skeleton(f"{path}: {where}tree", entry.get("tree", 0) if isinstance(entry, dict) else 0)
        if not sharded:
            check_file(where, entry)
            continue
        for leaf_path, leaf in has(where, entry, "leaves", dict).items():
            at = f"{where}leaves.{leaf_path}."
            shape = has(at, leaf, "shape", list)
            if any(type(n) is not int or n < 0 for n in shape):
                raise ValueError(f"{path}: {at}shape is {shape!r:.80}, not a list of sizes")
            if (dtype := has(at, leaf, "dtype", str)) not in DTYPES:
                raise ValueError(f"{path}: {at}dtype is {dtype!r:.80}, which this version does not know")
            if leaf.get("shard", 0) is not None and has(at, leaf, "shard", int) >= len(shards):
                raise ValueError(f"{path}: {at}shard is {leaf['shard']}, but there are {len(shards)} files")
            n_bytes -= math.prod(shape) * DTYPES[dtype].itemsize
    if sharded and n_bytes < 0:
        raise ValueError(f"{path}: its leaves have {-n_bytes} bytes more than its files")


def check_skeleton(where: str, shape: Any) -> None:
    """ValueError unless `shape` is what `skeleton` makes."""
    if shape is None or shape == "leaf":
        return
    kind, children = next(iter(shape.items())) if isinstance(shape, dict) and len(shape) == 1 else ("", None)
    if kind in ("dict", "int_dict") and isinstance(children, dict):
        if kind == "int_dict" and (odd := [k for k in children if not _is_number(k)]):
            raise ValueError(f"{where} has the key {odd[0]!r:.80} where numbers are")
        children = list(children.values())
    elif kind not in ("list", "tuple") or not isinstance(children, list):
        raise ValueError(f"{where} is {shape!r:.80}, not the shape of a tree")
    for child in children:
        check_skeleton(where, child)


def _is_number(key: str) -> bool:
    return key.removeprefix("-").isdecimal() and key.isascii() and str(int(key)) == key
