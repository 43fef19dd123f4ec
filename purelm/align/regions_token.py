"""Trust regions of one token at a time: soft bounds, and bounds on probabilities in place of ratios.

Signature, aux and legend as in purelm.align.regions; mu = exp(lp - log_ratio) is the old policy's probability of the
token and pi = exp(lp) the new one's.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.regions import dual_clip
from purelm.align.tokens import (
    like_tokens,
    log_ratio_and_advantages,
    ratio_of,
    region_aux,
    same_shape,
    unmasked,
)

__all__ = ["dppo_kl", "dppo_tv", "dro", "probability_band", "sapo", "up_grpo"]

Aux = dict[str, Tensor]
Tokens = Float[Tensor, "*b t"]


def sapo(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> tuple[Tokens, Aux]:
    """l = -A (4/tau) sigmoid(tau (w - 1)), tau = tau_positive where A > 0, else tau_negative (arXiv:2511.20347).

    dl/dlp = -A w 4 s (1 - s) with s = sigmoid(tau (w - 1)): at w = 1 that of `unclipped`, and it fades on both sides.
    Its aggregate is `sequence_mean`. verl's code falls back to tau_negative = 1. Nothing is clipped, so aux has the
    shares that `clip` with 0.2 would hold back.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(f"tau_positive and tau_negative must be above 0, got {tau_positive} and {tau_negative}")
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    w = ratio_of(log_w)
    tau = torch.where(adv > 0, torch.full_like(w, tau_positive), tau_negative)
    loss = -adv * (4.0 / tau) * torch.sigmoid(tau * (w - 1))
    return loss, region_aux(w, (adv < 0) & (w < 0.8), (adv > 0) & (w > 1.2), mask_BT)


def dro(
    log_probs_BT: Tokens, log_ratio_BT: Tokens, advantages: Tensor, mask_BT: Tensor, *, beta: float
) -> tuple[Tokens, Aux]:
    """l = -(A lp - (beta/2) (log w)^2): direct reward optimisation as in verl and Tinker; beta has no default there.

    dl/dlp = -A + beta log w: a pull towards the old policy in place of a bound (arXiv:2405.19107, per token). Give
    `ratios.token`: with `ratios.none` the pull is 0.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be above 0 and finite, got {beta}")
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    w = ratio_of(log_w)
    loss = -(adv * unmasked(log_probs_BT, mask_BT) - (beta / 2) * log_w.square())
    return loss, region_aux(w, torch.zeros_like(w), torch.zeros_like(w), mask_BT)


def up_grpo(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    c: float = 3.0,
) -> tuple[Tokens, Aux]:
    """l = -A lp where A > 0, without a bound or an old policy; elsewhere `dual_clip` (UP-GRPO, arXiv:2607.06987).

    dl/dlp = -A where A > 0; elsewhere that of dual_clip. The paper writes the first as -A pi / sg(pi), which has
    another value and this gradient. Used there with a KL coefficient of 0.001 and `token_mean`.
    """
    same_shape(mask_BT, log_probs=log_probs_BT, log_ratio=log_ratio_BT)
    adv = like_tokens(advantages, mask_BT)
    negative, aux = dual_clip(log_probs_BT, log_ratio_BT, adv.clamp(max=0.0), mask_BT, low=low, high=high, c=c)
    return torch.where(adv > 0, -adv * unmasked(log_probs_BT, mask_BT), negative), aux


def dppo_tv(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
) -> tuple[Tokens, Aux]:
    """l = -K A sg(min(w, cap)) lp; K = [pi - mu <= high] where A > 0, else [pi - mu >= -low] (arXiv:2602.04879).

    dl/dlp = -K A min(w, cap). The bound is on the change of the sampled token's probability, its part of the total
    variation: a rare token may change by a large factor, a likely one may not. As in verl; prime-rl's default has
    -K A w without a cap, the same gradient below it, and adds 1e-3 (lp - ls)^2, which is 2e-3 `divergences.k2` to the
    sampler. mu is formed from the ratio: beyond the ratio's clamp it is off, where w is next to 0 anyway.
    """
    if not (low >= 0 and high >= 0):
        raise ValueError(f"low and high must be at least 0, got {low} and {high}")
    pi, mu = _probabilities(log_probs_BT, log_ratio_BT, mask_BT)
    adv = like_tokens(advantages, mask_BT)
    below, above = (adv <= 0) & (pi - mu < -low), (adv > 0) & (pi - mu > high)
    return _kept(log_probs_BT, log_ratio_BT, adv, mask_BT, below, above, cap)


def dppo_kl(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
) -> tuple[Tokens, Aux]:
    """`dppo_tv` with the divergence D = mu log(mu/pi) + (1-mu) log((1-mu)/(1-pi)) of token against all others.

    Dropped are A > 0 with pi > mu and D > high, and A <= 0 with pi < mu and D > low (arXiv:2602.04879, DPPO-Binary-KL).
    The bounds are what verl's code falls back to; 0.2 is wide, since D is about (pi - mu)^2 / (2 mu (1 - mu)).
    """
    if not (low >= 0 and high >= 0):
        raise ValueError(f"low and high must be at least 0, got {low} and {high}")
    pi, mu = _probabilities(log_probs_BT, log_ratio_BT, mask_BT)
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT.detach(), advantages, mask_BT)
    tiny = torch.finfo(pi.dtype).eps  # 1 - pi is rounded to this anyway
    rest = (1 - mu) * (((1 - mu).clamp(min=0) + tiny) / ((1 - pi).clamp(min=0) + tiny)).log()
    divergence = rest - mu * log_w
    below, above = (adv <= 0) & (pi < mu) & (divergence > low), (adv > 0) & (pi > mu) & (divergence > high)
    return _kept(log_probs_BT, log_ratio_BT, adv, mask_BT, below, above, cap)


def probability_band(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    bound: float = 0.1,
    cap: float = 20.0,
) -> tuple[Tokens, Aux]:
    """`dppo_tv` with K = [|pi - mu| <= bound], whatever the sign of A: prime-rl's "ipo".

    That name stands for INTELLECT policy optimization, not for the preference loss IPO. prime-rl's bound was 0.1 and is
    0.3 in its later documents.
    """
    if not bound >= 0:
        raise ValueError(f"bound must be at least 0, got {bound}")
    pi, mu = _probabilities(log_probs_BT, log_ratio_BT, mask_BT)
    adv = like_tokens(advantages, mask_BT)
    return _kept(log_probs_BT, log_ratio_BT, adv, mask_BT, pi - mu < -bound, pi - mu > bound, cap)


def _probabilities(log_probs_BT: Tensor, log_ratio_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """pi and mu, detached."""
    same_shape(mask_BT, log_probs=log_probs_BT, log_ratio=log_ratio_BT)
    lp = unmasked(log_probs_BT.detach(), mask_BT)
    return lp.exp(), (lp - unmasked(log_ratio_BT.detach(), mask_BT)).clamp(max=0.0).exp()


def _kept(
    log_probs: Tensor, log_ratio: Tensor, adv: Tensor, mask: Tensor, below: Tensor, above: Tensor, cap: float
) -> tuple[Tensor, Aux]:
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}")
    w = ratio_of(unmasked(log_ratio.detach(), mask))
    loss = -torch.where(below | above, 0.0, adv * w.clamp(max=cap)) * unmasked(log_probs, mask)
    return loss, region_aux(w, below, above, mask)
