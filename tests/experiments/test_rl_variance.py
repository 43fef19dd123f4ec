"""experiments.rl_variance. Oracles: all groups of sequences, one by one; central differences; other constants."""

import json
from itertools import product

import pytest
import torch

from experiments.rl_variance import (
    ESTIMATORS,
    Policy,
    enumerated,
    estimates,
    exact_variance,
    gradient,
    measured,
    optimal_baseline,
)
from purelm import random
from tests.programs import run_here


@pytest.mark.parametrize("vocab, length, tilt", [(2, 1, 0.0), (3, 2, 1.0), (4, 3, -2.0)])
def test_scores(vocab, length, tilt):
    """Probabilities add up to 1, scores have mean 0, and g is the gradient of the mean reward along itself."""
    p = enumerated(vocab, length, tilt, 3)
    n = sum(vocab**t for t in range(1, length + 1))
    assert p.scores_ND.shape == (vocab**length, n) and float(p.probs_N.sum()) == pytest.approx(1, abs=1e-12)
    assert float((p.probs_N @ p.scores_ND).abs().max()) < 1e-12
    sums = torch.tensor([sum(x) for x in product(range(vocab), repeat=length)])
    assert p.rewards_N.tolist() == [float(x % vocab == 0) for x in sums.tolist()]


def test_gradient_by_differences():
    """A tilt moves the last logits alone: d E r / d tilt is the sum of g there, on the tokens that lead to a reward."""
    up, down, here = (enumerated(3, 2, x, 0) for x in (1 + 1e-5, 1 - 1e-5, 1))
    slope = float(up.probs_N @ up.rewards_N - down.probs_N @ down.rewards_N) / 2e-5
    last = gradient(here)[3:].view(3, 3)  # by the token before
    found = sum(float(last[x, -x % 3]) for x in range(3))
    assert found == pytest.approx(slope, rel=1e-8)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("vocab, length, size", [(2, 2, 2), (2, 2, 3), (3, 1, 4), (2, 1, 5)])
def test_formulas_against_all_groups(estimator, vocab, length, size):
    """Oracle: mean and variance over all N^G groups, with their probabilities; rewards that are no 0 and 1 too."""
    made = enumerated(vocab, length, 0.7, 1)
    for rewards in (made.rewards_N, torch.linspace(-1, 2, len(made.rewards_N), dtype=torch.float64) ** 2):
        policy = Policy(made.probs_N, rewards, made.scores_ND)
        groups = torch.tensor(list(product(range(len(rewards)), repeat=size)))
        weights = policy.probs_N[groups].prod(1)
        found = estimates(policy, estimator, groups)
        mean = weights @ found
        variance = float(weights @ (found - mean).square().sum(1))
        assert exact_variance(policy, estimator, size) == pytest.approx(variance, rel=1e-9, abs=1e-14)
        scale = 1 - 1 / size if estimator == "group mean" else 1
        torch.testing.assert_close(mean, scale * gradient(policy), rtol=0, atol=1e-12)


def test_the_optimal_constant_is_the_best():
    policy = enumerated(3, 2, -1.0, 2)
    best, b = exact_variance(policy, "optimal", 4), optimal_baseline(policy)
    g2 = float(gradient(policy).square().sum())
    squares = policy.probs_N * policy.scores_ND.square().sum(1)
    for c in (b - 0.01, b + 0.01, 0.0, 1.0):
        assert best < (float(squares @ (policy.rewards_N - c).square()) - g2) / 4
    assert best < exact_variance(policy, "no baseline", 4) and best < exact_variance(policy, "leave one out", 4)


def test_measurement_agrees_with_the_formulas():
    """Within 5 of its own standard errors, which shrink as 1 / sqrt(groups)."""
    policy = enumerated(3, 2, 0.5, 0)
    few, many = (measured(policy, 3, n, random.key(1)) for n in (1000, 16_000))
    for name, (variance, error, bias) in many.items():
        assert abs(variance - exact_variance(policy, name, 3)) < 5 * error < 0.2 * variance
        assert error == pytest.approx(few[name][1] / 4, rel=0.3)
        assert bias == pytest.approx(1 / 3 if name == "group mean" else 0, abs=0.1)


def test_what_it_leaves(tmp_path):
    flags = ["--vocab", "2", "--length", "2", "--tilts", "0", "1", "--group-sizes", "2", "3", "--groups", "200"]
    done = run_here("experiments.rl_variance", *flags, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rl_variance.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * len(ESTIMATORS) and {row["group_size"] for row in rows} == {2, 3}
    text = (tmp_path / "rl_variance.md").read_text()
    for row in rows:
        assert f"{row['exact']:.4g} / {row['measured']:.4g}" in text
        policy = enumerated(2, 2, 0.0 if row["reward"] == rows[0]["reward"] else 1.0, 0)
        assert row["exact"] == exact_variance(policy, row["estimator"], row["group_size"])
    assert (tmp_path / "rl_variance.png").read_bytes()[:4] == b"\x89PNG"
    done = run_here("experiments.rl_variance", "--group-sizes", "2", "2", "--results", tmp_path / "no")
    assert done.returncode == 2 and "group_sizes: give at least one, and none twice" in done.stderr
    assert not (tmp_path / "no").exists()
