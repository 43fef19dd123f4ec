"""One Transformer block and its parts, as functions of their parameters.

Legend: B batch, T positions, D d_model, H query heads, G key/value heads, K head dim, F ffn width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.models.config import Config
from purelm.ops import Ops
from purelm.ops.rope import rope_tables
from purelm.ops.softcap import soft_cap

__all__ = [
    "Attend",
    "Context",
    "attend_all",
    "block",
    "context",
    "embed",
    "feed_forward",
    "norm",
    "readout",
    "segment_lengths",
    "segment_positions",
    "unembedding",
]

Params = dict[str, Any]
Attend = Callable[..., Tensor]  # (q_BTHK, k_BTGK, v_BTGK, *, segment_ids) -> o_BTHK


class Context(NamedTuple):
    """What every block of one forward pass shares; None where the model or the batch has no such thing."""

    cos: Tensor | None  # (T, K/2) or (B, T, K/2): rotary tables
    sin: Tensor | None
    segment_ids: Any  # (B, T), or a pair for queries and keys


def segment_positions(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Position within the run of equal ids: 0 where an id begins.

    >>> segment_positions(torch.tensor([[1, 1, 2, 2, 2, 0]]))
    tensor([[0, 1, 0, 1, 2, 0]])
    """
    at = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.zeros_like(segment_ids, dtype=torch.bool)
    begins = torch.cat([begins[:, :1], segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    return at - torch.cummax(torch.where(begins, at, 0), 1).values


def segment_lengths(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Number of positions of the row that have the same id.

    >>> segment_lengths(torch.tensor([[1, 1, 2, 2, 2, 0]]))
    tensor([[2, 2, 3, 3, 3, 1]])
    """
    ids_BT = segment_ids.contiguous()
    sorted_BT = torch.sort(ids_BT, -1).values
    return torch.searchsorted(sorted_BT, ids_BT, right=True) - torch.searchsorted(sorted_BT, ids_BT)


def context(positions: Tensor, segment_ids: Any, cfg: Config, *, length: int, dtype: torch.dtype) -> Context:
    """Tables for these positions, (T,) or (B, T); `length` positions are in play (dynamic_ntk looks at it)."""
    if cfg.position != "rope":
        return Context(None, None, segment_ids)
    n: int | Tensor = length
    if segment_ids is not None and cfg.rope_scaling is not None and cfg.rope_scaling.kind == "dynamic_ntk":
        # Of the document, or what it shares a row with would change it.
        n = segment_lengths(segment_ids[0] if isinstance(segment_ids, tuple) else segment_ids)
    # fp32 whatever the compute dtype: a bf16 cosine is off by 0.2 %. fp64 where a test asks for it.
    dtype = torch.promote_types(dtype, torch.float32)
    cos, sin = rope_tables(
        positions, cfg.head_width, cfg.rope_theta, cfg.rope_scaling, length=n, dtype=dtype
    )
    return Context(cos, sin, segment_ids)


def embed(params: Params, tokens_BT: Tensor, positions: Tensor, cfg: Config, ops: Ops) -> Float[Tensor, "b t d"]:
    """Token vectors, plus those of positions where these are learned."""
    x_BTD = ops.embedding(tokens_BT, params["token_embeddings"]["weight"])
    if cfg.position == "learned":
        x_BTD = x_BTD + ops.embedding(positions, params["position_embeddings"]["weight"])
    return x_BTD


def unembedding(params: Params, cfg: Config) -> Float[Tensor, "v d"]:
    """The matrix from states to logits: the token embeddings themselves when tied."""
    return params["token_embeddings" if cfg.tie_embeddings else "lm_head"]["weight"]


def readout(params: Params, h: Float[Tensor, "*b d"], cfg: Config, ops: Ops) -> Float[Tensor, "*b v"]:
    """Logits of final states."""
    return soft_cap(ops.linear(h, unembedding(params, cfg)), cfg.logit_softcap)


def norm(params: Params | None, x: Tensor, cfg: Config, ops: Ops) -> Tensor:
    """The model's norm; no parameters, no norm."""
    if params is None:
        return x
    if cfg.norm == "layer":
        return ops.layer_norm(x, params["weight"], params.get("bias"), cfg.norm_eps)
    return ops.rms_norm(x, params["weight"], cfg.norm_eps)


def block(
    params: Params, x_BTD: Float[Tensor, "b t d"], ctx: Context, *, cfg: Config, ops: Ops, attend: Attend
) -> Float[Tensor, "b t d"]:
    """Attention, then feed-forward, each added to the residual stream.

    `attend(q, k, v, segment_ids=ctx.segment_ids)` is where positions meet: a plain attention, or one that reads a
    cache.
    """

    def mix(h_BTD: Tensor) -> Tensor:
        q, k, v = _project(params["attn"], h_BTD, ctx, cfg, ops)
        o_BTHK = attend(q, k, v, segment_ids=ctx.segment_ids)
        return _linear(params["attn"]["output_proj"], o_BTHK.flatten(2), ops)

    x_BTD = _residual(mix, params, "ln1", x_BTD, cfg, ops)
    return _residual(partial(feed_forward, params["ffn"], cfg=cfg, ops=ops), params, "ln2", x_BTD, cfg, ops)


def attend_all(cfg: Config, ops: Ops, window: int | None) -> Attend:
    """Attention over the sequence itself; a bidirectional model sees `window` keys to each side."""
    sides = window if cfg.causal or window is None else (window, window)
    return partial(
        ops.attention, causal=cfg.causal, window=sides, scale=cfg.attention_scale, softcap=cfg.attention_softcap
    )


def feed_forward(params: Params, x: Float[Tensor, "b t d"], *, cfg: Config, ops: Ops) -> Float[Tensor, "b t d"]:
    """W2 act(W1 x), or W2 (act(W1 x) * W3 x) where gated."""
    gate = _linear(params["w1"], x, ops)
    if cfg.ffn == "swiglu":
        inner = ops.swiglu(gate, _linear(params["w3"], x, ops))
    elif cfg.ffn == "geglu":
        inner = ops.geglu(gate, _linear(params["w3"], x, ops), cfg.gelu_tanh)
    elif cfg.ffn == "gelu":
        inner = ops.gelu(gate, cfg.gelu_tanh)
    else:
        inner = ops.silu(gate) if cfg.ffn == "silu" else ops.relu2(gate)
    return _linear(params["w2"], inner, ops)


def _linear(params: Params, x: Tensor, ops: Ops) -> Tensor:
    return ops.linear(x, params["weight"], params.get("bias"))


def _residual(
    f: Callable[[Tensor], Tensor], params: Params, name: str, x: Tensor, cfg: Config, ops: Ops
) -> Tensor:
    """x + f(x) with the norm(s) called `name` where the Config puts them."""
    first = params.get(name)
    if cfg.norm_position == "post":
        return norm(first, x + f(x), cfg, ops)
    if cfg.norm_position == "output":
        return x + norm(first, f(x), cfg, ops)
    y = f(norm(first, x, cfg, ops))
    if cfg.norm_position == "sandwich":
        y = norm(params[f"{name}_post"], y, cfg, ops)
    return x + y


def _project(
    params: Params, h_BTD: Tensor, ctx: Context, cfg: Config, ops: Ops
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B,T,H,K), k and v (B,T,G,K): projected, normed where the Config says so, and turned."""
    q, k, v = (_linear(params[name], h_BTD, ops) for name in ("q_proj", "k_proj", "v_proj"))
    if cfg.qk_norm == "full":
        q, k = _qk_norm(params, q, k, cfg, ops)
    q, k, v = (x.unflatten(-1, (-1, cfg.head_width)) for x in (q, k, v))
    if cfg.qk_norm == "head":
        q, k = _qk_norm(params, q, k, cfg, ops)
    if ctx.cos is not None:
        q, k = (ops.rope(x, ctx.cos, ctx.sin, cfg.rope_layout) for x in (q, k))
    return q, k, v


def _qk_norm(params: Params, q: Tensor, k: Tensor, cfg: Config, ops: Ops) -> tuple[Tensor, Tensor]:
    q = ops.rms_norm(q, params["q_norm"]["weight"], cfg.norm_eps)
    return q, ops.rms_norm(k, params["k_norm"]["weight"], cfg.norm_eps)
