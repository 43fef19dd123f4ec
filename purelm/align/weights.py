"""Weights against the gap between the sampler's log-probabilities and the trainer's.

Each is `f(old_log_probs_BT, sampler_log_probs_BT, mask_BT, **options) -> (weights_BT, aux)`, by which the region's loss
is multiplied: detached, in fp32 or wider, 0 where masked and where a token is rejected. They correct for a sampler that
is not the policy whose update the region bounds. Where the ratio's old log-probabilities are the sampler's own, the gap
is in the ratio already: then `none` (both together would count it twice).

A rejected token has loss 0. Whether it leaves the denominator is the caller's choice (slime#657): give the aggregate
`mask * (weights != 0)` and it leaves, the mask and it stays.

Each is a choice of tokens, of weights, or of both; `product` joins them: `partial(product, of=(truncated, veto))`.

aux, over unmasked tokens: `rejected` and `bounded` the shares of weight 0 and of weights that a bound changed,
`sampler_ratio_mean` of rho before any bound, `sampler_gap` the mean of |lo - ls|, `sampler_gap_largest`.

Legend: B sequences, T positions; lo = old_log_probs (the trainer's), ls = sampler_log_probs, rho = exp(lo - ls),
T_i = unmasked tokens of sequence i.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.tokens import like_tokens, mean, ratio_of, row_count, row_sum, same_shape, share, unmasked

__all__ = [
    "Weight",
    "batch_normalized",
    "clamped",
    "geometric",
    "geometric_masked",
    "masked",
    "none",
    "off_policy_sequence_mask",
    "product",
    "sequence_masked",
    "sequence_truncated",
    "truncated",
    "veto",
]

Aux = dict[str, Tensor]
Weight = Callable[..., tuple[Tensor, Aux]]
Tokens = Float[Tensor, "*b t"]


def none(old_log_probs_BT: Tokens, sampler_log_probs_BT: Tokens, mask_BT: Tensor) -> tuple[Tokens, Aux]:
    """1. The gap is in aux: to see what a weight would do."""
    log_rho = _log_rho(old_log_probs_BT, sampler_log_probs_BT, mask_BT)
    return _result(log_rho, torch.ones_like(log_rho), mask_BT)


def truncated(
    old_log_probs_BT: Tokens, sampler_log_probs_BT: Tokens, mask_BT: Tensor, *, cap: float = 2.0
) -> tuple[Tokens, Aux]:
    """min(rho_it, cap): truncated importance sampling, "TIS" (fengyao.notion.site/off-policy-rl).

    2 in open-instruct, slime and verl, and for Olmo 3's 32B-Think and RL-Zero.

    >>> truncated(torch.tensor([[0.5, 3.0]]).log(), torch.zeros(1, 2), torch.ones(1, 2))[0]
    tensor([[0.5000, 2.0000]])
    """
    _check(0.0, cap)
    log_rho = _log_rho(old_log_probs_BT, sampler_log_probs_BT, mask_BT)
    return _result(log_rho, ratio_of(log_rho).clamp(max=cap), mask_BT, ratio_of(log_rho) > cap)


def clamped(
    old_log_probs_BT: Tokens, sampler_log_probs_BT: Tokens, mask_BT: Tensor, *, low: float = 0.5, high: float = 2.0
) -> tuple[Tokens, Aux]:
    """clip(rho_it, low, high): slime's `--tis-clip-low`, with its GLM-5.2 script's bounds."""
    _check(low, high)
    log_rho = _log_rho(old_log_probs_BT, sampler_log_probs_BT, mask_BT)
    rho = ratio_of(log_rho)
    return _result(log_rho, rho.clamp(low, high), mask_BT, (rho < low) | (rho > high))


def masked(
    old_log_probs_BT: Tokens, sampler_log_probs_BT: Tokens, mask_BT: Tensor, *, low: float = 0.5, high: float = 5.0
) -> tuple[Tokens, Aux]:
    """rho_it where low <= rho_it <= high, else 0: IcePop's (arXiv:2510.18855), "MIS" of the token."""
    _check(low, high)
    log_rho = _log_rho(old_log_probs_BT, sampler_log_probs_BT, mask_BT)
    rho = ratio_of(log_rho)
    return _result(log_rho, torch.where((rho < low) | (rho > high), 0.0, rho), mask_BT)


