"""Which prompts and groups are worth training on: masks (P,) from rewards, and what is known of each prompt so far.

    keep_P = ~zero_gradient(rewards_PG) & within(pass_rate(rewards_PG), 0.1, 0.9)
    rows = row_groups(keep_P, group_size)                # of groups.py; groups that are refilled: collect.py

Legend: P prompts of a batch, G responses a prompt, N prompts of a data set.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from purelm.align.groups import checked_rewards
from purelm.devices import at_hand

__all__ = [
    "Pool",
    "hard_but_solvable",
    "new_pool",
    "pass_rate",
    "pool_weights",
    "record",
    "retire",
    "within",
    "zero_gradient",
]


def zero_gradient(rewards_PG: Shaped[Tensor, "p g"], *, tol: float = 1e-6) -> Bool[Tensor, " p"]:
    """Groups with max - min <= tol: whose advantages are 0 once the group's mean is subtracted (DAPO, Olmo 3).

    Not a test of the deviation: that of equal rewards is not always 0 in fp32, and rewards that are sums of floating
    parts differ by rounding where they should be equal.

    >>> zero_gradient(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist()
    [True, False]
    """
    if not 0 <= tol < float("inf"):
        raise ValueError(f"zero_gradient: tol must be at least 0 and finite, got {tol}")
    r = checked_rewards("zero_gradient", rewards_PG)
    return r.amax(1) - r.amin(1) <= tol


def pass_rate(rewards_PG: Shaped[Tensor, "p g"], *, threshold: float = 1.0) -> Float[Tensor, " p"]:
    """Share of a prompt's responses with a reward of at least `threshold`."""
    r = checked_rewards("pass_rate", rewards_PG)
    return (r >= threshold).to(r.dtype).mean(1)


def within(rate_P: Float[Tensor, " p"], low: float, high: float) -> Bool[Tensor, " p"]:
    """low <= rate <= high: a band of difficulty, both ends included.

    Olmo 3's filter before training is `within(pass_rate(rewards of 8 responses), 0, 0.625)`; OpenRLHF's band takes the
    mean reward.
    """
    if not low <= high:
        raise ValueError(f"within: low must be at most high, got {low} and {high}")
    return (rate_P >= low) & (rate_P <= high)


def hard_but_solvable(
    few_PG: Shaped[Tensor, "p g"], many_PN: Shaped[Tensor, "p n"], *, threshold: float = 1.0
) -> Bool[Tensor, " p"]:
    """Prompts that none of few responses solve, and at least one of many does: the second stage of GLM-4.5.

    There 8 and 512 responses (arXiv:2508.06471, section 3.2), of prompts with verified answers.
    """
    if len(few_PG) != len(many_PN):
        raise ValueError(f"hard_but_solvable: rewards of {len(few_PG)} and of {len(many_PN)} prompts")
    few, many = pass_rate(few_PG, threshold=threshold), pass_rate(many_PN, threshold=threshold)
    return (few == 0) & (many > 0)


class Pool(NamedTuple):
    """What is known of each prompt of a data set."""

    rate_N: Tensor  # latest mean reward, fp32; nan where the prompt was not tried yet
    active_N: Tensor  # bool; False: not sampled any more


def new_pool(n: int, device: torch.device | str = "cpu") -> Pool:
    """n prompts, none of them tried."""
    if n < 1:
        raise ValueError(f"new_pool: at least one prompt is needed, got {n}")
    return Pool(torch.full((n,), float("nan"), device=device), torch.ones(n, dtype=torch.bool, device=device))


def record(pool: Pool, prompts_P: Int[Tensor, " p"], rewards_PG: Shaped[Tensor, "p g"]) -> Pool:
    """The pool after a batch: the mean reward of each of its prompts. prompts_P are their places in the pool."""
    r = checked_rewards("record", rewards_PG)
    n = len(pool.rate_N)
    if prompts_P.shape != r.shape[:1]:
        raise ValueError(f"record: {tuple(prompts_P.shape)} prompts for rewards {tuple(r.shape)}")
    if at_hand(prompts_P) and not bool(((prompts_P >= 0) & (prompts_P < n)).all()):
        raise ValueError(f"record: prompts must lie in 0..{n - 1}, got {prompts_P.tolist()}")
    if at_hand(prompts_P) and len(prompts_P.unique()) < len(prompts_P):
        raise ValueError("record: a prompt occurs twice in one batch; make one group of its responses")
    return pool._replace(rate_N=pool.rate_N.index_put((prompts_P,), r.mean(1).to(pool.rate_N.dtype)))


def retire(pool: Pool, *, rate: float = 0.875) -> Pool:
    """The pool without prompts whose latest mean reward is at least `rate`, for good.

    0.875 in Olmo 3 (`no_resampling_pass_rate`), 0.9 in ScaleRL (arXiv:2510.13786). Prompts not yet tried stay.
    """
    return pool._replace(active_N=pool.active_N & ~(pool.rate_N >= rate))


def pool_weights(
    pool: Pool, edges: Float[Tensor, " k"], weights: Float[Tensor, " k_plus_1"], *, untried: float = 1.0
) -> Float[Tensor, " n"]:
    """Probabilities of drawing each prompt: a weight for each class of difficulty, shared equally within the class.

    Class k holds the prompts with edges[k-1] <= rate < edges[k]; those not yet tried are a class of their own. A class
    without a prompt gives its share to the others. For `random.choice(key, N, (P,), replace=False, p=...)`.

    >>> pool = Pool(torch.tensor([0.1, 0.9, 0.95]), torch.tensor([True, True, True]))
    >>> pool_weights(pool, torch.tensor([0.5]), torch.tensor([3.0, 1.0]))
    tensor([0.7500, 0.1250, 0.1250])
    """
    if edges.ndim != 1 or weights.shape != (len(edges) + 1,):
        raise ValueError(f"pool_weights: {len(edges)} edges make {len(edges) + 1} classes, got {len(weights)} weights")
    if at_hand(edges) and not bool((edges.diff() > 0).all()):
        raise ValueError(f"pool_weights: edges must ascend, got {edges.tolist()}")
    if at_hand(weights) and not (bool((weights >= 0).all()) and bool(weights.isfinite().all())):
        raise ValueError(f"pool_weights: weights must be at least 0 and finite, got {weights.tolist()}")
    tried = ~pool.rate_N.isnan()
    class_N = torch.where(tried, torch.bucketize(pool.rate_N.nan_to_num(), edges, right=True), len(weights))
    share_K = torch.cat([weights, weights.new_full((1,), untried)])
    count_K = torch.zeros_like(share_K).index_add(0, class_N, pool.active_N.to(share_K.dtype))
    p_N = torch.where(pool.active_N, (share_K / count_K.clamp(min=1))[class_N], 0.0)
    total = p_N.sum()
    if at_hand(total) and not bool(total > 0):
        raise ValueError("pool_weights: no active prompt has a weight above 0; the pool is used up")
    return p_N / total
