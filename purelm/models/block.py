"""One block of a Transformer: a mixer, then a feed-forward layer, each added to the residual stream.

    layer = Layer(attention(d_model=64, n_heads=4), built_in("swiglu"), rms_norm())
    params = init_leaves(key, with_std(layer_leaves(layer, 64, 256), course_init))
    y_BTD = block(layer, params, x_BTD, ctx, ops)

Legend: B batch, T positions, D d_model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from purelm.models.config import NormPlace
from purelm.models.context import Context
from purelm.models.feed_forward import FeedForward
from purelm.models.leaves import Leaf, Params, with_prefix
from purelm.models.mixers import Mixer
from purelm.models.norms import Norm
from purelm.ops import Ops

__all__ = ["Layer", "apply_norm", "block", "block_cached", "layer_leaves"]


class Layer(NamedTuple):
    """The parts of a block, and where its norms stand."""

    mixer: Mixer
    feed_forward: FeedForward
    norm: Norm | None
    # pre: x + f(n(x)); post: n(x + f(x)); output: x + n(f(x)); sandwich: x + n'(f(n(x)))
    norm_position: NormPlace = "pre"


def layer_leaves(layer: Layer, d_model: int, d_ff: int, *, biases: bool = False) -> dict[str, Leaf]:
    """The block's leaf table: attn (the mixer), ffn, norms ln1 and ln2, and for "sandwich" ln1_post and ln2_post."""
    leaves = with_prefix("attn", layer.mixer.leaves(layer.mixer.config))
    ffn = layer.feed_forward
    leaves |= with_prefix("ffn", ffn.leaves(ffn.config, d_model, d_ff, biases))
    if layer.norm is not None:
        names = ("ln1", "ln2", *(("ln1_post", "ln2_post") if layer.norm_position == "sandwich" else ()))
        for name in names:
            leaves |= with_prefix(name, layer.norm.leaves(layer.norm.config, d_model))
    return leaves


def block(
    layer: Layer, params: Params, x_BTD: Float[Tensor, "b t d"], ctx: Context, ops: Ops
) -> Float[Tensor, "b t d"]:
    """The residual stream after the block, from the stream x_BTD before it."""
    mixer = layer.mixer

    def mix(h_BTD: Tensor) -> Tensor:
        return mixer.apply(mixer.config, params["attn"], h_BTD, ctx, ops)

    return _sublayers(layer, mix, params, x_BTD, ops)


def block_cached(
    layer: Layer, params: Params, x_BTD: Float[Tensor, "b t d"], ctx: Context, ops: Ops, state: Any, reads: Any
) -> tuple[Float[Tensor, "b t d"], Any]:
    """The residual stream after the block, and the mixer's state extended by the T positions of x_BTD.

    state: this layer's entry of the cache. reads: what `mixer.reads` returned for this pass.
    """
    mixer, new = layer.mixer, state

    def mix(h_BTD: Tensor) -> Tensor:
        nonlocal new
        y_BTD, new = mixer.apply_cached(mixer.config, params["attn"], h_BTD, ctx, ops, state, reads)
        return y_BTD

    return _sublayers(layer, mix, params, x_BTD, ops), new


def apply_norm(norm: Norm | None, params: Params, name: str, x: Tensor, ops: Ops) -> Tensor:
    """norm(x) with the weights params[name]; x itself if norm is None."""
    return x if norm is None else norm.apply(norm.config, params[name], x, ops)


def _sublayers(layer: Layer, mix: Callable[[Tensor], Tensor], params: Params, x: Tensor, ops: Ops) -> Tensor:
    """The residual stream after the mixer and the feed-forward layer."""
    ffn, norm = layer.feed_forward, layer.norm

    def feed_forward(h: Tensor) -> Tensor:
        return ffn.apply(ffn.config, params["ffn"], h, ops)

    if layer.norm_position == "pre" and norm is not None and norm.add is not None:
        y = mix(apply_norm(norm, params, "ln1", x, ops))
        h, x = norm.add(norm.config, params["ln2"], y, x, ops)  # the sum and the norm of it in one pass
        return x + feed_forward(h)
    x = _residual(layer, mix, params, "ln1", x, ops)
    return _residual(layer, feed_forward, params, "ln2", x, ops)


def _residual(
    layer: Layer, f: Callable[[Tensor], Tensor], params: Params, name: str, x: Tensor, ops: Ops
) -> Tensor:
    """x + f(x), with the norm `name` (and `name`_post for "sandwich") where layer.norm_position puts it."""
    if layer.norm_position == "post":
        return apply_norm(layer.norm, params, name, x + f(x), ops)
    if layer.norm_position == "output":
        return x + apply_norm(layer.norm, params, name, f(x), ops)
    y = f(apply_norm(layer.norm, params, name, x, ops))
    if layer.norm_position == "sandwich":
        y = apply_norm(layer.norm, params, f"{name}_post", y, ops)
    return x + y
