"""Trust regions that single out tokens among all of the batch: by covariance, by entropy.

Signature, aux and legend as in purelm.align.regions. Which tokens are chosen depends on all rows that are given, so a
microbatch chooses among its own (as verl's does): give the whole minibatch where that matters.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.regions import clip, unclipped
from purelm.align.tokens import like_tokens, mean, same_shape, share, unmasked

__all__ = ["clip_cov", "high_entropy", "kl_cov"]

Aux = dict[str, Tensor]
Tokens = Float[Tensor, "*b t"]


def clip_cov(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    fraction: float = 2e-4,
    least: float = 1.0,
    most: float = 5.0,
    draws_BT: Tokens | None = None,
    low: float = 1.0,
    high: float = 1.0,
) -> tuple[Tokens, Aux]:
    """`clip`, and loss 0 for a few tokens whose covariance is in (least, most) (Clip-Cov, arXiv:2505.22617).

    cov = (A - mean A)(lp - mean lp), means over all unmasked tokens. Chosen are max(1, floor(fraction N)) of N tokens,
    or as many as there are: those with the smallest of `draws_BT`, uniform numbers of the caller's, which is the
    paper's random choice; without draws those of the largest covariance. Tokens that `clip` holds back are no
    candidates. dl/dlp = that of clip, 0 where chosen. verl's clip ratio is 0.2 unless set and 1.0 in its recipe, as
    here. aux: `chosen`, the share of tokens.
    """
    cov, adv = _covariance(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    w = unmasked(log_ratio_BT.detach(), mask_BT).exp()
    clipped = ((adv > 0) & (w > 1 + high)) | ((adv < 0) & (w < 1 - low))
    candidates = (mask_BT != 0) & (cov > least) & (cov < most) & ~clipped
    order = -cov if draws_BT is None else draws_BT.to(cov.dtype)
    chosen = _first(torch.where(candidates, order, torch.inf), _quota(fraction, mask_BT)) & candidates
    loss, aux = clip(log_probs_BT, log_ratio_BT, advantages, mask_BT, low=low, high=high)
    return torch.where(chosen, 0.0, loss), aux | {"chosen": share(chosen, mask_BT)}


def kl_cov(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    fraction: float = 2e-4,
    coefficient: float = 1.0,
) -> tuple[Tokens, Aux]:
    """l = -w A, plus coefficient |log w| for the tokens of largest covariance (KL-Cov, arXiv:2505.22617).

    Chosen are max(1, floor(fraction N)) of N tokens; covariance as in `clip_cov`. dl/dlp = -w A, plus
    coefficient sign(log w) where chosen: at log w = 0, on-policy, it is 0. The coefficient is 1 in the paper and in
    verl's code, 0.1 in its YAML. aux: `chosen`, the share of tokens.
    """
    cov, _ = _covariance(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    held = mask_BT != 0
    chosen = _first(torch.where(held, -cov, torch.inf), _quota(fraction, mask_BT)) & held
    loss, aux = unclipped(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    penalty = coefficient * unmasked(log_ratio_BT, mask_BT).abs()
    return loss + torch.where(chosen, penalty, 0.0), aux | {"chosen": share(chosen, mask_BT)}


def high_entropy(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    entropy_BT: Tokens,
    fraction: float = 0.2,
    region: Callable[..., tuple[Tensor, Aux]] = clip,
) -> tuple[Tokens, Aux]:
    """The region's loss for the `fraction` of tokens of highest entropy, 0 for the others (80/20, arXiv:2506.01939).

    No gradient enters the entropy. max(1, floor(fraction N)) of N tokens stay; the others stay in the aggregate's
    denominator (TRL's `top_entropy_quantile` takes them out of it: for that, give the aggregate the smaller mask).
    aux: `chosen`, the share of tokens that stay.
    """
    same_shape(mask_BT, entropy=entropy_BT)
    held = mask_BT != 0
    order = torch.where(held, -unmasked(entropy_BT.detach(), mask_BT), torch.inf)
    chosen = _first(order, _quota(fraction, mask_BT)) & held
    loss, aux = region(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    return torch.where(chosen, loss, 0.0), aux | {"chosen": share(chosen, mask_BT)}


def _covariance(log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's part of the covariance, and the advantages; detached."""
    same_shape(mask, log_probs=log_probs, log_ratio=log_ratio)
    adv, lp = like_tokens(advantages, mask), unmasked(log_probs.detach(), mask)
    return (adv - mean(adv, mask)) * (lp - mean(lp, mask)), adv


def _quota(fraction: float, mask_BT: Tensor) -> Tensor:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    # In float64: in fp32 0.2 times 5 tokens may come out above or below 1.
    return (fraction * (mask_BT != 0).sum().to(torch.float64)).floor().clamp(min=1)


def _first(order_BT: Tensor, n: Tensor) -> Tensor:
    """Whether an element is among the n smallest of all, by rank: n is a tensor, so no shape depends on values.

    Of equal ones the earlier comes first."""
    by_size = order_BT.flatten().argsort(stable=True)
    return (by_size.argsort() < n).reshape(order_BT.shape)
