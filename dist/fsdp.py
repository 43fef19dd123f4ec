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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from purelm import tree
from purelm.dist.agreement import check_same_kind
from purelm.dist.ddp import check_denominator, sum_metrics
from purelm.dist.fsdp_units import Arrive, Deliver, Gather, Replicated, Schedule, Unit, unpack
from purelm.dist.sharding import part_of, part_shape, unshard, whole_of
from purelm.dist.world import Group, rank_of, size_of
from purelm.dist.zero import global_norm
from purelm.models import transformer
from purelm.models.regional import made_once
from purelm.ops import REFERENCE, Ops
from purelm.transforms import accumulate, value_and_grad

__all__ = ["Bound", "Plan", "differentiate", "plan", "transformer_loss"]


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

        def own(x: Tensor, replicated: bool) -> Tensor:
            local = x.clone() if replicated else part_of(x, rank, N)
            local.is_part = N > 1 and not replicated  # type: ignore[attr-defined]  # make_step asks for a norm of all
            return local

        return tree.map(own, params, self.replicated)

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
    check: bool = True,
) -> Plan:
    """How to shard a tree like `params` (shapes and dtypes are looked at, meta tensors will do).

    All ranks of the group call it: ValueError on each, naming the leaf, where their trees differ, or what they say of
    them (check=False leaves that out, and its two messages of 32 bytes).

    replicated: (path, leaf) -> whether every rank keeps the whole leaf; by default all but matrices. Leaves that are
        not floating all do.
    """
    like = tree.map(lambda x: torch.empty_like(x, device="meta"), params)
    flags = tree.map_with_path(lambda path, x: replicated(path, x) or not tree.is_floating(x), params)
    if check:
        check_same_kind(like, group, "fsdp.plan")
        check_same_kind({"compute": compute, "reduce": reduce, "replicated": flags}, group, "fsdp.plan")
    return Plan(like, flags, group, compute, reduce)


def differentiate(loss_fn: Callable[[Any, Any], Any], *, microbatches: int = 1) -> Callable[[Any, Any], Any]:
    """value_and_grad, and accumulate: for `make_step(..., differentiate=...)`, which leaves it uncompiled.

    Metrics of microbatches are added, but for "non_finite_rank": the first one that is a rank.
    """
    gradient = value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        return gradient

    def accumulated(params: Any, batch: Any) -> Any:
        ranks: list[Tensor] = []

        def one(params: Any, batch: Any) -> Any:
            (value, metrics), grads = gradient(params, batch)
            ranks.extend(metrics[name] for name in metrics if name == "non_finite_rank")
            return (value, {name: x for name, x in metrics.items() if name != "non_finite_rank"}), grads

        (value, metrics), grads = accumulate(one, microbatches)(params, batch)
        if ranks:
            metrics = {**metrics, "non_finite_rank": _first_of(torch.stack(ranks))}
        return (value, metrics), grads

    return accumulated


def _first_of(ranks: Tensor) -> Tensor:
    """The first that is not -1, else -1."""
    return ranks[(ranks >= 0).to(torch.int8).argmax()]


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
    """`transformer.loss` of sharded parameters, summed over ranks, and metrics likewise, in one message.

    The metric non_finite_rank is the first rank whose own loss is inf or nan, -1 if none is.

    batch["denominator"] must be that of all ranks (ddp.with_global_denominator). The embedding, each block, and the
    unembedding, which stays whole over all chunks of the loss, are units of their own.

    tensor_parallel: a `tensor_parallel.Plan` over another axis of a mesh. `local` is plan.shard of its shard, plan
    being that of what it shards; gradients go through its `reduce` afterwards, and their norm is
    `tensor_parallel.global_norm(grads, norm=plan.norm)`.
    """
    if "denominator" not in batch:
        raise ValueError("batch has no denominator of all ranks: use ddp.with_global_denominator")
    if not torch.compiler.is_compiling():
        check_denominator(batch, plan.group, "fsdp.transformer_loss")
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
    sums = sum_metrics({**metrics, "loss": value}, plan.group)
    return _OneTerm.apply(value, sums.pop("loss")), sums


def _wrapped(wrap_block: Callable[[transformer.BlockFn], transformer.BlockFn], f: Any, ops: Ops) -> Any:
    """wrap_block of the block, with ops that know nothing of this evaluation: in there all parameters are whole."""
    plain = replace(f, ops=ops)
    return made_once(wrap_block, plain, lambda: wrap_block(plain))


class Bound:
    """A plan and the tensors of one evaluation: `params`, and functions that gather what they are given of them."""

    def __init__(self, plan: Plan, local: Any, order: list[Any], deliver: Deliver | None = None):
        self.plan, self.schedule = plan, Schedule(plan.group, plan.compute, plan.reduce, deliver)
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
            lower = Replicated.apply(plan.group, plan.compute, *[leaves[i] for i in whole])
            for i, x in zip(whole, lower, strict=True):
                leaves[i] = x
        elif plan.compute is not None:
            for i in whole:
                leaves[i] = leaves[i].to(plan.compute)
        self.params = tree.unflatten(treedef, leaves)
        self.inputs: dict[int, Tensor] = {}  # of Gather, by the id of the part, where it is not the part itself
        cut = [x for x in self.leaves if id(x) in self.shapes and x.requires_grad]
        if cut and deliver is None and size_of(plan.group) > 1 and torch.is_grad_enabled():
            self.inputs = dict(zip(map(id, cut), Arrive.apply(self.schedule, *cut), strict=True))
        subtrees = [[x for x in tree.leaves(subtree) if id(x) in self.shapes] for subtree in order]
        self.units: list[Unit] = []
        for parts in subtrees:
            self._add(parts)
        self.position = 0  # of the unit that is expected next

    def _add(self, parts: list[Tensor]) -> "Unit":
        unit = Unit(self.schedule, parts, [self.shapes[id(p)] for p in parts])
        self.units.append(unit)
        return unit

    def _unit(self, parts: list[Tensor]) -> "Unit":
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
            for i, x in zip(at, Gather.apply(unit, *inputs), strict=True):
                leaves[i] = x
            params = tree.unflatten(treedef, leaves)
            del leaves, x
            unit.prefetch(+1)
            with saved_tensors_hooks(unit.pack, unpack):
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


class _OneTerm(torch.autograd.Function):
    """The sum over ranks; backward, the identity: each rank differentiates its own term of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, total: Tensor) -> Tensor:
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