def sequence_truncated(
    old_log_probs_BT: Tokens, sampler_log_probs_BT: Tokens, mask_BT: Tensor, *, cap: float = 2.0
) -> tuple[Tokens, Aux]:
    """min(prod_t rho_it, cap), at each token of i. The spread grows with length: 0.012 a token is 3.3 after 100."""
    _check(0.0, cap)
    log_rho = _log_rho(old_log_probs_BT, sampler_log_probs_BT, mask_BT)
    whole = ratio_of(row_sum(log_rho, mask_BT))
    return _result(log_rho, whole.clamp(max=cap), mask_BT, whole > cap)


def sequence_masked(
    old_log_probs_BT: Tokens, sampler_log_probs_BT: Tokens, mask_BT: Tensor, *, low: float = 0.0, high: float = 3.0
) -> tuple[Tokens, Aux]:
    """prod_t rho_it where low <= it <= high, else 0, at each token of i (richardli.xyz/rl-collapse).

    TRL's default mode, with its bound. OpenRLHF's `seq-mask-tis` rejects by the geometric mean, and weighs by token:
    `partial(product, of=(truncated, geometric_masked))`.
    """
    _check(low, high)
    log_rho = _log_rho(old_log_probs_BT, sampler_log_probs_BT, mask_BT)
    whole = ratio_of(row_sum(log_rho, mask_BT))
    return _result(log_rho, torch.where((whole < low) | (whole > high), 0.0, whole), mask_BT)


def geometric(
    old_log_probs_BT: Tokens, sampler_log_probs_BT: Tokens, mask_BT: Tensor, *, low: float = 0.0, high: float = 2.0
) -> tuple[Tokens, Aux]:
    """clip(exp((1/T_i) sum_t (lo - ls)), low, high), at each token of i: the geometric mean, whatever the length."""
    _check(low, high)
    log_rho = _log_rho(old_log_probs_BT, sampler_log_probs_BT, mask_BT)
    average = ratio_of(row_sum(log_rho, mask_BT) / row_count(mask_BT, log_rho.dtype))
    return _result(log_rho, average.clamp(low, high), mask_BT, (average < low) | (average > high))


def geometric_masked(
    old_log_probs_BT: Tokens,
    sampler_log_probs_BT: Tokens,
    mask_BT: Tensor,
    *,
    low: float = 0.9999,
    high: float = 1.0001,
) -> tuple[Tokens, Aux]:
    """1 where low <= exp((1/T_i) sum_t (lo - ls)) <= high, else 0: a choice alone, to be joined with a weight.

    open-instruct's `rho_mask_sequence_level`; the bounds are those of slime's mis.yaml, which suit long responses.
    """
    _check(low, high)
    log_rho = _log_rho(old_log_probs_BT, sampler_log_probs_BT, mask_BT)
    average = row_sum(log_rho, mask_BT) / row_count(mask_BT, log_rho.dtype)
    # In logs: 1 + 1e-4 has three digits left in fp32.
    out = (average < _log(low)) | (average > _log(high))
    return _result(log_rho, torch.where(out, 0.0, torch.ones_like(log_rho)), mask_BT)


def veto(
    old_log_probs_BT: Tokens, sampler_log_probs_BT: Tokens, mask_BT: Tensor, *, least: float = 1e-4
) -> tuple[Tokens, Aux]:
    """0 for a sequence with any token of rho_it < least, else 1: a choice alone, to be joined with a weight.

    One token that the trainer holds for impossible spoils what follows it. slime's mis.yaml.
    """
    _check(least, float("inf"))
    log_rho = _log_rho(old_log_probs_BT, sampler_log_probs_BT, mask_BT)
    bad = (log_rho < _log(least)).any(-1, keepdim=True)
    return _result(log_rho, torch.where(bad, 0.0, torch.ones_like(log_rho)), mask_BT)


