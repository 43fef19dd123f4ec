"""The maths of a language model, one idea a file, and `Ops`, the bundle of them that a model takes.

    from purelm.ops import REFERENCE
    from purelm.ops.sdpa import sdpa_attention
    fast = REFERENCE._replace(attention=sdpa_attention)

Functions are imported from their files: `from purelm.ops.rms_norm import rms_norm`. What a function must look like to
take a field's place is said by the field's Protocol in `purelm.ops.protocols`.
"""

from typing import NamedTuple

from torch import Tensor

from purelm.ops import activations, glu, protocols
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
    """x itself."""
    return x


class Ops(NamedTuple):
    """What a model computes with; each field's type is its signature (`purelm.ops.protocols`)."""

    linear: protocols.Linear
    embedding: protocols.Embedding
    position_embedding: protocols.Embedding  # added to `embedding`'s
    unembed: protocols.Unembed  # from states to logits
    rms_norm: protocols.RMSNorm
    add_rms_norm: protocols.AddRMSNorm
    layer_norm: protocols.LayerNorm
    rope: protocols.Rope
    attention: protocols.Attention
    swiglu: protocols.Gate
    geglu: protocols.GeluGate
    silu: protocols.Activation
    gelu: protocols.GeluActivation
    relu2: protocols.Activation
    linear_cross_entropy: protocols.LinearCrossEntropy
    log_probs: protocols.LogProbs
    # Where a sublayer (a mixer, a feed-forward layer) begins and ends. In one process these are the identity and
    # `linear`; where its features are spread over processes (purelm.dist.tensor_parallel), messages.
    enter: protocols.Boundary  # what a sublayer reads
    linear_out: protocols.Linear  # the linear layer that a sublayer ends with
    final: protocols.Boundary  # the last states, of all positions
    # Attention of one new token a row over a cache in whose memory it is written, all in one (`decode_`). None: rope,
    # the write and `attention` under a mask. To be replaced, or None, where `attention` is replaced by other maths.
    decode_attention_: protocols.DecodeAttention | None = None


REFERENCE = Ops(
    linear=_linear.linear,
    embedding=_embedding.embedding,
    position_embedding=_embedding.embedding,
    unembed=_linear.linear,
    rms_norm=_rms_norm.rms_norm,
    add_rms_norm=_rms_norm.add_rms_norm,
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
