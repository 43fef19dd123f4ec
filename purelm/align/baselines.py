"""Advantages against baselines that come from outside of the group: (rewards (P, G), ...) -> (advantages (P, G), aux).

aux as in `advantages`.

Legend: P prompts, G responses a prompt, N responses of another policy.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from purelm.align.advantages import Aux, aux_of
from purelm.align.groups import checked_rewards

__all__ = ["ema_baseline", "remax", "soft_baseline"]

Rewards = Shaped[Tensor, "p g"]
Advantages = Float[Tensor, "p g"]


def remax(rewards_PG: Rewards, greedy_P: Shaped[Tensor, " p"]) -> tuple[Advantages, Aux]:
    """A_i = r_i - r(greedy response of the prompt); ReMax (Li et al. 2023, arXiv:2310.10505)."""
    r = checked_rewards("remax", rewards_PG)
    greedy = checked_rewards("remax: greedy", greedy_P, ndim=1)
    if greedy.shape != r.shape[:1]:
        raise ValueError(f"remax: greedy must have one reward a prompt, ({len(r)},), got {tuple(greedy.shape)}")
    return r - greedy[:, None], aux_of(r)


def ema_baseline(rewards_PG: Rewards, baseline: Tensor | float, *, decay: float = 0.95) -> tuple[Advantages, Aux]:
    """A_i = r_i - b with a moving average b, one number or one a prompt (P,); no group is needed.

    aux["baseline"] is the next b: decay b + (1 - decay) mean r. With one b for each role of a game: role-conditioned
    advantages (SPIRAL, Liu et al. 2025, arXiv:2506.24119).
    """
    r = checked_rewards("ema_baseline", rewards_PG)
    if not 0 <= decay <= 1:
        raise ValueError(f"ema_baseline: decay must be in 0..1, got {decay}")
    b = torch.as_tensor(baseline, dtype=r.dtype, device=r.device).detach()
    if b.ndim and b.shape != r.shape[:1]:
        raise ValueError(f"ema_baseline: baseline must be one number or ({len(r)},), got {tuple(b.shape)}")
    mean = r.mean(1) if b.ndim else r.mean()
    following = (decay * b + (1 - decay) * mean).detach()
    return r - (b[:, None] if b.ndim else b), {**aux_of(r), "baseline": following}


def soft_baseline(
    rewards_PG: Rewards, reference_rewards_PN: Shaped[Tensor, "p n"], *, beta: float = 0.5
) -> tuple[Advantages, Aux]:
    """A_i = r_i - V, V = beta log mean_n exp(r_n / beta) over rewards of responses of the reference policy.

    V is the value of the policy that is optimal under a KL penalty beta; A*-PO (Brantley et al. 2025,
    arXiv:2505.20686), which regresses beta log(pi / pi_ref) on this advantage.
    """
    if not beta > 0:
        raise ValueError(f"soft_baseline: beta must be above 0, got {beta}")
    r = checked_rewards("soft_baseline", rewards_PG)
    reference = checked_rewards("soft_baseline: reference", reference_rewards_PN)
    if len(reference) != len(r):
        raise ValueError(f"soft_baseline: rewards of {len(r)} prompts, reference rewards of {len(reference)}")
    log_n = torch.log(torch.tensor(float(reference.shape[1]), dtype=r.dtype, device=r.device))
    value = beta * (torch.logsumexp(reference / beta, 1, keepdim=True) - log_n)
    return r - value, aux_of(r)
