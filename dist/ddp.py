"""Data parallelism: gradients are summed or averaged over ranks by functions of gradient trees.

    state = init_state(params, optimizer, strategy=ddp.strategy())
    step = make_step(loss, optimizer, schedule, strategy=ddp.strategy())

`strategy` puts the number of all ranks' targets into the batch, by which the loss is divided, and sums gradients over
ranks while backward still runs; so padding and weights may differ between ranks. It is made of functions that other
training loops may call. `differentiate` sums the gradients of such a loss; that of a mean over one rank's batch would
come out N times too large, so a batch with the denominator of one rank is refused. `all_reduce_mean` averages the
gradients of losses that are means over each rank's batch (`strategy=train.reducing(all_reduce_mean)`).
"""

import math
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from purelm import tree
from purelm.dist.agreement import check_same_kind
from purelm.dist.collectives import all_reduce, broadcast
from purelm.dist.messages import Op, Pending, cast_leaves, cut, default_bucket_bytes, send_bucket
from purelm.dist.sharding import scatter_bucket
from purelm.dist.world import Group, device_of, rank_of, size_of
from purelm.ops.cross_entropy import nonzero
from purelm.train import Loss, Strategy, n_targets
from purelm.transforms import accumulate, value_and_grad

__all__ = [
    "all_reduce_mean",
    "differentiate",
    "evaluate",
    "overlapped_value_and_grad",
    "strategy",
    "sum_metrics",
    "with_global_denominator",
]

Messages = Literal["per_leaf", "flat", "bucketed"]


def strategy(
    group: Group = None, *, bucket_bytes: int | None = None, wire: torch.dtype | None = None
) -> Strategy:
    """Every rank holds all parameters and is given its own part of the batch.

    Parameters begin as rank 0's. Loss, metrics and gradients are those of one process with the whole batch. A step
    sends the messages of `all_reduce_mean`, bucket by bucket while backward runs (`overlapped_value_and_grad`).
    """
    return Strategy(
        prepare=partial(with_global_denominator, group=group),
        differentiate=partial(differentiate, group=group, bucket_bytes=bucket_bytes, wire=wire),
        shard=partial(broadcast, group=group),
        evaluate=partial(evaluate, group=group),
    )


def all_reduce_mean(
    grads: Any,
    group: Group = None,
    strategy: Messages = "bucketed",
    *,
    op: Op = "mean",
    bucket_bytes: int | None = None,
    wire: torch.dtype | None = None,
    check: bool = True,
) -> Any:
    """The mean (or sum) of a gradient tree over the ranks, on every rank, as new tensors of the same dtypes.

    Messages: one a leaf with "per_leaf"; one a dtype with "flat", which holds a second copy of all gradients; with
    "bucketed" one for each run of leaves of bucket_bytes, last leaves first (by default
    `messages.default_bucket_bytes`). All are started before the first is waited for.
    Bytes a rank sends: 2 (N - 1) / N of the tree's. wire: the dtype in which gradients are sent and added; by default
    their own.

    >>> all_reduce_mean({"w": torch.ones(2)})  # in a group of one
    {'w': tensor([1., 1.])}
    """
    if strategy not in ("per_leaf", "flat", "bucketed"):
        raise ValueError(f'strategy must be "per_leaf", "flat" or "bucketed", got {strategy!r}')
    check_options(op, bucket_bytes)
    if size_of(group) == 1:
        return grads
    if check:
        check_same_kind(grads, group, "gradients")
    leaves, treedef = tree.flatten(grads)
    limit = {"per_leaf": 0, "flat": math.inf, "bucketed": bucket_bytes or default_bucket_bytes(leaves)}[strategy]
    last_first = cut(leaves, limit, range(len(leaves))[::-1])
    under_way = [(at, send_bucket([leaves[i] for i in at], group, op, wire)) for at in last_first]
    out: list[Any] = list(leaves)
    for at, message in under_way:
        for i, x in zip(at, message.wait(), strict=True):
            out[i] = x
    return tree.unflatten(treedef, out)


