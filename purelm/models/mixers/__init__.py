"""Mixers: the sublayers in which positions of a sequence see each other, as values. One file for each kind.

Config(mixer=...) takes your own `Mixer`, made of functions from any module. Each takes `config` as first argument
instead of closing over it, so that mixers made with equal configurations are equal.

For tensor parallelism a mixer passes its input through `ops.enter` once and ends with `ops.linear_out`; its leaves say
how they may be cut.

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
    """The slots of a cache that T new tokens of each row go into, and those in use before them.

    Token t of a row lies in slot t. Rows are level where all have equally many tokens before the new ones.
    """

    new_T: Tensor  # int64: the slots of the new tokens, (T,) of level rows, else (B, T)
    every_S: Tensor  # (S,) int64: all slots, 0 .. S-1
    length: Tensor  # int64: tokens before the new ones, 0-d of level rows, else (B,)
    used: tuple[int, int] | None  # (least, most) tokens before the new ones, where the host knows them
    rows_B: Tensor  # (B,) int64: 0 .. B-1
    one: bool  # True in `decode`: T is 1, and the new token sees every earlier one (within its window)
    in_place: bool  # whether `write` writes into the memory of the given tensor

    def write(self, x: Tensor, values: Tensor) -> Tensor:
        """x (B, S, ...) with values (B, T, ...) in the slots of the new tokens.

        The slots of padding after a row's last token are written too, as far as there are any.
        """
        if self.new_T.ndim == 1:
            return (x.index_copy_ if self.in_place else x.index_copy)(1, self.new_T, values)
        if self.one:
            put = x.index_put_ if self.in_place else x.index_put
            return put((self.rows_B, self.new_T[:, 0]), values[:, 0])
        n = values.shape[1]
        token_BS = self.every_S - self.length.unsqueeze(-1)  # which of the new tokens a slot gets
        gets = (token_BS >= 0) & (token_BS < n)
        spread = values[self.rows_B.unsqueeze(-1), token_BS.clamp(0, n - 1)]
        return torch.where(gets.reshape(*gets.shape, *(1,) * (x.ndim - 2)), spread, x)


class Cost(NamedTuple):
    """What a layer costs for B sequences of T positions."""

    flops: dict[str, int]  # FLOPs of matrix products in forward, by part
    activation_bytes: dict[str, int]  # bytes that backward needs from forward, by part
    cache_elements: int  # elements of the layer's state in a cache of T positions


class CostOfMixer(Protocol):
    """The function (config, batch, length) -> Cost of one layer for `batch` sequences of `length` positions.

    bytes_per_element: of activations. flash: attention scores are not kept for backward. skip_masked: only pairs of
    positions that see each other count.
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
    """One way of mixing positions: functions, and the `config` that each takes as first argument."""

    config: Hashable
    leaves: Callable[[Any], dict[str, Leaf]]  # (config) -> leaf table of one layer
    apply: Callable[[Any, Params, Tensor, Context, Ops], Tensor]  # (config, params, x_BTD, ctx, ops) -> y_BTD
    # (config, batch, n_slots, dtype, device) -> an empty state, a tree of tensors whose first axis is the batch
    init_state: Callable[[Any, int, int, torch.dtype, Any], Any]
    # (config, slots) -> masks and the like that apply_cached needs; called once a pass for all layers of this kind
    reads: Callable[[Any, Slots], Any]
    # (config, params, x_BTD, ctx, ops, state, the result of reads) -> (y_BTD, state)
    apply_cached: Callable[[Any, Params, Tensor, Context, Ops, Any, Any], tuple[Tensor, Any]]
    cost: CostOfMixer


def not_cached(config: Any, *_: Any) -> Any:
    """An `init_state` for mixers that cannot decode with a cache: raises ValueError."""
    raise ValueError(f"mixer {config!r} has no cached form")
