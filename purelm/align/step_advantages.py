"""Advantages of the steps of episodes: against whatever stood at the same place, GiGPO's among them.

`baselined` is the building block: ids say what is compared with what, such as all answers of a proposer, of a solver,
or all steps that began in the same state. Which ids a hierarchy gives is the caller's: "hierarchical GRPO" and TreePO,
whose definitions were not found in public, are no functions of their own here.

Legend: N values, E episodes, S steps, E = P G episodes of P tasks.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from purelm.align.advantages import Aux
from purelm.align.groups import checked_rewards
from purelm.align.token_advantages import returns

__all__ = ["baselined", "gigpo"]


def baselined(
    values_N: Shaped[Tensor, " n"],
    ids_N: Int[Tensor, " n"],
    *,
    std: bool = False,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Float[Tensor, " n"]:
    """v_i - mean of v over those with the same id; with std divided by their deviation + eps.

    A value that is alone, and values that are all equal, have 0.

    >>> baselined(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([7, 8, 7]))
    tensor([-1.,  0.,  1.])
    """
    v = checked_rewards("baselined", values_N, ndim=1)
    if ids_N.shape != v.shape or ids_N.is_floating_point():
        raise ValueError(f"baselined: ids must be integers of the shape {tuple(v.shape)}, "
                         f"got {ids_N.dtype} {tuple(ids_N.shape)}")  # fmt: skip
    if ddof not in (0, 1) or not 0 <= eps < float("inf"):
        raise ValueError(f"baselined: ddof must be 0 or 1 and eps at least 0, got {ddof!r} and {eps}")
    unique, at = ids_N.unique(return_inverse=True)
    sums = lambda x: torch.zeros(len(unique), dtype=v.dtype, device=v.device).index_add(0, at, x)  # noqa: E731
    count = sums(torch.ones_like(v))
    # Less one of the group first, so that equal values have exactly 0.
    first = torch.full_like(count, torch.inf).scatter_reduce(0, at, v, "amin")
    d = v - first[at]
    d = d - (sums(d) / count)[at]
    if not std:
        return d
    scale = (sums(d * d) / (count - ddof).clamp(min=1)).sqrt()[at] + eps
    return d / torch.where(scale > 0, scale, 1.0)


def gigpo(
    rewards_ES: Shaped[Tensor, "e s"],
    mask_ES: Shaped[Tensor, "e s"],
    states_ES: Int[Tensor, "e s"],
    *,
    group_size: int,
    gamma: float = 0.95,
    weight: float = 1.0,
    std: bool = False,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "e s"], Aux]:
    """A_it = A(sum_t r_it) + weight A(R_it), R_it = sum_(k >= t) gamma^(k-t) r_ik; GiGPO (arXiv:2505.10978, eq. 3-8).

    The first is against the other episodes of the task (`group_size` of them, one after the other), the second against
    all steps of those episodes that began in the same state; a state that was seen once has 0. Each is less the mean,
    with std divided by the deviation. gamma and weight are those of verl-agent, the authors' code; std is off in its
    `mean_norm`. Its mean of episodes counts each once for every step unless told otherwise; here, as in the paper,
    once.

    Args:
        rewards_ES: of each step; 0 but for the last where only the outcome is rewarded.
        mask_ES: not 0 on steps that were taken.
        states_ES: ids, equal where two steps of a task began in what counts as the same state.
    Returns:
        (one a step, for all tokens of its response, 0 where masked; aux: `reward`, the mean of episodes' sums, and
        `shared`, the share of steps whose state another step of the task began in).
    """
    r = checked_rewards("gigpo", torch.where(mask_ES != 0, rewards_ES, torch.zeros_like(rewards_ES)))
    for name, x in (("mask", mask_ES), ("states", states_ES)):
        if x.shape != r.shape:
            raise ValueError(f"gigpo: {name} must have the shape of rewards {tuple(r.shape)}, got {tuple(x.shape)}")
    E = len(r)
    if not isinstance(group_size, int) or group_size < 1 or E % group_size:
        raise ValueError(f"gigpo: group_size must divide the number of episodes, {E}, got {group_size}")
    on = mask_ES != 0
    tasks_E = torch.arange(E, device=r.device) // group_size
    of_episode = baselined(r.sum(1), tasks_E, std=std, eps=eps)
    R = returns(r, mask_ES, gamma=gamma)
    # One id for each pair of task and state, from the ids of states in their order.
    numbers = states_ES.unique(return_inverse=True)[1]
    ids = tasks_E[:, None] * (numbers.amax() + 1) + numbers
    found = baselined(R[on], ids[on], std=std, eps=eps) if on.any() else R[on]
    of_step = torch.zeros_like(r).masked_scatter(on, found)
    _, at, count = ids[on].unique(return_inverse=True, return_counts=True)
    shared = (count[at] > 1).to(r.dtype).sum() / max(1, at.numel())
    a = torch.where(on, of_episode[:, None] + weight * of_step, 0.0)
    return a, {"reward": r.sum(1).mean().detach(), "shared": shared}
