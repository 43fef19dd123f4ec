"""Validation of token ids before a model sees them."""

import torch
from torch import Tensor

from purelm.models.config import Config
from purelm.models.model import Model

__all__ = ["check_tokens"]


def check_tokens(tokens: Tensor, cfg: Config | Model, name: str = "tokens") -> None:
    """ValueError with the value and the position of the first id outside 0..vocab_size-1; waits for the device.

    Models do not call this, since waiting at every call would be slow. An id out of range on a GPU then fails a
    device-side assertion, after which the process can no longer use the GPU.
    """
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {tokens.dtype}")
    tokens = tokens.to(torch.int64)  # torch does not compare uint16 on every device
    bad = (tokens < 0) | (tokens >= cfg.vocab_size)
    if not bool(bad.any()):
        return
    first = tuple(bad.nonzero()[0].tolist())
    at = first[0] if len(first) == 1 else first
    raise ValueError(
        f"{name}: id {int(tokens[first])} at position {at} is outside the vocabulary (0..{cfg.vocab_size - 1})"
    )
