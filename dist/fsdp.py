"""Fully sharded parameters: each rank holds 1/N of every matrix, and a block's are whole only while it runs.

    plan = fsdp.plan(params, group, compute=torch.bfloat16)
    local = plan.shard(params)                                   # fp32 masters, 1/N of them
    loss = partial(fsdp.transformer_loss, cfg=cfg, plan=plan, wrap_block=remat)
    step = make_step(loss, optimizer, schedule, differentiate=fsdp.differentiate, norm=plan.norm,
                     prepare=partial(with_global_denominator, group=group))

(ZeRO stage 3, Rajbhandari et al. 1910.02054.) Around a block stands `Bound.gathered`: parameters are cast, gathered,
used and dropped. What autograd saves of them are notes of where they were; the first note that backward reads gathers
the block's parameters again. Their gradients are reduce-scattered when the block's backward is done. While one block
runs, the next one's parameters are under way, in either direction: two blocks' at a time, never more. All of it is
ordinary autograd: it goes with value_and_grad, accumulate, remat (inside: gathered(remat(block))), compiled blocks and
gradients of gradients of activations; gradients of parameters cannot be differentiated again, which raises.

Messages and bytes a step, of n bytes of parameters in `compute`: an all_gather a block forward and one backward,
(N - 1) / N n sent each; a reduce_scatter a block, (N - 1) / N n in `reduce`; one all_reduce of what is replicated.
Every rank must run the same blocks in the same order.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from purelm import tree
from purelm.dist.collectives import all_reduce
from purelm.dist.messages import Pending, cast_leaves, send_bucket
from purelm.dist.sharding import gather_parts, part_of, part_shape, scatter_sums, unshard, whole_of
from purelm.dist.world import Group, rank_of, size_of
from purelm.dist.zero import global_norm
from purelm.models import transformer
from purelm.models.regional import made_once
from purelm.ops import REFERENCE, Ops
from purelm.transforms import accumulate, value_and_grad

__all__ = ["Bound", "Plan", "differentiate", "plan", "transformer_loss"]

Deliver = Callable[[list[Tensor], Pending], None]


def vectors(path: str, x: Tensor) -> bool:
    """Norms, biases and numbers: too small to be worth a message."""
    return x.ndim < 2


@dataclass(frozen=True)
class Plan:
    """Which leaves are cut, and in what dtypes they travel."""

    like: Any  # the whole tree, on the meta device
    replicated: Any  # a bool for each leaf
    group: Group
    compute: torch.dtype | None  # of gathered parameters; None: the masters' own
    reduce: torch.dtype | None  # of gradients on the wire; None: the masters'

    @functools.cached_property
    def _leaves(self) -> list[tuple[bool, torch.Size, tuple[int, ...]]]:
        """Of each leaf: whether it is replicated, its shape, and that of a rank's."""
        N = size_of(self.group)
        both = zip(tree.leaves(self.replicated), [x.shape for x in tree.leaves(self.like)], strict=True)
        return [(r, shape, tuple(shape) if r else part_shape(shape, N)) for r, shape in both]

    def shard(self, params: Any) -> Any:
        """This rank's tree: parts of matrices, cut along axis 0, and whole replicated leaves; memory of its own."""
        rank, N = rank_of(self.group), size_of(self.group)
        return tree.map(lambda x, r: x.clone() if r else part_of(x, rank, N), params, self.replicated)

    def unshard(self, local: Any) -> Any:
        """The whole tree, on every rank; None where a leaf is None, on all ranks, as gradients of integers are."""
        (likes, flags, leaves), treedef = tree.flatten_up_to(self.like, self.replicated, local)
        cut = [i for i, r in enumerate(flags) if not r and leaves[i] is not None]
        wholes = unshard([leaves[i] for i in cut], [likes[i] for i in cut], self.group)
        for i, x in zip(cut, wholes, strict=True):
            leaves[i] = x
        return tree.unflatten(treedef, leaves)

    def norm(self, grads: Any) -> Tensor:
        """The global norm of a local gradient tree: parts summed over ranks, replicated leaves counted once.

        Leaves may be absent, the same ones on every rank.
        """
        cut = tree.map(lambda r, g: None if r else g, self.replicated, grads)
        once = tree.map(lambda r, g: g if r else None, self.replicated, grads)
        over_ranks = global_norm(self.group)(cut)
        return torch.hypot(over_ranks, tree.global_norm(once).to(over_ranks.device))

    def bind(self, local: Any, order: list[Any] | None = None, deliver: Deliver | None = None) -> "Bound":
        """For one evaluation. order: subtrees of `local` in the order in which they will be gathered.

        deliver: takes parts and their gradients under way, in place of autograd, for which the parts then have none.
        """
        return Bound(self, local, order or [], deliver)


