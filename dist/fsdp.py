"""Fully sharded parameters: each rank holds 1/N of every matrix, and a block's are whole only while it runs.

    model = transformer.make(cfg, ops=fsdp.ops(FUSED), wrap_block=lambda f: fsdp.gathered(remat(f)))
    strategy = fsdp.strategy(model, group)
    state = init_state(params, optimizer, strategy=strategy)          # 1/N of the fp32 masters
    step = make_step(model.loss, optimizer, schedule, strategy=strategy, precision=MIXED)

(ZeRO stage 3, Rajbhandari et al. 1910.02054.) Any loss will do, of any model: what it gets are `Part`s, tensors with
the shape of the whole, which are gathered where they are used. `gathered` makes what a function is given one unit: its
parameters are cast, gathered by one message, used and dropped. What autograd saves of them are notes of where they
were; the first note that backward reads gathers the unit's parameters again. Their gradients are reduce-scattered when
the unit's backward is done. While one unit runs, the next one's parameters are under way, in either direction: two
units' at a time, never more. (In forward from the second evaluation on: the first one shows the order.)

All of it is ordinary autograd: it goes with value_and_grad, accumulate, remat (inside: gathered(remat(block))),
compiled blocks and gradients of gradients. Under torch.func's transforms (jvp, vmap, grad) parameters are gathered all
the same, by `collectives.all_gather`, and nothing is dropped in between.

Messages and bytes a step, of n bytes of parameters in `compute`: an all_gather a unit forward and one backward,
(N - 1) / N n sent each; a reduce_scatter a unit, (N - 1) / N n in `reduce`; one all_reduce of what is replicated.
Every rank must run the same units in the same order.
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
    """Each rank holds its part of every matrix, of parameters, gradients and optimizer state.

    Loss, metrics and gradients are those of one process with the whole batch (`ddp.strategy`). Parameters travel in
    make_step's `precision.compute`.

    Args:
        model: a Model, or any tree like the whole parameters (meta tensors will do): one with a head of one's own, say.
        reduce, replicated, check: of `plan`.
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
    """f(params, ...) with parameters of one unit: gathered together, whole while f runs, and dropped.

    For `wrap_block`. Parameters that are whole already pass through.
    """

    @functools.wraps(f, updated=())
    def whole(params: Any, *args: Any, **kwargs: Any) -> Any:
        part = next((x for x in tree.leaves(params) if isinstance(x, Part)), None)
        return f(params, *args, **kwargs) if part is None else part.bound.gathered(f)(params, *args, **kwargs)

    return whole


def ops(base: Ops) -> Ops:
    """base, where each op gathers the matrices that it is given: one unit, for all that the op does with them.

    For what stands outside of blocks: a loss that goes through its unembedding chunk by chunk gathers it once.
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

    def bind(self, local: Any, order: Sequence[Any] = (), deliver: Deliver | None = None) -> Bound:
        """For one evaluation. order: subtrees of `local` in the order in which they will be gathered.

        deliver: takes parts and their gradients under way, in place of autograd, for which the parts then have none.
        """
        return Bound(self, local, [tree.leaves(subtree) for subtree in order], deliver)

    def bound(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """f(params, ...) as a function of this rank's tree: params are `Part`s, whole where they are used."""
        order: list[list[int]] = []  # numbers of the leaves that were gathered together, as the last evaluation had it

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


def differentiate(
    loss_fn: Loss, plan: Plan, *, microbatches: int = 1, compute: torch.dtype | None = None
) -> Callable[[Any, Any], Any]:
    """(local, batch) -> ((loss, metrics), local gradients): what `strategy` differentiates with.

    loss_fn divides by batch["denominator"], that of all ranks (`ddp.with_global_denominator`). Loss, metrics and
    gradients are sums over ranks and microbatches; the metric non_finite_rank is the first rank whose own loss is inf
    or nan, -1 if none is. compute: in place of the plan's.
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
    """(local, batch) -> (loss, metrics), sums over ranks."""
    bound = plan.bound(loss_fn)

    def summed(local: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        check_denominator(batch, plan.group, "fsdp.evaluate")
        loss, metrics = bound(local, batch)
        sums = sum_metrics({**metrics, "loss": loss}, plan.group)
        return OneTerm.apply(loss, sums.pop("loss")), sums

    return summed


def _first_of(ranks: Tensor) -> Tensor:
    """The first that is not -1, else -1."""
    return ranks[(ranks >= 0).to(torch.int8).argmax()]
