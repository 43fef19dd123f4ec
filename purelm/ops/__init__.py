"""The maths of a language model, one idea a file, and `Ops`, the bundle of them that a model takes.

    from purelm.ops import REFERENCE
    from purelm.ops.sdpa import sdpa_attention
    fast = REFERENCE._replace(attention=sdpa_attention)

Functions are imported from their files: `from purelm.ops.rms_norm import rms_norm`.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from purelm.ops import activations, glu
from purelm.ops import attention as _attention
from purelm.ops import embedding as _embedding
from purelm.ops import layer_norm as _layer_norm
from purelm.ops import linear as _linear
from purelm.ops import linear_cross_entropy as _linear_cross_entropy
from purelm.ops import log_probs as _log_probs
from purelm.ops import rms_norm as _rms_norm
from purelm.ops import rope as _rope

__all__ = ["REFERENCE", "Ops"]


def identity(x: Tensor) -> Tensor:
    """x"""
    return x


class Ops(NamedTuple):
    """What a model computes with; each field has the signature of the reference function of the same name."""

    linear: Callable[..., Tensor]  # (x, weight_OI, bias_O=None)
    embedding: Callable[..., Tensor]  # (ids, weight_VD)
    position_embedding: Callable[..., Tensor]  # (positions, weight_TD): added to `embedding`'s
    unembed: Callable[..., Tensor]  # (x, weight_VD): logits
    rms_norm: Callable[..., Tensor]  # (x, weight_D=None, eps)
    layer_norm: Callable[..., Tensor]  # (x, weight_D=None, bias_D=None, eps)
    rope: Callable[..., Tensor]  # (x_BTHK, cos, sin, layout)
    attention: Callable[..., Tensor]  # (q_BTHK, k_BSGK, v_BSGK, *, causal, window, segment_ids, scale, softcap)
    swiglu: Callable[..., Tensor]  # (gate, up)
    geglu: Callable[..., Tensor]  # (gate, up, tanh=False)
    silu: Callable[..., Tensor]  # (x)
    gelu: Callable[..., Tensor]  # (x, tanh=False)
    relu2: Callable[..., Tensor]  # (x)
    # (hidden, unembedding_VD, targets, *, weights, denominator, reduction, softcap, z_loss, chunk) -> (loss, nll)
    linear_cross_entropy: Callable[..., tuple[Tensor, Tensor]]
    # (hidden, unembedding_VD, targets, *, softcap, temperature, chunk, ignore_index) -> (log_prob, entropy)
    log_probs: Callable[..., tuple[Tensor, Tensor]]
    # Where a sublayer (a mixer, a feed-forward layer) begins and ends. In one process these are the identity and
    # `linear`; where its features are spread over processes (purelm.dist.tensor_parallel), messages.
    enter: Callable[[Tensor], Tensor]  # (x_BTD): what a sublayer reads
    linear_out: Callable[..., Tensor]  # (x, weight_OI, bias_O=None): the linear layer that a sublayer ends with
    final: Callable[[Tensor], Tensor]  # (x_BTD): the last states, of all positions


REFERENCE = Ops(
    linear=_linear.linear,
    embedding=_embedding.embedding,
    position_embedding=_embedding.embedding,
    unembed=_linear.linear,
    rms_norm=_rms_norm.rms_norm,
    layer_norm=_layer_norm.layer_norm,
    rope=_rope.rope,
    attention=_attention.attention,
    swiglu=glu.swiglu,
    geglu=glu.geglu,
    silu=activations.silu,
    gelu=activations.gelu,
    relu2=activations.relu2,
    linear_cross_entropy=_linear_cross_entropy.linear_cross_entropy,
    log_probs=_log_probs.log_probs,
    enter=identity,
    linear_out=_linear.linear,
    final=identity,
)
