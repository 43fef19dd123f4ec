"""Tensor parallelism: each rank has some heads, some of the ffn's features, some of the vocabulary.

    layout = tensor_parallel.Layout(cfg.vocab_size, group, sequence_parallel=True)
    model = transformer.make(cfg, ops=layout.ops(FUSED), wrap_block=remat)
    strategy = tensor_parallel.strategy(model, layout)
    state = init_state(params, optimizer, strategy=strategy)             # this rank's part of the whole params
    step = make_step(model.loss, optimizer, schedule, strategy=strategy)

All ranks of the group are given the same batch and get the same loss. The model's leaf table says along which axis a
leaf is cut (`Leaf.cut`): q, k, v, w1 and w3 by rows, output_proj and w2 by columns, the token embedding and lm_head by
rows (`vocab_parallel`); all other leaves are replicated. A model takes its sizes from the parameters that it is given,
so its code stays as it is: messages are sent where it calls `ops.enter`, `ops.linear_out`, `ops.embedding`,
`ops.final`, `ops.unembed`, `ops.linear_cross_entropy` and `ops.log_probs`.

A sublayer's input is the same on all ranks, and its output is a sum over ranks. So it begins and ends with a pair of
`conjugates`: `enter` and `leave`, or with sequence_parallel `gather_time` and `scatter_time`. In the second case a rank
has T / N of the T positions between sublayers: activations of norms and residuals take 1 / N of the memory, and each
rank has a share of the gradients of norm weights, which the strategy's `reduce` sums. `model.hidden`, `model.apply` and
`model.log_probs` return whole tensors, the same on all ranks, so any loss can be computed from them. A matrix that is
cut must be used through ops.

Messages of one block, each of the n bytes of x_BTD: 2 all_reduces in forward and 2 in backward; with sequence_parallel
2 all_gathers and 2 reduce_scatters in each. Either way a rank sends 4 n (N - 1) / N bytes in forward, and as many in
backward. Under `remat`, backward also repeats the messages of forward but for the block's last.

Sources: Shoeybi et al. 2019 (arXiv:1909.08053), section 3; Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.
Differences: there is no dropout; what `gather_time` returns is kept for backward and not gathered again.
Legend: B batch, T positions, D d_model, N ranks.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.dist import vocab_parallel
from purelm.dist.agreement import check_same_kind
from purelm.dist.collectives import all_reduce
from purelm.dist.conjugates import enter, gather_time, leave, scatter_time, whole
from purelm.dist.sharding import gather_leaves, part_of, part_shape
from purelm.dist.world import Group, rank_of, size_of
from purelm.dist.zero import global_norm
from purelm.ops import Ops
from purelm.train import ALONE, Loss, Strategy
from purelm.transforms import accumulate, value_and_grad

__all__ = ["Layout", "like", "shard", "strategy", "unshard"]

Params = dict[str, Any]
Leaves = Mapping[str, Any]  # path -> models.leaves.Leaf


@dataclass(frozen=True)
class Layout:
    """How a model is divided over the ranks of a group."""

    vocab_size: int  # of the whole model
    group: Group = None
    sequence_parallel: bool = False  # between sublayers a rank has T / N positions
    calls: Counter[str] = field(default_factory=Counter, compare=False, repr=False)  # of each op, in eager code

    def ops(self, base: Ops) -> Ops:
        """The ops of `base`, with messages where sublayers begin and end and where the vocabulary is used.

        Attention, rope and gates run on this rank's heads and features. Losses are replaced by those of
        `vocab_parallel`.
        """
        group, V = self.group, self.vocab_size
        if size_of(group) == 1:
            return base

        def enter_sublayer(x_BtD: Tensor) -> Tensor:
            self._count("enter")
            return gather_time(x_BtD, group) if self.sequence_parallel else enter(x_BtD, group)

        def linear_out(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            self._count("linear_out")
            y = self._leave(base.linear(x, weight))
            return y if bias is None else y + bias

        def embedding(ids: Tensor, part_MD: Tensor) -> Tensor:
            self._count("embedding")
            if self.sequence_parallel and ids.shape[-1] % size_of(group):
                raise ValueError(
                    f'batch["tokens"] has {ids.shape[-1]} positions; sequence_parallel needs a multiple of the '
                    f"{size_of(group)} ranks"
                )
            return self._leave(vocab_parallel.embedding(ids, part_MD, V, group, base.embedding))

        def position_embedding(ids: Tensor, weight: Tensor) -> Tensor:
            ids = ids.chunk(size_of(group), -1)[rank_of(group)] if self.sequence_parallel else ids
            return base.position_embedding(ids, weight)

        def final(x_BtD: Tensor) -> Tensor:
            return whole(x_BtD, 1, group) if self.sequence_parallel else x_BtD

        def unembed(x: Tensor, part_MD: Tensor) -> Tensor:
            return whole(base.unembed(enter(x, group), part_MD), -1, group)[..., :V]

        def linear_cross_entropy(hidden: Tensor, part_MD: Tensor, targets: Tensor, **rest: Any) -> Any:
            return vocab_parallel.linear_cross_entropy(enter(hidden, group), part_MD, targets, V, group, **rest)

        def log_probs(hidden: Tensor, part_MD: Tensor, targets: Tensor, **rest: Any) -> Any:
            return vocab_parallel.log_probs(enter(hidden, group), part_MD, targets, V, group, **rest)

        return base._replace(
            enter=enter_sublayer,
            linear_out=linear_out,
            embedding=embedding,
            position_embedding=position_embedding,
            final=final,
            unembed=unembed,
            linear_cross_entropy=linear_cross_entropy,
            log_probs=log_probs,
        )

    def _leave(self, x_BTD: Tensor) -> Tensor:
        return scatter_time(x_BTD, self.group) if self.sequence_parallel else leave(x_BTD, self.group)

    def _count(self, op: str) -> None:
        if not torch.compiler.is_compiling():
            self.calls[op] += 1


def strategy(model: Any, layout: Layout, data: Strategy = ALONE) -> Strategy:
    """Each rank holds its part of the leaves that the leaf table cuts; the loss is the same on all ranks.

    Args:
        model: a Model made with layout.ops; or, of one with an added head for example, a leaf table.
        data: the strategy of another axis of a mesh, `ddp.strategy(data_group)` or
            `fsdp.strategy(like(model, layout), data_group)`: it divides this rank's part further.
    ValueError for a model that cannot be divided over the ranks.
    """
    leaves = _table(model)
    N, group = size_of(layout.group), layout.group
    if N == 1:
        return data
    _check_cuts(leaves, N)
    if (V := getattr(model, "vocab_size", layout.vocab_size)) != layout.vocab_size:
        raise ValueError(f"layout.vocab_size is {layout.vocab_size}, the model's is {V}")

    def is_share(path: str, _: Any) -> bool:
        leaf = _leaf(leaves, path)
        has_some_positions = layout.sequence_parallel and leaf.place == "stream"
        return leaf.cut is None and (leaf.place == "sublayer" or has_some_positions)

    def reduce(grads: Params) -> Params:
        """Complete gradients: those of which each rank has a share are summed, by one all_reduce (none, no message)."""
        grads = data.reduce(grads)
        shares, complete = tree.partition(is_share, grads)
        if not tree.leaves(shares):
            return grads
        flat, unravel = tree.ravel(shares)
        return tree.combine(unravel(all_reduce(flat, group, check=False)), complete)

    def norm(grads: Params) -> Tensor:
        """The norm of the whole gradient, each leaf counted once; one all_reduce of one number, besides data.norm's."""
        cut, same = tree.partition(lambda path, x: _leaf(leaves, path).cut is not None, grads)
        over_ranks = global_norm(group)(data.norm(cut))
        return torch.hypot(over_ranks, data.norm(same).to(over_ranks.device))

    def differentiate(loss: Loss, *, microbatches: int = 1, compute: torch.dtype | None = None) -> Any:
        if data.differentiate is not None:
            gradient = data.differentiate(loss, microbatches=microbatches, compute=compute)
        else:
            gradient = value_and_grad(loss, has_aux=True)
            gradient = accumulate(gradient, microbatches) if microbatches > 1 else gradient

        def checked(params: Any, batch: Any) -> Any:
            before = layout.calls.copy()
            out = gradient(params, batch)
            _check_calls(layout.calls - before)
            return out

        return checked

    return Strategy(
        prepare=data.prepare,
        differentiate=differentiate,
        reduce=reduce,
        norm=norm,
        optimizer=data.optimizer,
        shard=lambda params: data.shard(shard(params, leaves, group)),
        unshard=lambda local: unshard(data.unshard(local), leaves, group),
        evaluate=data.evaluate,
    )


