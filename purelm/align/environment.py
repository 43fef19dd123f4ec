"""Learning to foresee what the environment answers, beside the policy's loss: ECHO.

Signature, aux and legend as in purelm.align.regions.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.regions import clip
from purelm.align.tokens import mean, same_shape, unmasked

__all__ = ["echo"]

Aux = dict[str, Tensor]
Tokens = Float[Tensor, "*b t"]


def echo(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    environment_BT: Tensor,
    coefficient: float = 0.1,
    region: Callable[..., tuple[Tensor, Aux]] = clip,
) -> tuple[Tokens, Aux]:
    """The region's loss on the policy's own tokens, -coefficient lp on those of the environment (a tool's answers).

    dl/dlp = -coefficient where `environment_BT` is not 0. 0.1 is prime-rl's, whose `echo` is its GRPO and this
    cross-entropy, with the same denominator; no paper was read. The mask holds both kinds of tokens, so both count in
    the aggregate's denominator; a sum of two aggregates has two. Nothing was sampled there: give `ratios.token`, and
    the sampler the old policy's log-probabilities, where a weight is used. aux is the region's, of its own tokens, and
    `environment_nll`, the mean of -lp of the others.
    """
    if not 0 <= coefficient < float("inf"):
        raise ValueError(f"coefficient must be at least 0 and finite, got {coefficient}")
    same_shape(mask_BT, log_probs=log_probs_BT)
    if environment_BT.shape != mask_BT.shape:
        raise ValueError(f"environment must have the mask's shape {tuple(mask_BT.shape)}, "
                         f"got {tuple(environment_BT.shape)}")  # fmt: skip
    theirs_BT = (mask_BT != 0) & (environment_BT != 0)
    own_BT = torch.where(theirs_BT, torch.zeros_like(mask_BT), mask_BT)
    loss, aux = region(log_probs_BT, log_ratio_BT, advantages, own_BT)
    nll = -unmasked(log_probs_BT, theirs_BT)
    return loss + coefficient * nll, aux | {"environment_nll": mean(nll, theirs_BT)}
