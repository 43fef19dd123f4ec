"""What is added to rewards, by length or distance from the reference, and what becomes of responses that were cut off.

lengths are tokens of responses; "truncated" is True where the limit, not the model, ended a response.
"""

import math

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from purelm.align.divergences import k1

__all__ = ["cosine", "kimi", "kl_penalty", "linear_length", "overlong_mask", "soft_overlong", "truncated_to"]

Rewards = Float[Tensor, "*shape"]
Lengths = Shaped[Tensor, "*shape"]


def overlong_mask(mask_BT: Shaped[Tensor, "b t"], truncated_B: Bool[Tensor, " b"]) -> Shaped[Tensor, "b t"]:
    """The mask, 0 in rows that were cut off: neither right nor wrong, they teach nothing (DAPO, arXiv:2503.14476).

    Their rewards still count in the group's mean. Whether such rows count in a mean over rows is the aggregation's
    choice.
    """
    _same("overlong_mask", mask_BT[:, 0] if mask_BT.ndim == 2 and mask_BT.shape[1] else mask_BT, truncated_B)
    return torch.where(truncated_B[:, None], torch.zeros_like(mask_BT), mask_BT)


def soft_overlong(lengths: Lengths, *, longest: int = 20480, buffer: int = 4096) -> Rewards:
    """What is added to a reward: 0 up to L - C tokens, (L - C - T) / C up to L, -1 beyond (DAPO, equation 13).

    >>> soft_overlong(torch.tensor([60, 80, 100, 200]), longest=100, buffer=40).tolist()
    [0.0, -0.5, -1.0, -1.0]
    """
    if not 0 < buffer <= longest:
        raise ValueError(f"soft_overlong: buffer must be above 0 and at most longest {longest}, got {buffer}")
    return ((longest - buffer - _floating(lengths)) / buffer).clamp(-1.0, 0.0)


def truncated_to(rewards: Rewards, truncated: Bool[Tensor, "*shape"], value: float = 0.0) -> Rewards:
    """The rewards, `value` for responses that were cut off, even if they hold a right answer (Dr. GRPO's code)."""
    _same("truncated_to", rewards, truncated)
    return torch.where(truncated, torch.full_like(rewards, value), rewards)


def cosine(
    right: Bool[Tensor, "*shape"],
    lengths: Lengths,
    *,
    longest: int,
    of_right: tuple[float, float] = (1.0, 0.5),
    of_wrong: tuple[float, float] = (-1.0, -0.5),
) -> Rewards:
    """long + (short - long) (1 + cos(pi T / L)) / 2: right answers had better be short, wrong ones long.

    Yeo et al. 2025 (arXiv:2502.03373); the defaults are those of TRL and open-r1. T / L is at most 1, so a response of
    more than L tokens has the reward of L (open-r1 goes on along the cosine).

    Args:
        of_right, of_wrong: (short, long), the reward at length 0 and at L.
    """
    _same("cosine", right, lengths)
    if longest < 1:
        raise ValueError(f"cosine: longest must be at least 1, got {longest}")
    T = _floating(lengths)
    near = (1 + torch.cos(math.pi * (T / longest).clamp(max=1.0))) / 2  # 1 at length 0, 0 at L
    short = torch.where(right, of_right[0], of_wrong[0]).to(T.dtype)
    long = torch.where(right, of_right[1], of_wrong[1]).to(T.dtype)
    return long + (short - long) * near


def kimi(right_PG: Bool[Tensor, "p g"], lengths_PG: Shaped[Tensor, "p g"]) -> Float[Tensor, "p g"]:
    """lam = 1/2 - (T - min) / (max - min) for right answers, min(0, lam) for wrong ones; min and max of the group.

    Kimi k1.5 (arXiv:2501.12599), section 2.3.3: 1/2 for the shortest, -1/2 for the longest; 0 where all are as long.
    """
    _same("kimi", right_PG, lengths_PG)
    T = _floating(lengths_PG)
    least, most = T.amin(-1, keepdim=True), T.amax(-1, keepdim=True)
    lam = torch.where(most > least, 0.5 - (T - least) / torch.where(most > least, most - least, 1.0), 0.0)
    return torch.where(right_PG, lam, lam.clamp(max=0.0))


def kl_penalty(
    log_probs_BT: Float[Tensor, "b t"],
    ref_log_probs_BT: Float[Tensor, "b t"],
    mask_BT: Shaped[Tensor, "b t"],
    *,
    coefficient: float,
) -> Float[Tensor, " b"]:
    """What is added to each sequence's reward: -c sum_t (lp_t - lr_t) over its tokens, detached; 0 of no token.

    With lp of the policy that sampled, the sum is the estimate k1 of KL(policy || reference), so that the expected
    reward is r - c KL: RLHF's objective (Ouyang et al. 2022, arXiv:2203.02155, equation 2), RLOO's (arXiv:2402.14740).
    Give it before the advantage is taken; divergences are no part of the loss then.

    >>> lp, lr = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-2.0, -2.5, -1.0]])
    >>> kl_penalty(lp, lr, torch.tensor([[1, 1, 0]]), coefficient=0.5)
    tensor([-0.7500])
    """
    if not 0 <= coefficient < float("inf"):
        raise ValueError(f"kl_penalty: coefficient must be at least 0 and finite, got {coefficient}")
    # Not clamped: what is clamped has no bound on how far the policy goes.
    d_BT = k1(log_probs_BT.detach(), ref_log_probs_BT.detach(), mask_BT, log_clamp=None)
    return -coefficient * d_BT.sum(-1)


def linear_length(
    rewards_PG: Float[Tensor, "p g"], lengths_PG: Shaped[Tensor, "p g"], *, coefficient: float
) -> Float[Tensor, "p g"]:
    """r_i - c p T_i / max_j T_j, p the mean reward of the group: length costs more where a prompt is easy.

    For rewards in 0..1, as prime-rl has it.
    """
    _same("linear_length", rewards_PG, lengths_PG)
    T = _floating(lengths_PG)
    r = rewards_PG.to(torch.promote_types(rewards_PG.dtype, torch.float32))
    return r - coefficient * r.mean(-1, keepdim=True) * T / T.amax(-1, keepdim=True).clamp(min=1)


def _floating(lengths: Tensor) -> Tensor:
    return lengths.to(torch.promote_types(lengths.dtype, torch.float32))


def _same(name: str, x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{name}: the shapes {tuple(x.shape)} and {tuple(y.shape)} must be equal")
