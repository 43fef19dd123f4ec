"""Sums and means over the tokens of answers, and what losses of preferences tell of them.

Legend: B sequences, T positions.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.masked import masked_sum

__all__ = [
    "Number", "Scored", "check_above_0", "check_shapes", "length_desensitized", "scored", "sequence_log_probs",
    "token_mean", "wide",
]  # fmt: skip

Scored = tuple[Tensor, dict[str, Tensor]]  # the loss of each pair, detached values of each pair
Number = float | Tensor


def sequence_log_probs(log_probs: Float[Tensor, "*b t"], mask: Tensor) -> Float[Tensor, "*b"]:
    """sum_t m_t log p_t in fp32, or fp64 where the log-probabilities are; what is masked may be nan.

    >>> sequence_log_probs(torch.tensor([[-1.0, -2.0, float("nan")]]), torch.tensor([[1, 1, 0]]))
    tensor([-3.])
    """
    return masked_sum(wide(log_probs), mask, -1)


def length_desensitized(
    log_probs: Float[Tensor, "*b t"], mask: Tensor, shared: Tensor, *, alpha: Number
) -> Float[Tensor, "*b"]:
    """The sum of the first `shared` chosen tokens of each sequence, plus alpha times that of the rest.

    With shared = min(n_w, n_l) of each pair, for both of its answers, in place of `sequence_log_probs`, `dpo` is LD-DPO
    (arXiv:2409.06411). alpha = 1 is the plain sum, alpha = 0 cuts the longer answer.

    >>> log_p, ones = torch.tensor([[-1.0, -2.0, -4.0]]), torch.ones(1, 3)
    >>> length_desensitized(log_p, ones, torch.tensor([2]), alpha=0.5)
    tensor([-5.])
    """
    if shared.shape != mask.shape[:-1]:
        raise ValueError(f"shared must have the shape {tuple(mask.shape[:-1])}, got {tuple(shared.shape)}")
    x = torch.where(mask == 0, 0.0, wide(log_probs))
    number = (mask != 0).cumsum(-1)
    return masked_sum(torch.where(number <= shared.unsqueeze(-1), x, alpha * x), mask, -1)


def token_mean(total: Tensor, n_tokens: Tensor) -> Tensor:
    """total / n; that of an answer of no tokens is 0."""
    if n_tokens.shape != total.shape:
        raise ValueError(f"numbers of tokens have shape {tuple(n_tokens.shape)}, and the sums {tuple(total.shape)}")
    return torch.where(n_tokens == 0, 0.0, total / n_tokens.clamp(min=1))


def scored(chosen_reward: Tensor, rejected_reward: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """The aux of a loss: of the rewards, and of the policy's sums."""
    r_w, r_l, log_w, log_l = (x.detach() for x in (chosen_reward, rejected_reward, chosen, rejected))
    return {
        "chosen_reward": r_w,
        "rejected_reward": r_l,
        "margin": r_w - r_l,
        "accuracy": (r_w > r_l).to(r_w.dtype),
        "policy_accuracy": (log_w > log_l).to(r_w.dtype),
    }


def wide(x: Tensor) -> Tensor:
    """x in fp32, or fp64 where it is; ValueError if it is not floating."""
    if not x.is_floating_point():
        raise ValueError(f"log-probabilities and scores must be floating, got {x.dtype}")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_shapes(given: dict[str, Tensor]) -> None:
    """ValueError naming the first whose shape is not that of the first."""
    (first, x), *rest = given.items()
    for name, y in rest:
        if y.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(y.shape)}, and {first} {tuple(x.shape)}: they must be equal")


def check_above_0(name: str, value: Number) -> None:
    """ValueError for a number that is 0, less, or not finite; what a tensor holds is not looked at."""
    if not isinstance(value, Tensor) and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be above 0 and finite, got {value}")
