"""Model: a language model as a value, all that training, evaluation, generation and parallelism know of it.

    model = transformer.make(cfg, ops=FUSED, wrap_block=remat)
    params = model.init(random.key(0))
    loss, metrics = model.loss(params, batch)

Your own model is a Model of your own pure functions, with the signatures of `purelm.models.protocols`.
Legend: B batch, T positions, D d_model, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from purelm.models import protocols
from purelm.models.leaves import Leaf, Params

__all__ = ["Model"]


class Model(NamedTuple):
    """Pure functions of parameters, and the leaf table that describes the parameters."""

    init: protocols.Init
    leaves: Mapping[str, Leaf]  # path -> shape, kind, initialisation and cut of each parameter
    hidden: protocols.Forward  # states_BTD after the final norm
    unembedding: Callable[[Params], Tensor]  # (params) -> weight_VD; logits are states weight^T, soft-capped if at all
    apply: protocols.Forward  # logits_BTV
    loss: protocols.Loss
    log_probs: protocols.LogProbs
    init_cache: protocols.InitCache
    prefill: protocols.Prefill
    decode: protocols.Decode
    decode_: protocols.Decode  # `decode` that writes into the memory of the given cache
    vocab_size: int
    context_length: int  # the most positions in training; `generate` stops there
    config: Any  # what the model was made from, a `transformer.Config` for a Transformer
