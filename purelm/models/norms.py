"""Norms of the residual stream as values: Config(norm=...) takes any `Norm`."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor

from purelm.models.leaves import Fill, Leaf, Params
from purelm.ops import Ops

__all__ = ["Norm", "layer_norm", "rms_norm"]


class Norm(NamedTuple):
    """A norm over the last axis: functions, and the `config` that each takes as first argument."""

    config: Hashable
    leaves: Callable[[Any, int], dict[str, Leaf]]  # (config, width) -> table
    apply: Callable[[Any, Params, Tensor, Ops], Tensor]  # (config, params, x, ops) -> y
    # (config, params, x, residual, ops) -> (the norm of x + residual, x + residual); None: in two steps
    add: Callable[[Any, Params, Tensor, Tensor, Ops], tuple[Tensor, Tensor]] | None = None


def rms_norm(eps: float = 1e-5) -> Norm:
    """The norm x / sqrt(mean(x^2) + eps) * weight; computed by `ops.rms_norm`, or with a sum by `ops.add_rms_norm`."""
    return Norm((eps,), _rms_leaves, _rms_apply, _rms_add)


def layer_norm(eps: float = 1e-5, bias: bool = True) -> Norm:
    """The norm (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; computed by `ops.layer_norm`."""
    return Norm((eps, bias), _layer_leaves, _layer_apply)


def _rms_leaves(config: tuple[float], width: int) -> dict[str, Leaf]:
    return {"weight": Leaf((width,), "norm", "norms", Fill(1.0))}


def _rms_apply(config: tuple[float], params: Params, x: Tensor, ops: Ops) -> Tensor:
    return ops.rms_norm(x, params["weight"], config[0])


def _rms_add(config: tuple[float], params: Params, x: Tensor, residual: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
    return ops.add_rms_norm(x, residual, params["weight"], config[0])


def _layer_leaves(config: tuple[float, bool], width: int) -> dict[str, Leaf]:
    bias = {"bias": Leaf((width,), "bias", "norms", Fill(0.0))} if config[1] else {}
    return {"weight": Leaf((width,), "norm", "norms", Fill(1.0)), **bias}


def _layer_apply(config: tuple[float, bool], params: Params, x: Tensor, ops: Ops) -> Tensor:
    return ops.layer_norm(x, params["weight"], params.get("bias"), config[0])
