"""Numbers that follow a run: the entropy's coefficient, the temperature of sampling, the reference policy.

Each is a pure function of its state and of what was measured; the state is saved with the run.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from purelm import tree
from purelm.tree import Tree

__all__ = [
    "EntropyControl",
    "Temperature",
    "adapt_entropy",
    "entropy_control",
    "mixed_reference",
    "observe",
    "plateaued",
    "raised",
    "temperature",
]


class EntropyControl(NamedTuple):
    """The coefficient of an entropy bonus that keeps entropy near a target."""

    coefficient: Tensor  # 0-d; what was reached so far
    applied: Tensor  # 0-d; what the loss of the next step takes: coefficient, or 0 while entropy is above the target


def entropy_control(coefficient: float = 0.0) -> EntropyControl:
    """The state at the start: nothing is applied before entropy was measured."""
    return EntropyControl(torch.tensor(float(coefficient)), torch.tensor(0.0))


def adapt_entropy(
    state: EntropyControl,
    entropy: Float[Tensor, ""] | float,
    target: float,
    *,
    change: float = 0.005,
    least: float = 0.0,
    most: float = float("inf"),
) -> EntropyControl:
    """c + change if entropy <= target, else c - change; applied only while entropy <= target.

    Skywork-OR1 (He et al. 2025, arXiv:2505.22312), section 3.2.5. No host reads anything.

    >>> adapt_entropy(entropy_control(0.01), 0.1, target=0.2)
    EntropyControl(coefficient=tensor(0.0150), applied=tensor(0.0150))
    """
    if not least <= most or not change >= 0:
        raise ValueError(f"adapt_entropy: least {least} <= most {most} and change {change} >= 0 are needed")
    low = torch.as_tensor(entropy, device=state.coefficient.device).detach() <= target
    c = (state.coefficient + torch.where(low, change, -change)).clamp(least, most)
    return EntropyControl(c, torch.where(low, c, torch.zeros_like(c)))


class Temperature(NamedTuple):
    """The temperature at which responses are sampled, and how the reward did at it."""

    value: float
    best: float = float("-inf")  # highest reward so far
    n_without_gain: int = 0  # measurements since


def temperature(value: float) -> Temperature:
    """The state at the start."""
    if not 0 < value < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {value}")
    return Temperature(float(value))


def observe(state: Temperature, reward: float, *, least_gain: float = 0.0) -> Temperature:
    """The state after a mean reward: a gain is more than least_gain above the best so far."""
    if reward > state.best + least_gain:
        return state._replace(best=float(reward), n_without_gain=0)
    return state._replace(n_without_gain=state.n_without_gain + 1)


def plateaued(state: Temperature, patience: int) -> bool:
    """Whether the last `patience` rewards were no gain."""
    return state.n_without_gain >= patience


def raised(state: Temperature, held_out: Mapping[float, float], *, most_drop: float = 0.01) -> Temperature:
    """The state at the highest temperature whose held-out score is at most `most_drop` below the present one's.

    GLM-4.5 (arXiv:2508.06471), for a reward that has reached a plateau: more exploration as long as quality holds.

    Args:
        held_out: temperature -> score; that of the present temperature must be among them. Lower ones are not taken.
        most_drop: relative: 0.01 is one part in a hundred.
    """
    if state.value not in held_out:
        raise ValueError(f"raised: held_out has no score of the present temperature {state.value}")
    score = held_out[state.value]
    good = [T for T, s in held_out.items() if T >= state.value and s >= score - most_drop * abs(score)]
    return Temperature(max(good), state.best, 0)


def mixed_reference(params: Tree, reference: Tree, *, alpha: float = 0.6) -> Tree:
    """alpha params + (1 - alpha) reference, detached: the reference of a KL term moved after the policy.

    TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656); TRL's 0.6, every 512 steps.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"mixed_reference: alpha must be in 0..1, got {alpha}")
    return tree.map(lambda p, r: torch.lerp(r.detach(), p.detach().to(r.dtype), alpha), params, reference)
