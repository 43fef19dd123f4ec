"""The layers that a Config describes, and its leaf table."""

import math
from typing import NamedTuple

import torch

from purelm.caches import memo
from purelm.models.block import Layer, layer_leaves
from purelm.models.config import Config
from purelm.models.feed_forward import FeedForward, built_in
from purelm.models.initialise import course_init
from purelm.models.leaves import Cut, Leaf, Std, with_prefix, with_std
from purelm.models.mixers import Mixer
from purelm.models.mixers.attention import attention
from purelm.models.norms import Norm, layer_norm, rms_norm
from purelm.ops.rope import RopeScaling

__all__ = ["Kinds", "counted_layers", "kinds_of", "layer_of", "leaves", "leaves_of_layer", "leaves_outside", "norm_of"]


class Kinds(NamedTuple):
    """The distinct layers of a model, and which of them each layer is."""

    layers: tuple[Layer, ...]  # the distinct ones
    of: tuple[int, ...]  # layer i of the model is layers[of[i]]
    norm: Norm | None  # the norm after the last block
    ropes: tuple[tuple[float, RopeScaling | None], ...]  # (theta, scaling) of each distinct layer


def norm_of(cfg: Config) -> Norm | None:
    """The norm that cfg.norm names or is; None for "none"."""
    if not isinstance(cfg.norm, str):
        return cfg.norm
    if cfg.norm == "none":
        return None
    return rms_norm(cfg.norm_eps) if cfg.norm == "rms" else layer_norm(cfg.norm_eps, cfg.biases == "all")


def layer_of(cfg: Config, i: int) -> Layer:
    """Layer i as a value: its mixer, feed-forward layer and norms."""
    return Layer(_mixer_of(cfg, i), _feed_forward_of(cfg), norm_of(cfg), cfg.norm_position)


def _feed_forward_of(cfg: Config) -> FeedForward:
    return built_in(cfg.ffn, gelu_tanh=cfg.gelu_tanh) if isinstance(cfg.ffn, str) else cfg.ffn


def _mixer_of(cfg: Config, i: int) -> Mixer:
    mixer = cfg.mixers[i % len(cfg.mixers)]
    if not isinstance(mixer, str):
        return mixer
    return attention(
        cfg.d_model,
        cfg.n_heads,
        cfg.kv_heads,
        cfg.head_width,
        causal=cfg.causal,
        window=cfg.window_of(i),
        scale=cfg.attention_scale,
        softcap=cfg.attention_softcap,
        qk_norm=cfg.qk_norm,
        norm_eps=cfg.norm_eps,
        qkv_bias=cfg.biases in ("all", "qkv"),
        out_bias=cfg.biases == "all",
        rope_layout=cfg.rope_layout,
    )


def kinds_of(cfg: Config) -> Kinds:
    """The kinds of layers: one for each combination of an entry of cfg.mixers, a window and a rope; wrapped once."""
    return _kinds(cfg) if torch.compiler.is_compiling() else _kept_kinds(cfg)


def _kinds(cfg: Config) -> Kinds:
    keys = [(i % len(cfg.mixers), cfg.window_of(i), cfg.rope_of(i)) for i in range(cfg.n_layers)]
    distinct = list(dict.fromkeys(keys))
    layers = tuple([layer_of(cfg, keys.index(key)) for key in distinct])
    ropes = tuple([rope for _, _, rope in distinct])
    return Kinds(layers, tuple([distinct.index(key) for key in keys]), norm_of(cfg), ropes)


_kept_kinds = memo(64)(_kinds)


def counted_layers(cfg: Config) -> list[tuple[Layer, int]]:
    """(layer, how many of it the model has) for each layer of one period of cfg.mixers and cfg.window.

    The time taken does not grow with the number of layers.
    """
    period = math.lcm(len(cfg.mixers), len(cfg.window) if isinstance(cfg.window, tuple) else 1)
    return [(layer_of(cfg, i), (cfg.n_layers - i - 1) // period + 1) for i in range(min(period, cfg.n_layers))]


def leaves(cfg: Config, std: Std = course_init) -> dict[str, Leaf]:
    """The leaf table: path -> Leaf, embeddings first, then layer by layer, then ln_final and lm_head.

    Paths are the keys of CS336's state_dict, such as layers.0.attn.q_proj.weight. Only some models have ln1, ln2 and
    ln_final (norm not "none"), ln1_post and ln2_post ("sandwich"), w3 (gated), lm_head (not tied), position_embeddings
    ("learned").

    >>> cfg = Config(vocab_size=8, context_length=4, d_model=4, n_layers=1, n_heads=2)
    >>> leaves(cfg)["lm_head.weight"].kind
    'head'
    """
    return dict(_leaves(cfg, std))


@memo(64)
def _leaves(cfg: Config, std: Std) -> dict[str, Leaf]:
    before, behind = leaves_outside(cfg)
    table = dict(before)
    for i in range(cfg.n_layers):
        table |= with_prefix(f"layers.{i}", leaves_of_layer(cfg, layer_of(cfg, i)))
    return with_std({**table, **behind}, std)


def leaves_of_layer(cfg: Config, layer: Layer) -> dict[str, Leaf]:
    """The leaf table of one block, without initializers for matrices."""
    return layer_leaves(layer, cfg.d_model, cfg.ff_width, biases=cfg.biases == "all")


def leaves_outside(cfg: Config) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Leaf tables of what lies outside the blocks: (embeddings before them, final norm and head after them)."""
    vocabulary, D = Cut(0, None, "vocab_size"), cfg.d_model
    before = {"token_embeddings.weight": Leaf((cfg.vocab_size, D), "embedding", "token_embeddings", cut=vocabulary)}
    if cfg.position == "learned":
        before["position_embeddings.weight"] = Leaf((cfg.context_length, D), "embedding", "position_embeddings")
    norm, behind = norm_of(cfg), {}
    if norm is not None:
        behind = with_prefix("ln_final", norm.leaves(norm.config, D))
    if not cfg.tie_embeddings:
        behind["lm_head.weight"] = Leaf((cfg.vocab_size, D), "head", "lm_head", cut=vocabulary)
    return before, behind
