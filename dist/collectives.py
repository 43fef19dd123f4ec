"""Collectives over trees of tensors, as functions: nothing is written to, results are new trees.

Each is linear, and each has an adjoint: with <x, y> the sum over ranks and leaves of the products, and A* the adjoint,
<A x, y> = <x, A* y>. They are differentiable by it, so a loss summed over ranks has the gradient that the maths says:

    broadcast   <->  reduce         all_reduce  <->  all_reduce         all_gather  <->  reduce_scatter

A message a leaf; bytes are what one rank sends, for a tree of n bytes over N ranks in a ring. In a world of one all are
the identity. Groups are arguments; None is the world. A rank whose tree is of another kind is an error on all ranks
(`agreement.check_same_kind`, which costs a message of 32 bytes; check=False leaves it out).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from purelm import tree
from purelm.dist.agreement import check_same_kind
from purelm.dist.world import Group, rank_of, size_of

__all__ = ["all_gather", "all_reduce", "broadcast", "reduce", "reduce_scatter"]


def broadcast(values: Any, src: int = 0, group: Group = None, *, check: bool = True) -> Any:
    """The tree of the group's rank `src`, on every rank. Adjoint: `reduce` to src. Bytes: n.

    Other ranks' trees say only what kind of leaves to expect.
    """
    return _on_leaves(lambda x: _Broadcast.apply(x, src, group), values, group, check, "broadcast")


def reduce(values: Any, dst: int = 0, group: Group = None, *, check: bool = True) -> Any:
    """The sum over ranks on the group's rank `dst`, zeros elsewhere. Adjoint: `broadcast` from dst. Bytes: n."""
    return _on_leaves(lambda x: _Reduce.apply(x, dst, group), values, group, check, "reduce")


def all_reduce(values: Any, group: Group = None, *, op: Literal["sum", "mean"] = "sum", check: bool = True) -> Any:
    """The sum (or mean) over ranks, on every rank. Its own adjoint. Bytes: 2 n (N - 1) / N."""
    if op not in ("sum", "mean"):
        raise ValueError(f'op must be "sum" or "mean", got {op!r}')
    return _on_leaves(lambda x: _AllReduce.apply(x, op == "mean", group), values, group, check, "all_reduce")


def all_gather(values: Any, group: Group = None, *, check: bool = True) -> Any:
    """Leaves (m, ...) to (N m, ...): those of all ranks one after another, in order of rank, on axis 0.

    Adjoint: `reduce_scatter`. Bytes: n (N - 1), n being the bytes of one rank's tree.
    """
    what = "all_gather"
    return _on_leaves(lambda x: _AllGather.apply(_with_axis(x, what), group), values, group, check, what)


def reduce_scatter(values: Any, group: Group = None, *, check: bool = True) -> Any:
    """Leaves (N m, ...) to (m, ...): rank r has the sum over ranks of rows r m to (r + 1) m.

    Adjoint: `all_gather`. Bytes: n (N - 1) / N. ValueError where N does not divide axis 0.
    """
    N = size_of(group)

    def one(x: Tensor) -> Tensor:
        if _with_axis(x, "reduce_scatter").shape[0] % N:
            raise ValueError(f"reduce_scatter: axis 0 of {tuple(x.shape)} is not divisible by the {N} ranks")
        return _ReduceScatter.apply(x, group)

    return _on_leaves(one, values, group, check, "reduce_scatter")


def _on_leaves(f: Callable[[Tensor], Tensor], values: Any, group: Group, check: bool, what: str) -> Any:
    if size_of(group) == 1:
        return values
    rank_of(group)
    if check:
        check_same_kind(values, group, what)
    return tree.map(f, values)


def _with_axis(x: Tensor, what: str) -> Tensor:
    if x.ndim == 0:
        raise ValueError(f"{what}: a 0-d leaf has no axis 0; give x[None]")
    return x


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, src: int, group: Group) -> Tensor:
        y = x.contiguous().clone()
        dist.broadcast(y, group=group, group_src=src)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.src, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Reduce.apply(dy, ctx.src, ctx.group), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dst: int, group: Group) -> Tensor:
        y = x.contiguous().clone()
        dist.reduce(y, group=group, group_dst=dst)
        return y if rank_of(group) == dst else torch.zeros_like(y)  # others' buffers hold anything

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.dst, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Broadcast.apply(dy, ctx.dst, ctx.group), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mean: bool, group: Group) -> Tensor:
        y = x.contiguous().clone()
        dist.all_reduce(y, group=group)
        return y / size_of(group) if mean else y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.mean, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _AllReduce.apply(dy, ctx.mean, ctx.group), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        y = x.new_empty((size_of(group) * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(y, x.contiguous(), group=group)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _ReduceScatter.apply(dy, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        y = x.new_empty((x.shape[0] // size_of(group), *x.shape[1:]))
        dist.reduce_scatter_tensor(y, x.contiguous(), group=group)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _AllGather.apply(dy, ctx.group), None
