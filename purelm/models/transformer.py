"""The Transformer: a Config, `make`, which turns it into a Model, and the same functions with cfg as an argument.

    cfg = Config(vocab_size=256, context_length=64, d_model=64, n_layers=2, n_heads=4)
    model = make(cfg)
    params = model.init(random.key(0))
    logits_BTV = model.apply(params, tokens_BT)         # or apply(params, tokens_BT, cfg)

The parts are modules beside this one: config, leaves (the parameters), block, mixers, feed_forward, norms, cache.
Legend: B batch, T positions, D d_model, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm import random
from purelm.models.block import Layer, apply_norm
from purelm.models.block import block as run_block
from purelm.models.cache import Cache, cached_blocks, decode, decode_, init_cache, prefill
from purelm.models.config import Config, RopeScaling, config_from_dict
from purelm.models.context import Context, contexts, segment_positions
from purelm.models.embedding import embed, readout, unembedding
from purelm.models.initialise import course_init, gpt2_init, scaled_residual
from purelm.models.layers import kinds_of, layer_of, leaves
from purelm.models.leaves import Leaf, Params, Std, check_params, init_leaves
from purelm.models.model import Model
from purelm.models.tokens import check_tokens
from purelm.ops import REFERENCE, Ops
from purelm.ops.precision import accumulator

__all__ = [
    "BlockFn",
    "Cache",
    "Config",
    "Context",
    "Leaf",
    "Model",
    "RopeScaling",
    "Std",
    "apply",
    "check_params",
    "check_tokens",
    "config_from_dict",
    "course_init",
    "decode",
    "decode_",
    "gpt2_init",
    "hidden",
    "identity",
    "init",
    "init_cache",
    "layer_of",
    "leaves",
    "log_probs",
    "loss",
    "make",
    "prefill",
    "scaled_residual",
    "unembedding",
]

BlockFn = Callable[[Params, Tensor, Context], Tensor]  # (one layer's params, x_BTD, ctx) -> x_BTD
WrapBlock = Callable[[BlockFn], BlockFn]


def identity(f: BlockFn) -> BlockFn:
    """f itself: the default `wrap_block`."""
    return f


def make(
    cfg: Config,
    ops: Ops = REFERENCE,
    wrap_block: Callable[[Callable[..., Any]], Callable[..., Any]] = identity,
    *,
    std: Std = course_init,
) -> Model:
    """The Model of this Config, computed with these ops.

    Args:
        wrap_block: maps the block function (params, x_BTD, ctx) -> x_BTD to one of the same signature, to add remat,
            compile each block by itself, or gather sharded parameters. `make` calls it twice for each kind of layer:
            with this function, and with the cached one (params, x_BTD, ctx, state, reads) -> (x_BTD, state).
        std: (path, leaf) -> standard deviation of a matrix's initial values.

    >>> model = make(Config(vocab_size=8, context_length=4, d_model=4, n_layers=1, n_heads=2))
    >>> params = model.init(random.key(0))
    >>> model.apply(params, torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 8])
    """
    blocks = _blocks(cfg, ops, wrap_block)
    cached = cached_blocks(cfg, ops, wrap_block)
    table = leaves(cfg, std)
    return Model(
        init=partial(_init, table),
        leaves=table,
        hidden=partial(_hidden, cfg, ops, blocks),
        unembedding=partial(_unembedding, cfg),
        apply=partial(_apply, cfg, ops, blocks),
        loss=partial(_loss, cfg, ops, blocks),
        log_probs=partial(_log_probs, cfg, ops, blocks),
        init_cache=partial(init_cache, cfg),
        prefill=partial(prefill, cfg=cfg, ops=ops, blocks=cached),
        decode=partial(decode, cfg=cfg, ops=ops, blocks=cached),
        decode_=partial(decode_, cfg=cfg, ops=ops, blocks=cached),
        vocab_size=cfg.vocab_size,
        context_length=cfg.context_length,
        config=cfg,
    )


def init(
    key: random.Key, cfg: Config, std: Std = course_init, dtype: torch.dtype = torch.float32
) -> Params:
    """Fresh parameters: matrices std(path, leaf) * N(0, 1), truncated at 3 std; norm weights 1; biases 0.

    Drawn in fp32 and cast to `dtype`, on the key's device.

    >>> cfg = Config(vocab_size=8, context_length=4, d_model=4, n_layers=1, n_heads=2)
    >>> init(random.key(0), cfg)["layers"][0]["attn"]["q_proj"]["weight"].shape
    torch.Size([4, 4])
    """
    return init_leaves(key, leaves(cfg, std), dtype)


def hidden(
    params: Params,
    tokens_BT: Int[Tensor, "b t"],
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    wrap_block: WrapBlock = identity,
    segment_ids: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t d"]:
    """States after the final norm, to which the unembedding is applied. Arguments as for `apply`."""
    return _hidden(cfg, ops, _blocks(cfg, ops, wrap_block), params, tokens_BT, segment_ids=segment_ids)


def apply(
    params: Params,
    tokens_BT: Int[Tensor, "b t"],
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    wrap_block: WrapBlock = identity,
    segment_ids: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t v"]:
    """Logits of the next token at each position, in the parameters' dtype.

    Args:
        tokens_BT: ids in 0..vocab_size-1, not checked here (`check_tokens` does).
        ops: the functions to compute with.
        wrap_block: as for `make`, but called anew in every call: give a wrapper that compiles to `make` instead.
        segment_ids: which document of a packed row each token belongs to. A token sees only tokens of its own document,
            so that logits are those of the documents by themselves; learned positions restart at each document.

    >>> cfg = Config(vocab_size=8, context_length=4, d_model=4, n_layers=1, n_heads=2)
    >>> apply(init(random.key(0), cfg), torch.tensor([[1, 2, 3]]), cfg).shape
    torch.Size([1, 3, 8])
    """
    return _apply(cfg, ops, _blocks(cfg, ops, wrap_block), params, tokens_BT, segment_ids=segment_ids)


def loss(
    params: Params,
    batch: Mapping[str, Tensor],
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    wrap_block: WrapBlock = identity,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """sum_i w_i (nll_i + z_loss (log Z_i)^2) / denominator over all targets i of the batch; nats, fp32.

    w_i are the weights, 1 without batch["weights"]. The denominator is batch["denominator"] if present, else sum_i w_i
    (or 1 if that is 0, so that a batch of padding has loss 0). If all parts of a batch get one denominator, the sums of
    their losses, gradients and metrics are those of the whole batch, however it is divided.

    Args:
        batch: "tokens" and "targets" (B, T); optionally "weights" (B, T), "segment_ids" (B, T), "denominator" 0-d.
            A target of weight 0 may be any number.
        z_loss: coefficient of (log Z)^2, Z being the sum of exp(logits).
        chunk: tokens whose logits are held at a time (`purelm.ops.linear_cross_entropy`); None: all.
    Returns:
        (loss, metrics): detached metrics nll, the loss without the z term, and n_targets, the sum of the weights.
    """
    return _loss(cfg, ops, _blocks(cfg, ops, wrap_block), params, batch, z_loss=z_loss, chunk=chunk)


def log_probs(
    params: Params,
    batch: Mapping[str, Tensor],
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    wrap_block: WrapBlock = identity,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """(log p(target), entropy of p) at each position, with p = softmax(logits / temperature); nats, fp32.

    Both are 0, with zero gradient, where batch["weights"] is 0.

    Args:
        batch: as for `loss`; "denominator" is ignored.
        chunk: tokens whose logits are held at a time (`purelm.ops.log_probs`); None: all.
    """
    return _log_probs(cfg, ops, _blocks(cfg, ops, wrap_block), params, batch, temperature=temperature, chunk=chunk)


# Both forms, Model's and the plain functions, call these: functions of (cfg, ops, wrapped block functions by kind).

Blocks = Sequence[BlockFn]
BATCH = ("tokens", "targets", "weights", "segment_ids", "denominator")


def _blocks(cfg: Config, ops: Ops, wrap_block: WrapBlock) -> Blocks:
    def one(layer: Layer) -> BlockFn:
        def block(params: Params, x_BTD: Tensor, ctx: Context) -> Tensor:
            return run_block(layer, params, x_BTD, ctx, ops)

        return wrap_block(block)

    return [one(layer) for layer in kinds_of(cfg).layers]


def _init(table: Mapping[str, Leaf], key: random.Key, dtype: torch.dtype = torch.float32) -> Params:
    return init_leaves(key, table, dtype)


def _unembedding(cfg: Config, params: Params) -> Tensor:
    return unembedding(params, cfg)


def _hidden(
    cfg: Config, ops: Ops, blocks: Blocks, params: Params, tokens_BT: Tensor, *, segment_ids: Tensor | None = None
) -> Tensor:
    # Not under tensor parallelism, which replaces ops.enter: a process then holds parts of parameters.
    if not torch.compiler.is_compiling() and ops.enter is REFERENCE.enter:
        check_params(params, leaves(cfg))
    if tokens_BT.ndim != 2:
        raise ValueError(f"tokens_BT must have 2 axes, (batch, positions), got shape {tuple(tokens_BT.shape)}")
    T = tokens_BT.shape[1]
    if cfg.position == "learned" and T > cfg.context_length:
        raise ValueError(f"tokens_BT must have at most context_length {cfg.context_length} positions, got {T}")
    positions = torch.arange(T, device=tokens_BT.device)
    if segment_ids is not None and cfg.position == "learned":
        positions = segment_positions(segment_ids)  # not for rope: attention is unchanged by a document's offset
    x_BTD = embed(params, tokens_BT, positions, cfg, ops)
    kinds = kinds_of(cfg)
    by_kind = contexts(positions, segment_ids, cfg, kinds.ropes, length=T, dtype=x_BTD.dtype)
    for kind, layer in zip(kinds.of, params["layers"], strict=True):
        x_BTD = blocks[kind](layer, x_BTD, by_kind[kind])
    return ops.final(apply_norm(kinds.norm, params, "ln_final", x_BTD, ops))


def _apply(
    cfg: Config, ops: Ops, blocks: Blocks, params: Params, tokens_BT: Tensor, *, segment_ids: Tensor | None = None
) -> Tensor:
    return readout(params, _hidden(cfg, ops, blocks, params, tokens_BT, segment_ids=segment_ids), cfg, ops)


def _loss(
    cfg: Config,
    ops: Ops,
    blocks: Blocks,
    params: Params,
    batch: Mapping[str, Tensor],
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    _check_batch(batch)
    targets, weights = batch["targets"], batch.get("weights")
    h_BTD = _hidden(cfg, ops, blocks, params, batch["tokens"], segment_ids=batch.get("segment_ids"))
    if weights is None:
        n_targets = torch.full((), float(targets.numel()), dtype=torch.float32, device=targets.device)
    else:
        n_targets = weights.sum(dtype=accumulator(weights.dtype))
    denominator = batch.get("denominator")
    if denominator is None:
        denominator = torch.where(n_targets == 0.0, 1.0, n_targets)
    value, nll = ops.linear_cross_entropy(
        h_BTD,
        unembedding(params, cfg),
        targets,
        weights=weights,
        denominator=denominator,
        softcap=cfg.logit_softcap,
        z_loss=z_loss,
        chunk=chunk,
    )
    return value, {"nll": nll, "n_targets": n_targets.detach()}


def _log_probs(
    cfg: Config,
    ops: Ops,
    blocks: Blocks,
    params: Params,
    batch: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    _check_batch(batch)
    targets, weights = batch["targets"], batch.get("weights")
    h_BTD = _hidden(cfg, ops, blocks, params, batch["tokens"], segment_ids=batch.get("segment_ids"))
    ignore_index = None if weights is None else -1
    if weights is not None:
        targets = torch.where(weights == 0, -1, targets)
    return ops.log_probs(
        h_BTD,
        unembedding(params, cfg),
        targets,
        softcap=cfg.logit_softcap,
        temperature=temperature,
        chunk=chunk,
        ignore_index=ignore_index,
    )


def _check_batch(batch: Mapping[str, Tensor]) -> None:
    unknown = [name for name in batch if name not in BATCH]
    missing = [name for name in BATCH[:2] if name not in batch]
    if unknown or missing:
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(map(str, unknown))}"
        raise ValueError(f"batch {what}: it must have tokens and targets, and may have {', '.join(BATCH[2:])}")
