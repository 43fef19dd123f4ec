"""Tensor parallelism of a Transformer: each rank has some heads, some of the ffn's features, some of the vocabulary.

    plan = tensor_parallel.Plan(cfg, group, sequence_parallel=True)
    local = plan.shard(params)                                # this rank's tree; no message
    loss, metrics = plan.loss(local, batch, ops=FUSED)        # as transformer.loss(params, batch, cfg, ops=FUSED)
    step = make_step(plan.loss, optimizer, schedule, reduce=plan.reduce, norm=plan.global_norm)

All ranks of the group see the same batch and get the same loss; the model is `purelm.models.transformer` itself, on
the Config of one rank (`local_config`). q, k, v, w1 and w3 have their rows cut, output_proj and w2 their columns, the
token embedding and lm_head their rows (`vocab_parallel`); everything else is on every rank.

A sublayer's input is the same on all ranks and its output is a sum over ranks; the pairs of `conjugates` stand there:
`enter` and `leave`, or with sequence_parallel `gather_time` and `scatter_time`. Between sublayers a rank then has T / N
of the T positions, so norms and residuals take 1 / N of the memory, and gradients of what norms hold are sums over
ranks: `Plan.reduce` adds them.

Messages of one block, n bytes of x_BTD each: 2 all_reduce in forward and 2 in backward, or 2 all_gather and 2
reduce_scatter in each. A rank sends 4 n (N - 1) / N in forward and as much in backward, either way. Under `remat`
backward repeats those of forward, but for the block's last one.

Sources: Shoeybi et al. 2019 (arXiv:1909.08053), section 3; Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.
Differences: there is no dropout; what `gather_time` returns is kept for backward and not gathered again.
Legend: B batch, T positions, D d_model, N ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from purelm import tree
from purelm.dist import vocab_parallel
from purelm.dist.agreement import check_same_kind
from purelm.dist.collectives import all_reduce
from purelm.dist.conjugates import enter, gather_time, leave, scatter_time
from purelm.dist.sharding import gather_leaves, part_of
from purelm.dist.world import Group, rank_of, size_of
from purelm.dist.zero import global_norm
from purelm.models import transformer
from purelm.models.config import Config
from purelm.models.regional import made_once
from purelm.models.transformer import BlockFn, Params, identity
from purelm.ops import REFERENCE, Ops

__all__ = ["Plan", "cut_axis", "local_config", "shard", "unshard"]

VOCABULARY = ("token_embeddings", "lm_head")
ROWS = ("q_proj", "k_proj", "v_proj", "w1", "w3", *VOCABULARY)
COLUMNS = ("output_proj", "w2")
HEAD_NORMS = ("q_norm", "k_norm")  # one for all heads, of which a rank sees its own
WHOLE = ("ln1", "ln2", "ln1_post", "ln2_post", "ln_final", "position_embeddings", *HEAD_NORMS)


@dataclass(frozen=True)
class Plan:
    """How a Transformer is divided over the ranks of a group."""

    cfg: Config  # of the whole model
    group: Group = None
    sequence_parallel: bool = False  # between sublayers a rank has T / N positions

    def __post_init__(self) -> None:
        local_config(self.cfg, self.group)

    def shard(self, params: Params) -> Params:
        """This rank's tree; see `shard`."""
        return shard(params, self.cfg, self.group)

    def unshard(self, local: Params) -> Params:
        """The whole tree, of parameters or of gradients; see `unshard`."""
        return unshard(local, self.cfg, self.group)

    def loss(
        self,
        params: Params,
        batch: Mapping[str, Tensor],
        *,
        ops: Ops = REFERENCE,
        wrap_block: Callable[[BlockFn], BlockFn] = identity,
        z_loss: float = 0.0,
        chunk: int | None = None,
        bound: Any = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """`transformer.loss` of the whole model, from this rank's parameters and the whole batch; equal on all ranks.

        Gradients are those of the whole, cut like the parameters, once `reduce` has been applied. ops.attention and
        the like run on this rank's heads; ops.linear_cross_entropy gives way to `vocab_parallel`'s. wrap_block sees
        one layer's local parameters. bound: an `fsdp.Bound` whose `params` these are: this rank's parameters are cut
        over another group besides, and gathered when they are used (`fsdp.transformer_loss(tensor_parallel=)`).
        """
        options: dict[str, Any] = {"z_loss": z_loss, "chunk": chunk}
        N, T = size_of(self.group), batch["tokens"].shape[1]
        if N == 1 and bound is None:
            return transformer.loss(params, batch, self.cfg, ops=ops, wrap_block=wrap_block, **options)
        if self.sequence_parallel and T % N:
            raise ValueError(f'batch["tokens"] has {T} positions; sequence_parallel needs a multiple of the {N} ranks')

        local_ops = self._ops(ops)

        def wrapped(f: Any) -> BlockFn:
            key = self, replace(f, ops=ops)  # local_ops are made anew in each evaluation, of the same things
            plain = replace(f, ops=local_ops)
            made = made_once(wrap_block, key, lambda: wrap_block(self._wrap_block(plain)))
            return made if bound is None else bound.gathered(made)

        marked = {k: {"weight": _Vocabulary(v["weight"])} if k in VOCABULARY else v for k, v in params.items()}
        return transformer.loss(
            marked,
            batch,
            local_config(self.cfg, self.group),
            ops=local_ops if bound is None else bound.ops(local_ops),
            wrap_block=wrapped,
            **options,
        )

    def reduce(self, grads: Params) -> Params:
        """Gradients of `loss` made complete: those summed over ranks of which each rank has a share.

        These are norms of q and k, and with sequence_parallel all that is not cut. One all_reduce for all of them; none
        where there are none. For `make_step(reduce=)`; data parallelism comes after or before it.
        """
        if size_of(self.group) == 1:
            return grads
        shares, complete = tree.partition(self._is_share, grads)
        if not tree.leaves(shares):
            return grads
        flat, unravel = tree.ravel(shares)
        return tree.combine(unravel(all_reduce(flat, self.group, check=False)), complete)

    def global_norm(
        self, grads: Params, norm: Callable[[Any], Tensor] = tree.global_norm
    ) -> Float[Tensor, ""]:
        """`tree.global_norm` of the whole, from what `reduce` returned; one all_reduce of one number.

        For `make_step(norm=)` and `clip_by_global_norm(norm=)`. norm: of this rank's tree; where its leaves are cut
        over another axis besides, `fsdp.Plan.norm`: `partial(model.global_norm, norm=plan.norm)`.
        """
        if size_of(self.group) == 1:
            return norm(grads)
        cut, whole = tree.partition(lambda path, x: cut_axis(path) is not None, grads)
        over_ranks = global_norm(self.group)(norm(cut))
        return torch.hypot(over_ranks, norm(whole).to(over_ranks.device))

    def _is_share(self, path: str, _: Any) -> bool:
        return cut_axis(path) is None and (self.sequence_parallel or path.split(".")[-2] in HEAD_NORMS)

    def _enter(self, x_BTD: Tensor) -> Tensor:
        return gather_time(x_BTD, self.group) if self.sequence_parallel else enter(x_BTD, self.group)

    def _leave(self, x_BTD: Tensor) -> Tensor:
        return scatter_time(x_BTD, self.group) if self.sequence_parallel else leave(x_BTD, self.group)

    def _ops(self, base: Ops) -> Ops:
        """`base`, where weights marked as cut are met by their messages."""

        def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
            if isinstance(weight, _Rows):
                return base.linear(weight.enter(x), weight.weight, bias)
            if isinstance(weight, _Columns):
                y = self._leave(base.linear(x, weight.weight))
                return y if bias is None else y + bias
            return base.linear(x, weight, bias)

        def embedding(ids: Tensor, weight: Any) -> Tensor:
            if isinstance(weight, _Vocabulary):
                V = self.cfg.vocab_size
                return self._leave(vocab_parallel.embedding(ids, weight.weight, V, self.group, base.embedding))
            if self.sequence_parallel:  # learned positions
                ids = ids.chunk(size_of(self.group), -1)[rank_of(self.group)]
            return base.embedding(ids, weight)

        def linear_cross_entropy(hidden: Tensor, weight: Any, targets: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
            return vocab_parallel.linear_cross_entropy(
                self._enter(hidden), weight.weight, targets, self.cfg.vocab_size, self.group, **rest
            )

        return base._replace(linear=linear, embedding=embedding, linear_cross_entropy=linear_cross_entropy)

    def _wrap_block(self, f: BlockFn) -> BlockFn:
        """f, on a layer whose weights are marked."""

        def marked(module: Params) -> Params:
            enter_once = _once(self._enter)

            def mark(name: str, leaves: Params) -> Params:
                if name in ROWS:
                    return {**leaves, "weight": _Rows(leaves["weight"], enter_once)}
                return {**leaves, "weight": _Columns(leaves["weight"])} if name in COLUMNS else leaves

            return {name: mark(name, leaves) for name, leaves in module.items()}

        def local_block(layer: Params, x_BTD: Tensor, ctx: transformer.Context) -> Tensor:
            return f({**layer, "attn": marked(layer["attn"]), "ffn": marked(layer["ffn"])}, x_BTD, ctx)

        return local_block


class _Rows(NamedTuple):
    """A matrix of which a rank has some outputs; `enter` is shared by those that have the same input."""

    weight: Tensor
    enter: Callable[[Tensor], Tensor]


class _Columns(NamedTuple):
    """A matrix of which a rank has some inputs."""

    weight: Tensor


class _Vocabulary(NamedTuple):
    """A matrix of which a rank has the vectors of some tokens."""

    weight: Tensor


def _once(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """f, which is called once for one x: q, k and v share a message, in backward too. Lives as long as a block runs."""
    last: list[Tensor] = []

    def call(x: Tensor) -> Tensor:
        if not last or last[0] is not x:
            last[:] = [x, f(x)]
        return last[1]

    return call


def local_config(cfg: Config, group: Group = None) -> Config:
    """The Config of one rank's parameters; ValueError for a model that cannot be divided over the ranks."""
    N = size_of(group)
    if N == 1:
        return cfg
    for name, value in (("n_heads", cfg.n_heads), ("n_kv_heads", cfg.kv_heads), ("d_ff", cfg.ff_width)):
        if value % N:
            raise ValueError(f"cfg.{name} must be a multiple of the {N} ranks for tensor parallelism, got {value}")
    if cfg.qk_norm == "full":
        raise ValueError('cfg.qk_norm must be "none" or "head" for tensor parallelism: "full" is a norm over all heads')
    if any(x != "attention" for x in ((cfg.mixer,) if isinstance(cfg.mixer, str) else cfg.mixer)):
        raise ValueError(f'cfg.mixer must be "attention" for tensor parallelism, got {cfg.mixer!r}')
    return replace(
        cfg,
        vocab_size=-(-cfg.vocab_size // N),
        n_heads=cfg.n_heads // N,
        n_kv_heads=cfg.kv_heads // N,
        head_dim=cfg.head_width,
        d_ff=cfg.ff_width // N,
    )


def cut_axis(path: str) -> int | None:
    """The axis on which this leaf is cut; None for one that every rank has.

    >>> [cut_axis(f"layers.0.ffn.{name}") for name in ("w1.weight", "w1.bias", "w2.weight", "w2.bias")]
    [0, 0, 1, None]
    """
    module, leaf = path.split(".")[-2:]
    if module not in (*ROWS, *COLUMNS, *WHOLE):
        raise ValueError(f"{path}: tensor parallelism does not know how to divide this")
    if module in ROWS:
        return 0
    return 1 if module in COLUMNS and leaf == "weight" else None


def shard(params: Params, cfg: Config, group: Group = None) -> Params:
    """This rank's part of the whole parameters, in memory of its own where cut.

    A vocabulary that N does not divide is filled up with rows of zeros; these have gradients of 0. All ranks call it:
    ValueError on each, naming what differs, where their trees or Configs do; a message of 32 bytes.
    """
    rank, N = rank_of(group), size_of(group)
    check_same_kind({"cfg": asdict(cfg), "params": params}, group, "tensor_parallel.shard")
    local_config(cfg, group)
    if (V := len(params["token_embeddings"]["weight"])) != cfg.vocab_size:
        raise ValueError(f"params: token_embeddings.weight has {V} rows, but cfg.vocab_size is {cfg.vocab_size}")

    def part(path: str, x: Tensor) -> Tensor:
        axis = cut_axis(path)
        if axis is None:
            return x
        local = part_of(x.movedim(axis, 0), rank, N).movedim(0, axis).contiguous()
        local.is_part = True  # type: ignore[attr-defined]  # make_step asks for a norm of all
        return local

    return params if N == 1 else tree.map_with_path(part, params)


def unshard(local: Params, cfg: Config, group: Group = None) -> Params:
    """The inverse of `shard`, on every rank. Also for (reduced) gradients. Messages of `sharding.gathered`."""
    N = size_of(group)
    if N == 1:
        return local
    cut, whole = tree.partition(lambda path, x: cut_axis(path) is not None, local)
    axes = [cut_axis(path) or 0 for path in tree.paths(cut)]
    vocabulary = [path.split(".")[-2] in VOCABULARY for path in tree.paths(cut)]
    leaves, treedef = tree.flatten(cut)
    parts = [x.movedim(axis, 0).contiguous() for x, axis in zip(leaves, axes, strict=True)]
    rows = [cfg.vocab_size if v else N * len(x) for v, x in zip(vocabulary, parts, strict=True)]
    wholes = gather_leaves(parts, [(n, *x.shape[1:]) for n, x in zip(rows, parts, strict=True)], group)
    out = [x.movedim(0, axis).contiguous() for x, axis in zip(wholes, axes, strict=True)]
    return tree.combine(tree.unflatten(treedef, out), whole)
