"""Estimates of KL(pi || ref) from sampled tokens: values to add to a loss, or to take from a reward.

Each is `f(log_probs_BT, ref_log_probs_BT, mask_BT, **options) -> kl_BT`, 0 where masked, in nats. No gradient enters
the reference. d = lp - lr, for tokens sampled from pi (on-policy; from an older policy: `old_log_probs_BT`).

Which one is right depends on where it stands (by enumeration, see the tests):
    E[value]     k1, k3, unbiased_k3, importance are KL; k2, straight_through, absolute are not
    E[gradient]  as a LOSS, k2, unbiased_k3, importance and straight_through have KL's gradient; k1's is 0, k3's is that
                 of the other direction, KL(ref || pi). k1's absolute value has none of these
so: k1 in a reward, one of the four in a loss (OpenRLHF warns of the others). GRPO's printed loss (arXiv:2402.03300
equation 4) has k3. Names after Schulman's "Approximating KL divergence" (2020).

`log_clamp` bounds |d|, with gradient 0 beyond it: k3 has exp(-d). verl and slime clamp at 20, and the result at 10;
open-instruct d at 40. None is without.

Legend: B sequences, T positions; lp = log_probs, lr = ref_log_probs, w = exp(lp - lo) with lo = old_log_probs.
"""

from jaxtyping import Float
from torch import Tensor

from purelm.align.tokens import ratio_of, same_shape, unmasked

__all__ = ["absolute", "importance", "k1", "k2", "k3", "straight_through", "unbiased_k3"]

Tokens = Float[Tensor, "*b t"]


def k1(log_probs_BT: Tokens, ref_log_probs_BT: Tokens, mask_BT: Tensor, *, log_clamp: float | None = 20.0) -> Tokens:
    """d. Unbiased, of either sign; dk/dlp = 1, so that as a loss its expected gradient is 0."""
    return _difference(log_probs_BT, ref_log_probs_BT, mask_BT, log_clamp)


def k2(log_probs_BT: Tokens, ref_log_probs_BT: Tokens, mask_BT: Tensor, *, log_clamp: float | None = 20.0) -> Tokens:
    """d^2 / 2. dk/dlp = d: as a loss, on-policy, KL's gradient."""
    return _difference(log_probs_BT, ref_log_probs_BT, mask_BT, log_clamp).square() / 2


def k3(log_probs_BT: Tokens, ref_log_probs_BT: Tokens, mask_BT: Tensor, *, log_clamp: float | None = 20.0) -> Tokens:
    """exp(-d) + d - 1 >= 0. Unbiased with a small spread; dk/dlp = 1 - exp(-d).

    By expm1, which keeps what 1 - 1 cancels for small d.
    """
    d = _difference(log_probs_BT, ref_log_probs_BT, mask_BT, log_clamp)
    return (-d).expm1() + d


def absolute(
    log_probs_BT: Tokens, ref_log_probs_BT: Tokens, mask_BT: Tensor, *, log_clamp: float | None = 20.0
) -> Tokens:
    """|d|. dk/dlp = sign d. No estimate of KL; verl's `abs`."""
    return _difference(log_probs_BT, ref_log_probs_BT, mask_BT, log_clamp).abs()


def straight_through(
    log_probs_BT: Tokens, ref_log_probs_BT: Tokens, mask_BT: Tensor, *, log_clamp: float | None = 20.0
) -> Tokens:
    """sg(k3) + k2 - sg(k2): the value of k3, the gradient of k2, d. verl's `k3+`."""
    value = k3(log_probs_BT, ref_log_probs_BT, mask_BT, log_clamp=log_clamp).detach()
    slope = k2(log_probs_BT, ref_log_probs_BT, mask_BT, log_clamp=log_clamp)
    return value + (slope - slope.detach())


def importance(
    log_probs_BT: Tokens,
    ref_log_probs_BT: Tokens,
    mask_BT: Tensor,
    *,
    old_log_probs_BT: Tokens | None = None,
    log_clamp: float | None = 20.0,
) -> Tokens:
    """w d, gradient through w too: dk/dlp = w (d + 1). open-instruct's estimator 3.

    Args:
        old_log_probs_BT: of the policy that sampled; None for this one, w = 1 with gradient 1.
    """
    d = _difference(log_probs_BT, ref_log_probs_BT, mask_BT, log_clamp)
    return _weight(log_probs_BT, old_log_probs_BT, mask_BT, log_clamp) * d


def unbiased_k3(
    log_probs_BT: Tokens,
    ref_log_probs_BT: Tokens,
    mask_BT: Tensor,
    *,
    old_log_probs_BT: Tokens | None = None,
    log_clamp: float | None = 20.0,
) -> Tokens:
    """w k3, gradient through w too: dk/dlp = w d. DeepSeek-V3.2's (arXiv:2512.02556).

    TRL's `use_bias_correction_kl`, slime's `--use-unbiased-kl`.

    Args:
        old_log_probs_BT: of the policy that sampled; None for this one, w = 1 with gradient 1.
    """
    weight = _weight(log_probs_BT, old_log_probs_BT, mask_BT, log_clamp)
    return weight * k3(log_probs_BT, ref_log_probs_BT, mask_BT, log_clamp=log_clamp)


def _difference(log_probs_BT: Tensor, other_BT: Tensor, mask_BT: Tensor, log_clamp: float | None) -> Tensor:
    if log_clamp is not None and not log_clamp > 0:
        raise ValueError(f"log_clamp must be above 0, or None for no clamp, got {log_clamp}")
    same_shape(mask_BT, log_probs=log_probs_BT, ref_log_probs=other_BT)
    d = unmasked(log_probs_BT, mask_BT) - unmasked(other_BT.detach(), mask_BT)
    return d if log_clamp is None else d.clamp(-log_clamp, log_clamp)


def _weight(log_probs_BT: Tensor, old_BT: Tensor | None, mask_BT: Tensor, log_clamp: float | None) -> Tensor:
    if old_BT is not None:
        same_shape(mask_BT, old_log_probs=old_BT)
    return ratio_of(_difference(log_probs_BT, log_probs_BT if old_BT is None else old_BT, mask_BT, log_clamp))
