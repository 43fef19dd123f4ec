"""What fsdp gathers together: units of parameters, when they are sent and dropped, and what autograd sees of them.

A unit's parameters are whole while its block runs. What autograd saves of them are notes of where they were (`pack`);
the first note that backward reads gathers them again (`unpack`), and the unit before it is sent on its way. Gradients
leave through `Gather`, and `Arrive`, to which autograd comes last, waits for them.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm.dist.collectives import all_reduce
from purelm.dist.messages import Pending, cast_leaves, send_bucket
from purelm.dist.sharding import gather_parts, scatter_sums
from purelm.dist.world import Group

__all__ = ["Arrive", "Deliver", "Gather", "Replicated", "Schedule", "Unit", "unpack"]

Deliver = Callable[[list[Tensor], Pending], None]


class Schedule:
    """What the units of an evaluation share.

    It holds none of them, nor do they hold each other: a cycle would keep the parameters of each step until Python's
    garbage collector comes by. In forward `Bound` holds them, then the graph.
    """

    def __init__(
        self, group: Group, compute: torch.dtype | None, reduce: torch.dtype | None, deliver: Deliver | None
    ):
        self.group, self.compute, self.reduce, self.deliver = group, compute, reduce, deliver
        self.units: list[weakref.ref[Unit]] = []
        self.uses: Counter[int] = Counter()  # of each part, by its id
        self.scatters: list[Pending] = []
        self.n_arrived = 0  # of them

    def scatter(self, unit: "Unit", grads: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Gradients of the unit's parts: sent now, and there when `arrived` returns."""
        parts, wire = unit.parts, unit.travel.wire
        while self.n_arrived < len(self.scatters) - 1:  # lets go of a message: two at a time, with the one that comes
            self.scatters[self.n_arrived].wait()
            self.n_arrived += 1
        pending = scatter_sums(grads, self.group, wire)
        if self.deliver is not None:
            self.deliver(parts, pending)
            return [None] * len(parts)
        if any(p.dtype != wire or self.uses[id(p)] > 1 for p in parts):  # autograd itself will read them
            return [g.to(p.dtype) for g, p in zip(pending.wait(), parts, strict=True)]
        self.scatters.append(pending)
        return pending.early()  # for Arrive, which reads none of them

    def arrived(self) -> None:
        for pending in self.scatters:
            pending.wait()
        self.scatters, self.n_arrived = [], 0


class Unit:
    """Parameters that are gathered together."""

    def __init__(self, schedule: Schedule, parts: list[Tensor], shapes: list[torch.Size]):
        self.schedule, self.number, self.parts, self.shapes = schedule, len(schedule.units), parts, shapes
        schedule.units.append(weakref.ref(self))
        schedule.uses.update(map(id, parts))
        self.pending: Pending | None = None
        self.wholes: list[Tensor] | None = None
        self.storages: dict[int, int] = {}
        self.used = False
        self.noted = self.read = 0  # how often backward will ask for them, and has

    @functools.cached_property
    def travel(self) -> "Travel":
        of, dtypes = self.schedule, [p.dtype for p in self.parts]
        wire = of.reduce or functools.reduce(torch.promote_types, dtypes)
        return Travel(of.group, self.shapes, dtypes, [of.compute or dtype for dtype in dtypes], wire)

    def start(self) -> None:
        """Send the parts, if they are neither here nor under way."""
        if self.pending is None and self.wholes is None:
            with torch.no_grad():
                self.pending = gather_parts(self.parts, self.shapes, self.schedule.group, self.schedule.compute)

    def get(self) -> list[Tensor]:
        if self.wholes is None:
            self.start()
            assert self.pending is not None
            lower = self.schedule.compute
            self.wholes = [x.to(lower or p.dtype) for x, p in zip(self.pending.wait(), self.parts, strict=True)]
            self.pending = None
            self.storages = {x.untyped_storage().data_ptr(): i for i, x in enumerate(self.wholes) if x.numel()}
        return self.wholes

    def drop(self) -> None:
        self.wholes, self.pending, self.storages = None, None, {}

    def prefetch(self, step: int) -> None:
        """Start the neighbour: at most this unit and that one are whole at a time."""
        units, i = self.schedule.units, self.number + step
        other = units[i]() if 0 <= i < len(units) else None
        if other is not None and (step > 0 or other.noted):
            other.start()

    def pack(self, x: Tensor) -> Any:
        i = self.storages.get(x.untyped_storage().data_ptr()) if type(x) is Tensor and x.numel() else None
        if i is None:
            # An operator that saves its own result would hold itself, for ever where backward never comes.
            return x.detach() if x.requires_grad else x
        self.noted += 1
        return self, i, x.size(), x.stride(), x.storage_offset()


def unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    unit, i, size, stride, offset = packed
    first = unit.wholes is None
    whole = unit.get()[i]
    if first:
        unit.prefetch(-1)
    unit.read += 1
    if unit.read % unit.noted == 0 and not any(p.requires_grad for p in unit.parts):
        unit.drop()  # no parameter wants a gradient, so Gather.backward, which drops them else, will not run
    return whole.as_strided(size, stride, offset)


class Arrive(torch.autograd.Function):
    """Parts as they are; backward, waits for their gradients.

    One for all parts of an evaluation, before all units: autograd comes to it when it is done with them, and nobody
    can read a gradient that is still under way.
    """

    @staticmethod
    def forward(ctx: Any, schedule: Schedule, *parts: Tensor) -> Any:
        ctx.schedule = schedule
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.schedule.arrived()
        return None, *grads


class Gather(torch.autograd.Function):
    """Parts to wholes; backward, sums over ranks of the wholes' gradients to parts."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, *parts: Tensor) -> Any:
        ctx.unit = unit
        return tuple(x.view_as(x) for x in unit.get())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        unit = ctx.unit
        unit.drop()
        if torch.is_grad_enabled():  # create_graph: what is made of these gradients will be differentiated
            return None, *_Sums.apply(unit.travel, *grads)
        return None, *unit.schedule.scatter(unit, grads)


class Replicated(torch.autograd.Function):
    """Whole leaves, cast to `compute`; backward, gradients are raised and summed over ranks, in one message."""

    @staticmethod
    def forward(ctx: Any, group: Group, compute: torch.dtype | None, *leaves: Tensor) -> Any:
        ctx.group, ctx.dtypes = group, [x.dtype for x in leaves]
        lower = leaves if compute is None else cast_leaves(leaves, compute)
        return tuple(y.view_as(y) if y is x else y for x, y in zip(leaves, lower, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raised = [g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
            return None, None, *all_reduce(raised, ctx.group, check=False)
        widest = functools.reduce(torch.promote_types, ctx.dtypes)
        return None, None, *send_bucket(grads, ctx.group, "sum", widest, ctx.dtypes).wait()


class Travel(NamedTuple):
    """How the leaves of a unit travel."""

    group: Group
    shapes: list[torch.Size]  # of the wholes
    dtypes: list[torch.dtype]  # of the parts
    compute: list[torch.dtype]  # of the wholes
    wire: torch.dtype  # of gradients


class _Sums(torch.autograd.Function):
    """Wholes to parts of their sums over ranks; backward, `_Wholes`."""

    @staticmethod
    def forward(ctx: Any, travel: Travel, *wholes: Tensor) -> Any:
        ctx.travel = travel
        parts = scatter_sums(wholes, travel.group, travel.wire).wait()
        return tuple(x.to(dtype, copy=True) for x, dtype in zip(parts, travel.dtypes, strict=True))  # no views

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_Wholes.apply(ctx.travel, *grads)


class _Wholes(torch.autograd.Function):
    """Parts to wholes, which stay; backward, `_Sums`."""

    @staticmethod
    def forward(ctx: Any, travel: Travel, *parts: Tensor) -> Any:
        ctx.travel = travel
        wholes = gather_parts(parts, travel.shapes, travel.group).wait()
        return tuple(x.to(dtype, copy=True) for x, dtype in zip(wholes, travel.compute, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_Sums.apply(ctx.travel, *grads)