def overlapped_value_and_grad(
    f: Callable[..., Any],
    group: Group = None,
    *,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    microbatches: int = 1,
    op: Op = "mean",
    bucket_bytes: int | None = None,
    wire: torch.dtype | None = None,
    compute: torch.dtype | None = None,
    parts: bool = False,
    check: bool = True,
) -> Callable[..., tuple[Any, Any]]:
    """`value_and_grad` whose gradients are averaged (or summed) over ranks while backward still runs.

    Value and aux are this rank's own. The first call records the order in which gradients become ready (rank 0's order
    is used by all) and sends them at its end. Later calls send a bucket as soon as its last gradient is ready. All
    ranks send buckets in one order, even if they use different parameters: the gradient of an unused one is zeros, sent
    at the end. With microbatches, f(params, batch) is evaluated on each as by `accumulate`, and gradients are sent
    during the last one's backward.

    parts: return only this rank's part of each gradient (`sharding.part_of`; in a group of one the whole), for
    `zero.sharded(reduce="parts")`. A reduce_scatter sends half of what an all_reduce does, and results take 1/N of the
    memory.

    The overlap needs a backward pass that yields gradients one by one: eager, rematerialised or compiled block by
    block. A model compiled as a whole yields them all at the end. So does an f that begins with a cast of all
    parameters, since autograd runs the casts' backward last: give the dtype as `compute` instead. f then gets
    parameters of that dtype, and each gradient is cast to its parameter's own as it is added or sent.
    """
    check_options(op, bucket_bytes)
    if microbatches < 1 or (microbatches > 1 and argnums != 0):
        raise ValueError(f"microbatches is {microbatches} and argnums {argnums}: several microbatches need argnums 0")
    known: dict[Any, list[list[int]]] = {}  # structure, shapes and dtypes -> buckets of leaf indices
    local = value_and_grad(f, argnums, has_aux)
    send = partial(scatter_bucket if parts else send_bucket, group=group, op=op, wire=wire)

    def sending(kind: Any, masters: list[Tensor], before: list[Tensor] | None) -> Callable[..., tuple[Any, Any]]:
        def watch(inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
            reducer = _Reducer(inputs, masters, before, known.get(kind), group, send)

            def finish() -> list[Tensor]:
                grads, known[kind] = reducer.finish(bucket_bytes or default_bucket_bytes(masters))
                return grads

            return finish

        return value_and_grad(f, argnums, has_aux, watch=watch)

    def overlapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        differentiated = args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in argnums)

        def alone(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            value, grads = local(*args, **kwargs)
            return value, tree.map(lambda p, g: g if g is None else g.to(p.dtype), differentiated, grads)

        leaves, treedef = tree.flatten(differentiated)
        if compute is not None:
            lower = tree.unflatten(treedef, cast_leaves(leaves, compute))
            numbers = (argnums,) if isinstance(argnums, int) else argnums
            by_number = dict(zip(numbers, (lower,) if isinstance(argnums, int) else lower, strict=True))
            args = tuple(by_number.get(i, x) for i, x in enumerate(args))
        if size_of(group) == 1:
            local_only = partial(alone, **kwargs)
            return accumulate(local_only, microbatches)(*args) if microbatches > 1 else local_only(*args)
        kind = treedef, *[(x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves]
        if check and kind not in known:
            check_same_kind(differentiated, group, "parameters")
        last = partial(sending, kind, [x for x in leaves if tree.is_floating(x)])
        if microbatches == 1:
            return last(None)(*args, **kwargs)
        return _in_parts(partial(alone, **kwargs), lambda before: partial(last(before), **kwargs), microbatches, *args)

    return overlapped


def _in_parts(local: Any, sending: Any, microbatches: int, params: Any, batch: Any) -> tuple[Any, Any]:
    """Sums over microbatches; those of the earlier gradients are added to the last one's as these are sent."""
    count = 0
    value: Any = None
    before: Any = None

    def one(params: Any, batch: Any) -> Any:
        nonlocal count, value, before
        count += 1
        if count < microbatches:
            value, before = _added((value, before), local(params, batch))
            return torch.zeros(())
        floating = [g for g in tree.leaves(before) if g is not None]
        last, grads = sending(floating)(params, batch)
        value = _added(value, last)
        before = grads
        return torch.zeros(())

    accumulate(one, microbatches)(params, batch)  # used only to cut the batch; `one` adds up
    return value, before


def _added(a: Any, b: Any) -> Any:
    if a is None or (isinstance(a, tuple) and all(x is None for x in a)):
        return b
    return tree.map(lambda x, y: x + y, a, b)


def differentiate(
    loss_fn: Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]],
    group: Group = None,
    *,
    microbatches: int = 1,
    bucket_bytes: int | None = None,
    wire: torch.dtype | None = None,
    compute: torch.dtype | None = None,
    parts: bool = False,
) -> Callable[[Any, Any], tuple[tuple[Tensor, dict[str, Tensor]], Any]]:
    """The function (params, batch) -> ((loss, metrics), grads), summed over ranks, by which `strategy` differentiates.

    loss_fn must divide by batch["denominator"], which `with_global_denominator` puts there: sums over ranks are then
    what one process gets from the whole batch. ValueError for a batch with "targets" that has no denominator, or that
    of one rank (`train.with_denominator`). The metric non_finite_rank is the first rank whose own loss is inf or nan,
    -1 if none is. The other arguments are those of `overlapped_value_and_grad`.
    """
    options: dict[str, Any] = {"bucket_bytes": bucket_bytes, "wire": wire, "compute": compute, "parts": parts}
    both = overlapped_value_and_grad(loss_fn, group, has_aux=True, microbatches=microbatches, op="sum", **options)

    def gradient(params: Any, batch: Any) -> tuple[tuple[Tensor, dict[str, Tensor]], Any]:
        check_denominator(batch, group, "ddp.differentiate")
        (loss, metrics), grads = both(params, batch)
        metrics = sum_metrics({**metrics, "loss": loss}, group)
        return (metrics.pop("loss"), metrics), grads

    gradient.gives_parts = lambda: parts and size_of(group) > 1  # type: ignore[attr-defined]
    return gradient


