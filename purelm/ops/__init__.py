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
from purelm.ops import rms_norm as _rms_norm
from purelm.ops import rope as _rope

__all__ = ["REFERENCE", "Ops"]


class Ops(NamedTuple):
    """What a model computes with; each field has the signature of the reference function of the same name."""

    linear: Callable[..., Tensor]  # (x, weight_OI, bias_O=None)
    embedding: Callable[..., Tensor]  # (ids, weight_VD)
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


REFERENCE = Ops(
    linear=_linear.linear,
    embedding=_embedding.embedding,
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
)
