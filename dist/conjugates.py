"""Pairs of functions between replicated tensors and those of which each rank has a share; each is the other's backward.

    enter        identity    <->  leave         all_reduce        Shoeybi et al. 2019 (arXiv:1909.08053): f and g
    gather_time  all_gather  <->  scatter_time  reduce_scatter    Korthikanti et al. 2022 (arXiv:2205.05198): g, g-bar
    whole        all_gather   ->  this rank's part

The first pair is for one loss that every rank computes: the gradient that reaches `leave` is then complete on every
rank, and is not summed again. (`collectives.all_reduce` does sum it, as a loss that is summed over ranks needs.) The
second pair is that of `collectives`, on axis 1.
Legend: B batch, T positions, t = T / N of them, D d_model, N ranks; n bytes of the argument.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from purelm.dist.collectives import Linear, all_gather, reduce_scatter, total
from purelm.dist.world import Group, rank_of, size_of

__all__ = ["enter", "gather_time", "leave", "scatter_time", "whole"]


def enter(x: Tensor, group: Group = None) -> Tensor:
    """x; its gradient is summed over ranks. For a replicated input of work that ranks divide. Backward: `leave`."""
    return x if size_of(group) == 1 else _Enter.apply(x, group)


def leave(x: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks, on every rank. One all_reduce, 2 n (N - 1) / N bytes. Backward: `enter`, the identity."""
    return x if size_of(group) == 1 else _Leave.apply(x, group)


def gather_time(x_BtD: Float[Tensor, "b t d"], group: Group = None) -> Float[Tensor, "b T d"]:
    """The positions of all ranks, concatenated. One all_gather, n (N - 1) bytes. Backward: `scatter_time`."""
    if size_of(group) == 1:
        return x_BtD
    return all_gather(x_BtD.transpose(0, 1), group, check=False).transpose(0, 1).contiguous()


def scatter_time(x_BTD: Float[Tensor, "b T d"], group: Group = None) -> Float[Tensor, "b t d"]:
    """This rank's positions of the sum over ranks. One reduce_scatter, n (N - 1) / N bytes. Backward: `gather_time`."""
    N = size_of(group)
    if x_BTD.shape[1] % N:
        raise ValueError(f"scatter_time: {x_BTD.shape[1]} positions are not divisible by the {N} ranks")
    if N == 1:
        return x_BTD
    return reduce_scatter(x_BTD.transpose(0, 1), group, check=False).transpose(0, 1).contiguous()


def whole(x: Tensor, axis: int, group: Group = None) -> Tensor:
    """All ranks' parts, concatenated along `axis`, for work that every rank does in full.

    One all_gather, n (N - 1) bytes. Backward: this rank's part of the gradient, no message.
    """
    return x if size_of(group) == 1 else _Whole.apply(x.movedim(axis, 0), group).movedim(0, axis).contiguous()


class _Enter(Linear):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return Linear.differentiated(_Leave, ctx, dy)


class _Leave(Linear):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return total(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return Linear.differentiated(_Enter, ctx, dy)


class _Whole(Linear):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return all_gather(x.detach(), group, check=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (group,) = ctx.rest
        return dy.chunk(size_of(group))[rank_of(group)].contiguous(), None
