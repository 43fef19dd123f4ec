"""Messages that carry many leaves: which leaves go together, packed and sent by one launch and one collective each.

Packing, sending and unpacking leaf by leaf costs the host 0.1 ms and more a leaf, which for the ten leaves of a layer
is more than a GPU takes to compute it.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from purelm import tree
from purelm.dist.world import Group, rank_of, size_of

__all__ = [
    "BUCKET_BYTES",
    "Op",
    "Pending",
    "buckets",
    "by_owner",
    "cast_leaves",
    "cut",
    "default_bucket_bytes",
    "from_owners",
    "in_turn",
    "send_bucket",
    "split_as",
    "stand_in",
]

Op = Literal["sum", "mean"]
BUCKET_BYTES = 25 << 20  # of one message; as torch's DistributedDataParallel (bucket_cap_mb = 25)
_IN_FLIGHT = 2  # messages at a time: while one travels, the next is packed


def default_bucket_bytes(leaves: Iterable[Tensor]) -> int:
    """25 MiB, or 1/64 of a larger model: messages cost the host 0.1 ms each, and the last of them cannot hide."""
    return max(BUCKET_BYTES, sum(x.nbytes for x in leaves) // 64)


class Pending:
    """Results of a collective that is under way: wait() gives them, again and again the same."""

    def __init__(self, work: Any, finish: Callable[[], list[Tensor]]):
        self._work, self._finish = work, finish
        self._results: list[Tensor] | None = None
        self._early: list[Tensor] | None = None

    def early(self) -> list[Tensor]:
        """Where the results of `scatter_sums` will be: not to be read before wait()."""
        if self._results is not None:
            return self._results
        if self._early is None:
            self._early = self._finish()
        return self._early

    def wait(self) -> list[Tensor]:
        """On a GPU the stream waits, not the host."""
        if self._results is None:
            if self._work is not None:
                self._work.wait()
            self._results = self._finish() if self._early is None else self._early
            self._work, self._finish, self._early = None, list, None  # lets go of the message
        return self._results


def split_as(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The tensors of these shapes that lie one after another in flat, as views."""
    return [y.view(tuple(shape)) for y, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]


def buckets(
    leaves: Sequence[Tensor | None],
    limit: float,
    order: Iterable[int],
    kind: Callable[[int], Hashable] = lambda i: None,
    *,
    at_least: bool = False,
) -> list[list[int]]:
    """Numbers of leaves, in this order, cut in messages: one dtype, device and kind, at most `limit` bytes or one leaf.

    at_least: a message is full once it holds `limit` bytes, its last leaf included, as DistributedDataParallel has
    it: a norm between two large matrices then goes with one of them.
    Absent leaves are in none. Messages are in the order of their first leaves.
    """
    found: list[list[int]] = []
    last: dict[Hashable, tuple[list[int], float]] = {}  # of each kind: the message that is being filled, and its room
    for i in order:
        x = leaves[i]
        if x is None:
            continue
        key, size = (x.dtype, x.device, kind(i)), x.numel() * x.element_size()
        at, room = last.get(key, ([], limit))
        if not at or (room <= 0 if at_least else size > room):
            at, room = [], limit
            found.append(at)
        at.append(i)
        last[key] = at, room - size
    return found


def cut(leaves: Sequence[Tensor], limit: float, order: Iterable[int]) -> list[list[int]]:
    """`buckets` of at least `limit` bytes: those of gradients."""
    return buckets(leaves, limit, order, at_least=True)


def by_owner(values: Sequence[Tensor | None], limit: int, owners: Sequence[int] = ()) -> list[list[int]]:
    """Numbers of the leaves of each message, of one owner each; what has no element is not sent."""
    filled = [i for i, x in enumerate(values) if x is not None and x.numel()]
    return buckets(values, limit, filled, lambda i: owners[i] if owners else None)


def in_turn(messages: Iterable[Pending]) -> Iterator[list[Tensor]]:
    """The results of each message; the next one is sent before the last is waited for."""
    under_way: deque[Pending] = deque()
    for message in messages:
        under_way.append(message)
        if len(under_way) == _IN_FLIGHT:
            yield under_way.popleft().wait()
    while under_way:
        yield under_way.popleft().wait()


@torch.no_grad()
def cast_leaves(leaves: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Leaves as `tree.cast` gives them, by one launch."""
    at = [i for i, x in enumerate(leaves) if tree.is_floating(x) and x.dtype != dtype]
    out = list(leaves)
    for i in at:
        out[i] = torch.empty_like(leaves[i], dtype=dtype)
    if at:
        torch._foreach_copy_([out[i] for i in at], [leaves[i] for i in at])
    return out


def send_bucket(
    tensors: Sequence[Tensor],
    group: Group,
    op: Op,
    wire: torch.dtype | None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> Pending:
    """Sums (means) of these tensors, in `dtypes`, by default their own; sent in `wire`, by default the first."""
    dtypes = dtypes or [x.dtype for x in tensors]
    wire = wire or dtypes[0]
    if len(tensors) == 1:
        pieces = [tensors[0].to(wire, copy=True, memory_format=torch.contiguous_format)]
        buffer = pieces[0]
    else:
        shapes = [x.shape for x in tensors]
        buffer = tensors[0].new_empty(sum(s.numel() for s in shapes), dtype=wire)
        pieces = split_as(buffer, shapes)
        torch._foreach_copy_(pieces, list(tensors))  # cast and packed in one pass
    how = dist.ReduceOp.AVG if op == "mean" else dist.ReduceOp.SUM
    work = dist.all_reduce(buffer, op=how, group=group, async_op=True)
    # Not the gradients themselves, which are let go when they are sent.
    return Pending(work, lambda: [x if x.dtype == d else x.to(d) for x, d in zip(pieces, dtypes, strict=True)])


def from_owners(
    values: Sequence[Tensor], owners: Sequence[int], group: Group = None, bucket_bytes: int | None = None
) -> list[Tensor]:
    """values[i] of rank owners[i], on every rank; what others hold there says only its shape, dtype and device.

    A broadcast for each owner, dtype and bucket; sent in a ring: the bytes of all values. Results are new:
    views of the messages they came in.
    """
    rank = rank_of(group)
    if size_of(group) == 1:
        return list(values)

    def message(at: list[int]) -> Pending:
        of, src = [values[i] for i in at], owners[at[0]]
        n = sum(x.numel() for x in of)
        flat = torch.cat([x.detach().reshape(-1) for x in of]) if src == rank else of[0].new_empty(n)
        work = dist.broadcast(flat, group=group, group_src=src, async_op=True)
        return Pending(work, lambda: split_as(flat, [x.shape for x in of]))

    out = list(values)
    in_messages = by_owner(values, bucket_bytes or default_bucket_bytes(values), owners)
    for at, found in zip(in_messages, in_turn(map(message, in_messages)), strict=True):
        for i, x in zip(at, found, strict=True):
            out[i] = x
    return out


def stand_in(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of x's shape in the memory of one number."""
    return torch.zeros((), dtype=dtype, device=device).expand(x.shape)
