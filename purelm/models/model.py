"""Model: what a language model is to everything that trains, evaluates, samples or divides it.

    model = transformer.make(cfg, ops=FUSED, wrap_block=remat)
    params = model.init(random.key(0))
    loss, metrics = model.loss(params, batch)

A model of one's own is any such tuple of pure functions: nothing asks where they come from. Their signatures are in
`purelm.models.protocols`.
Legend: B batch, T positions, D d_model, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from purelm.models import protocols
from purelm.models.leaves import Leaf, Params

__all__ = ["Model"]


class Model(NamedTuple):
    """Pure functions of parameters, and the table that says what these are."""

    init: protocols.Init
    leaves: Mapping[str, Leaf]  # path -> shape, kind, first values, how it may be cut: the one place that names them
    hidden: protocols.Forward  # states_BTD, behind the final norm
    unembedding: Callable[[Params], Tensor]  # (params) -> weight_VD: from states to logits
    apply: protocols.Forward  # logits_BTV
    loss: protocols.Loss
    log_probs: protocols.LogProbs
    init_cache: protocols.InitCache
    prefill: protocols.Prefill
    decode: protocols.Decode
    decode_: protocols.Decode  # the same, written over the cache's memory
    vocab_size: int
    context_length: int  # positions that it was made for
    config: Any  # what it was made of
