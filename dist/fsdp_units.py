"""Units: the parameters that fsdp gathers together, when they are gathered and dropped, and how autograd sees them.

A unit's parameters are whole while its block runs. Where autograd would save one of them, `pack` saves a reference to
its place in the unit. The first reference that backward reads (`unpack`) gathers the unit again, and prefetches the
unit before it. Gradients are sent by the backward of `Gather`; that of `Arrive`, which autograd runs last, waits for
them.
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

Deliver = Callable[[list[Tensor], Pending], None]  # (parts of a unit, their gradients, under way)


class Schedule:
    """What the units of one evaluation share.

    It refers to units weakly, and they do not refer to each other: a reference cycle would keep each step's parameters
    until Python's garbage collector runs. Units are held by `Bound` in forward, and then by the autograd graph.
    """

    def __init__(
        self, group: Group, compute: torch.dtype | None, reduce: torch.dtype | None, deliver: Deliver | None
    ):
        self.group, self.compute, self.reduce, self.deliver = group, compute, reduce, deliver
        self.units: list[weakref.ref[Unit]] = []
        self.uses: Counter[int] = Counter()  # id of a part -> number of units that have it
        self.scatters: list[Pending] = []
        self.n_arrived = 0  # scatters that were waited for

    def scatter(self, unit: "Unit", grads: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Start the reduce-scatter of a unit's gradients; returns its parts', which are complete after `arrived`."""
        parts, wire = unit.parts, unit.travel.wire
        while self.n_arrived < len(self.scatters) - 1:  # frees messages: at most two are held, with the one below
            self.scatters[self.n_arrived].wait()
            self.n_arrived += 1
        pending = scatter_sums(grads, self.group, wire)
        if self.deliver is not None:
            self.deliver(parts, pending)
            return [None] * len(parts)
        if any(p.dtype != wire or self.uses[id(p)] > 1 for p in parts):  # must be cast here, or added up by autograd
            return [g.to(p.dtype) for g, p in zip(pending.wait(), parts, strict=True)]
        self.scatters.append(pending)
        return pending.early()  # nothing reads them before Arrive, which waits

    def arrived(self) -> None:
        """Wait for all gradients that were sent."""
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
        self.noted = self.read = 0  # references that `pack` gave out, and reads of them by `unpack`

    @functools.cached_property
    def travel(self) -> "Travel":
        """Group, shapes and dtypes of the unit's messages, without the parameters."""
        of, dtypes = self.schedule, [p.dtype for p in self.parts]
        wire = of.reduce or functools.reduce(torch.promote_types, dtypes)
        return Travel(of.group, self.shapes, dtypes, [of.compute or dtype for dtype in dtypes], wire)

    def start(self) -> None:
        """Start the all_gather, unless the parameters are whole or under way."""
        if self.pending is None and self.wholes is None:
            with torch.no_grad():
                self.pending = gather_parts(self.parts, self.shapes, self.schedule.group, self.schedule.compute)

    def get(self) -> list[Tensor]:
        """The whole parameters, gathered if they are not yet."""
        if self.wholes is None:
            self.start()
            assert self.pending is not None
            lower = self.schedule.compute
            self.wholes = [x.to(lower or p.dtype) for x, p in zip(self.pending.wait(), self.parts, strict=True)]
            self.pending = None
            self.storages = {x.untyped_storage().data_ptr(): i for i, x in enumerate(self.wholes) if x.numel()}
        return self.wholes

    def drop(self) -> None:
        """Forget the whole parameters, so that their memory is free when the block's work is done."""
        self.wholes, self.pending, self.storages = None, None, {}

    def prefetch(self, step: int) -> None:
        """Start the all_gather of the next (+1) or previous (-1) unit; at most that and this one are whole."""
        units, i = self.schedule.units, self.number + step
        other = units[i]() if 0 <= i < len(units) else None
        if other is not None and (step > 0 or other.noted):
            other.start()

    def pack(self, x: Tensor) -> Any:
        """A saved-tensor hook: for a view of a whole parameter a reference to it, for other tensors the tensor."""
        i = self.storages.get(x.untyped_storage().data_ptr()) if type(x) is Tensor and x.numel() else None
        if i is None:
            # Detached: an operator that saves its own result would be in a cycle, never freed if backward does not run.
            return x.detach() if x.requires_grad else x
        self.noted += 1
        return self, i, x.size(), x.stride(), x.storage_offset()


def unpack(packed: Any) -> Tensor:
    """The tensor that `Unit.pack` was given; gathers its unit again if that was dropped."""
    if isinstance(packed, Tensor):
        return packed
    unit, i, size, stride, offset = packed
    first = unit.wholes is None
    whole = unit.get()[i]
    if first:
        unit.prefetch(-1)
    unit.read += 1
    if unit.read % unit.noted == 0 and not any(p.requires_grad for p in unit.parts):
        unit.drop()  # frozen unit: Gather.backward, which drops the others, will not run
    return whole.as_strided(size, stride, offset)


class Arrive(torch.autograd.Function):
    """The identity on parts; backward waits for their gradients.

    One node for all parts of an evaluation, ahead of all units: its backward runs after that of all units, so nothing
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
    """All-gather: parts to whole parameters; backward, reduce-scatter of their gradients."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, *parts: Tensor) -> Any:
        ctx.unit = unit
        return tuple(x.view_as(x) for x in unit.get())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        unit = ctx.unit
        unit.drop()
        if torch.is_grad_enabled():  # create_graph: these gradients will be differentiated
            return None, *_Sums.apply(unit.travel, *grads)
        return None, *unit.schedule.scatter(unit, grads)


class Replicated(torch.autograd.Function):
    """Replicated leaves, cast to `compute`; backward casts gradients back and sums them over ranks, by one message."""

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
    """How the parameters of a unit are sent, and their gradients."""

    group: Group
    shapes: list[torch.Size]  # of whole parameters
    dtypes: list[torch.dtype]  # of the parts
    compute: list[torch.dtype]  # of whole parameters
    wire: torch.dtype  # of gradients as they are sent


class _Sums(torch.autograd.Function):
    """Reduce-scatter, differentiable: whole tensors to this rank's parts of their sums. Backward: `_Wholes`."""

    @staticmethod
    def forward(ctx: Any, travel: Travel, *wholes: Tensor) -> Any:
        ctx.travel = travel
        parts = scatter_sums(wholes, travel.group, travel.wire).wait()
        return tuple(x.to(dtype, copy=True) for x, dtype in zip(parts, travel.dtypes, strict=True))  # no views

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_Wholes.apply(ctx.travel, *grads)


class _Wholes(torch.autograd.Function):
    """All-gather, differentiable: parts to whole tensors, which are not dropped. Backward: `_Sums`."""

    @staticmethod
    def forward(ctx: Any, travel: Travel, *parts: Tensor) -> Any:
        ctx.travel = travel
        wholes = gather_parts(parts, travel.shapes, travel.group).wait()
        return tuple(x.to(dtype, copy=True) for x, dtype in zip(wholes, travel.compute, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_Sums.apply(ctx.travel, *grads)
