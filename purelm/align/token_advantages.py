"""Advantages of tokens: returns, REINFORCE++, GAE, the optimal token baseline.

Each is (rewards of tokens (B, T), mask (B, T), ...) -> (advantages (B, T), aux), 0 where the mask is 0. Time passes
only where the mask is not 0: tokens in between, such as a tool's answers, neither discount nor end anything, and what
lies there has no influence, not even nan.

Legend: B rows, T positions of targets, P prompts, G responses a prompt, B = P G.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from purelm.align.advantages import Aux, aux_of, centered
from purelm.align.groups import checked_rewards, grouped, ungrouped

__all__ = [
    "at_last_token",
    "gae",
    "optimal_token_baseline",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "returns",
    "whitened",
]

Tokens = Float[Tensor, "b t"]
Mask = Shaped[Tensor, "b t"]


def at_last_token(rewards_B: Shaped[Tensor, " b"], mask_BT: Mask) -> Tokens:
    """Rewards of responses as rewards of their last tokens; the rest is 0. A row without tokens loses its reward.

    >>> at_last_token(torch.tensor([1.0, 2.0]), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])).tolist()
    [[0.0, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0]]
    """
    r = checked_rewards("at_last_token", rewards_B, ndim=1)
    if mask_BT.ndim != 2 or len(mask_BT) != len(r):
        raise ValueError(f"at_last_token: {len(r)} rewards need a mask ({len(r)}, T), got {tuple(mask_BT.shape)}")
    on = mask_BT != 0
    later = on.flip(1).cumsum(1).flip(1)  # tokens from here on
    return torch.where(on & (later == 1), r[:, None], 0.0)


def returns(rewards_BT: Tokens, mask_BT: Mask, *, gamma: float = 1.0) -> Tokens:
    """R_t = r_t + gamma R_{t+1}, t + 1 the next token that the mask chooses.

    >>> returns(torch.tensor([[1.0, 9.0, 1.0]]), torch.tensor([[1, 0, 1]]), gamma=0.5)
    tensor([[1.5000, 0.0000, 1.0000]])
    """
    r, on = _inputs("returns", rewards_BT, mask_BT)
    _check_share("returns", "gamma", gamma)
    if gamma == 1.0:
        return torch.where(on, r.flip(1).cumsum(1).flip(1), 0.0)
    return _backwards(r, on, gamma)


def whitened(x_BT: Tokens, mask_BT: Mask, *, ddof: int = 1, eps: float = 1e-8) -> Tokens:
    """(x - mean) / sqrt(var + eps) over all tokens that the mask chooses, so that longer rows count more.

    eps lies under the root, and var divides by n - ddof, as in verl. Fewer than ddof + 1 tokens: var is 0.
    """
    x, on = _inputs("whitened", x_BT, mask_BT)
    if ddof not in (0, 1) or not eps > 0:
        raise ValueError(f"whitened: ddof must be 0 or 1 and eps above 0, got {ddof!r} and {eps}")
    n = on.sum().to(x.dtype)
    mean = x.sum() / n.clamp(min=1)
    d = torch.where(on, x - mean, 0.0)
    var = (d * d).sum() / (n - ddof).clamp(min=1)
    return d / (var + eps).sqrt()


def reinforce_plus_plus(
    rewards_BT: Tokens, mask_BT: Mask, *, gamma: float = 1.0, eps: float = 1e-8
) -> tuple[Tokens, Aux]:
    """A = whitened(returns); REINFORCE++ (Hu 2025, arXiv:2501.03262). No group is needed.

    A KL penalty is a reward there: `at_last_token(r, mask) - beta * kl_BT`.
    """
    R = returns(rewards_BT, mask_BT, gamma=gamma)
    total = torch.where(mask_BT != 0, rewards_BT, 0.0).sum(1).mean()
    return whitened(R, mask_BT, eps=eps), {"reward": total.detach()}


def reinforce_plus_plus_baseline(
    rewards_PG: Shaped[Tensor, "p g"], mask_BT: Mask, *, eps: float = 1e-8
) -> tuple[Tokens, Aux]:
    """A = whitened(r_i - mean_group r), the same for all tokens of a response; REINFORCE++-baseline (same paper)."""
    a, aux = centered(rewards_PG)
    _check_rows("reinforce_plus_plus_baseline", a, mask_BT)
    return whitened(ungrouped(a)[:, None].expand(mask_BT.shape), mask_BT, eps=eps), aux


def gae(
    rewards_BT: Tokens, values_BT: Tokens, mask_BT: Mask, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tokens, Aux]:
    """A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t; PPO with a critic (Schulman 2015, 1506.02438).

    V is 0 after the last token. aux["returns"], (B, T): A + V, what the critic is taught. With gamma = lam = 1, A is
    the return minus V.
    """
    r, on = _inputs("gae", rewards_BT, mask_BT)
    v, _ = _inputs("gae", values_BT, mask_BT)
    v = v.detach()
    _check_share("gae", "gamma", gamma)
    _check_share("gae", "lam", lam)
    # V of the next chosen token, carried backwards over those that are not.
    following, carried = [], torch.zeros_like(v[:, 0])
    for t in reversed(range(v.shape[1])):
        following.append(carried)
        carried = torch.where(on[:, t], v[:, t], carried)
    delta = torch.where(on, r + gamma * torch.stack(following[::-1], 1) - v, 0.0)
    a = _backwards(delta, on, gamma * lam)
    return a, {"reward": r.sum(1).mean().detach(), "returns": torch.where(on, a + v, 0.0).detach()}


def optimal_token_baseline(
    rewards_PG: Shaped[Tensor, "p g"], log_probs_BT: Tokens, squares_BT: Tokens, mask_BT: Mask
) -> tuple[Tokens, Aux]:
    """A_it = r_i - sum_j r_j W_jt / sum_j W_jt over the responses of the group that reach t; verl's.

    W_t = sum_{s <= t} (1 - 2 pi_s + sum_v pi_sv^2), the squared gradient of log pi by the logits so far.

    Args:
        log_probs_BT: log pi_s of the tokens, of the policy that gave them.
        squares_BT: sum over the vocabulary of pi_sv^2.
    """
    r = checked_rewards("optimal_token_baseline", rewards_PG)
    _check_rows("optimal_token_baseline", r, mask_BT)
    lp, on = _inputs("optimal_token_baseline", log_probs_BT, mask_BT)
    squares, _ = _inputs("optimal_token_baseline", squares_BT, mask_BT)
    W_BT = torch.where(on, 1 - 2 * lp.exp() + squares, 0.0).detach().clamp(min=0).cumsum(1)
    G = r.shape[1]
    W_PGT = grouped(torch.where(on, W_BT, 0.0), G)
    d_PG = r - r[:, :1]  # of equal rewards exactly 0
    total_PT = W_PGT.sum(1)
    some = total_PT > 0
    baseline_PT = torch.where(some, (d_PG[..., None] * W_PGT).sum(1) / torch.where(some, total_PT, 1.0), 0.0)
    a = ungrouped(d_PG[..., None] - baseline_PT[:, None])
    return torch.where(on, a, 0.0), aux_of(r)


def _backwards(x_BT: Tensor, on_BT: Tensor, factor: float) -> Tensor:
    """y_t = x_t + factor y_{t+1} over the chosen tokens, 0 elsewhere."""
    out, carried = [], torch.zeros_like(x_BT[:, 0])
    for t in reversed(range(x_BT.shape[1])):
        carried = torch.where(on_BT[:, t], x_BT[:, t] + factor * carried, carried)
        out.append(torch.where(on_BT[:, t], carried, 0.0))
    return torch.stack(out[::-1], 1)


def _inputs(name: str, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(x in fp32 or wider and 0 where the mask is, the mask as bool)."""
    if x.ndim != 2 or not x.shape[1] or mask.shape != x.shape:
        found = f"{tuple(x.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"{name}: tensors (B, T) and a mask of that shape are needed, got {found}")
    on = mask != 0
    return torch.where(on, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0), on


def _check_rows(name: str, rewards_PG: Tensor, mask_BT: Tensor) -> None:
    if mask_BT.ndim != 2 or len(mask_BT) != rewards_PG.numel():
        raise ValueError(f"{name}: rewards {tuple(rewards_PG.shape)} need a mask of {rewards_PG.numel()} rows, "
                         f"got {tuple(mask_BT.shape)}")  # fmt: skip


def _check_share(name: str, what: str, x: float) -> None:
    if not 0 <= x <= 1:
        raise ValueError(f"{name}: {what} must be in 0..1, got {x}")
