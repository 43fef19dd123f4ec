"""Recipes as formulas. Oracle: each from rewards to loss and gradient, in loops over numpy's float64, with derivatives
written by hand."""

import numpy as np
import pytest
import torch

from purelm.align.recipes import RECIPES
from tests.align.objectives import NAMES, TOL, G, T, drawn, ready, recipe_objective, value_and_grad

# The oracle: a recipe is spelled out again, as names that the loops know.
LOOPS = {
    "course2025": ("std", "reinforce", "rows"),
    "course2025_no_baseline": ("raw", "reinforce", "rows"),
    "course2025_off_policy": ("std", (0.2, 0.2), "rows"),
    "course2025_no_clip": ("std", (9e9, 9e9), "rows"),
    "course2026_grpo": ("std", "reinforce", "rows"),
    "course2026_dr_grpo": ("mean", "reinforce", "length"),
    "course2026_maxrl": ("maxrl", "reinforce", "rows"),
    "course2026_rft": ("right", "reinforce", "rows"),
    "course2026_off_naive": ("std", "reinforce", "rows"),
    "course2026_off_no_clip": ("std", (9e9, 9e9), "rows"),
    "course2026_off_clip": ("std", (0.2, 0.2), "rows"),
    "course2026_off_gspo": ("std", ("sequence", 3e-4, 3e-4), "rows"),
    "grpo": ("std", (0.2, 0.2), "rows", "kl"),
    "dr_grpo": ("mean", (0.2, 0.2), "length"),
    "rloo": ("rloo", "reinforce", "sums"),
    "dapo": ("std", (0.2, 0.28), "tokens"),
    "gspo": ("std", ("sequence", 3e-4, 4e-4), "rows"),
    "cispo": ("std", "cispo", "tokens"),
    "olmo3": ("mean", (0.2, 0.272), "tokens"),
    "olmo3_32b_think": ("mean", (0.2, 0.272), "tokens", "tis"),
    "olmo3_7b_instruct": ("mean", (0.2, 0.272), "tokens"),
    "olmo3_rl_zero": ("mean", (0.2, 0.272), "tokens", "tis"),
    "glm45": ("mean", "reinforce", "groups"),
    "glm4_9b_slime": ("std", (0.2, 0.28), "rows"),
    "glm47_slime": ("std", ("sequence", 1e-4, 2e-4), "rows", "tis"),
    "scalerl": ("batch", "cispo", "groups"),
}


def loop_advantages(kind, r):
    every = [float(x) for x in r]
    spread = lambda x: (sum((y - sum(x) / len(x)) ** 2 for y in x) / (len(x) - 1)) ** 0.5  # noqa: E731
    out = []
    for p in range(0, len(every), G):
        x = every[p : p + G]
        m = sum(x) / G
        out += {
            "raw": lambda x=x: x,
            "right": lambda x=x: [float(y >= 1) for y in x],
            "mean": lambda x=x, m=m: [y - m for y in x],
            "std": lambda x=x, m=m: [(y - m) / (spread(x) + 1e-6) for y in x],
            "batch": lambda x=x, m=m: [(y - m) / (spread(every) + 1e-6) for y in x],
            "rloo": lambda x=x, m=m: [y - (sum(x) - y) / (G - 1) for y in x],
            "maxrl": lambda x=x, m=m: [(y - m) / m if m > 0 else 0.0 for y in x],
        }[kind]()
    return out


def loop(name, batch):
    """(loss, d loss / d log_probs)."""
    kind, region, total, *more = LOOPS[name]
    lp, lo, ls, lr, m = (
        batch[k].numpy() for k in ("log_probs", "old_log_probs", "sampler_log_probs", "ref_log_probs", "mask")
    )
    A = loop_advantages(kind, batch["rewards"])
    B = len(A)
    loss, grad = np.zeros((B, T)), np.zeros((B, T, T))  # grad[i, t, s]: of l_it by lp_is
    for i in range(B):
        on = np.flatnonzero(m[i])
        for t in on:
            if region == "reinforce":
                loss[i, t], grad[i, t, t] = -A[i] * lp[i, t], -A[i]
            elif region == "cispo":
                w = min(np.exp(lp[i, t] - lo[i, t]), 5.0)
                loss[i, t], grad[i, t, t] = -w * A[i] * lp[i, t], -w * A[i]
            else:
                low, high = region[-2:]
                along = on if region[0] == "sequence" else [t]
                w = np.exp(np.mean([lp[i, s] - lo[i, s] for s in along]))
                bounded = min(max(w, 1 - low), 1 + high)
                loss[i, t] = -min(w * A[i], bounded * A[i])
                for s in along:
                    grad[i, t, s] = -w * A[i] / len(along) if w * A[i] <= bounded * A[i] else 0.0
            if "tis" in more:
                rho = min(np.exp(lo[i, t] - ls[i, t]), 2.0)
                loss[i, t], grad[i, t] = rho * loss[i, t], rho * grad[i, t]
            if "kl" in more:
                d = lr[i, t] - lp[i, t]
                loss[i, t] += 0.04 * (np.exp(d) - d - 1)
                grad[i, t, t] += 0.04 * (1 - np.exp(d))
    c = np.zeros((B, T))
    for i in range(B):
        first = i - i % G
        c[i] = {
            "rows": m[i] / m[i].sum() / B,
            "sums": m[i] / B,
            "length": m[i] / (B * 7),
            "tokens": m[i] / m.sum(),
            "groups": m[i] / m[first : first + G].sum() / (B / G),
        }[total]
    return (c * loss).sum(), np.einsum("it,its->is", c, grad)


def test_every_recipe_has_a_loop():
    assert set(LOOPS) == set(RECIPES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("seed", "spread"), [(0, 0.3), (1, 0.8), (2, 6e-4)])
def test_recipe_is_its_formula(name, seed, spread):
    """1e-9 in float64: one recipe's loss taken for another's differs by more, see below."""
    objective = recipe_objective(name)
    loss, g, _ = value_and_grad(objective, ready(objective, seed, spread=spread))
    wanted, wanted_g = loop(name, drawn(seed, spread=spread))
    torch.testing.assert_close(loss, torch.tensor(wanted), **TOL)
    torch.testing.assert_close(g, torch.from_numpy(wanted_g), **TOL)


def test_recipes_with_other_formulas_have_other_gradients():
    """So the loops above tell recipes apart: equal spelling, equal gradient, and only then."""
    grads = {
        name: np.stack([loop(name, drawn(s, spread=x))[1] for s in range(20) for x in (0.8, 6e-4)]) for name in NAMES
    }
    for i, a in enumerate(NAMES):
        for b in NAMES[:i]:
            same = np.abs(grads[a] - grads[b]).max() < 1e-6
            assert same == (LOOPS[a] == LOOPS[b]), (a, b)
