"""LoRA: low-rank updates of chosen matrices, as a tree beside the parameters.

    adapters = lora.init(key, params, rank=8, match=of_kind(model.leaves, "matrix"))
    loss = lambda adapters, batch: model.loss(lora.merge(params, adapters, alpha=16.0), batch)
    state = init_state(adapters, adamw()); step = make_step(loss, ...)     # params stay as they are
    params = lora.merge(params, state.params, alpha=16.0)                  # nothing of LoRA is left at inference

W' = W + alpha / r B A, with A (r, in) and B (out, r); Hu et al. 2021 (arXiv:2106.09685), equation 3. B begins as 0, so
W' = W at first. `merge` forms W' as a tensor, so every op, kernel and strategy works on it unchanged; its memory is
that of the chosen matrices once more.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import random, tree
from purelm.tree import Tree

__all__ = ["Adapter", "init", "merge", "n_adapted"]


class Adapter(NamedTuple):
    """The update of one matrix (..., out, in)."""

    a: Tensor  # (..., r, in)
    b: Tensor  # (..., out, r)


def init(
    key: random.Key,
    params: Tree,
    rank: int,
    match: Callable[[str, Tensor], bool] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tree:
    """A tree of the form of params, with an `Adapter` in place of each matrix that is chosen, and None elsewhere.

    A is uniform in (-1/sqrt(in), 1/sqrt(in)), as PEFT draws it, with a key of its own for each path; B is 0.

    Args:
        rank: r, at least 1 and at most the shorter side of every chosen matrix.
        match: (path, leaf) -> whether it is adapted; None: every leaf of two or more axes but embeddings and heads
            (paths with "embed" or "head"). `purelm.models.leaves.of_kind(model.leaves, "matrix")` goes by the model's
            own table.
    ValueError if nothing is chosen, and for a chosen leaf that is no matrix.

    >>> adapters = init(random.key(0), {"w": torch.zeros(6, 4), "b": torch.zeros(6)}, rank=2)
    >>> adapters["w"].a.shape, adapters["w"].b.shape, adapters["b"]
    (torch.Size([2, 4]), torch.Size([6, 2]), None)
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"lora: rank must be an int of at least 1, got {rank!r}")
    chosen = _inner_matrix if match is None else match

    def made(path: str, w: Tensor) -> Adapter | None:
        if not chosen(path, w):
            return None
        if w.ndim < 2 or not w.is_floating_point():
            raise ValueError(f"lora: {path} has shape {tuple(w.shape)} and {w.dtype}; a floating matrix is needed")
        n_out, n_in = w.shape[-2:]
        if rank > min(n_out, n_in):
            raise ValueError(f"lora: rank {rank} is more than the shorter side of {path}, {tuple(w.shape)}")
        own = random.fold_in(key, zlib.crc32(path.encode()))
        bound = 1.0 / math.sqrt(n_in)
        a = random.uniform(own, (*w.shape[:-2], rank, n_in)) * (2 * bound) - bound
        return Adapter(a.to(w.device, dtype), torch.zeros(*w.shape[:-2], n_out, rank, dtype=dtype, device=w.device))

    adapters = tree.map_with_path(made, params)
    if not tree.leaves(adapters):
        raise ValueError("lora: match chooses no leaf of params")
    return adapters


def merge(params: Tree, adapters: Tree, *, alpha: float, rank_stabilized: bool = False) -> Tree:
    """params with W + s B A in place of each adapted W, s = alpha / r; leaves without an adapter are as they were.

    The product is formed in the adapter's dtype and added in the wider of both, then rounded to W's. Differentiable by
    both trees: W's gradient is that of W', A's and B's follow by the chain rule.

    Args:
        rank_stabilized: s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).

    >>> w = {"w": torch.eye(2)}
    >>> merge(w, {"w": Adapter(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))}, alpha=1.0)["w"]
    tensor([[4., 6.],
            [4., 9.]])
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"lora: alpha must be a finite number, got {alpha!r}")
    flat, form = tree.flatten(params)
    paths = tree.paths(params)
    found = _by_path(adapters)
    if unknown := sorted(set(found) - set(paths)):
        raise ValueError(f"lora: adapters have {', '.join(unknown[:3])}, which params have not")

    def merged(path: str, w: Tensor) -> Tensor:
        if path not in found:
            return w
        a, b = found[path]
        r = a.shape[-2]
        if (*a.shape[:-2], b.shape[-2], a.shape[-1]) != tuple(w.shape) or b.shape[-1] != r:
            raise ValueError(
                f"lora: {path} has shape {tuple(w.shape)}, its adapter a {tuple(a.shape)} and b {tuple(b.shape)}"
            )
        scale = alpha / (math.sqrt(r) if rank_stabilized else r)
        return (w + scale * (b @ a)).to(w.dtype)

    return tree.unflatten(form, [merged(path, w) for path, w in zip(paths, flat, strict=True)])


def n_adapted(adapters: Tree) -> int:
    """How many matrices have an adapter."""
    return len(_by_path(adapters))


def _by_path(adapters: Tree) -> dict[str, tuple[Tensor, Tensor]]:
    """path of the matrix -> (a, b)."""
    halves: dict[str, dict[str, Any]] = {}
    for path, x in zip(tree.paths(adapters), tree.leaves(adapters), strict=True):
        where, _, name = path.rpartition(".")
        halves.setdefault(where, {})[name] = x
    odd = [where for where, pair in halves.items() if set(pair) != {"a", "b"}]
    if odd:
        raise ValueError(f"lora: adapters must hold an Adapter or None for each leaf of params; {odd[0]} is neither")
    return {where: (pair["a"], pair["b"]) for where, pair in halves.items()}


def _inner_matrix(path: str, w: Tensor) -> bool:
    return w.ndim >= 2 and not any(part in path.lower() for part in ("embed", "head"))