def _check_calls(calls: Counter[str]) -> None:
    """ValueError unless the model was made with layout.ops, and calls `enter` and `linear_out` equally often."""
    if not calls["embedding"]:
        raise ValueError("tensor_parallel: the model was not made with layout.ops(...), and takes parts for wholes")
    if calls["enter"] != calls["linear_out"]:
        raise ValueError(
            f"tensor_parallel: ops.enter was called {calls['enter']} times and ops.linear_out {calls['linear_out']} "
            "times: each sublayer must call both once, or sums over ranks are wrong"
        )


def _table(model: Any) -> Leaves:
    leaves = getattr(model, "leaves", model)
    if not isinstance(leaves, Mapping):
        raise ValueError(f"model must be a Model or a leaf table, path -> Leaf, got {type(model).__name__}")
    return leaves


def _leaf(leaves: Leaves, path: str) -> Any:
    if path not in leaves:
        raise ValueError(f"{path}: tensor parallelism does not know how to divide this; it is not in the leaf table")
    return leaves[path]


def _check_cuts(leaves: Leaves, N: int) -> None:
    for path, leaf in leaves.items():
        if leaf.cut is not None and leaf.cut.units is not None and leaf.cut.units % N:
            raise ValueError(
                f"{path}: {leaf.cut.what} must be a multiple of the {N} ranks for tensor parallelism, "
                f"got {leaf.cut.units}"
            )


