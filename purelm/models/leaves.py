"""The leaf table: shape, kind and initialisation of each parameter of a model, by path.

    leaves = transformer.leaves(cfg)             # path -> Leaf
    leaves["layers.0.attn.q_proj.weight"].cut    # Cut(axis=0, units=12, what="n_heads")

It is the one place that names parameters: `init` draws them by it, accounting counts them, `of_kind` makes masks for
optimizers of it, and tensor parallelism reads which axis of a leaf may be cut.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from purelm import random, tree

__all__ = [
    "Cut",
    "Draw",
    "Fill",
    "Initializer",
    "Kind",
    "Leaf",
    "Leaves",
    "Place",
    "Std",
    "check_params",
    "init_leaves",
    "leaf_key",
    "like",
    "n_params",
    "of_kind",
    "with_prefix",
    "with_std",
]

Params = dict[str, Any]
# embedding: a vector for each token or position. head: from states to logits. matrix: a linear layer's weight.
Kind = Literal["embedding", "head", "matrix", "norm", "bias"]
# What a leaf is applied to. With tensor parallelism this decides if the gradient of an uncut leaf is summed over
# processes.
# sublayer: values between `ops.enter` and `ops.linear_out`, of which each process has some features or heads.
# stream: the residual stream, of which each process has some positions under sequence parallelism, else all.
# outside: values that are the same on all processes, such as the input of a classifier.
Place = Literal["sublayer", "stream", "outside"]
Initializer = Callable[[random.Key, tuple[int, ...], torch.dtype], Tensor]  # (key, shape, dtype) -> initial values


@dataclass(frozen=True)
class Fill:
    """Initializer: every element is `value`."""

    value: float

    def __call__(self, key: random.Key, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, self.value, dtype=dtype, device=key.device)


@dataclass(frozen=True)
class Draw:
    """Initializer: std * N(0, 1) truncated at 3 std; drawn in fp32 (in fp64 if dtype is fp64) and cast to dtype."""

    std: float

    def __call__(self, key: random.Key, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (random.truncated_normal(key, shape, -3.0, 3.0, wide) * self.std).to(dtype)


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism may divide a leaf: along `axis`, in whole units (heads, say)."""

    axis: int
    # The number of processes must divide this; None: any number of processes, the last part padded by zero rows.
    units: int | None
    what: str = "rows"  # what a unit is, for error messages


@dataclass(frozen=True)
class Leaf:
    """One parameter."""

    shape: tuple[int, ...]
    kind: Kind
    part: str  # accounting sums leaves by part of the model: "attention", "ffn", "norms", ...
    init: Initializer | None = None  # None: `with_std` sets Draw(std(path, leaf)), by the model's rule std
    cut: Cut | None = None  # None: every process has the whole leaf
    place: Place = "stream"
    residual: bool = False  # the matrix's output is added to the residual stream (`scaled_residual` asks)


Leaves = Mapping[str, Leaf]  # keys are paths as in `tree.paths`: "layers.0.attn.q_proj.weight"
Std = Callable[[str, Leaf], float]  # (path, leaf) -> std of its initial values, before truncation


def with_prefix(prefix: str, leaves: Leaves) -> dict[str, Leaf]:
    """The same leaves, at the paths prefix.path."""
    return {f"{prefix}.{path}": leaf for path, leaf in leaves.items()}


def with_std(leaves: Leaves, std: Std) -> dict[str, Leaf]:
    """The table with an initializer for every leaf: `Draw(std(path, leaf))` for those without one."""
    return {p: x if x.init is not None else replace(x, init=Draw(std(p, x))) for p, x in leaves.items()}


def leaf_key(key: random.Key, path: str) -> random.Key:
    """The key of the leaf at `path`: fold_in(key, crc32(path)). Adding a leaf so changes no other leaf's values."""
    return random.fold_in(key, zlib.crc32(path.encode()))


def init_leaves(key: random.Key, leaves: Leaves, dtype: torch.dtype = torch.float32) -> Params:
    """Fresh parameters, on the key's device, each leaf drawn with `leaf_key(key, path)`."""

    def draw(path: str, leaf: Leaf) -> Tensor:
        if leaf.init is None:
            raise ValueError(f"leaves: {path} has no initializer; with_std(leaves, std) gives one to each")
        return leaf.init(leaf_key(key, path), leaf.shape, dtype)

    return tree.from_flat({path: draw(path, leaf) for path, leaf in leaves.items()})


def like(leaves: Leaves, dtype: torch.dtype = torch.float32) -> Params:
    """The parameter tree on the meta device: shapes and dtypes without memory."""
    return tree.from_flat({path: torch.empty(leaf.shape, dtype=dtype, device="meta") for path, leaf in leaves.items()})


def n_params(leaves: Leaves) -> int:
    """Number of elements of all leaves."""
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def of_kind(leaves: Leaves, *kinds: Kind) -> Callable[[str, Any], bool]:
    """A predicate for optimizers' masks: (path, x) -> whether the leaf at `path` is of one of these kinds.

    `muon_adamw(predicate=of_kind(model.leaves, "matrix"))` gives Muon the matrices inside the blocks and AdamW the
    rest. The predicate raises ValueError for a path that is not in the table.

    >>> table = {"w": Leaf((4, 4), "matrix", "ffn"), "e": Leaf((9, 4), "embedding", "embeddings")}
    >>> is_hidden = of_kind(table, "matrix")
    >>> is_hidden("w", None), is_hidden("e", None)
    (True, False)
    """

    def chosen(path: str, x: Any) -> bool:
        if path not in leaves:
            raise ValueError(f"{path} is not in the model's leaf table; it has {', '.join(list(leaves)[:3])}, ...")
        return leaves[path].kind in kinds

    return chosen


def check_params(params: Any, leaves: Leaves) -> None:
    """ValueError naming parameters that are missing, unknown to the table, or of another shape than it says.

    Without this check parameters of another Config (fewer layers, say) could give wrong numbers instead of an error.
    """
    found = tree.leaves(params)
    paths = tree.paths(params)
    if len(found) != len(leaves) or any(path not in leaves for path in paths):
        missing, unknown = sorted(set(leaves) - set(paths)), sorted(set(paths) - set(leaves))
        what = [f"lack {', '.join(missing[:3])}"] if missing else []
        what += [f"have {', '.join(unknown[:3])}, unknown to the model"] if unknown else []
        raise ValueError(f"params {' and '.join(what)}: they are of a model with another configuration")
    for path, x in zip(paths, found, strict=True):
        if x.shape != leaves[path].shape:
            raise ValueError(
                f"params: {path} has shape {tuple(x.shape)}, the model's configuration says {leaves[path].shape}"
            )