def plan(
    params: Any,
    group: Group = None,
    *,
    compute: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
    replicated: Callable[[str, Tensor], bool] = vectors,
) -> Plan:
    """How to shard a tree like `params` (shapes and dtypes are looked at, meta tensors will do).

    replicated: (path, leaf) -> whether every rank keeps the whole leaf; by default all but matrices. Leaves that are
        not floating all do.
    """
    like = tree.map(lambda x: torch.empty_like(x, device="meta"), params)
    flags = tree.map_with_path(lambda path, x: replicated(path, x) or not tree.is_floating(x), params)
    return Plan(like, flags, group, compute, reduce)


def differentiate(loss_fn: Callable[[Any, Any], Any], *, microbatches: int = 1) -> Callable[[Any, Any], Any]:
    """value_and_grad, and accumulate: for `make_step(..., differentiate=...)`, which leaves it uncompiled."""
    gradient = value_and_grad(loss_fn, has_aux=True)
    return accumulate(gradient, microbatches) if microbatches > 1 else gradient


def transformer_loss(
    local: Any,
    batch: Mapping[str, Tensor],
    cfg: transformer.Config,
    plan: Plan,
    *,
    ops: Ops = REFERENCE,
    wrap_block: Callable[[transformer.BlockFn], transformer.BlockFn] = transformer.identity,
    tensor_parallel: Any = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`transformer.loss` of sharded parameters, summed over ranks, and metrics likewise.

    batch["denominator"] must be that of all ranks (ddp.with_global_denominator). The embedding, each block, and the
    unembedding, which stays whole over all chunks of the loss, are units of their own.

    tensor_parallel: a `tensor_parallel.Plan` over another axis of a mesh. `local` is plan.shard of its shard, plan
    being that of what it shards; gradients go through its `reduce` afterwards, and their norm is
    `tensor_parallel.global_norm(grads, norm=plan.norm)`.
    """
    if "denominator" not in batch:
        raise ValueError("batch has no denominator of all ranks: use ddp.with_global_denominator")
    head = local["token_embeddings" if cfg.tie_embeddings else "lm_head"]
    bound = plan.bind(local, [local["token_embeddings"], *local["layers"], head])
    if tensor_parallel is not None:
        options = {**options, "ops": ops, "wrap_block": wrap_block, "bound": bound}
        value, metrics = tensor_parallel.loss(bound.params, batch, **options)
    else:
        value, metrics = transformer.loss(
            bound.params,
            batch,
            cfg,
            ops=bound.ops(ops),
            wrap_block=lambda f: bound.gathered(_wrapped(wrap_block, f, ops)),
            **options,
        )
    names = list(metrics)
    total = _Total.apply(plan.group, value, *[metrics[name].to(value.dtype) for name in names])
    return total[0], {name: x.to(metrics[name].dtype) for name, x in zip(names, total[1:], strict=True)}


def _wrapped(wrap_block: Callable[[transformer.BlockFn], transformer.BlockFn], f: Any, ops: Ops) -> Any:
    """wrap_block of the block, with ops that know nothing of this evaluation: in there all parameters are whole."""
    plain = replace(f, ops=ops)
    return made_once(wrap_block, plain, lambda: wrap_block(plain))


class Bound:
    """A plan and the tensors of one evaluation: `params`, and functions that gather what they are given of them."""

    def __init__(self, plan: Plan, local: Any, order: list[Any], deliver: Deliver | None = None):
        self.plan, self.schedule = plan, _Schedule(plan, deliver)
        leaves, treedef = tree.flatten(local)
        if len(leaves) != len(plan._leaves):
            raise ValueError(f"the plan is for {len(plan._leaves)} leaves, got {len(leaves)}")
        self.shapes: dict[int, torch.Size] = {}  # of whole leaves, by the id of their part
        whole = []
        for i, (x, (replicated, shape, expected)) in enumerate(zip(leaves, plan._leaves, strict=True)):
            if x.shape != expected:
                what = f"{list(tree.paths(local))[i]} has shape {tuple(x.shape)}"
                raise ValueError(f"{what}, the plan's is {expected}: give plan.shard(params)")
            if not replicated:
                self.shapes[id(x)] = shape
            elif tree.is_floating(x):
                whole.append(i)
        self.leaves = list(leaves)  # ids stay theirs
        if whole and size_of(plan.group) > 1:
            for i, x in zip(whole, _Replicated.apply(plan, *[leaves[i] for i in whole]), strict=True):
                leaves[i] = x
        elif plan.compute is not None:
            for i in whole:
                leaves[i] = leaves[i].to(plan.compute)
        self.params = tree.unflatten(treedef, leaves)
        self.inputs: dict[int, Tensor] = {}  # of _Gather, by the id of the part, where it is not the part itself
        cut = [x for x in self.leaves if id(x) in self.shapes and x.requires_grad]
        if cut and deliver is None and size_of(plan.group) > 1 and torch.is_grad_enabled():
            self.inputs = dict(zip(map(id, cut), _Arrive.apply(self.schedule, *cut), strict=True))
        subtrees = [[x for x in tree.leaves(subtree) if id(x) in self.shapes] for subtree in order]
        self.units: list[_Unit] = []
        for parts in subtrees:
            self._add(parts)
        self.position = 0  # of the unit that is expected next

    def _add(self, parts: list[Tensor]) -> "_Unit":
        unit = _Unit(self.schedule, parts, [self.shapes[id(p)] for p in parts])
        self.units.append(unit)
        return unit

    def _unit(self, parts: list[Tensor]) -> "_Unit":
        """The next unit of these parts (tied embeddings are two); one that was not announced comes last."""
        n = len(self.units)
        for i in [*range(self.position, n), *range(self.position)]:
            unit = self.units[i]
            if not unit.used and [id(p) for p in unit.parts] == [id(p) for p in parts]:
                self.position = i + 1
                break
        else:
            unit = self._add(parts)
        unit.used = True
        return unit

    def gathered(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """f(params, ...) as a function of a subtree of `self.params`."""

        def whole(params: Any, *args: Any, **kwargs: Any) -> Any:
            leaves, treedef = tree.flatten(params)
            at = [i for i, x in enumerate(leaves) if id(x) in self.shapes]
            if not at:
                return f(params, *args, **kwargs)
            parts = [leaves[i] for i in at]
            if size_of(self.plan.group) == 1:
                for i, x in zip(at, parts, strict=True):
                    leaves[i] = whole_of(x.to(self.plan.compute or x.dtype), self.shapes[id(x)])
                return f(tree.unflatten(treedef, leaves), *args, **kwargs)
            unit = self._unit(parts)
            inputs = [self.inputs.get(id(x), x) for x in parts]
            for i, x in zip(at, _Gather.apply(unit, *inputs), strict=True):
                leaves[i] = x
            params = tree.unflatten(treedef, leaves)
            del leaves, x
            unit.prefetch(+1)
            with saved_tensors_hooks(unit.pack, _unpack):
                out = f(params, *args, **kwargs)
            unit.drop()
            return out

        return whole

    def ops(self, ops: Ops) -> Ops:
        """Ops for what stands outside of blocks: they gather a matrix that is a part."""

        def on_parts(op: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                # In trees, too: tensor_parallel marks matrices.
                parts = {i: x for i, x in enumerate(args) if any(id(leaf) in self.shapes for leaf in tree.leaves(x))}
                if not parts:
                    return op(*args, **kwargs)
                return self.gathered(lambda some, others: op(*_merged(some, others), **kwargs))(
                    parts, [None if i in parts else x for i, x in enumerate(args)]
                )

            return call

        names = ("embedding", "linear", "linear_cross_entropy", "rms_norm", "layer_norm")
        return ops._replace(**{name: on_parts(getattr(ops, name)) for name in names})


def _merged(some: Mapping[int, Any], others: list[Any]) -> list[Any]:
    return [some.get(i, x) for i, x in enumerate(others)]


class _Schedule:
    """What the units of an evaluation share.

    It holds none of them, nor do they hold each other: a cycle would keep the parameters of each step until Python's
    garbage collector comes by. In forward `Bound` holds them, then the graph.
    """

    def __init__(self, plan: Plan, deliver: Deliver | None):
        self.plan, self.deliver = plan, deliver
        self.units: list[weakref.ref[_Unit]] = []
        self.uses: Counter[int] = Counter()  # of each part, by its id
        self.scatters: list[Pending] = []
        self.n_arrived = 0  # of them

    def scatter(self, unit: "_Unit", grads: Sequence[Tensor], now: bool = False) -> Sequence[Tensor | None]:
        """Gradients of the unit's parts: sent now, and there when `arrived` returns, or `now`."""
        parts = unit.parts
        wire = self.plan.reduce or functools.reduce(torch.promote_types, [p.dtype for p in parts])
        while self.n_arrived < len(self.scatters) - 1:  # lets go of a message: two at a time, with the one that comes
            self.scatters[self.n_arrived].wait()
            self.n_arrived += 1
        pending = scatter_sums(grads, self.plan.group, wire)
        if self.deliver is not None:
            self.deliver(parts, pending)
            return [None] * len(parts)
        if now or any(p.dtype != wire or self.uses[id(p)] > 1 for p in parts):  # autograd itself will read them
            return [g.to(p.dtype) for g, p in zip(pending.wait(), parts, strict=True)]
        self.scatters.append(pending)
        return pending.early()  # for _Arrive, which reads none of them

    def arrived(self) -> None:
        for pending in self.scatters:
            pending.wait()
        self.scatters, self.n_arrived = [], 0


class _Unit:
    """Parameters that are gathered together."""

    def __init__(self, schedule: _Schedule, parts: list[Tensor], shapes: list[torch.Size]):
        self.schedule, self.number, self.parts, self.shapes = schedule, len(schedule.units), parts, shapes
        schedule.units.append(weakref.ref(self))
        schedule.uses.update(map(id, parts))
        self.pending: Pending | None = None
        self.wholes: list[Tensor] | None = None
        self.storages: dict[int, int] = {}
        self.used = False
        self.noted = self.read = 0  # how often backward will ask for them, and has

    def start(self) -> None:
        """Send the parts, if they are neither here nor under way."""
        if self.pending is None and self.wholes is None:
            plan = self.schedule.plan
            with torch.no_grad():
                self.pending = gather_parts(self.parts, self.shapes, plan.group, plan.compute)

    def get(self) -> list[Tensor]:
        if self.wholes is None:
            self.start()
            assert self.pending is not None
            lower = self.schedule.plan.compute
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


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    unit, i, size, stride, offset = packed
    first = unit.wholes is None
    whole = unit.get()[i]
    if first:
        unit.prefetch(-1)
    unit.read += 1
    if unit.read % unit.noted == 0 and not any(p.requires_grad for p in unit.parts):
        unit.drop()  # no gradient will come back, at which it would be
    return whole.as_strided(size, stride, offset)


class _Arrive(torch.autograd.Function):
    """Parts as they are; backward, waits for their gradients.

    One for all parts of an evaluation, before all units: autograd comes to it when it is done with them, and nobody
    can read a gradient that is still under way.
    """

    @staticmethod
    def forward(ctx: Any, schedule: _Schedule, *parts: Tensor) -> Any:
        ctx.schedule = schedule
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.schedule.arrived()
        return None, *grads


class _Gather(torch.autograd.Function):
    """Parts to wholes; backward, sums over ranks of the wholes' gradients to parts."""

    @staticmethod
    def forward(ctx: Any, unit: _Unit, *parts: Tensor) -> Any:
        ctx.unit = unit
        return tuple(x.view_as(x) for x in unit.get())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        unit = ctx.unit
        unit.drop()
        return None, *_sums(partial(unit.schedule.scatter, unit, now=torch.is_grad_enabled()), grads)


class _Replicated(torch.autograd.Function):
    """Whole leaves, cast to `plan.compute`; backward, gradients are raised and summed over ranks, in one message."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *leaves: Tensor) -> Any:
        ctx.group, ctx.dtypes = plan.group, [x.dtype for x in leaves]
        lower = leaves if plan.compute is None else cast_leaves(leaves, plan.compute)
        return tuple(y.view_as(y) if y is x else y for x, y in zip(leaves, lower, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        widest = functools.reduce(torch.promote_types, ctx.dtypes)
        return None, *_sums(lambda grads: send_bucket(grads, ctx.group, "sum", widest, ctx.dtypes).wait(), grads)


def _sums(f: Callable[[Sequence[Tensor]], Sequence[Tensor | None]], grads: Sequence[Tensor]) -> Any:
    """f(grads), which autograd does not see through."""
    return _Once.apply(f, *grads) if torch.is_grad_enabled() else f(grads)  # enabled: create_graph


class _Once(torch.autograd.Function):
    """Sums over ranks that are not differentiated again."""

    @staticmethod
    def forward(ctx: Any, f: Callable[[Sequence[Tensor]], Sequence[Tensor | None]], *grads: Tensor) -> Any:
        return tuple(None if x is None else x.clone() for x in f(grads))  # no views of a message

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("fsdp: gradients of sharded parameters cannot be differentiated again")


class _Total(torch.autograd.Function):
    """Numbers summed over ranks; backward, the identity: each rank differentiates its own term of the sum."""

    @staticmethod
    def forward(ctx: Any, group: Group, *numbers: Tensor) -> Any:
        return tuple(all_reduce(torch.stack(numbers), group, check=False).unbind())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *grads
