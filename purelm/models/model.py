"""Model: what a language model is to everything that trains, evaluates, samples or divides it.

    model = transformer.make(cfg, ops=FUSED, wrap_block=remat)
    params = model.init(random.key(0))
    loss, metrics = model.loss(params, batch)

A model of one's own is any such tuple of pure functions: nothing asks where they come from.
Legend: B batch, T positions, D d_model, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from purelm.models.leaves import Leaf, Params

__all__ = ["Model"]


class Model(NamedTuple):
    """Pure functions of parameters, and the table that says what these are."""

    init: Callable[..., Params]  # (key, dtype=torch.float32) -> params
    leaves: Mapping[str, Leaf]  # path -> shape, kind, first values, how it may be cut: the one place that names them
    hidden: Callable[..., Tensor]  # (params, tokens_BT, *, segment_ids=None) -> states_BTD
    unembedding: Callable[[Params], Tensor]  # (params) -> weight_VD: from states to logits
    apply: Callable[..., Tensor]  # (params, tokens_BT, *, segment_ids=None) -> logits_BTV
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]  # (params, batch, *, z_loss=0.0, chunk=None)
    # (params, batch, *, temperature=1.0, chunk=None) -> (log p of each target, entropy), (B, T) each
    log_probs: Callable[..., tuple[Tensor, Tensor]]
    init_cache: Callable[..., Any]  # (batch, max_len, dtype=torch.float32, device=None) -> cache
    # (params, tokens_BT, cache, *, lengths=None, last_only=True, n_positions=None) -> (logits, cache)
    prefill: Callable[..., tuple[Tensor, Any]]
    decode: Callable[..., tuple[Tensor, Any]]  # (params, tokens_B, cache, *, used=None, n_positions=None)
    decode_: Callable[..., tuple[Tensor, Any]]  # the same, written over the cache's memory
    vocab_size: int
    context_length: int  # positions that it was made for
    config: Any  # what it was made of
