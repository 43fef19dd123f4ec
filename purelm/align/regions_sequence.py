"""Trust regions in which a token's loss depends on other tokens of its sequence.

Signature, aux and legend as in purelm.align.regions. Give these `ratios.token`; GSPO, whose ratio itself is of the
sequence, is `ratios.sequence` with `regions.clip`.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.regions import clip, dual_clip
from purelm.align.tokens import (
    log_ratio_and_advantages,
    mean,
    ratio_of,
    region_aux,
    row_count,
    row_sum,
    share,
    unmasked,
)

__all__ = ["fipo", "gmpo", "off_policy_masked", "topr", "vespo"]

Aux = dict[str, Tensor]
Tokens = Float[Tensor, "*b t"]


def gmpo(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    low: float = 0.4,
    high: float = 0.4,
) -> tuple[Tokens, Aux]:
    """l_it = -s_i A_it, s_i = exp((1/T_i) sum_t c_it): geometric-mean policy optimization (arXiv:2507.20673).

    c = min(log w, high) where A > 0, max(log w, -low) where A < 0, 0 where A = 0: each token is clipped in logs, then
    the mean is taken (GSPO takes the mean, then clips). With one advantage a sequence and `sequence_mean`, dL/dlp_it =
    -(1/B) s_i A_i k_it / T_i, k = 0 where c is clipped, else 1. Every token of a row has the row's loss.
    """
    if not (low >= 0 and high >= 0):
        raise ValueError(f"low and high must be at least 0, got {low} and {high}")
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    bounded = torch.where(adv > 0, log_w.clamp(max=high), log_w.clamp(min=-low))
    s = ratio_of(row_sum(torch.where(adv == 0, 0.0, bounded), mask_BT) / row_count(mask_BT, log_w.dtype))
    below, above = (adv < 0) & (log_w < -low), (adv > 0) & (log_w > high)
    return -s * adv, region_aux(ratio_of(log_w), below, above, mask_BT)


def topr(log_probs_BT: Tokens, log_ratio_BT: Tokens, advantages: Tensor, mask_BT: Tensor) -> tuple[Tokens, Aux]:
    """l = -sg(a) A lp, a = 1 where A > 0, else min(s_i, 1), s_i = exp((1/T_i) sum_t log w) (TOPR, arXiv:2503.14286).

    dl/dlp = -a A: right samples are learned from however old, wrong ones only while they are still likely. s_i as in
    verl; the paper's is the product over the sequence, `ratios.sequence_product` here, whose mean over a row is itself.
    """
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT.detach(), advantages, mask_BT)
    s = (row_sum(log_w, mask_BT) / row_count(mask_BT, log_w.dtype)).clamp(max=0.0).exp()
    loss = -torch.where(adv > 0, adv, s * adv) * unmasked(log_probs_BT, mask_BT)
    return loss, region_aux(ratio_of(log_w), (adv < 0) & (s < 1), torch.zeros_like(s), mask_BT)


def vespo(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    k_positive: float = 2.0,
    decay_positive: float = 3.0,
    k_negative: float = 3.0,
    decay_negative: float = 2.0,
    log_clamp: float = 20.0,
) -> tuple[Tokens, Aux]:
    """l = -sg(W^k exp(decay (1 - W))) A lp, W = prod_t w_it of the sequence (VESPO, arXiv:2602.10693).

    dl/dlp = -W^k exp(decay (1 - W)) A: 1 at W = 1, largest at W = k/decay, to 0 on both sides. k and decay are those of
    A >= 0 and A < 0. log W is clamped at +-log_clamp. Where the old log-probabilities are the sampler's, W holds the
    mismatch already: use no weight beside it. aux: `gate` is the mean of what multiplies A.
    """
    options = {"k_positive": k_positive, "decay_positive": decay_positive, "k_negative": k_negative,
               "decay_negative": decay_negative, "log_clamp": log_clamp}  # fmt: skip
    for name, option in options.items():
        if not 0 < option < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {option}")
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT.detach(), advantages, mask_BT)
    log_W = row_sum(log_w, mask_BT).clamp(-log_clamp, log_clamp)
    k = torch.where(adv >= 0, torch.full_like(log_w, k_positive), k_negative)
    decay = torch.where(adv >= 0, torch.full_like(log_w, decay_positive), decay_negative)
    gate = (k * log_W + decay * (1 - ratio_of(log_W))).exp()
    loss = -gate * adv * unmasked(log_probs_BT, mask_BT)
    nothing = torch.zeros_like(log_w)
    return loss, region_aux(ratio_of(log_w), nothing, nothing, mask_BT) | {"gate": mean(gate, mask_BT)}


def fipo(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    half_life: float = 32.0,
    least: float = 1.0,
    most: float = 1.2,
    safe_ratio: float = 4.0,
    safe_least: float = 0.8,
    low: float = 0.2,
    high: float = 0.28,
    c: float = 10.0,
) -> tuple[Tokens, Aux]:
    """`dual_clip` of A f, f_t = sg(clip(exp F_t, least, most)), F_t = sum_(k >= t) g^(k-t) log w_k (arXiv:2603.19835).

    g = 2^(-1/half_life); tokens with w > c are left out of F. A token counts more where the policy has since raised the
    probability of what followed it. Where A < 0 and w > safe_ratio, f = clip(exp F, safe_least, 1) instead. dl/dlp is
    f times that of dual_clip. Defaults are ms-swift's (high side alone, c as in the 32B script); both sides are
    least=0.8. An early version of ms-swift drops such tokens in place of bounding f. aux: `influence`, the mean of f.
    """
    for name, option in {"half_life": half_life, "safe_ratio": safe_ratio, "c": c}.items():
        if not option > 0:
            raise ValueError(f"{name} must be above 0, got {option}")
    if not (0 < least <= most and 0 < safe_least <= 1):
        raise ValueError(f"needed: 0 < least <= most and 0 < safe_least <= 1, got {least}, {most}, {safe_least}")
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT.detach(), advantages, mask_BT)
    part = torch.where(log_w > math.log(c), 0.0, log_w)
    influence = ratio_of(_discounted(part, 2.0 ** (-1.0 / half_life)))
    unsafe = (adv < 0) & (log_w > math.log(safe_ratio))
    f = torch.where(unsafe, influence.clamp(safe_least, 1.0), influence.clamp(least, most))
    loss, aux = dual_clip(log_probs_BT, log_ratio_BT, adv * f, mask_BT, low=low, high=high, c=c)
    return loss, aux | {"influence": mean(f, mask_BT)}


def off_policy_masked(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    region: Callable[..., tuple[Tensor, Aux]] = clip,
    delta: float = 0.5,
) -> tuple[Tokens, Aux]:
    """l = M_i times the region's, M_i = 0 where A < 0 and (1/T_i) sum_t -log w > delta, else 1 (arXiv:2512.02556).

    DeepSeek-V3.2's off-policy sequence mask: wrong samples that the policy has left behind teach nothing more. There
    the old policy is the sampler's. Dropped tokens stay in the aggregate's denominator, as there. delta is not in the
    paper: 0.5 in TRL's documents, 1e-4 in slime's. aux: `off_policy`, the share of tokens dropped.
    """
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT.detach(), advantages, mask_BT)
    dropped = (adv < 0) & (-row_sum(log_w, mask_BT) / row_count(mask_BT, log_w.dtype) > delta)
    loss, aux = region(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    return torch.where(dropped, 0.0, loss), aux | {"off_policy": share(dropped, mask_BT)}


def _discounted(x_BT: Tensor, g: float) -> Tensor:
    """y_t = sum_(k >= t) g^(k-t) x_k, by doubling: O(T log T) work, no (T, T) matrix."""
    step, n = 1, x_BT.shape[-1]
    while step < n:
        ahead = torch.nn.functional.pad(x_BT[..., step:], (0, step))
        x_BT = x_BT + g**step * ahead
        step *= 2
    return x_BT
