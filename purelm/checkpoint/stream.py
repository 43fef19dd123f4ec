"""A tree as bytes: a safetensors stream that also holds the tree's form, and is checked when it is read.

    data = to_bytes(params, meta={"config": {...}})       # for a file object: file.write(data)
    params, meta = from_bytes(data)                       # from one: from_bytes(file.read())

Any program that reads safetensors finds the leaves under their paths. "__metadata__" has one entry, "purelm": JSON with
"tree" (see `manifest`), "meta", and the SHA-256 of both and of all leaves.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from purelm import tree
from purelm.checkpoint.folder import storable
from purelm.checkpoint.manifest import check_leaves, check_meta, check_skeleton, check_structure, rebuild, skeleton
from purelm.checkpoint.reading import as_like, cast, check_dtype

__all__ = ["from_bytes", "to_bytes"]


def to_bytes(value: Any, *, meta: Mapping[str, Any] | None = None) -> bytes:
    """The tree of tensors `value`, and JSON values `meta`, as a safetensors stream.

    ValueError, as in `save`, for what could not be read back: leaves that are no tensors, two leaves of one path.

    >>> tree_, meta = from_bytes(to_bytes({"w": torch.ones(2), "none": None}, meta={"step": 3}))
    >>> tree_, meta
    ({'w': tensor([1., 1.]), 'none': None}, {'step': 3})
    """
    check_structure("tree", value)
    check_leaves("tree", value)
    leaves = dict(zip(tree.paths(value), storable(tree.leaves(value)), strict=True))
    about = {"tree": skeleton(value), "meta": check_meta(meta)}
    about = json.loads(json.dumps(about))
    return serialise(leaves, {"purelm": json.dumps({**about, "sha256": _digest(about, leaves)})})


def from_bytes(
    data: bytes,
    *,
    like: Any = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Any, dict[str, Any]]:
    """(tree, meta) of what `to_bytes` made. ValueError where anything is missing or changed.

    A stream that another program wrote is refused, since it has no form and no checksum:
    `tree.from_flat(safetensors.torch.load(data))` makes a tree of it.

    Args:
        like: a tree of the structure, shapes and dtypes that are expected; the result has exactly that structure.
            Without it, NamedTuples come back as dicts.
        device: where the tensors go.
        dtype: what floating leaves are cast to, before they are compared with `like`.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ValueError(f"from_bytes: data is of type {type(data).__name__}; bytes are needed: file.read()")
    check_dtype(dtype)
    data = bytes(data)
    try:
        leaves = parse(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"from_bytes: not a safetensors stream, or cut short ({error})") from None
    about = _about(metadata)
    if about.get("sha256") != _digest(about, leaves):
        raise ValueError("from_bytes: its SHA-256 does not match: the bytes were changed or damaged")
    leaves = {path: cast(x.to(device), dtype) for path, x in leaves.items()}
    if like is not None:
        return as_like("from_bytes: data", leaves, like), about["meta"]
    return rebuild(about["tree"], leaves), about["meta"]


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `to_bytes` wrote beside the leaves."""
    if "purelm" not in metadata:
        raise ValueError(
            'from_bytes: no "purelm" in its metadata, so that to_bytes did not write it, or it is damaged; '
            "tree.from_flat(safetensors.torch.load(data)) reads another program's"
        )
    try:
        about = json.loads(metadata["purelm"])
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("meta"), dict) or "tree" not in about:
        raise ValueError('from_bytes: its metadata "purelm" is not what to_bytes writes')
    check_skeleton("from_bytes: tree", about["tree"])
    return about


def _digest(about: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> str:
    """SHA-256 of form, meta, and each leaf's path, dtype, shape and bytes; the leaves' order does not matter."""
    digest = hashlib.sha256(json.dumps([about["tree"], about["meta"]], sort_keys=True).encode())
    for path in sorted(leaves):
        x = leaves[path]
        digest.update(json.dumps([path, str(x.dtype), list(x.shape)]).encode())
        if x.numel():
            digest.update(tree.as_bytes(x).numpy().data)
    return digest.hexdigest()
