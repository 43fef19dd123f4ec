"""What tests of objectives share: a batch drawn in float64, and an objective's loss and gradient on it."""

import numpy as np
import torch

from purelm.align.objective import advantages_of, policy_loss
from purelm.align.recipes import RECIPES, adapted

F64 = torch.float64
TOL = {"rtol": 1e-9, "atol": 1e-12}
G, T = 4, 6
NAMES = list(RECIPES)


def recipe_objective(name):
    return adapted(RECIPES[name], group_size=G, max_new_tokens=7).objective


def drawn(seed=0, groups=3, spread=0.3):
    """A batch in float64, off-policy by `spread`; rewards of 0, 1/2 and 1, one flat group."""
    rng = np.random.default_rng(seed)
    B = G * groups
    tensor = lambda x: torch.from_numpy(np.asarray(x, dtype=np.float64))  # noqa: E731
    lp = -rng.uniform(0.1, 3.0, (B, T))
    mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    mask[1, 0] = mask[1].sum() < 2  # a hole, as of a tool's answer
    rewards = rng.integers(0, 3, B) / 2
    rewards[:G] = 1.0
    rewards[G], rewards[G + 1] = 0.0, 1.0
    return {
        "log_probs": tensor(lp),
        "old_log_probs": tensor(lp - rng.normal(0, spread, (B, T))),
        "sampler_log_probs": tensor(lp - rng.normal(0, spread, (B, T))),
        "ref_log_probs": tensor(lp - rng.normal(0, spread, (B, T))),
        "entropy": tensor(rng.uniform(0, 2, (B, T))),
        "mask": tensor(mask),
        "rewards": tensor(rewards),
    }


def ready(objective, seed=0, **options):
    batch = drawn(seed, **options)
    batch["advantages"], _ = advantages_of(objective, batch["rewards"], group_size=G)
    return batch


def value_and_grad(objective, batch):
    lp = batch["log_probs"].detach().clone().requires_grad_()
    loss, metrics = policy_loss(objective, {**batch, "log_probs": lp})
    (g,) = torch.autograd.grad(loss, lp)
    return loss.detach(), g, metrics
