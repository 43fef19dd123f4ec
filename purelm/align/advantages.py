"""Advantages of groups of responses: how much better a response was than what its prompt leads one to expect.

    advantages_PG, aux = group_normalized(grouped(rewards_B, group_size))
    batch["advantages"] = ungrouped(advantages_PG)          # (B,), one a row

Each is (rewards (P, G), options) -> (advantages (P, G), aux), in fp32 or wider. aux, detached and 0-d: "reward", the
mean, and "flat_groups", the share of groups whose rewards are all equal. A group of equal rewards has advantages of
exactly 0 wherever a group's mean is subtracted. Rewards that are not finite are refused on a CPU in plain code.

Baselines from outside of the group (ReMax, moving averages, A*-PO) are in `baselines`, advantages of tokens (returns,
REINFORCE++, GAE) in `token_advantages`.

Legend: P prompts, G responses a prompt, R rewards of a response.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from purelm.align.groups import checked_rewards
from purelm.devices import at_hand

__all__ = [
    "Advantage",
    "Aux",
    "aux_of",
    "batch_normalized",
    "centered",
    "codapo",
    "gpg",
    "group_normalized",
    "leave_one_out",
    "max_rl",
    "multi_reward",
    "opo",
    "pass_at_k",
    "positive_only",
    "raw",
]

Aux = dict[str, Tensor]
Advantage = Callable[..., tuple[Tensor, Aux]]
Rewards = Shaped[Tensor, "p g"]
Advantages = Float[Tensor, "p g"]


def raw(rewards_PG: Rewards) -> tuple[Advantages, Aux]:
    """A_i = r_i, REINFORCE without a baseline."""
    r = checked_rewards("raw", rewards_PG)
    return r, aux_of(r)


def positive_only(rewards_PG: Rewards, *, threshold: float = 1.0) -> tuple[Advantages, Aux]:
    """A_i = 1 where r_i >= threshold, else 0: with REINFORCE on top, supervised learning of one's own right responses.

    Rejection fine-tuning, expert iteration, STaR (Zelikman et al. 2022, arXiv:2203.14465).
    """
    r = checked_rewards("positive_only", rewards_PG)
    return (r >= threshold).to(r.dtype), aux_of(r)


def centered(rewards_PG: Rewards) -> tuple[Advantages, Aux]:
    """A_i = r_i - mean_j r_j; Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), Olmo 3.

    >>> centered(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[0]
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500]])
    """
    r = checked_rewards("centered", rewards_PG)
    return _centered(r), aux_of(r)


def group_normalized(rewards_PG: Rewards, *, ddof: int = 1, eps: float = 1e-6) -> tuple[Advantages, Aux]:
    """A_i = (r_i - mean r) / (std r + eps), over the group: GRPO (Shao et al. 2024, arXiv:2402.03300).

    Args:
        ddof: the standard deviation divides by G - ddof. 1: CS336, TRL, verl, slime; 0: open-instruct.
        eps: 1e-6: CS336, verl, slime; 1e-4: TRL; 1e-8: open-instruct. It matters where rewards are nearly equal.

    >>> group_normalized(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))[0]
    tensor([[ 0.7071, -0.7071],
            [ 0.0000,  0.0000]])
    """
    _check_std("group_normalized", ddof, eps)
    r = checked_rewards("group_normalized", rewards_PG, least=ddof + 1, why=f" for a deviation with ddof {ddof}")
    return _normalized(r, ddof, eps, 1), aux_of(r)


def batch_normalized(
    rewards_PG: Rewards, *, ddof: int = 1, eps: float = 1e-6, std: Tensor | float | None = None
) -> tuple[Advantages, Aux]:
    """A_i = (r_i - mean_group r) / (std_batch r + eps), the deviation over all P G rewards.

    "Lite PPO" (Liu et al. 2025, arXiv:2508.08221), `scale_rewards="batch"` of TRL. The deviation is that of rewards;
    `multi_reward` and `token_advantages.reinforce_plus_plus_baseline` divide by that of what is centred.

    Args:
        std: that of the whole batch, where these rewards are a part of it.
    """
    _check_std("batch_normalized", ddof, eps)
    r = checked_rewards("batch_normalized", rewards_PG)
    if std is None:
        if r.numel() <= ddof:
            raise ValueError(f"batch_normalized: {r.numel()} rewards have no deviation with ddof {ddof}")
        std = _std(r.reshape(1, -1), ddof, 1)
    scale = torch.as_tensor(std, dtype=r.dtype, device=r.device) + eps
    return _centered(r) / torch.where(scale > 0, scale, 1.0), aux_of(r)


def leave_one_out(rewards_PG: Rewards) -> tuple[Advantages, Aux]:
    """A_i = r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean r); RLOO (Ahmadian et al. 2024, arXiv:2402.14740)."""
    r = checked_rewards("leave_one_out", rewards_PG, least=2, why=", one is left out")
    n = r.shape[1]
    return _centered(r) * (n / (n - 1)), aux_of(r)


def max_rl(rewards_PG: Rewards, *, eps: float = 0.0) -> tuple[Advantages, Aux]:
    """A_i = (r_i - mean r) / (mean r + eps), 0 where the mean is 0; MaxRL (2026, arXiv:2602.02710).

    Rewards must be at least 0. With rewards of 0 and 1 a right response has 1/mean - 1: the rarer, the more it counts.

    >>> max_rl(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))[0]
    tensor([[ 3., -1., -1., -1.],
            [ 0.,  0.,  0.,  0.]])
    """
    r = checked_rewards("max_rl", rewards_PG)
    if at_hand(r) and bool((r < 0).any()):
        raise ValueError(f"max_rl: rewards must be at least 0, got {float(r.min())}; add a constant, or take centered")
    mean = r.mean(1, keepdim=True)
    some = mean > 0
    return torch.where(some, _centered(r) / torch.where(some, mean + eps, 1.0), 0.0), aux_of(r)


def opo(rewards_PG: Rewards, lengths_PG: Shaped[Tensor, "p g"]) -> tuple[Advantages, Aux]:
    """A_i = r_i - sum_j T_j r_j / sum_j T_j, T tokens of each response; OPO (Hao et al. 2025, arXiv:2505.23585).

    The baseline of least variance if the squared gradient of log pi grows as the length. Lengths of a group that are
    all 0 count as equal.
    """
    r = checked_rewards("opo", rewards_PG)
    if lengths_PG.shape != r.shape:
        raise ValueError(f"opo: lengths must have the shape of rewards {tuple(r.shape)}, got {tuple(lengths_PG.shape)}")
    T = lengths_PG.to(r.dtype)
    T = torch.where(T.sum(1, keepdim=True) > 0, T, torch.ones_like(T))
    d = r - r[:, :1]  # of equal rewards exactly 0
    return d - (T * d).sum(1, keepdim=True) / T.sum(1, keepdim=True), aux_of(r)


def gpg(rewards_PG: Rewards, *, f_norm: float = 1.0, alpha: Tensor | float | None = None) -> tuple[Advantages, Aux]:
    """A_i = alpha (r_i - mean r) / f_norm, alpha = rewards in the batch / rewards that are not 0 (at least 1).

    GPG (Chu et al. 2025, arXiv:2504.02546) as verl has it. alpha: that of the whole batch, where this is a part of it.
    """
    r = checked_rewards("gpg", rewards_PG)
    if not f_norm > 0:
        raise ValueError(f"gpg: f_norm must be above 0, got {f_norm}")
    if alpha is None:
        alpha = r.numel() / (r != 0).to(r.dtype).sum().clamp(min=1)
    return _centered(r) * alpha / f_norm, aux_of(r)


def pass_at_k(rewards_PG: Rewards, *, eps: float | None = None, ddof: int = 1) -> tuple[Advantages, Aux]:
    """A = r_max - r_second for the best response of a group (the first of them), 0 for the others.

    What a group's best of k adds beside its second (arXiv:2503.19595; verl's `grpo_passk`): a tie for the best gives 0.
    eps: with a number, divided by std + eps of the group.
    """
    least = 2 if eps is None else max(2, ddof + 1)
    r = checked_rewards("pass_at_k", rewards_PG, least=least, why=", a best and a second")
    top, at = r.topk(2, 1)
    gain = top[:, :1] - top[:, 1:]
    if eps is not None:
        _check_std("pass_at_k", ddof, eps)
        gain = gain / (_std(r, ddof, 1) + eps)
    is_best = torch.arange(r.shape[1], device=r.device) == at[:, :1]
    return torch.where(is_best, gain, 0.0), aux_of(r)


def multi_reward(
    rewards_PGR: Shaped[Tensor, "p g r"],
    weights_R: Shaped[Tensor, " r"] | None = None,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
) -> tuple[Advantages, Aux]:
    """A = normalize_batch(sum_k w_k z_k), z_k reward k normalised over its group; GDPO (2026, arXiv:2601.05242).

    Normalised one by one, so that sums of rewards that agree by chance stay apart. eps: 1e-4 as TRL. Weights are 1 by
    default. aux has "reward" as the mean of each reward, (R,).
    """
    _check_std("multi_reward", ddof, eps)
    r = checked_rewards("multi_reward", rewards_PGR, ndim=3, least=ddof + 1, why=f" for a deviation with ddof {ddof}")
    z = _normalized(r, ddof, eps, 1)
    if weights_R is not None:
        if weights_R.shape != r.shape[2:]:
            raise ValueError(f"multi_reward: {r.shape[2]} rewards and weights of shape {tuple(weights_R.shape)}")
        z = z * weights_R.to(z.dtype)
    total = z.sum(2)
    flat = ((r == r[:, :1]).all(1).all(1)).to(r.dtype).mean()
    a = _normalized(total.reshape(1, -1), ddof, eps, 1).view_as(total)
    return a, {"reward": r.mean((0, 1)).detach(), "flat_groups": flat.detach()}


def codapo(
    rewards_PG: Rewards,
    mean_log_probs_PG: Float[Tensor, "p g"],
    *,
    advantage: Advantage = group_normalized,
    floor: float = 0.1,
    right: float = 0.5,
) -> tuple[Advantages, Aux]:
    """(v + floor) A, v = c (1 - 4 (d - 1/2)^2): prompts of middling difficulty and high confidence count more.

    c = exp(mean over the group of the mean log-probability of a token), d = share of responses that are wrong, with
    rewards of at most `right`. CoDaPO (2026, arXiv:2606.07950). aux has "value", v of each prompt, (P,): by it the
    prompts of a second round are chosen.
    """
    r = checked_rewards("codapo", rewards_PG)
    if mean_log_probs_PG.shape != r.shape:
        found = tuple(mean_log_probs_PG.shape)
        raise ValueError(f"codapo: mean_log_probs must have the shape of rewards {tuple(r.shape)}, got {found}")
    a, aux = advantage(r)
    confidence = mean_log_probs_PG.detach().to(r.dtype).mean(1).exp()
    difficulty = (r <= right).to(r.dtype).mean(1)
    value = confidence * (1 - 4 * (difficulty - 0.5) ** 2)
    return (value + floor)[:, None] * a, {**aux, "value": value.detach()}


def aux_of(r_PG: Tensor) -> Aux:
    """{"reward": mean, "flat_groups": share of groups of equal rewards}, detached."""
    flat = (r_PG == r_PG[:, :1]).all(1).to(r_PG.dtype)
    return {"reward": r_PG.mean().detach(), "flat_groups": flat.mean().detach()}


def _centered(r: Tensor) -> Tensor:
    """r - mean over axis 1; exactly 0 for equal rewards, whose mean need not be equal to them in fp32."""
    d = r - r[:, :1]
    return d - d.mean(1, keepdim=True)


def _std(r: Tensor, ddof: int, axis: int) -> Tensor:
    """Standard deviation, axis kept; its gradient is 0, not nan, where it is 0."""
    squares = (_centered(r) ** 2).sum(axis, keepdim=True)
    some = squares > 0
    return torch.where(some, torch.where(some, squares / (r.shape[axis] - ddof), 1.0).sqrt(), 0.0)


def _normalized(r: Tensor, ddof: int, eps: float, axis: int) -> Tensor:
    std = _std(r, ddof, axis)
    # eps may be 0: a group of equal rewards has advantage 0, not nan.
    return _centered(r) / torch.where(std + eps > 0, std + eps, 1.0)


def _check_std(name: str, ddof: Any, eps: float) -> None:
    if ddof not in (0, 1):
        raise ValueError(f"{name}: ddof must be 0 or 1, got {ddof!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{name}: eps must be at least 0 and finite, got {eps}")
