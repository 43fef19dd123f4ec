"""Mixers: what lets the positions of a sequence see each other. A value, one file for each kind.

A mixer of one's own needs no change here: `Config(mixer=mine)`, mine being a `Mixer` of functions from anywhere. Its
functions take `config` first, whatever it is; so mixers with equal configurations are equal. Its last linear layer is
`ops.linear_out`, and what it reads goes through `ops.enter`, once; then it can be cut over processes as its leaves say.

Legend: B batch, T positions, S slots of a cache, D d_model.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from purelm.models.context import Context
from purelm.models.leaves import Leaf, Params
from purelm.ops import Ops

__all__ = ["Cost", "CostOfMixer", "Mixer", "Slots", "not_cached"]


class Slots(NamedTuple):
    """Where T new tokens stand in a cache."""

    new_T: Tensor  # (T,) int64: the slots that they are written to
    every_S: Tensor  # (S,) int64: 0 .. S-1
    length: Tensor  # 0-d int64: slots in use before
    start: Tensor | None  # (B,) int64: first slot of each row; None when no row is padded
    used: int | None  # `length` where the host knows it
    n_rows: int  # B
    one: bool  # whether this is the step of one token, which sees all that is there
    write: Callable[[Tensor, int, Tensor, Tensor], Tensor]  # (x, axis, indices, values): index_copy or index_copy_


class Cost(NamedTuple):
    """What a layer costs for B sequences of T positions."""

    flops: dict[str, int]  # of matrix products in forward, by part
    activation_bytes: dict[str, int]  # that backward needs from forward, by part
    cache_elements: int  # of the state after T positions


class CostOfMixer(Protocol):
    """The cost for `batch` sequences of `length` positions.

    flash: scores are not kept for backward. skip_masked: pairs that do not see each other cost nothing.
    """

    def __call__(
        self,
        config: Any,
        batch: int,
        length: int,
        /,
        *,
        bytes_per_element: int = 4,
        flash: bool = False,
        skip_masked: bool = False,
    ) -> Cost: ...


class Mixer(NamedTuple):
    """One way of mixing positions; functions and their `config`, which is the first argument of each."""

    config: Hashable
    leaves: Callable[[Any], dict[str, Leaf]]  # (config) -> table of one layer's parameters
    apply: Callable[[Any, Params, Tensor, Context, Ops], Tensor]  # (config, params, x_BTD, ctx, ops) -> y_BTD
    # (config, batch, n_slots, dtype, device) -> an empty state, a tree of tensors whose first axis is the batch
    init_state: Callable[[Any, int, int, torch.dtype, Any], Any]
    reads: Callable[[Any, Slots], Any]  # (config, slots) -> what all layers of this kind need of them, formed once
    # (config, params, x_BTD, ctx, ops, state, what reads returned) -> (y_BTD, state)
    apply_cached: Callable[[Any, Params, Tensor, Context, Ops, Any, Any], tuple[Tensor, Any]]
    cost: CostOfMixer


def not_cached(config: Any, *_: Any) -> Any:
    """`init_state` of a mixer that cannot go on from a state."""
    raise ValueError(f"mixer {config!r} has no cached form")
