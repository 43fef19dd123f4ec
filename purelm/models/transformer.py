"""The Transformer: Config, init, apply, loss, and cached decoding.

    cfg = Config(vocab_size=256, context_length=64, d_model=64, n_layers=2, n_heads=4)
    params = init(random.key(0), cfg)
    logits_BTV = apply(params, tokens_BT, cfg)

Parts lie beside this file: config, initialise, layers (the block), regional (what is made of a block, made once), cache
(prefill and decode).
Legend: B batch, T positions, D d_model, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.models.cache import KVCache, decode, decode_, init_cache, prefill
from purelm.models.config import Config, RopeScaling, config_from_dict
from purelm.models.initialise import Variance, course_init, gpt2_init, init, param_shapes, scaled_residual
from purelm.models.layers import (
    Context,
    block,
    context,
    embed,
    norm,
    readout,
    segment_positions,
    unembedding,
)
from purelm.models.regional import Block, made_once
from purelm.models.tokens import check_tokens
from purelm.ops import REFERENCE, Ops
from purelm.ops.precision import accumulator

__all__ = [
    "Block",
    "BlockFn",
    "Config",
    "KVCache",
    "RopeScaling",
    "Variance",
    "apply",
    "block",
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
    "loss",
    "param_shapes",
    "prefill",
    "scaled_residual",
    "unembedding",
]

Params = dict[str, Any]
BlockFn = Callable[[Params, Tensor, Context], Tensor]  # (one layer's params, x_BTD, ctx) -> x_BTD


def identity(f: BlockFn) -> BlockFn:
    return f


def _wrapped(wrap_block: Callable[[BlockFn], BlockFn], f: Block) -> BlockFn:
    return made_once(wrap_block, f, lambda: wrap_block(f))


def hidden(
    params: Params,
    tokens_BT: Int[Tensor, "b t"],
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    wrap_block: Callable[[BlockFn], BlockFn] = identity,
    segment_ids: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t d"]:
    """States after the final norm: what the unembedding is applied to. Arguments as for `apply`."""
    T = tokens_BT.shape[1]
    if cfg.position == "learned" and T > cfg.context_length:
        raise ValueError(f"tokens_BT must have at most context_length {cfg.context_length} positions, got {T}")
    positions = torch.arange(T, device=tokens_BT.device)
    if segment_ids is not None and cfg.position == "learned":
        positions = segment_positions(segment_ids)  # rotary ones are relative: a common offset changes nothing
    x_BTD = embed(params, tokens_BT, positions, cfg, ops)
    ctx = context(positions, segment_ids, cfg, length=T, dtype=x_BTD.dtype)
    windows = {cfg.window_of(i) for i in range(cfg.n_layers)}
    blocks = {w: _wrapped(wrap_block, Block(cfg, ops, w)) for w in windows}
    for i, layer in enumerate(params["layers"]):
        x_BTD = blocks[cfg.window_of(i)](layer, x_BTD, ctx)
    return norm(params.get("ln_final"), x_BTD, cfg, ops)


def apply(
    params: Params,
    tokens_BT: Int[Tensor, "b t"],
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    wrap_block: Callable[[BlockFn], BlockFn] = identity,
    segment_ids: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t v"]:
    """Logits of the next token at each position, in the parameters' dtype.

    Args:
        tokens_BT: ids in 0..vocab_size-1, not checked here (`check_tokens` does).
        ops: the maths to compute with.
        wrap_block: maps the block function (params, x_BTD, ctx) -> x_BTD to one of the same signature; remat,
            regional compilation and gathers of sharded parameters enter here. It is called once for equal cfg and ops,
            as long as it is the same function: make it outside of the loss, or wrap_block=lambda f: jit(f) in there
            compiles at each evaluation.
        segment_ids: documents of a packed row; tokens see only equal ids, so that a packed batch gives what separate
            documents give. Learned positions restart where an id begins.

    >>> from purelm import random
    >>> cfg = Config(vocab_size=8, context_length=4, d_model=4, n_layers=1, n_heads=2)
    >>> apply(init(random.key(0), cfg), torch.tensor([[1, 2, 3]]), cfg).shape
    torch.Size([1, 3, 8])
    """
    h_BTD = hidden(params, tokens_BT, cfg, ops=ops, wrap_block=wrap_block, segment_ids=segment_ids)
    return readout(params, h_BTD, cfg, ops)


def loss(
    params: Params,
    batch: Mapping[str, Tensor],
    cfg: Config,
    *,
    ops: Ops = REFERENCE,
    wrap_block: Callable[[BlockFn], BlockFn] = identity,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """sum_i w_i (nll_i + z_loss (log Z_i)^2) / denominator over all targets of the batch; nats, fp32.

    The denominator is batch["denominator"] if present, else the sum of the batch's weights (1 where that is 0, so a
    batch of nothing but padding has loss 0). With the same denominator in each part, losses, gradients and metrics of
    any split of a batch add up to the whole's.

    Args:
        batch: "tokens" and "targets" (B, T); optionally "weights" (B, T), "segment_ids" (B, T), "denominator" 0-d.
            Where a weight is 0 the target may be anything.
        z_loss: coefficient of (log Z)^2.
        chunk: tokens whose logits are held at a time (`purelm.ops.linear_cross_entropy`); all of them when None.
    Returns:
        (loss, metrics): metrics are detached and additive: nll, the loss without the z term; n_targets, the sum of
        weights.
    """
    targets, weights = batch["targets"], batch.get("weights")
    h_BTD = hidden(
        params, batch["tokens"], cfg, ops=ops, wrap_block=wrap_block, segment_ids=batch.get("segment_ids")
    )
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
