"""Validation of token ids where they enter."""

import torch
from torch import Tensor

from purelm.models.config import Config
from purelm.models.model import Model

__all__ = ["check_tokens"]


def check_tokens(tokens: Tensor, cfg: Config | Model, name: str = "tokens") -> None:
    """ValueError that names the first id outside 0..vocab_size-1 and where it stands; reads values on the host.

    Models do not check: it would wait for the device at each call. On a GPU an id out of range ends in a device-side
    assertion, after which the process is of no use.
    """
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {tokens.dtype}")
    tokens = tokens.to(torch.int64)  # comparisons of uint16 do not exist everywhere
    bad = (tokens < 0) | (tokens >= cfg.vocab_size)
    if not bool(bad.any()):
        return
    first = tuple(bad.nonzero()[0].tolist())
    at = first[0] if len(first) == 1 else first
    raise ValueError(
        f"{name}: id {int(tokens[first])} at position {at} is outside the vocabulary (0..{cfg.vocab_size - 1})"
    )
