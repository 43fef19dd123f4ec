"""Pairs of functions between what all ranks hold alike and what each holds a share of; each is the other's backward.

    enter        identity    <->  leave         all_reduce        Shoeybi et al. 2019 (arXiv:1909.08053): f and g
    gather_time  all_gather  <->  scatter_time  reduce_scatter    Korthikanti et al. 2022 (arXiv:2205.05198): g, g-bar

Unlike `collectives`, whose adjoints are those of a loss summed over ranks, the first pair is for one loss that all
ranks compute alike: the gradient that reaches `leave` is whole on every rank, and is not summed again. The second pair
does not differ from `collectives` in this; time is axis 1 here.
Legend: B batch, T positions, t = T / N of them, D d_model, N ranks; n bytes of the argument.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from purelm.dist.world import Group, size_of

__all__ = ["enter", "gather_time", "leave", "scatter_time"]


def enter(x: Tensor, group: Group = None) -> Tensor:
    """x, whose gradient is summed over ranks: what all ranks have goes into work that differs. Backward: `leave`."""
    return x if size_of(group) == 1 else _Enter.apply(x, group)


def leave(x: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks, on every rank. One all_reduce, 2 n (N - 1) / N bytes. Backward: `enter`, the identity."""
    return x if size_of(group) == 1 else _Leave.apply(x, group)


def gather_time(x_BtD: Float[Tensor, "b t d"], group: Group = None) -> Float[Tensor, "b T d"]:
    """All ranks' positions one after another. One all_gather, n (N - 1) bytes. Backward: `scatter_time`."""
    return x_BtD if size_of(group) == 1 else _GatherTime.apply(x_BtD, group)


def scatter_time(x_BTD: Float[Tensor, "b T d"], group: Group = None) -> Float[Tensor, "b t d"]:
    """This rank's positions of the sum over ranks. One reduce_scatter, n (N - 1) / N bytes. Backward: `gather_time`."""
    N = size_of(group)
    if x_BTD.shape[1] % N:
        raise ValueError(f"scatter_time: {x_BTD.shape[1]} positions are not divisible by the {N} ranks")
    return x_BTD if N == 1 else _ScatterTime.apply(x_BTD, group)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Leave.apply(dy, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Enter.apply(dy, ctx.group), None


class _GatherTime(torch.autograd.Function):
    @staticmethod
    def forward(x_BtD: Tensor, group: Group) -> Tensor:
        B, t, D = x_BtD.shape
        N = size_of(group)
        y = x_BtD.new_empty(N * B, t, D)
        dist.all_gather_into_tensor(y, x_BtD.contiguous(), group=group)
        return y.view(N, B, t, D).transpose(0, 1).reshape(B, N * t, D)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _ScatterTime.apply(dy, ctx.group), None


class _ScatterTime(torch.autograd.Function):
    @staticmethod
    def forward(x_BTD: Tensor, group: Group) -> Tensor:
        B, T, D = x_BTD.shape
        N = size_of(group)
        y = x_BTD.new_empty(B, T // N, D)
        message = x_BTD.reshape(B, N, T // N, D).transpose(0, 1).reshape(N * B, T // N, D)
        dist.reduce_scatter_tensor(y, message.contiguous(), group=group)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _GatherTime.apply(dy, ctx.group), None
