"""Trees sharded along axis 0: cutting, all-gather and reduce-scatter, with many leaves in a message.

A leaf (n, ...) on N ranks is cut into parts of m = ceil(n / N) rows, the last ones padded with zeros, so that all ranks
send equal numbers of bytes for any n. A part has the leaf's path and number of axes (one for a 0-d leaf), so optimizers
that select leaves by these select the same parts. Padding has zero gradients, and every element-wise optimizer leaves
it zero.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.dist.messages import Op, Pending, by_owner, default_bucket_bytes, in_turn, split_as
from purelm.dist.world import Group, all_gather_single, rank_of, reduce_scatter_single, size_of

__all__ = [
    "gather_leaves",
    "gather_parts",
    "gathered",
    "part_of",
    "part_shape",
    "scatter_bucket",
    "scatter_sums",
    "shard",
    "unshard",
    "whole_of",
]


def part_shape(shape: Sequence[int], n_ranks: int) -> tuple[int, ...]:
    """Shape of each rank's part.

    >>> part_shape((5, 3), 2), part_shape((), 4)
    ((3, 3), (1,))
    """
    first, *rest = shape or (1,)
    return (-(-first // n_ranks), *rest)


def part_of(x: Tensor, rank: int, n_ranks: int) -> Tensor:
    """The rows of rank `rank`, padded with zeros; a copy.

    >>> part_of(torch.arange(5), 1, 2)
    tensor([3, 4, 0])
    """
    x = x[None] if x.ndim == 0 else x
    m = part_shape(x.shape, n_ranks)[0]
    rows = x[rank * m : (rank + 1) * m]
    if len(rows) == m:
        return rows.clone(memory_format=torch.contiguous_format)
    out = x.new_zeros((m, *x.shape[1:]))
    out[: len(rows)] = rows
    return out


def whole_of(parts: Tensor, shape: Sequence[int]) -> Tensor:
    """The leaf of this shape from all ranks' parts, concatenated."""
    if len(shape) and parts.shape[0] == shape[0]:
        return parts
    return parts[: shape[0]] if len(shape) else parts[0]


def shard(values: Any, group: Group = None) -> Any:
    """This rank's part of each leaf; no message."""
    rank, N = rank_of(group), size_of(group)
    return tree.map(lambda x: part_of(x, rank, N), values)


def unshard(parts: Any, like: Any, group: Group = None) -> Any:
    """The whole tree from all ranks' parts; `like` has its shapes (meta tensors will do). Sends as `gathered` does."""
    leaves, treedef = tree.flatten(parts)
    shapes = [x.shape for x in tree.leaves(like)]
    if len(shapes) != len(leaves):
        raise ValueError(f"unshard: {len(leaves)} parts, but `like` has {len(shapes)} leaves")
    return tree.unflatten(treedef, gather_leaves(leaves, shapes, group))


def gather_leaves(
    parts: Sequence[Any], shapes: Sequence[Sequence[int]], group: Group = None, limit: int | None = None
) -> list[Any]:
    """Whole leaves of these shapes, in the parts' dtypes; None where a part is None. Sends as `gathered` does."""
    out = [x if x is None or x.numel() else x.new_empty(tuple(s)) for x, s in zip(parts, shapes, strict=True)]
    for at, found in gathered(parts, shapes, group, limit):
        for i, x in zip(at, found, strict=True):
            out[i] = x
    return out


def gathered(
    parts: Sequence[Tensor | None],
    shapes: Sequence[Sequence[int]],
    group: Group = None,
    limit: int | None = None,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """(indices of leaves, whole leaves) of each message in turn: one for each dtype and `limit` bytes, two under way.

    limit: bytes of whole leaves in a message, by default N times `messages.default_bucket_bytes` of the parts.
    """
    N = size_of(group)
    limit = limit or default_bucket_bytes([x for x in parts if x is not None]) * N
    in_messages = by_owner(parts, limit // N)

    def message(at: list[int]) -> Pending:
        of: list[Any] = [parts[i] for i in at]
        return gather_parts(of, [shapes[i] for i in at], group)

    return zip(in_messages, in_turn(map(message, in_messages)), strict=True)


def gather_parts(
    parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group = None, dtype: torch.dtype | None = None
) -> Pending:
    """Whole leaves of these shapes from every rank's parts, by one all_gather.

    dtype: of the message and the results; by default the widest of the parts'. Bytes sent: N - 1 times those of the
    parts in that dtype. Each result is a contiguous copy, not a view of the message.
    """
    dtype = dtype or functools.reduce(torch.promote_types, [p.dtype for p in parts])
    N = size_of(group)
    if N == 1:
        return Pending(None, lambda: [whole_of(p.to(dtype), s) for p, s in zip(parts, shapes, strict=True)])
    # One launch packs all parts and one unpacks them: a launch for each leaf takes the host longer than the layer that
    # the leaves belong to. `finish` holds shapes only, so the parts can be freed.
    sizes, shapes_of_parts = [p.numel() for p in parts], [p.shape for p in parts]
    flat = parts[0].new_empty(sum(sizes), dtype=dtype)
    torch._foreach_copy_(list(flat.split_with_sizes(sizes)), [p.reshape(-1) for p in parts])
    message = flat.new_empty(N, flat.numel())
    work = all_gather_single(message.view(-1), flat, group, async_op=True)

    def finish() -> list[Tensor]:
        out = [message.new_empty(N, size) for size in sizes]
        torch.split_with_sizes_copy(message, sizes, 1, out=out)
        by_shape = zip(out, shapes_of_parts, shapes, strict=True)
        return [whole_of(x.view(N * part[0], *part[1:]), shape) for x, part, shape in by_shape]

    return Pending(work, finish)


def scatter_sums(wholes: Sequence[Tensor], group: Group = None, dtype: torch.dtype | None = None) -> Pending:
    """This rank's parts of the sums over ranks of whole leaves, by one reduce_scatter.

    The adjoint of `gather_parts`. dtype: of the message, the sums and the results; by default the first leaf's. Bytes
    sent: (N - 1) / N of the message's.
    """
    dtype = dtype or wholes[0].dtype
    N = size_of(group)
    shapes = [part_shape(x.shape, N) for x in wholes]
    wholes = [x[None] if x.ndim == 0 else x for x in wholes]
    if N == 1:
        return Pending(None, lambda: [x.to(dtype) for x in wholes])
    message = wholes[0].new_empty((N, sum(math.prod(s) for s in shapes)), dtype=dtype)
    filled = [x for x in wholes if x.numel()]
    if len({x.dtype for x in filled}) > 1:
        filled = [x.to(dtype) for x in filled]
    if filled:  # cut, padded and packed by one launch
        torch._chunk_cat(filled, 0, N, out=message)
    out = message.new_empty(message.shape[1])
    work = reduce_scatter_single(out, message.view(-1), group, async_op=True)

    def finish(sent: Tensor = message) -> list[Tensor]:  # the default keeps the message alive until the work is done
        return split_as(out, shapes)

    return Pending(work, finish)


def scatter_bucket(
    tensors: Sequence[Tensor], group: Group, op: Op, wire: torch.dtype | None, dtypes: Sequence[torch.dtype]
) -> Pending:
    """`messages.send_bucket` by reduce_scatter: results are this rank's parts of the sums (means)."""
    message = scatter_sums(tensors, group, wire or dtypes[0])
    divisor = size_of(group) if op == "mean" else 1

    def finish() -> list[Tensor]:
        return [x if divisor == 1 else x / divisor for x in map(torch.Tensor.to, message.wait(), dtypes)]

    return Pending(message, finish)
