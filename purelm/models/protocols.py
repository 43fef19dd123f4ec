"""What each function of a `Model` is called with, and what it returns.

Arguments before `/` are given by position, so a model of one's own may name them as it likes.
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
    """States (B, T, D) or logits (B, T, V) of tokens; segment_ids: documents of a packed row."""

    def __call__(
        self, params: Params, tokens_BT: Int[Tensor, "b t"], /, *, segment_ids: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t n"]: ...


class Loss(Protocol):
    """(scalar, metrics) of a batch with "tokens" and "targets"; metrics are detached."""

    def __call__(
        self, params: Params, batch: Mapping[str, Tensor], /, *, z_loss: float = 0.0, chunk: int | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]: ...


class LogProbs(Protocol):
    """(log p of each target, entropy of its distribution)."""

    def __call__(
        self, params: Params, batch: Mapping[str, Tensor], /, *, temperature: float = 1.0, chunk: int | None = None
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]: ...


class InitCache(Protocol):
    """An empty cache, a tree of tensors, with room for max_len tokens in each row."""

    def __call__(
        self, batch: int, max_len: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Any: ...


class Prefill(Protocol):
    """(logits, cache) after T more tokens. Logits of the last position (B, V), or of all without last_only."""

    def __call__(
        self,
        params: Params,
        tokens_BT: Int[Tensor, "b t"],
        cache: Any,
        /,
        *,
        lengths: Int[Tensor, " b"] | None = None,
        last_only: bool = True,
        n_positions: int | None = None,
    ) -> tuple[Tensor, Any]: ...


class Decode(Protocol):
    """(logits of the next token, cache) after one more token in each row; used: the cache's length, if known."""

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
