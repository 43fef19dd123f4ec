"""Messages that carry many leaves: which leaves share one, and how it is packed, sent and unpacked.

A message is packed by one kernel launch and sent by one collective. Leaf by leaf, packing, sending and unpacking would
cost the host 0.1 ms or more a leaf: for the ten leaves of a layer, more than a GPU takes to compute the layer.
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
BUCKET_BYTES = 25 << 20  # of one message; the default of torch's DistributedDataParallel (bucket_cap_mb=25)
_IN_FLIGHT = 2  # messages under way: while one is sent, the next is packed


def default_bucket_bytes(leaves: Iterable[Tensor]) -> int:
    """25 MiB, or 1/64 of all leaves if that is more.

    Small messages would be many, at 0.1 ms of the host's time each; the last message overlaps with no compute, so it
    should not be large.
    """
    return max(BUCKET_BYTES, sum(x.nbytes for x in leaves) // 64)


class Pending:
    """A collective under way; wait() returns its results, the same ones each time."""

    def __init__(self, work: Any, finish: Callable[[], list[Tensor]]):
        self._work, self._finish = work, finish
        self._results: list[Tensor] | None = None
        self._early: list[Tensor] | None = None

    def early(self) -> list[Tensor]:
        """The tensors that `scatter_sums` will write its results to; not to be read before wait()."""
        if self._results is not None:
            return self._results
        if self._early is None:
            self._early = self._finish()
        return self._early

    def wait(self) -> list[Tensor]:
        """The results. On a GPU the current stream waits for them, not the host."""
        if self._results is None:
            if self._work is not None:
                self._work.wait()
            self._results = self._finish() if self._early is None else self._early
            self._work, self._finish, self._early = None, list, None  # frees the message
        return self._results


def split_as(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Views of consecutive pieces of flat, in these shapes."""
    return [y.view(tuple(shape)) for y, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]


def buckets(
    leaves: Sequence[Tensor | None],
    limit: float,
    order: Iterable[int],
    kind: Callable[[int], Hashable] = lambda i: None,
    *,
    at_least: bool = False,
) -> list[list[int]]:
    """Indices of leaves, in this order, grouped into messages of one dtype, device and kind.

    A message has at most `limit` bytes, or one larger leaf. at_least: it is closed once it has `limit` bytes or more,
    as in DistributedDataParallel, so that a norm between two large matrices shares a message with one of them.
    None leaves are in no message. Messages are in the order of their first leaves.
    """
    found: list[list[int]] = []
    last: dict[Hashable, tuple[list[int], float]] = {}  # by kind: the message that is being filled, and its room
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
    """`buckets` of at least `limit` bytes, as gradients are sent."""
    return buckets(leaves, limit, order, at_least=True)


def by_owner(values: Sequence[Tensor | None], limit: int, owners: Sequence[int] = ()) -> list[list[int]]:
    """Indices of the leaves of each message, which all have one owner; None and empty leaves are not sent."""
    filled = [i for i, x in enumerate(values) if x is not None and x.numel()]
    return buckets(values, limit, filled, lambda i: owners[i] if owners else None)


def in_turn(messages: Iterable[Pending]) -> Iterator[list[Tensor]]:
    """The results of each message in turn; the next message is started before this one is waited for."""
    under_way: deque[Pending] = deque()
    for message in messages:
        under_way.append(message)
        if len(under_way) == _IN_FLIGHT:
            yield under_way.popleft().wait()
    while under_way:
        yield under_way.popleft().wait()


@torch.no_grad()
def cast_leaves(leaves: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """`tree.cast` of a list of leaves, by one kernel launch; detached."""
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
    """The all_reduce of these tensors as one message, started; results are sums (means) over ranks, in new memory.

    dtypes: of the results, by default the tensors' own. wire: of the message, by default the first of `dtypes`.
    """
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
    # Does not hold the tensors: the caller may free them as soon as they are packed.
    return Pending(work, lambda: [x if x.dtype == d else x.to(d) for x, d in zip(pieces, dtypes, strict=True)])


def from_owners(
    values: Sequence[Tensor], owners: Sequence[int], group: Group = None, bucket_bytes: int | None = None
) -> list[Tensor]:
    """values[i] of rank owners[i], on every rank; of the others' values[i] only shape, dtype and device are used.

    One broadcast for each owner, dtype and bucket; in a ring each rank sends the bytes of all values. Results are views
    of the messages that they came in.
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
    """Zeros of x's shape, in the memory of one element."""
    return torch.zeros((), dtype=dtype, device=device).expand(x.shape)
