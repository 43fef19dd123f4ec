"""Signatures of the functions of a `Model`: one Protocol for each field.

Arguments before `/` are passed by position, so your own functions may name them differently.
Legend: B batch, T positions, D d_model, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm import random
from purelm.models.leaves import Params

__all__ = ["Decode", "Forward", "Init", "InitCache", "LogProbs", "Loss", "Prefill"]


class Init(Protocol):
    """Fresh parameters, on the key's device."""

    def __call__(self, key: random.Key, /, dtype: torch.dtype = torch.float32) -> Params: ...


class Forward(Protocol):
    """States (B, T, D) or logits (B, T, V) of tokens.

    segment_ids: which document of a packed row each token belongs to; tokens see only those of their own document.
    """

    def __call__(
        self, params: Params, tokens_BT: Int[Tensor, "b t"], /, *, segment_ids: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t n"]: ...


class Loss(Protocol):
    """(loss, metrics) of a batch with "tokens" and "targets"; the loss is 0-d, in nats, and metrics are detached.

    The batch may also have "weights" (B, T), whose targets of weight 0 may be any number, "segment_ids" (B, T), and
    "denominator", 0-d: loss = sum of weights x losses / denominator, by default the sum of the weights.
    z_loss: coefficient of (log Z)^2. chunk: tokens whose logits are held at a time; None: all.
    """

    def __call__(
        self, params: Params, batch: Mapping[str, Tensor], /, *, z_loss: float = 0.0, chunk: int | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]: ...


class LogProbs(Protocol):
    """(log p(target), entropy of p) at each position, in nats, with p = softmax(logits / temperature).

    Both are 0 where the batch's "weights" are 0.
    """

    def __call__(
        self, params: Params, batch: Mapping[str, Tensor], /, *, temperature: float = 1.0, chunk: int | None = None
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]: ...


class InitCache(Protocol):
    """An empty cache with room for max_len tokens in each row: a tree of tensors whose first axis is the batch."""

    def __call__(
        self, batch: int, max_len: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Any: ...


class Prefill(Protocol):
    """(logits, cache) after T more tokens in each row: logits (B, V) of the last, or (B, T, V) if not last_only.

    lengths: of each row only the first lengths[b] tokens count, and logits are those of its last one; None: all.
    n_positions: the sequence length for positions that scale with it (dynamic_ntk); None: the cache's size.
    used: tokens that every row has before, if the caller knows; then nothing waits for the device. None: unknown.
    """

    def __call__(
        self,
        params: Params,
        tokens_BT: Int[Tensor, "b t"],
        cache: Any,
        /,
        *,
        lengths: Int[Tensor, " b"] | None = None,
        last_only: bool = True,
        used: int | None = None,
        n_positions: int | None = None,
    ) -> tuple[Tensor, Any]: ...


class Decode(Protocol):
    """(logits of the next token, cache) after one more token in each row.

    used: tokens of the longest row before, if the host knows; None: unknown. n_positions: as for `Prefill`.
    """

    def __call__(
        self,
        params: Params,
        tokens_B: Int[Tensor, " b"],
        cache: Any,
        /,
        *,
        used: int | None = None,
        n_positions: int | None = None,
    ) -> tuple[Float[Tensor, "b v"], Any]: ...
