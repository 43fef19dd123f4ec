"""Collectives over trees of tensors, as pure functions: arguments are not written to, results are new trees.

Each is a linear map A with an adjoint A*: <A x, y> = <x, A* y>, where <x, y> is a sum over all ranks and leaves. The
backward pass applies the adjoint, which gives the gradient of a loss that is summed over ranks:

    broadcast   <->  reduce         all_reduce  <->  all_reduce         all_gather  <->  reduce_scatter

Each leaf is one message. "Bytes" is what one rank sends, for a tree of n bytes over N ranks in a ring. In a group of
one rank all are the identity. group=None is all processes. ValueError on all ranks if their trees differ in paths,
shapes or dtypes (`agreement.check_same_kind`, a message of 32 bytes; check=False skips it).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from purelm import tree
from purelm.dist.agreement import check_same_kind
from purelm.dist.world import Group, all_gather_single, rank_of, reduce_scatter_single, size_of

__all__ = ["Linear", "alike", "all_gather", "all_reduce", "broadcast", "reduce", "reduce_scatter", "total"]


def broadcast(values: Any, src: int = 0, group: Group = None, *, check: bool = True) -> Any:
    """The tree of the group's rank `src`, on every rank. Adjoint: `reduce` to src. Bytes: n.

    Of the other ranks' trees only shapes and dtypes are used.
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
    """Leaves (m, ...) to (N m, ...): those of all ranks, concatenated along axis 0 in order of rank.

    Adjoint: `reduce_scatter`. Bytes: n (N - 1), n being the bytes of one rank's tree.
    """
    what = "all_gather"
    return _on_leaves(lambda x: _AllGather.apply(_with_axis(x, what), group), values, group, check, what)


def alike(values: Any, group: Group = None) -> Any:
    """The identity on a tree that is the same on all ranks; its gradient is summed over them.

    No message in forward, `all_reduce` in backward. For a loss that is summed over ranks; `conjugates.enter` is for one
    loss that every rank computes.
    """
    return values if size_of(group) == 1 else tree.map(lambda x: _Alike.apply(x, group), values)


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
    if check:
        check_same_kind(values, group, what)
    return tree.map(f, values)


def _with_axis(x: Tensor, what: str) -> Tensor:
    if x.ndim == 0:
        raise ValueError(f"{what}: a 0-d leaf has no axis 0; give x[None]")
    return x


def total(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks as a new tensor, by one all_reduce; not differentiable."""
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=group)
    return y


class Linear(torch.autograd.Function):
    """Base of linear maps forward(x, *rest), whose backward is another such map, the adjoint, with the same rest."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rest = inputs[1:]

    @staticmethod
    def differentiated(adjoint: Any, ctx: Any, dy: Tensor) -> Any:
        """What backward returns: the adjoint of dy, and None for each argument of `rest`."""
        return adjoint.apply(dy, *ctx.rest), *[None for _ in ctx.rest]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Adds jvp, which maps the tangent, and vmap, which moves the batch axis to the end."""
        super().__init_subclass__(**kwargs)

        def jvp(ctx: Any, dx: Tensor, *rest: Any) -> Tensor:
            return cls.apply(dx, *ctx.rest)

        def vmap(info: Any, in_dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
            y = cls.apply(x.movedim(in_dims[0], -1), *rest)
            return y, y.ndim - 1

        cls.jvp, cls.vmap = staticmethod(jvp), staticmethod(vmap)  # type: ignore[assignment]


class _Broadcast(Linear):
    @staticmethod
    def forward(x: Tensor, src: int, group: Group) -> Tensor:
        y = x.contiguous().clone()
        dist.broadcast(y, group=group, group_src=src)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return Linear.differentiated(_Reduce, ctx, dy)


class _Reduce(Linear):
    @staticmethod
    def forward(x: Tensor, dst: int, group: Group) -> Tensor:
        y = x.contiguous().clone()
        dist.reduce(y, group=group, group_dst=dst)
        return y if rank_of(group) == dst else torch.zeros_like(y)  # undefined on the others

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return Linear.differentiated(_Broadcast, ctx, dy)


class _AllReduce(Linear):
    @staticmethod
    def forward(x: Tensor, mean: bool, group: Group) -> Tensor:
        return total(x, group) / size_of(group) if mean else total(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return Linear.differentiated(_AllReduce, ctx, dy)


class _AllGather(Linear):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        y = x.new_empty((size_of(group) * x.shape[0], *x.shape[1:]))
        all_gather_single(y, x.contiguous(), group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return Linear.differentiated(_ReduceScatter, ctx, dy)


class _ReduceScatter(Linear):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        y = x.new_empty((x.shape[0] // size_of(group), *x.shape[1:]))
        reduce_scatter_single(y, x.contiguous(), group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return Linear.differentiated(_AllGather, ctx, dy)


class _Alike(Linear):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _AllReduce.apply(dy, False, *ctx.rest), None