def like(model: Any, layout: Layout, dtype: torch.dtype = torch.float32) -> Params:
    """A tree on the meta device with the shapes of one rank's part, for a strategy that divides it further."""
    N = size_of(layout.group)

    def local(leaf: Any) -> Tensor:
        shape = list(leaf.shape)
        if N > 1 and leaf.cut is not None:
            shape[leaf.cut.axis] = part_shape((shape[leaf.cut.axis],), N)[0]
        return torch.empty(shape, dtype=dtype, device="meta")

    return tree.from_flat({path: local(leaf) for path, leaf in _table(model).items()})


def shard(params: Params, model: Any, group: Group = None) -> Params:
    """This rank's part of the whole parameters; leaves that are cut are copied. model: a Model or its leaf table.

    A vocabulary that N does not divide is padded with rows of zeros, whose gradients are 0. All ranks call it:
    ValueError on each, naming the leaf, if their trees differ, for which each sends 32 bytes.
    """
    leaves, rank, N = _table(model), rank_of(group), size_of(group)
    if N == 1:
        return params
    table = {path: (leaf.shape, None if leaf.cut is None else leaf.cut.axis) for path, leaf in leaves.items()}
    check_same_kind({"leaves": table, "params": params}, group, "tensor_parallel.shard")
    _check_cuts(leaves, N)

    def part(path: str, x: Tensor) -> Tensor:
        leaf = _leaf(leaves, path)
        if tuple(x.shape) != leaf.shape:
            raise ValueError(f"params: {path} has shape {tuple(x.shape)}, the leaf table says {leaf.shape}")
        if leaf.cut is None:
            return x
        axis = leaf.cut.axis
        local = part_of(x.movedim(axis, 0), rank, N).movedim(0, axis).contiguous()
        local.is_part = True  # type: ignore[attr-defined]  # make_step then needs strategy.norm
        return local

    return tree.map_with_path(part, params)


def unshard(local: Params, model: Any, group: Group = None) -> Params:
    """The inverse of `shard`, on every rank; also for (reduced) gradients. Sends as `sharding.gathered` does."""
    leaves = _table(model)
    if size_of(group) == 1:
        return local
    cut, same = tree.partition(lambda path, x: _leaf(leaves, path).cut is not None, local)
    of = [_leaf(leaves, path) for path in tree.paths(cut)]
    parts, treedef = tree.flatten(cut)
    parts = [x.movedim(leaf.cut.axis, 0).contiguous() for x, leaf in zip(parts, of, strict=True)]
    shapes = [
        (leaf.shape[leaf.cut.axis], *x.shape[1:]) for x, leaf in zip(parts, of, strict=True)
    ]
    wholes = gather_leaves(parts, shapes, group)
    out = [x.movedim(0, leaf.cut.axis).contiguous() for x, leaf in zip(wholes, of, strict=True)]
    return tree.combine(tree.unflatten(treedef, out), same)
