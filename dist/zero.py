"""ZeRO stage 1: every rank holds all parameters, but the optimizer state of only a part of them.

Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models" (1910.02054, section 5.1).
With g_r the gradients of rank r of N, part_r its part of each leaf, cut along axis 0, and f an element-wise optimizer:

    g = part_r(mean over ranks of g_r)        reduce_scatter
    u, state_r = f(g, state_r, part_r(p))     on rank r alone
    updates = u of all ranks, concatenated    all_gather

This equals f(mean of g_r, state, p), because f treats each element on its own. One that does not (Muon needs whole
matrices) goes into `whole_tensors`, where leaves are not cut but each has one owner. Both return an ordinary Optimizer:
they chain, and `partitioned(hidden_matrix, whole_tensors(muon()), sharded(adamw()))` has both. `strategy` is the form
that make_step takes.

All ranks of the group must call an update, with trees of the same paths, shapes and dtypes: check=True verifies this,
for a message of 32 bytes and a wait for the device (`agreement.check_same_kind`). Under torch.compile an update breaks
the graph, and the optimizer that it wraps is compiled on its own. In a group of one it is that optimizer, bit for bit.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from purelm import tree
from purelm.dist import ddp
from purelm.dist.agreement import check_same_kind
from purelm.dist.collectives import all_reduce
from purelm.dist.messages import Op, Pending, by_owner, default_bucket_bytes, from_owners, in_turn, split_as, stand_in
from purelm.dist.sharding import gather_leaves, gathered, part_of, part_shape, scatter_bucket, shard
from purelm.dist.world import Group, all_gather_single, device_of, rank_of, size_of
from purelm.optim import Optimizer
from purelm.optim.parts import check_sees_all
from purelm.train import Strategy
from purelm.transforms.boundary import between_graphs, not_traced
from purelm.transforms.donation import check_memory, consume, donated_type_of

__all__ = [
    "assign",
    "global_norm",
    "sharded",
    "sharded_step",
    "strategy",
    "whole_tensors",
]


def strategy(
    group: Group = None,
    *,
    whole: bool = False,
    bucket_bytes: int | None = None,
    wire: torch.dtype | None = None,
    check: bool = False,
) -> Strategy:
    """`ddp.strategy`, but each rank holds only 1/N of the optimizer state and of the reduced gradients.

    The optimizer is wrapped by `sharded(reduce="parts")`; with whole=True by `whole_tensors`, for one that needs whole
    matrices (Muon), and then every rank gets all gradients. check: as in `sharded`.
    """
    plain = ddp.strategy(group, bucket_bytes=bucket_bytes, wire=wire)
    if whole:
        return plain._replace(optimizer=lambda optimizer: whole_tensors(optimizer, group, reduce=None, check=check))
    return plain._replace(
        differentiate=functools.partial(
            ddp.differentiate, group=group, bucket_bytes=bucket_bytes, wire=wire, parts=True
        ),
        norm=global_norm(group),
        optimizer=lambda optimizer: sharded(optimizer, group, reduce="parts", check=check),
    )


Reduce = Literal["sum", "mean", "parts"] | None

LARGE = 1 << 20  # bytes from which a leaf is worth a message of its own, if that saves its copies


def sharded(
    optimizer: Optimizer,
    group: Group = None,
    *,
    reduce: Reduce = "mean",
    wire: torch.dtype | None = None,
    bucket_bytes: int | None = None,
    check: bool = True,
) -> Optimizer:
    """An element-wise optimizer whose state is sharded over the group's ranks; formula at the top of this file.

    State: 1/N of the optimizer's (rows rounded up: `sharding.part_shape`). For n bytes of gradients and u of updates
    (fp32, or fp64 for fp64 parameters) each rank sends n (N - 1) / N by reduce_scatter and u (N - 1) / N by
    all_gather, together as much as an all_reduce of the gradients; one message for each dtype and bucket, two under way
    at a time. During an update it takes memory for the updates, for two buckets, and for 1/N of gradients, parameters
    and updates.

    Masks and partitions of `optimizer` see the paths of the whole tree, and parts with the leaves' number of axes (one
    for a 0-d leaf): they may depend on these, not on sizes or values. A norm over all gradients would be that of this
    rank's parts: the first update refuses an optimizer that takes one (`optim.parts`). Give it `global_norm(group)`:
    `sharded(chain(clip_by_global_norm(1.0, norm=global_norm()), adamw()))`.
    The metric grad_norm of `make_step` is taken before gradients are reduced here.

    Args:
        reduce: how the ranks' gradients are combined: "mean" or "sum"; None if they are reduced already and equal on
            all ranks (no reduce_scatter); "parts" if they are this rank's parts of the reduced gradients, as
            `ddp.differentiate(parts=True)` returns them (ZeRO stage 2).
        wire: dtype in which gradients are sent and summed, by default their own; a mean is divided in their own.
        bucket_bytes: of a message, by default `messages.default_bucket_bytes`; a larger leaf has one of its own.
    """
    _check_arguments("sharded", reduce, bucket_bytes)
    is_tried: list[bool] = []

    def init(params: Any) -> Any:
        if size_of(group) == 1:
            return optimizer.init(params)
        check_same_kind(params, group, "zero.sharded")
        return optimizer.init(shard(params, group))

    def update(call: Callable[..., Any], grads: Any, state: Any, params: Any, lr: Tensor | float) -> tuple[Any, Any]:
        N = size_of(group)
        if N == 1:
            return call(optimizer.update, grads, state, params, lr)
        if check:
            check_same_kind({"grads": grads, "params": params}, group, "zero.sharded")
        if not is_tried:
            _try("zero.sharded", optimizer, tree.map(lambda p: p[None] if p.ndim == 0 else p, params), group)
            is_tried.append(True)
        (ps, wholes), treedef = tree.flatten_up_to(params, grads)
        limit = bucket_bytes or default_bucket_bytes(ps)
        if reduce == "parts":
            cut = wholes
            _check_parts("zero.sharded", params, cut, N)
        elif reduce is None:
            cut = [None if g is None else part_of(g, rank_of(group), N) for g in wholes]
        else:
            cut = _scatter(wholes, group, reduce, wire, limit)
        parts, state = call(optimizer.update, tree.unflatten(treedef, cut), state, shard(params, group), lr)
        (_, updates), _ = tree.flatten_up_to(params, parts)
        return tree.unflatten(treedef, gather_leaves(updates, [p.shape for p in ps], group, limit)), state

    return Optimizer(init, between_graphs(update, like=optimizer.update))


def sharded_step(
    step: Callable[..., tuple[Any, Any]],
    group: Group = None,
    *,
    bucket_bytes: int | None = None,
    donate: bool = False,
) -> Callable[[Any, Any, Any, Tensor | float], tuple[Any, Any]]:
    """A step (grads, state, params, lr) -> (params', state') over ranks, made of `step`, one of a single process.

    step: `kernels.adamw.adamw_step`, for example. grads are this rank's parts (`ddp.differentiate(parts=True)`), the
    state is that of `sharded(optimizer).init(params)`. Each rank steps a copy of its part of the parameters, and the
    results are gathered: a rank sends (N - 1) / N of the parameters' bytes. Unlike `sharded` with `apply_updates`, it
    never holds all updates.

    donate: params' are written over params, bucket by bucket; the tensors of params are empty afterwards, as under
    `jit(donate=)`. ValueError if they share memory or require grad. With step=adamw_step(..., donate=True) only 1/N of
    the parameters and two buckets are held twice. In a group of one it is `step` itself.
    """
    _check_arguments("sharded_step", None, bucket_bytes)
    donated = donated_type_of("sharded_step")

    def stepped(grads: Any, state: Any, params: Any, lr: Tensor | float) -> tuple[Any, Any]:
        N = size_of(group)
        if N == 1:
            return step(grads, state, params, lr)
        (leaves, gs), treedef = tree.flatten_up_to(params, grads)
        _check_parts("zero.sharded_step", params, gs, N)
        if donate:
            check_memory("sharded_step", leaves, (params, grads, state), {}, (0,))
        stepped_parts, state = step(grads, state, shard(params, group), lr)
        parts: list[Any] = tree.leaves(stepped_parts)
        out: list[Any] = [x.data for x in leaves] if donate else [torch.empty_like(x) for x in leaves]
        limit = bucket_bytes or default_bucket_bytes(leaves)
        # A large leaf without padding is gathered straight into its place: nothing is packed or copied.
        large = [i for i, x in enumerate(out) if _lies_in_parts(x, parts[i], N) and x.nbytes >= min(limit, LARGE)]
        # `large` must be the same on every rank, so it does not depend on strides.
        dense = [out[i] if out[i].is_contiguous() else out[i].contiguous() for i in large]
        ours = [parts[i].contiguous().view(-1) for i in large]
        under_way = [all_gather_single(x.view(-1), y, group, async_op=True) for x, y in zip(dense, ours, strict=True)]
        for i in large:
            parts[i] = None
        for at, wholes in gathered(parts, [x.shape for x in leaves], group, limit):
            torch._foreach_copy_([out[i] for i in at], wholes)
        for i, x, work in zip(large, dense, under_way, strict=True):
            work.wait()
            if x is not out[i]:
                out[i].copy_(x)
        if donate:
            consume(leaves, donated)
        return tree.unflatten(treedef, out), state

    return stepped


def whole_tensors(
    optimizer: Optimizer,
    group: Group = None,
    *,
    reduce: Reduce = "mean",
    bucket_bytes: int | None = None,
    check: bool = True,
) -> Optimizer:
    """An optimizer that treats each leaf on its own, with its state spread over the group's ranks leaf by leaf.

    Each leaf has one owner (`assign`, by number of elements), which holds its state and updates it:

        g = mean over ranks of g_r, on the owner    reduce
        u, state = optimizer(g, state, p)           on the owner
        updates = u of the owner                    broadcast

    State: about 1/N of the optimizer's; the owner of the largest leaf has at least that leaf's. With n and u as in
    `sharded`, each rank sends n bytes by reduce and u by broadcast, in a ring; one message for each owner, dtype and
    bucket, two under way at a time. Updates are fp32, or fp64 for fp64 parameters, and None where the gradient is None.

    The optimizer sees whole leaves under their own paths, and None for those of other owners, so masks and partitions
    must be predicates, not trees. Arguments, and what to do about norms, are as in `sharded`.
    """
    _check_arguments("whole_tensors", reduce, bucket_bytes)
    is_tried: list[bool] = []

    def init(params: Any) -> Any:
        if size_of(group) == 1:
            return optimizer.init(params)
        check_same_kind(params, group, "zero.whole_tensors")
        owners = assign([p.numel() for p in tree.leaves(params)], size_of(group))
        return optimizer.init(_owned(params, owners, rank_of(group)))

    def update(call: Callable[..., Any], grads: Any, state: Any, params: Any, lr: Tensor | float) -> tuple[Any, Any]:
        rank, N = rank_of(group), size_of(group)
        if N == 1:
            return call(optimizer.update, grads, state, params, lr)
        if check:
            check_same_kind({"grads": grads, "params": params}, group, "zero.whole_tensors")
        (ps, wholes), treedef = tree.flatten_up_to(params, grads)
        limit = bucket_bytes or default_bucket_bytes(ps)
        owners = assign([p.numel() for p in ps], N)
        if not is_tried:
            _try("zero.whole_tensors", optimizer, _owned(params, owners, rank), group)
            is_tried.append(True)
        at = [i for i, g in enumerate(wholes) if g is not None]
        if reduce is not None:
            wholes = _to_owners(wholes, owners, group, N if reduce == "mean" else 1, limit)
        mine = [g if r == rank else None for g, r in zip(wholes, owners, strict=True)]
        found, state = call(optimizer.update, tree.unflatten(treedef, mine), state, _owned(params, owners, rank), lr)

        (_, own), _ = tree.flatten_up_to(params, found)
        updates: list[Tensor | None] = [None] * len(ps)
        sent = [_in_wide(own[i], ps[i]) for i in at]
        for i, u in zip(at, from_owners(sent, [owners[i] for i in at], group, limit), strict=True):
            updates[i] = u
        return tree.unflatten(treedef, updates), state

    return Optimizer(init, between_graphs(update, like=optimizer.update))


@not_traced
def global_norm(group: Group = None) -> Callable[[Any], Tensor]:
    """The function parts -> sqrt(sum of squares over the floating leaves of all ranks), the `norm` of `optim.clip`.

    Right for both `sharded` and `whole_tensors`: padding is zeros, and leaves of other owners are None. The squares of
    each rank's `tree.global_norm` are summed in fp64, by one message of 8 bytes.
    """

    def norm(parts: Any) -> Tensor:
        here = tree.global_norm(parts)
        if size_of(group) == 1:
            return here
        if here.device.type == "cpu":  # with NCCL, that of a rank without leaves
            here = here.to(device_of(group))
        return all_reduce(here.double().square(), group, check=False).sqrt().to(here.dtype)

    return not_traced(norm)


def assign(sizes: Sequence[int], n_ranks: int, loads: Sequence[int] = ()) -> list[int]:
    """The owner of each leaf: largest first, each to the rank with the least so far (a tie: lower rank, earlier leaf).

    Graham's rule (1969): the largest load is at most 4/3 of that of the best assignment. loads: of the ranks, to begin
    with.

    >>> assign([1, 6, 3, 2], 2)
    [1, 0, 1, 1]
    """
    owners, total = [0] * len(sizes), list(loads) or [0] * n_ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = total.index(min(total))
        total[owners[i]] += sizes[i]
    return owners


def _try(who: str, optimizer: Optimizer, params: Any, group: Group) -> None:
    advice = "give make_step max_norm, or clip_by_global_norm(max_norm, norm=zero.global_norm(group)) here"
    check_sees_all(optimizer, params, global_norm(group), who, advice)


# Helpers on lists of leaves, with None where a parameter has no gradient.


def _check_parts(who: str, params: Any, grads: Sequence[Tensor | None], N: int) -> None:
    for i, (p, g) in enumerate(zip(tree.leaves(params), grads, strict=True)):
        if g is not None and tuple(g.shape) != (expected := part_shape(p.shape, N)):
            raise ValueError(
                f"{who}: the gradient of {tree.paths(params)[i]} has shape {tuple(g.shape)}, this rank's part has "
                f"{expected}: give those of ddp.differentiate(parts=True)"
            )


def _lies_in_parts(whole: Tensor, part: Tensor, N: int) -> bool:
    """Whether N parts, concatenated, are the leaf: there is no padding."""
    return whole.numel() == N * part.numel() > 0


def _owned(params: Any, owners: Sequence[int], rank: int) -> Any:
    leaves, treedef = tree.flatten(params)
    return tree.unflatten(treedef, [p if r == rank else None for p, r in zip(leaves, owners, strict=True)])


def _scatter(
    wholes: Sequence[Tensor | None], group: Group, op: Op, wire: torch.dtype | None, limit: int
) -> list[Tensor | None]:
    """This rank's parts of the sums or means over ranks, bucket by bucket."""
    N, rank = size_of(group), rank_of(group)
    out = [None if g is None or g.numel() else part_of(g, rank, N) for g in wholes]
    in_messages = by_owner(wholes, limit)

    def message(at: list[int]) -> Pending:
        of: list[Any] = [wholes[i] for i in at]
        return scatter_bucket(of, group, op, wire, [x.dtype for x in of])

    for at, parts in zip(in_messages, in_turn(map(message, in_messages)), strict=True):
        for i, part in zip(at, parts, strict=True):
            out[i] = part
    return out