def evaluate(loss_fn: Loss, group: Group = None) -> Loss:
    """loss_fn with its loss and metrics summed over ranks; the gradient is that of this rank's loss."""

    def summed(params: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        check_denominator(batch, group, "ddp.evaluate")
        loss, metrics = loss_fn(params, batch)
        metrics = sum_metrics({**metrics, "loss": loss}, group)
        return OneTerm.apply(loss, metrics.pop("loss")), metrics

    return summed


class OneTerm(torch.autograd.Function):
    """(own, total) -> total, the sum of `own` over ranks; backward, the identity on `own`, this rank's term."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, total: Tensor) -> Tensor:
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def check_denominator(batch: Any, group: Group, who: str) -> None:
    """ValueError where losses that are summed over ranks would be divided by the number of one rank's targets."""
    if size_of(group) == 1 or not isinstance(batch, Mapping) or "targets" not in batch:
        return
    denominator = batch.get("denominator")
    if denominator is None or getattr(denominator, "of_one_process", False):
        has = "no denominator" if denominator is None else "the denominator of one rank's targets"
        raise ValueError(
            f"{who}: the batch has {has}, so the sum over N = {size_of(group)} ranks would be N times too large: "
            "give it that of all ranks (ddp.with_global_denominator), or train with ddp.strategy(group)"
        )


def sum_metrics(metrics: Mapping[str, Tensor], group: Group = None) -> dict[str, Tensor]:
    """0-d metrics, "loss" among them, summed over ranks by one message, in fp32 (fp64 if the loss is).

    Adds the metric "non_finite_rank": the first rank whose own loss is inf or nan, else -1.
    """
    names, N = list(metrics), size_of(group)
    loss = metrics["loss"]
    dtype = torch.promote_types(loss.dtype, torch.float32)
    here = torch.zeros(N, dtype=dtype, device=loss.device)
    here[rank_of(group)] = (~torch.isfinite(loss)).to(dtype)
    values = torch.stack([metrics[name].detach().to(dtype) for name in names])
    total = all_reduce(torch.cat([values, here]), group, check=False)
    bad = total[len(names) :] > 0
    number = torch.arange(N, device=loss.device)
    first = torch.where(bad, number, N).amin()
    out = {name: total[i].to(metrics[name].dtype) for i, name in enumerate(names)}
    return {**out, "non_finite_rank": torch.where(first == N, -1, first)}


def with_global_denominator(batch: Any, group: Group = None) -> Any:
    """The batch with "denominator": the sum of all ranks' weights, or their number of targets (`train.n_targets`).

    sum_i nll_i w_i / sum_i w_i over the tokens i of all ranks is then the sum of the ranks' losses. A rank may have no
    targets; if none has any, the denominator is 1 and the loss 0. A batch that has a denominator is returned as it is.
    """
    total = n_targets(batch)
    if total is None or "denominator" in batch:
        return batch
    return {**batch, "denominator": nonzero(all_reduce(total, group, check=False))}


def check_options(op: str, bucket_bytes: float | None) -> None:
    """ValueError unless op is "sum" or "mean", and bucket_bytes None or at least 1."""
    if op not in ("sum", "mean"):
        raise ValueError(f'op must be "sum" or "mean", got {op!r}')
    if bucket_bytes is not None and bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}")


