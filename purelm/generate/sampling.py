"""From logits to a distribution and a draw: pure functions of logits (B, V). Excluded tokens get -inf.

Legend: B rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from purelm.devices import at_hand
from purelm.ops.softmax import log_softmax

__all__ = [
    "Choice",
    "Sampling",
    "choose",
    "distribution",
    "forbid",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "pick",
    "temper",
]

Logits = Float[Tensor, "b v"]
SMALLEST = 1e-37  # least temperature above 0; the least normal number of fp32 is 1.2e-38


def forbid(logits_BV: Logits, ids: Sequence[int], rows: Tensor | None = None) -> Logits:
    """The logits with -inf at these ids, in the rows where `rows` (B,) is True (None: in all rows)."""
    ids, V = list(ids), logits_BV.shape[-1]
    if not ids:
        return logits_BV
    if odd := [i for i in ids if not isinstance(i, int) or not 0 <= i < V]:
        raise ValueError(f"ids must be integers in 0..{V - 1}, got {odd[0]!r}")
    hit_V = torch.zeros(V, dtype=torch.bool, device=logits_BV.device)
    hit_V[torch.tensor(ids, device=logits_BV.device)] = True
    hit = hit_V if rows is None else hit_V & rows.unsqueeze(-1)
    return torch.where(hit, -torch.inf, logits_BV)


def temper(logits_BV: Logits, temperature: float) -> Logits:
    """logits / temperature, up to a constant a row; at temperature 0 (greedy) -inf except at the first largest logit.

    ValueError for a temperature between 0 and 1e-37, too close to the least normal number of fp32.

    >>> temper(torch.tensor([[1.0, 3.0, 3.0]]), 0.0)
    tensor([[-inf, 3., -inf]])
    """
    if not 0.0 <= temperature < math.inf or 0.0 < temperature < SMALLEST:
        raise ValueError(f"temperature must be 0 (greedy), or finite and at least {SMALLEST}, got {temperature}")
    if temperature == 0.0:
        best = torch.zeros_like(logits_BV, dtype=torch.bool)
        best = best.scatter(-1, logits_BV.argmax(-1, keepdim=True), True)
        return torch.where(best, logits_BV, -torch.inf)
    if temperature == 1.0:
        return logits_BV
    # The maximum is subtracted so that division by a small temperature does not overflow to inf.
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits_BV: Logits, k: int) -> Logits:
    """Keeps the k largest logits, and any others equal to the k-th.

    >>> keep_top_k(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2)
    tensor([[-inf, 4., 3., -inf]])
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"top_k must be an integer of at least 1, got {k!r}")
    least = torch.topk(logits_BV, min(k, logits_BV.shape[-1]), -1).values[..., -1:]
    return torch.where(logits_BV < least, -torch.inf, logits_BV)


def keep_top_p(logits_BV: Logits, p: float) -> Logits:
    """Keeps the smallest set of most probable tokens whose probabilities sum to at least p; ties go to lower ids.

    Source: nucleus sampling, Holtzman et al. 2019 (arXiv:1904.09751), equation 2.
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, got {p}")
    if p == 1.0:
        return logits_BV
    ordered, order = torch.sort(logits_BV, stable=True, dim=-1, descending=True)
    probability = torch.softmax(ordered.double(), -1)
    before = probability.cumsum(-1) - probability
    # The most probable token is always kept, also if p is so small that rounding would exclude it.
    keep = torch.cat([torch.ones_like(before[..., :1], dtype=torch.bool), before[..., 1:] < p], -1)
    keep = torch.zeros_like(keep).scatter(-1, order, keep)
    return torch.where(keep, logits_BV, -torch.inf)


def keep_min_p(logits_BV: Logits, p: float) -> Logits:
    """Keeps tokens whose probability is at least p times the largest one (Nguyen et al. 2024, arXiv:2407.01082)."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"min_p must be in 0..1, got {p}")
    if p == 0.0:
        return logits_BV
    # p_i >= p p_max exactly when exp(l_i - l_max) >= p: no sum is needed.
    ratio = torch.exp((logits_BV - logits_BV.amax(-1, keepdim=True)).double())
    return torch.where(ratio >= p, logits_BV, -torch.inf)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits: the keywords of `distribution`. ValueError for values out of range."""

    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        distribution(torch.zeros(1, 1), **vars(self))  # each filter checks its argument


def distribution(
    logits_BV: Logits,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Logits:
    """Log-probabilities to sample from, in fp32 or fp64: temperature first, then the filters top_k, top_p and min_p.

    Each filter applies to what the ones before it keep; None: not applied. The result is normalised.
    """
    x = temper(logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)), temperature)
    if top_k is not None:
        x = keep_top_k(x, top_k)
    if top_p is not None:
        x = keep_top_p(x, top_p)
    if min_p is not None:
        x = keep_min_p(x, min_p)
    return log_softmax(x)


def pick(log_probs_BV: Logits, uniform_B: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The first token at which the cumulative probability exceeds uniform_B in [0, 1); never one of probability 0.

    This takes one random number a row, where Gumbel noise takes one for each token. Sums are fp64. A row that is not a
    distribution (NaN, inf, or all -inf) raises ValueError on a CPU. On a GPU, where checking would wait for the device,
    its result is V, which is not a token.
    """
    cumulative_BV = torch.exp(log_probs_BV.double()).cumsum(-1)
    if at_hand(cumulative_BV):
        total_B = cumulative_BV[..., -1]
        if not bool(((total_B > 0) & (total_B < torch.inf)).all()):
            raise ValueError(f"log_probs must be log-probabilities in each row, got sums of {total_B.tolist()}")
    target_B1 = uniform_B.double().unsqueeze(-1) * cumulative_BV[..., -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)


_PLAIN = Sampling()  # of softmax(logits) itself; not made while compiling, where dynamo (2.11) fails at its checks


class Choice(NamedTuple):
    """One token for each row."""

    token_B: Tensor  # int64; of a row that is not finite, any
    logprob_B: Tensor  # under the distribution that it was drawn from
    model_logprob_B: Tensor  # and under softmax(logits)
    finite_B: Tensor  # bool: whether the row has no NaN, no inf, and not -inf alone


def choose(
    logits_BV: Logits,
    uniform_B: Float[Tensor, " b"],
    sampling: Sampling,
    forbidden_BV: Bool[Tensor, "b v"] | None = None,
) -> Choice:
    """The token of each row that `pick` finds in the row's `distribution`, with its log-probabilities.

    forbidden_BV: True at tokens that are not drawn.
    """
    # A row's maximum is NaN if any logit is, and -inf if all are.
    finite_B = torch.isfinite(logits_BV.amax(-1))
    logits_BV = torch.where(finite_B.unsqueeze(-1), logits_BV, 0.0)
    allowed_BV = logits_BV if forbidden_BV is None else torch.where(forbidden_BV, -torch.inf, logits_BV)
    log_probs_BV = distribution(  # by name: dynamo (2.11) does not know vars()
        allowed_BV, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
    )
    model_BV = log_probs_BV
    if sampling != _PLAIN or forbidden_BV is not None:
        model_BV = log_softmax(logits_BV.to(log_probs_BV.dtype))
    token_B = pick(log_probs_BV, uniform_B)
    at_B1 = token_B.unsqueeze(-1)
    logprob_B, model_logprob_B = (x.gather(-1, at_B1).squeeze(-1) for x in (log_probs_BV, model_BV))
    return Choice(token_B, logprob_B, model_logprob_B, finite_B)