def product(
    old_log_probs_BT: Tokens, sampler_log_probs_BT: Tokens, mask_BT: Tensor, *, of: Sequence[Weight]
) -> tuple[Tokens, Aux]:
    """The product of several weights; `bounded` is the largest share of theirs.

    >>> from functools import partial
    >>> lo, ls, mask = torch.tensor([[1.5, 1e-5]]).log(), torch.zeros(1, 2), torch.ones(1, 2)
    >>> product(lo, ls, mask, of=(truncated, partial(veto, least=1e-4)))[0]
    tensor([[0., 0.]])
    """
    if not of:
        raise ValueError("product needs one weight at least: of=(truncated, veto)")
    parts = [weight(old_log_probs_BT, sampler_log_probs_BT, mask_BT) for weight in of]
    joined = torch.stack([weights for weights, _ in parts]).prod(0)
    aux = parts[0][1] | {"bounded": torch.stack([aux["bounded"] for _, aux in parts]).amax()}
    return joined, aux | {"rejected": share(joined == 0, mask_BT)}


def batch_normalized(
    old_log_probs_BT: Tokens,
    sampler_log_probs_BT: Tokens,
    mask_BT: Tensor,
    *,
    weight: Weight = truncated,
    mean_weight: Tensor | float | None = None,
) -> tuple[Tokens, Aux]:
    """A weight divided by its mean over unmasked tokens, rejected ones included: the step's size is not the gap's.

    On in slime, off in verl.

    Args:
        mean_weight: in place of the mean, for a part of a batch: that of the whole batch, `aux["weight_mean"]` there.
    """
    weights, aux = weight(old_log_probs_BT, sampler_log_probs_BT, mask_BT)
    found = mean(weights, mask_BT)
    if isinstance(mean_weight, float | int) and not 0 < mean_weight < float("inf"):
        raise ValueError(f"mean_weight must be above 0 and finite, got {mean_weight}")
    divisor = found if mean_weight is None else torch.as_tensor(mean_weight, device=weights.device)
    # All rejected: weights of 0, and so they stay.
    return weights / torch.where(divisor == 0, 1.0, divisor).to(weights.dtype), aux | {"weight_mean": found}


def off_policy_sequence_mask(
    log_probs_BT: Tokens, behind_log_probs_BT: Tokens, mask_BT: Tensor, *, advantages: Tensor, delta: float = 0.5
) -> tuple[Tokens, Aux]:
    """0 where A < 0 and (1/T_i) sum_t (lb - lp) > delta, else 1, lb = behind_log_probs (arXiv:2512.02556).

    DeepSeek-V3.2's mask of wrong samples that the policy has left behind. As a weight it compares the trainer's old
    policy with the sampler; `regions_sequence.off_policy_masked` compares the current one, as there.
    """
    log_rho = _log_rho(log_probs_BT, behind_log_probs_BT, mask_BT)
    behind = -row_sum(log_rho, mask_BT) / row_count(mask_BT, log_rho.dtype)
    out = (like_tokens(advantages, mask_BT) < 0) & (behind > delta)
    return _result(log_rho, torch.where(out, 0.0, torch.ones_like(log_rho)), mask_BT)


def _log_rho(old_BT: Tensor | None, sampler_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
    if old_BT is None or sampler_BT is None:
        missing = "old_log_probs" if old_BT is None else "sampler_log_probs"
        raise ValueError(f"weights need the trainer's and the sampler's log-probabilities: {missing} is None")
    same_shape(mask_BT, old_log_probs=old_BT, sampler_log_probs=sampler_BT)
    return unmasked(old_BT.detach(), mask_BT) - unmasked(sampler_BT.detach(), mask_BT)


def _result(log_rho: Tensor, weights: Tensor, mask: Tensor, bounded: Tensor | None = None) -> tuple[Tensor, Aux]:
    size = unmasked(log_rho, mask).abs()
    return unmasked(weights, mask), {
        "rejected": share(weights == 0, mask),
        "bounded": share(torch.zeros_like(mask) if bounded is None else bounded, mask),
        "sampler_ratio_mean": mean(ratio_of(log_rho), mask),
        "sampler_gap": mean(size, mask),
        "sampler_gap_largest": size.amax() if size.numel() else size.sum(),
    }


def _check(low: float, high: float) -> None:
    if not 0 <= low < high:
        raise ValueError(f"bounds must have 0 <= low < high, got {low} and {high}")


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
