"""A smooth bound."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["check_positive", "check_softcap", "soft_cap"]


def check_positive(name: str, value: float | None, otherwise: str = "") -> None:
    """ValueError unless the number is above 0 and finite, or None; `otherwise` says what to do instead.

    Elsewhere 0 often means "none". Here it would make every score equal, and a negative number would act as its
    absolute value: results that look plausible, of something that nobody asked for.
    """
    if value is not None and not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, or None, got {value}{otherwise}")


def check_softcap(softcap: float | None) -> None:
    """ValueError unless the cap is above 0 and finite, or None for no cap."""
    check_positive("softcap", softcap, ": give None for no cap")


def soft_cap(x: Float[Tensor, "*shape"], cap: float | None) -> Float[Tensor, "*shape"]:
    """y = c tanh(x / c), which keeps small x and stays within (-c, c); None changes nothing.

    Used on attention scores and on final logits (Gemma 2, arXiv:2408.00118, section 2). ValueError for a cap that is
    not above 0.
    """
    check_softcap(cap)
    return x if cap is None else cap * torch.tanh(x / cap)