def _to_owners(
    wholes: Sequence[Tensor | None], owners: Sequence[int], group: Group, divisor: int, limit: int
) -> list[Tensor | None]:
    """The sums over ranks, divided by `divisor`, of the leaves that this rank owns; other entries are undefined."""
    rank, out = rank_of(group), list(wholes)
    in_messages = by_owner(wholes, limit, owners)

    def message(at: list[int]) -> Pending:
        of: list[Any] = [wholes[i] for i in at]
        flat = torch.cat([x.reshape(-1) for x in of])
        work = dist.reduce(flat, group=group, group_dst=owners[at[0]], async_op=True)
        return Pending(work, lambda: split_as(flat, [x.shape for x in of]) if owners[at[0]] == rank else of)

    for at, sums in zip(in_messages, in_turn(map(message, in_messages)), strict=True):
        for i, x in zip(at, sums, strict=True):
            out[i] = _divided(x, divisor) if owners[i] == rank else x
    return out


def _divided(x: Tensor, divisor: int) -> Tensor:
    return x if divisor == 1 else x / divisor


def _in_wide(update: Tensor | None, param: Tensor) -> Tensor:
    """An update as it is sent: in a dtype that follows from the parameter's, zeros where it is None."""
    wide = torch.promote_types(param.dtype, torch.float32)
    return stand_in(param, wide, param.device) if update is None else update.to(wide)


def _check_arguments(what: str, reduce: Reduce, bucket_bytes: int | None) -> None:
    allowed = ("sum", "mean", "parts", None) if what == "sharded" else ("sum", "mean", None)
    if reduce not in allowed:
        names = ", ".join(f'"{x}"' for x in allowed if x)
        raise ValueError(f"{what}: reduce must be one of {names} or None, got {reduce!r}")
    if bucket_bytes is not None and bucket_bytes < 1:
        raise ValueError(f"{what}: bucket_bytes must be at least 1, got {bucket_bytes}")