class _Reducer:
    """Hooks on the leaves of one backward pass, which send gradients in buckets as they become ready.

    The first pass has a hook on each leaf and records their order. Later ones have one hook a bucket, on its last leaf:
    a hook takes the thread that runs backward some 30 us, a large part of the time it has for a layer.
    """

    def __init__(
        self,
        inputs: list[Tensor],
        masters: list[Tensor],
        before: list[Tensor] | None,
        buckets: list[list[int]] | None,
        group: Group,
        send: Callable[..., Pending],
    ):
        self.inputs, self.masters, self.before = inputs, masters, before
        self.group, self.send = group, send
        self.buckets = buckets or []
        self.came: list[int] = []
        self.under_way: list[Pending] = []
        # Hooks hold this object weakly: it holds the leaves, whose hooks would otherwise never be freed if backward
        # fails.
        me, came = weakref.ref(self), self.came

        def send_whole(x: Tensor) -> None:
            reducer = me()
            assert reducer is not None  # the caller holds it until finish()
            reducer._send_whole()

        hooks: list[Any] = [(i, lambda x, i=i: came.append(i)) for i in range(len(inputs))] if buckets is None else []
        hooks += [(bucket[-1], send_whole) for bucket in self.buckets]
        self.handles = [inputs[i].register_post_accumulate_grad_hook(hook) for i, hook in hooks]

    def _send_whole(self) -> None:
        """Send complete buckets, in their order and not that of gradients: all ranks must send in one order."""
        while len(self.under_way) < len(self.buckets):
            bucket = self.buckets[len(self.under_way)]
            grads = [self.inputs[i].grad for i in bucket]
            if any(g is None for g in grads):
                return
            dtypes = [self.masters[i].dtype for i in bucket]
            if self.before is not None:
                grads = [g.to(d) + self.before[i] for g, d, i in zip(grads, dtypes, bucket, strict=True)]  # type: ignore
            self.under_way.append(self.send(grads, dtypes=dtypes))
            for i in bucket:
                self.inputs[i].grad = None  # copied into the message

    def finish(self, limit: float) -> tuple[list[Tensor], list[list[int]]]:
        """(reduced gradients, buckets). limit: bytes of a bucket, used where buckets are not known yet."""
        for handle in self.handles:
            handle.remove()
        sent = {i for bucket in self.buckets[: len(self.under_way)] for i in bucket}
        for i, x in enumerate(self.inputs):
            if x.grad is None and i not in sent:
                x.grad = torch.zeros_like(x)
                self.came.append(i)
        if not self.buckets:
            order = torch.tensor(self.came, device=device_of(self.group))
            order = broadcast(order, group=self.group, check=False)
            self.buckets = cut(self.masters, limit, order.tolist())
        with torch.no_grad():
            self._send_whole()
        grads = list(self.inputs)
        for bucket, message in zip(self.buckets, self.under_way, strict=True):
            for i, g in zip(bucket, message.wait(), strict=True):
                grads[i] = g
        return grads, self.buckets
