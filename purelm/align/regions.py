"""Trust regions: from ratios and advantages to losses of tokens, and to the share of them that is held back.

Each is `f(log_probs_BT, log_ratio_BT, advantages, mask_BT, **options) -> (loss_BT, aux)`: the loss of each token, to
MINIMISE, 0 where masked. log_ratio is of purelm.align.ratios; advantages are (B, 1) or (B, T), and no gradient enters
them. Here are those of the token's own ratio with hard bounds; regions_token has soft bounds and bounds on
probabilities, regions_sequence those of more than one token, regions_batch those of the whole batch.

GSPO is `ratios.sequence` and `clip(low=3e-4, high=4e-4)`; PPO, GRPO and Dr. GRPO are `ratios.token` and `clip()`; DAPO
`clip(high=0.28)`, Olmo 3 `clip(high=0.272)`. A loss of 0 with a gradient is right: on-policy, centred advantages sum to
0. Where w = 1 all of these have REINFORCE's gradient, -A d lp.

aux, over unmasked tokens: `clipped_low` and `clipped_high` the shares whose gradient a bound from below (w < 1) or from
above (w > 1) takes or changes, `ratio_mean` the mean of w.

Legend: B sequences, T positions; lp = log_probs, w = exp(log_ratio), A = advantage, sg = stop-gradient.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.tokens import (
    like_tokens,
    log_ratio_and_advantages,
    ratio_of,
    region_aux,
    same_shape,
    share,
    unmasked,
)

__all__ = ["Region", "cispo", "clip", "dual_clip", "reinforce", "two_sided", "unclipped"]

Aux = dict[str, Tensor]
Region = Callable[..., tuple[Tensor, Aux]]
Tokens = Float[Tensor, "*b t"]


def reinforce(
    log_probs_BT: Tokens, log_ratio_BT: Tokens | None, advantages: Tensor, mask_BT: Tensor
) -> tuple[Tokens, Aux]:
    """l = -A lp: REINFORCE (Williams 1992), the course's `no_baseline` and `reinforce_with_baseline`.

    dl/dlp = -A. The ratio is not read.

    >>> ones = torch.ones(1, 2)
    >>> reinforce(torch.tensor([[-1.0, -2.0]]), None, torch.tensor([[0.5]]), ones)[0]
    tensor([[0.5000, 1.0000]])
    """
    same_shape(mask_BT, log_probs=log_probs_BT)
    lp = unmasked(log_probs_BT, mask_BT)
    nothing = torch.zeros_like(lp)
    return -like_tokens(advantages, mask_BT) * lp, region_aux(torch.ones_like(lp), nothing, nothing, mask_BT)


def unclipped(log_probs_BT: Tokens, log_ratio_BT: Tokens, advantages: Tensor, mask_BT: Tensor) -> tuple[Tokens, Aux]:
    """l = -w A: importance sampling without a bound, the course's GRPO-No-Clip.

    dl/dlp = -w A.
    """
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    w = ratio_of(log_w)
    nothing = torch.zeros_like(w)
    return -w * adv, region_aux(w, nothing, nothing, mask_BT)


def clip(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
) -> tuple[Tokens, Aux]:
    """l = -min(w A, clip(w, 1 - low, 1 + high) A): PPO's (arXiv:1707.06347 equation 7), GRPO's.

    dl/dlp = -w A, but 0 where A > 0 and w > 1 + high, or A < 0 and w < 1 - low. With high > low it is DAPO's
    clip-higher (0.2, 0.28: arXiv:2503.14476). For A < 0 the loss has no upper bound: see `dual_clip`.

    >>> log_ratio = torch.tensor([[0.5, 1.5]]).log()
    >>> clip(log_ratio, log_ratio, torch.tensor([[1.0]]), torch.ones(1, 2))[0]
    tensor([[-0.5000, -1.2000]])
    """
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    w = ratio_of(log_w)
    return _clipped(w, adv, low, high), _clip_aux(w, adv, mask_BT, low, high)


def dual_clip(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    c: float = 3.0,
) -> tuple[Tokens, Aux]:
    """`clip`, for A < 0 never above c |A|: min(c |A|, max(w, 1 - low) |A|) (arXiv:1912.09729).

    dl/dlp = that of `clip`, but 0 where A < 0 and w > c. c must be above 1. verl always applies it, OpenRLHF and slime
    when asked. aux has `clipped_dual`, the share of tokens bounded by c, which counts in `clipped_high` too.
    """
    if not c > 1:
        raise ValueError(f"c must be above 1, got {c}")
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    w = ratio_of(log_w)
    clipped = _clipped(w, adv, low, high)
    loss = torch.where(adv < 0, torch.minimum(clipped, -c * adv), clipped)
    dual = (adv < 0) & (w > c)
    aux = _clip_aux(w, adv, mask_BT, low, high, dual)
    return loss, aux | {"clipped_dual": share(dual, mask_BT)}


def two_sided(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    delta: float = 4.0,
) -> tuple[Tokens, Aux]:
    """l = -min(min(w, delta) A, clip(w, 1 - low, 1 + high) A): INTELLECT-2's (arXiv:2505.07291).

    dl/dlp = that of `clip`, but 0 where w > delta too. With delta > 1 + high it is `dual_clip` with c = delta, which is
    asserted: with a smaller delta the bound would cut A > 0 below 1 + high. TRL's `delta`, which is off by default.
    """
    if not delta > 1 + high:
        raise ValueError(f"delta must be above 1 + high = {1 + high:g}, got {delta}")
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    w = ratio_of(log_w)
    _check_bounds(low, high)
    loss = -torch.minimum(w.clamp(max=delta) * adv, w.clamp(1 - low, 1 + high) * adv)
    dual = (adv < 0) & (w > delta)
    return loss, _clip_aux(w, adv, mask_BT, low, high, dual) | {"clipped_dual": share(dual, mask_BT)}


def cispo(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    cap: float = 5.0,
    floor: float = 0.0,
) -> tuple[Tokens, Aux]:
    """l = -sg(clip(w, floor, cap)) A lp: the weight is bounded, and no token loses its gradient (arXiv:2506.13585).

    dl/dlp = -clip(w, floor, cap) A. cap and floor bound the ratio itself. The paper, verl, slime and open-instruct say
    1 + eH and 1 - eL: for their eH give cap = 1 + eH. TRL and ScaleRL (arXiv:2510.13786) say eps_high and mean the cap:
    5.0, the default here. verl and slime have both bounds, the paper, TRL and open-instruct the upper one alone.
    """
    if not 0 <= floor < cap:
        raise ValueError(f"floor and cap must have 0 <= floor < cap, got {floor} and {cap}")
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT.detach(), advantages, mask_BT)
    w = ratio_of(log_w)
    loss = -w.clamp(floor, cap) * adv * unmasked(log_probs_BT, mask_BT)
    return loss, region_aux(w, w < floor, w > cap, mask_BT)


def _clipped(w: Tensor, adv: Tensor, low: float, high: float) -> Tensor:
    _check_bounds(low, high)
    return -torch.minimum(w * adv, w.clamp(1 - low, 1 + high) * adv)


def _check_bounds(low: float, high: float) -> None:
    if not (low >= 0 and high >= 0):
        raise ValueError(f"low and high must be at least 0, got {low} and {high}")


def _clip_aux(w: Tensor, adv: Tensor, mask: Tensor, low: float, high: float, dual: Tensor | None = None) -> Aux:
    above = (adv > 0) & (w > 1 + high)
    return region_aux(w, (adv < 0) & (w < 1 - low), above if dual is None else above | dual, mask)
