"""Fully sharded parameters: each rank holds 1/N of every matrix, and a block's matrices are whole only while it runs.

    model = transformer.make(cfg, ops=fsdp.ops(FUSED), wrap_block=lambda f: fsdp.gathered(remat(f)))
    strategy = fsdp.strategy(model, group)
    state = init_state(params, optimizer, strategy=strategy)          # 1/N of the fp32 masters
    step = make_step(model.loss, optimizer, schedule, strategy=strategy, precision=MIXED)

ZeRO stage 3 (Rajbhandari et al., arXiv:1910.02054). Any loss of any model will do. The loss is given `Part`s, tensors
with the shape of the whole, which are gathered where they are used. `gathered(f)` makes the parameters of f one unit:
they are cast, gathered by one message, used and dropped. Where autograd would save such a parameter for backward, it
saves a reference to the unit instead; the first reference that backward reads gathers the unit again. Gradients are
reduce-scattered at the end of the unit's backward. While one unit runs, the next is prefetched, in forward and in
backward; at most two are whole at a time. (In forward, prefetch begins with the second evaluation: the first records
the order of units.)

This is ordinary autograd: it composes with value_and_grad, accumulate, remat (inside: gathered(remat(block))), compiled
blocks and higher derivatives. Under torch.func's transforms (jvp, vmap, grad) parameters are gathered by
`collectives.all_gather` and are not dropped before backward.

A step of a model with n bytes of parameters in `compute` sends: an all_gather for each unit in forward and in backward,
n (N - 1) / N bytes in each pass; a reduce_scatter for each unit, as many bytes if `reduce` has the same width; one
all_reduce of the replicated gradients. Every rank must run the same units in the same order.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.dist.agreement import check_same_kind
from purelm.dist.ddp import OneTerm, check_denominator, sum_metrics, with_global_denominator
from purelm.dist.fsdp_parts import Bound, Part
from purelm.dist.fsdp_units import Deliver
from purelm.dist.sharding import part_of, part_shape, unshard
from purelm.dist.world import Group, rank_of, size_of
from purelm.dist.zero import global_norm
from purelm.ops import Ops
from purelm.train import Loss, Strategy
from purelm.transforms import accumulate, value_and_grad

__all__ = ["Bound", "Part", "Plan", "differentiate", "evaluate", "gathered", "ops", "plan", "strategy"]


def strategy(
    model: Any,
    group: Group = None,
    *,
    reduce: torch.dtype | None = None,
    replicated: Callable[[str, Tensor], bool] | None = None,
    check: bool = True,
) -> Strategy:
    """Each rank holds 1/N of every matrix: of parameters, gradients and optimizer state.

    Loss, metrics and gradients are those of one process with the whole batch, as of `ddp.strategy`. Parameters are
    gathered in make_step's `precision.compute`.

    Args:
        model: a Model; or, of one with an added head for example, a tree with the shapes of the whole parameters (meta
            tensors will do).
        reduce, replicated, check: as in `plan`.
    """
    like = _like(model)
    made = plan(like, group, reduce=reduce, replicated=vectors if replicated is None else replicated, check=check)
    return Strategy(
        prepare=partial(with_global_denominator, group=group),
        differentiate=partial(differentiate, plan=made),
        norm=made.norm,
        shard=made.shard,
        unshard=made.unshard,
        evaluate=partial(evaluate, plan=made),
    )


def _like(model: Any) -> Any:
    leaves = getattr(model, "leaves", None)
    if not isinstance(leaves, Mapping):
        return model
    return tree.from_flat({path: torch.empty(leaf.shape, device="meta") for path, leaf in leaves.items()})


def gathered(f: Callable[..., Any]) -> Callable[..., Any]:
    """f(params, ...), whose `Part`s are one unit: gathered by one message, whole while f runs, then dropped.

    For `wrap_block`. Parameters that are whole already are passed on as they are.
    """

    @functools.wraps(f, updated=())
    def whole(params: Any, *args: Any, **kwargs: Any) -> Any:
        part = next((x for x in tree.leaves(params) if isinstance(x, Part)), None)
        return f(params, *args, **kwargs) if part is None else part.bound.gathered(f)(params, *args, **kwargs)

    return whole


def ops(base: Ops) -> Ops:
    """The ops of `base`, each of which gathers the `Part`s that it is given, as one unit for the whole call.

    For parameters used outside of blocks: a loss over chunks of tokens, say, gathers its unembedding once, not for each
    chunk.
    """
    names = [name for name in base._fields if name not in ("enter", "final")]  # which take no parameters
    return base._replace(**{name: _on_parts(getattr(base, name)) for name in names})


def _on_parts(op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        at = [i for i, x in enumerate(args) if isinstance(x, Part)]
        if not at:
            return op(*args, **kwargs)

        def whole(parts: list[Tensor]) -> Any:
            merged = list(args)
            for i, x in zip(at, parts, strict=True):
                merged[i] = x
            return op(*merged, **kwargs)

        return args[at[0]].bound.gathered(whole)([args[i] for i in at])

    return call


def vectors(path: str, x: Tensor) -> bool:
    """True for norms, biases and scalars, which are too small to be worth a message."""
    return x.ndim < 2


@dataclass(frozen=True)
class Plan:
    """Which leaves are cut, and in which dtypes they are sent."""

    like: Any  # the whole tree, on the meta device
    replicated: Any  # a bool for each leaf
    group: Group
    compute: torch.dtype | None  # of gathered parameters; None: the masters' own
    reduce: torch.dtype | None  # of gradients on the wire; None: the masters'

    @functools.cached_property
    def _leaves(self) -> list[tuple[bool, torch.Size, tuple[int, ...]]]:
        """For each leaf: whether it is replicated, its shape, and the shape that a rank holds."""
        N = size_of(self.group)
        both = zip(tree.leaves(self.replicated), [x.shape for x in tree.leaves(self.like)], strict=True)
        return [(r, shape, tuple(shape) if r else part_shape(shape, N)) for r, shape in both]

    def shard(self, params: Any) -> Any:
        """This rank's tree, copied: parts of matrices, cut along axis 0, and replicated leaves."""
        rank, N = rank_of(self.group), size_of(self.group)

        def own(x: Tensor, replicated: bool) -> Tensor:
            local = x.clone() if replicated else part_of(x, rank, N)
            local.is_part = N > 1 and not replicated  # type: ignore[attr-defined]  # make_step then needs self.norm
            return local

        return tree.map(own, params, self.replicated)

    def unshard(self, local: Any) -> Any:
        """The whole tree, on every rank. A leaf that is None on all ranks (an integer's gradient) stays None."""
        (likes, flags, leaves), treedef = tree.flatten_up_to(self.like, self.replicated, local)
        cut = [i for i, r in enumerate(flags) if not r and leaves[i] is not None]
        wholes = unshard([leaves[i] for i in cut], [likes[i] for i in cut], self.group)
        for i, x in zip(cut, wholes, strict=True):
            leaves[i] = x
        return tree.unflatten(treedef, leaves)

    def norm(self, grads: Any) -> Tensor:
        """The global norm of a local gradient tree: parts summed over ranks, replicated leaves counted once.

        Leaves may be None, the same ones on every rank.
        """
        cut = tree.map(lambda r, g: None if r else g, self.replicated, grads)
        once = tree.map(lambda r, g: g if r else None, self.replicated, grads)
        over_ranks = global_norm(self.group)(cut)
        return torch.hypot(over_ranks, tree.global_norm(once).to(over_ranks.device))

    def bind(self, local: Any, order: Sequence[Any] = (), deliver: Deliver | None = None) -> Bound:
        """The plan with the tensors of one evaluation.

        Args:
            order: subtrees of `local`, in the order in which they will be gathered.
            deliver: called with a unit's parts and their gradients, under way. These parts get no gradient from
                autograd.
        """
        return Bound(self, local, [tree.leaves(subtree) for subtree in order], deliver)

    def bound(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """f(params, ...) as a function of this rank's tree: f is given `Part`s, gathered where it uses them."""
        order: list[list[int]] = []  # units of the last evaluation, as indices of leaves

        def call(local: Any, *args: Any, **kwargs: Any) -> Any:
            leaves = tree.leaves(local)
            bound = Bound(self, local, [[leaves[i] for i in unit] for unit in order])
            out = f(bound.params, *args, **kwargs)
            order[:] = bound.used
            return out

        return call


def plan(
    params: Any,
    group: Group = None,
    *,
    compute: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
    replicated: Callable[[str, Tensor], bool] = vectors,
    check: bool = True,
) -> Plan:
    """How to shard a tree like `params`, of which only shapes and dtypes are read (meta tensors will do).

    All ranks of the group call it: ValueError on each, naming the leaf, if their trees or other arguments differ. That
    takes two messages of 32 bytes; check=False skips it.

    replicated: (path, leaf) -> whether every rank keeps the whole leaf; by default all but matrices. Leaves that are
        not floating are always replicated.
    """
    like = tree.map(lambda x: torch.empty_like(x, device="meta"), params)
    flags = tree.map_with_path(lambda path, x: replicated(path, x) or not tree.is_floating(x), params)
    if check:
        check_same_kind(like, group, "fsdp.plan")
        check_same_kind({"compute": compute, "reduce": reduce, "replicated": flags}, group, "fsdp.plan")
    return Plan(like, flags, group, compute, reduce)


def differentiate(
    loss_fn: Loss, plan: Plan, *, microbatches: int = 1, compute: torch.dtype | None = None
) -> Callable[[Any, Any], Any]:
    """The function (local, batch) -> ((loss, metrics), local gradients), by which `strategy` differentiates.

    loss_fn must divide by batch["denominator"], that of all ranks (`ddp.with_global_denominator`). Loss, metrics and
    gradients are sums over ranks and microbatches; the metric non_finite_rank is the first rank whose own loss is inf
    or nan, -1 if none is. compute: replaces the plan's.
    """
    casting = plan if compute is None else replace(plan, compute=compute)
    gradient = value_and_grad(casting.bound(loss_fn), has_aux=True)

    def differentiated(local: Any, batch: Any) -> Any:
        check_denominator(batch, plan.group, "fsdp.differentiate")
        ranks: list[Tensor] = []

        def one(local: Any, batch: Any) -> Any:
            (loss, metrics), grads = gradient(local, batch)
            sums = sum_metrics({**metrics, "loss": loss}, plan.group)
            ranks.append(sums.pop("non_finite_rank"))
            return (sums.pop("loss"), sums), grads

        whole = one if microbatches == 1 else accumulate(one, microbatches)
        (value, metrics), grads = whole(local, batch)
        return (value, {**metrics, "non_finite_rank": _first_of(torch.stack(ranks))}), grads

    return differentiated


def evaluate(loss_fn: Loss, plan: Plan) -> Loss:
    """The function (local, batch) -> (loss, metrics), summed over ranks."""
    bound = plan.bound(loss_fn)

    def summed(local: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        check_denominator(batch, plan.group, "fsdp.evaluate")
        loss, metrics = bound(local, batch)
        sums = sum_metrics({**metrics, "loss": loss}, plan.group)
        return OneTerm.apply(loss, sums.pop("loss")), sums

    return summed


def _first_of(ranks: Tensor) -> Tensor:
    """The first rank that is not -1; -1 if there is none."""
    return ranks[(ranks >= 0).to(torch.int8).argmax()]
