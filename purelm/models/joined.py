"""Weights of layers that read one input, side by side in memory: one matrix product in place of two or three.

    params = join_weights(params)                    # the same tree with the same values
    generate(model, params, ...)

A product of few rows takes about as long for 768 features as for 2,304.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["join_weights", "side_by_side"]

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("w1", "w3"))


def join_weights(params: Any, together: Sequence[Sequence[str]] = TOGETHER) -> Any:
    """The tree in which the "weight"s of siblings named together are views of one tensor, one after the other.

    Paths, shapes and values are as they were, and weights that differ in their last axis, dtype or device stay apart.
    `linear.apply_linears` then multiplies by all of them at once where no gradient is recorded. What is joined is a
    copy: a step that updates one tree does not change the other.
    """
    if isinstance(params, dict):
        out = {name: join_weights(x, together) for name, x in params.items()}
        for names in together:
            if all(isinstance(out.get(name), dict) and isinstance(out[name].get("weight"), Tensor) for name in names):
                weights = [out[name]["weight"] for name in names]
                for name, weight in zip(names, _views(weights), strict=True):
                    out[name] = {**out[name], "weight": weight}
        return out
    if isinstance(params, tuple) and hasattr(params, "_fields"):
        return type(params)(*(join_weights(x, together) for x in params))
    if isinstance(params, (list, tuple)):
        return type(params)(join_weights(x, together) for x in params)
    return params


def _views(weights: list[Tensor]) -> Sequence[Tensor]:
    first = weights[0]
    alike = all(
        w.ndim == 2 and w.shape[1] == first.shape[1] and w.dtype == first.dtype and w.device == first.device
        for w in weights
    )
    if not alike:
        return weights
    return torch.cat([w.detach() for w in weights]).split([w.shape[0] for w in weights])


def side_by_side(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights (O_i, I) as one tensor (sum O_i, I), a view, if they follow each other in memory; else None."""
    first = weights[0]
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        return None  # no memory to look at
    if type(first) not in (Tensor, torch.nn.Parameter) or not first.is_contiguous():
        return None
    at, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for w in weights:
        follows = type(w) is type(first) and w.is_contiguous() and w.storage_offset() == at
        if not (follows and w.shape[1] == first.shape[1] and w.dtype == first.dtype):
            return None
        if w.untyped_storage().data_ptr() != storage:
            return None
        at += w.numel()
    rows = sum(w.shape[0] for w in weights)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
