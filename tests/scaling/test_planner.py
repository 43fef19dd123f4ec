"""Plans of runs.

Oracles: torch's derivatives; the inverse of the normal matrix; refits of many noisy copies of one design; all subsets
of small sets of candidates.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.scaling import parametric
from purelm.scaling.laws import Law, loss, optimum
from purelm.scaling.planner import Points, covariance, gradient, grid, noise_of, propose, sensitivities
from purelm.scaling.runs import Runs, taken

HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)
LAWS = st.builds(
    Law, st.floats(0.5, 3), st.floats(50, 5000), st.floats(50, 5000), st.floats(0.1, 0.8), st.floats(0.1, 0.8)
)


def on_grid(law, sizes=6, budgets=5):
    n, d = grid((1e8, 1e10), (1e20, 1e22), sizes, budgets, tokens_each=(1e-9, 1e9))
    return Runs(n, d, loss(law, n, d))


def theta_of(law):
    return torch.tensor(parametric.unknowns_of(law), dtype=torch.float64, requires_grad=True)


def law_of(theta):
    a, b, e, alpha, beta = theta
    return Law(torch.exp(e), torch.exp(a), torch.exp(b), alpha, beta)


@settings(max_examples=40)
@given(LAWS, st.floats(17, 26), st.floats(6, 12), st.floats(6, 13))
def test_gradients(law, log_c, log_n, log_d):
    """Oracle: torch's derivatives of ln N*, ln L* and ln L in ln A, ln B, ln E and the exponents."""
    for of in ("parameters", "loss"):
        theta = theta_of(law)
        torch.log(getattr(optimum(law_of(theta), 10**log_c), of)).backward()
        np.testing.assert_allclose(gradient(law, 10**log_c, of), theta.grad, rtol=1e-6, atol=1e-9)
    theta = theta_of(law)
    torch.log(loss(law_of(theta), 10**log_n, 10**log_d)).backward()
    np.testing.assert_allclose(sensitivities(law, 10**log_n, 10**log_d), theta.grad, rtol=1e-9)


def test_the_covariance_is_that_of_refits():
    """Oracles: numpy's inverse; 2,000 least-squares refits of runs with noise, whose deviations are good to 2 %."""
    runs, s = on_grid(HOFFMANN), 0.002
    rows = sensitivities(HOFFMANN, *runs[:2])
    v = covariance(runs, HOFFMANN, s, None)
    np.testing.assert_allclose(v, s**2 * np.linalg.inv(rows.T @ rows), rtol=1e-5)
    prior = (1.0, 2.0, 0.1, 0.2, 0.3)
    exact = np.linalg.inv(rows.T @ rows / s**2 + np.diag(1 / np.square(prior)))
    np.testing.assert_allclose(covariance(runs, HOFFMANN, s, prior), exact, rtol=1e-6)

    noise = np.random.default_rng(0).normal(size=(2000, len(runs.loss)))
    data = (np.log(runs.parameters)[None], np.log(runs.tokens)[None], np.log(runs.loss) + s * noise)
    begin = np.repeat(parametric.unknowns_of(HOFFMANN)[None], 2000, 0)
    found = parametric.law_of(parametric.refit(data, begin, 1.0, 2000).x)  # delta far above the noise: least squares
    for c in (1e22, 1e24):
        best = optimum(found, c)
        for of in ("parameters", "loss"):
            g = gradient(HOFFMANN, c, of)
            predicted = math.sqrt(g @ v @ g)
            assert np.std(np.log(getattr(best, of))) == pytest.approx(predicted, rel=0.06), (of, c)


@settings(max_examples=25)
@given(LAWS, st.integers(0, 2**32), st.sampled_from(["parameters", "loss"]))
def test_greedy_choices_are_nearly_those_of_all_subsets(law, draws, of):
    """Oracle: every subset of 9 candidates within the budget; equal for one run, and the budget is kept exactly."""
    rng = np.random.default_rng(draws)
    n, d = np.exp(rng.uniform(np.log(1e7), np.log(1e10), 9)), np.exp(rng.uniform(np.log(1e9), np.log(1e12), 9))
    runs = taken(on_grid(law), rng.choice(30, 8, replace=False))
    costs = 6 * n * d
    budget = float(rng.choice([0.2, 0.5, 0.9]) * costs.sum())
    g, s = gradient(law, 1e23, of), 0.01

    def variance(some):
        more = Runs(*(np.concatenate([x, y[list(some)]]) for x, y in zip(runs, (n, d, loss(law, n, d)), strict=True)))
        return g @ covariance(more, law, s) @ g

    before = variance(())
    subsets = [x for k in range(10) for x in itertools.combinations(range(9), k) if costs[list(x)].sum() <= budget]
    plan = propose(runs, law, 1e23, budget, Points(n, d), of=of, noise=s)
    reached = before - min(map(variance, subsets))
    assert before == pytest.approx(plan.variance_before, rel=1e-6)
    assert before - plan.variance_after >= 0.9 * reached - 1e-9 * before
    assert math.fsum(plan.cost) <= budget and plan.noise == s
    chosen = [int(np.argmin(abs(n - x))) for x in plan.parameters]
    assert len(set(chosen)) == len(chosen) and plan.tokens.tolist() == d[chosen].tolist()
    for k, v in enumerate(plan.variance, 1):
        assert v == pytest.approx(variance(chosen[:k]), rel=1e-5)
    one = propose(runs, law, 1e23, budget, Points(n, d), n=1, of=of, noise=s)
    singles = [x for x in subsets if len(x) <= 1]
    assert one.variance_after == pytest.approx(min(map(variance, singles)), rel=1e-6) and len(one.cost) <= 1


def test_no_single_exchange_is_better():
    """Oracles: each chosen run out and each other candidate in, within the budget; slow greedy choices, which exchanges
    improve here; all subsets, in a case of which one of the two greedy starts alone reaches 85 %.
    """
    runs, points = taken(on_grid(HOFFMANN), slice(0, 30, 3)), grid((1e8, 1e10), (1e20, 3e21), 10, 6)
    costs, s = 6 * points.parameters * points.tokens, 0.01
    budget = float(costs.sum() / 3)
    plan = propose(runs, HOFFMANN, 1e24, budget, points, noise=s, n=10)
    chosen = [
        int(np.flatnonzero((points.parameters == n) & (points.tokens == d))[0]) for n, d in zip(*plan[:2], strict=True)
    ]
    g, rows = gradient(HOFFMANN, 1e24), sensitivities(HOFFMANN, *points) / s
    information = np.linalg.inv(covariance(runs, HOFFMANN, s))

    def variance(some):
        return g @ np.linalg.solve(information + rows[some].T @ rows[some], g)

    assert variance(chosen) == pytest.approx(plan.variance_after, rel=1e-6)
    for k in range(len(chosen)):
        rest = chosen[:k] + chosen[k + 1 :]
        for i in set(range(len(costs))) - set(chosen):
            if costs[[*rest, i]].sum() <= budget:
                assert variance([*rest, i]) >= plan.variance_after * (1 - 1e-6)

    def greedy(price):
        some = []
        while len(some) < 10:
            free = [i for i in range(len(costs)) if i not in some and costs[[*some, i]].sum() <= budget]
            if not free:
                break
            some.append(max(free, key=lambda i: (variance(some) - variance([*some, i])) / price[i]))
        return variance(some)

    assert plan.variance_after < 0.95 * min(greedy(costs), greedy(np.ones_like(costs)))

    rng = np.random.default_rng(45)
    law = Law(*(rng.uniform(*x) for x in ((0.5, 3), (50, 5000), (50, 5000), (0.1, 0.8), (0.1, 0.8))))
    n, d = np.exp(rng.uniform(np.log(1e7), np.log(1e10), 9)), np.exp(rng.uniform(np.log(1e9), np.log(1e12), 9))
    runs, costs = taken(on_grid(law), rng.choice(30, 8, replace=False)), 6 * n * d
    budget = float(rng.choice([0.2, 0.5, 0.9]) * costs.sum())
    plan = propose(runs, law, 1e23, budget, Points(n, d), noise=s)
    g, rows = gradient(law, 1e23), sensitivities(law, n, d) / s
    information = np.linalg.inv(covariance(runs, law, s))
    subsets = [x for k in range(10) for x in itertools.combinations(range(9), k) if costs[list(x)].sum() <= budget]
    assert plan.variance_after == pytest.approx(min(variance(list(x)) for x in subsets), rel=1e-5)


def test_cost_in_seconds_repeats_and_limits():
    """Exact: any unit of cost, whole budgets used where they divide, candidates that are taken again."""
    runs, points = on_grid(HOFFMANN), grid((1e8, 1e10), (1e20, 1e22), 4, 3)

    def seconds(n, d):
        return np.full_like(n, 0.1)

    plan = propose(runs, HOFFMANN, 1e24, 0.3, points, seconds, noise=0.01)
    assert plan.cost.tolist() == [0.1] * 2  # 0.1 + 0.1 + 0.1 is above 0.3
    assert len(propose(runs, HOFFMANN, 1e24, 1.0, points, seconds, noise=0.01, n=4).cost) == 4
    many = propose(runs, HOFFMANN, 1e24, 3.05, points, seconds, noise=0.01, repeats=5)
    few = propose(runs, HOFFMANN, 1e24, 3.05, points, seconds, noise=0.01)
    assert len(few.cost) == len(points.tokens) < len(many.cost) == 30 and many.variance_after < few.variance_after
    none = propose(runs, HOFFMANN, 1e24, 0.05, points, seconds, noise=0.01)
    assert not len(none.cost) and none.variance_after == none.variance_before
    # Twice the noise is four times the variance, and one plan, where the prior says nothing.
    wide = (1e6,) * 5
    a, b = (propose(runs, HOFFMANN, 1e24, 1e22, points, noise=s, prior=wide) for s in (0.01, 0.02))
    assert a.parameters.tolist() == b.parameters.tolist()
    assert b.variance_after == pytest.approx(4 * a.variance_after, rel=1e-4)


def test_without_runs_the_prior_decides():
    """Oracle: the prior's own variance; a plan from it makes a law's numbers determined."""
    empty = Runs(*(np.zeros(0) for _ in range(3)))
    prior = np.array((1.0, 2.0, 0.5, 0.2, 0.3))
    np.testing.assert_allclose(covariance(empty, HOFFMANN, 0.01, tuple(prior)), np.diag(prior**2), atol=1e-12)
    plan = propose(empty, HOFFMANN, 1e22, 1e21, grid((1e7, 1e9), (1e18, 1e20)), noise=0.01)
    n, d = plan.parameters, plan.tokens
    found = covariance(Runs(n, d, loss(HOFFMANN, n, d)), HOFFMANN, 0.01, None)
    assert plan.variance_after < 0.2**2 < 1 < plan.variance_before and np.isfinite(found).all()


def test_noise_is_that_of_the_runs():
    """Oracle: the noise that was added; one bad run changes little."""
    runs = on_grid(HOFFMANN, 20, 20)
    noisy = runs._replace(loss=runs.loss * np.exp(0.01 * np.random.default_rng(1).normal(size=400)))
    assert noise_of(noisy, HOFFMANN) == pytest.approx(0.01, rel=0.15)  # two standard errors
    bad = noisy._replace(loss=np.where(np.arange(400) < 4, 9.0, noisy.loss))
    assert noise_of(bad, HOFFMANN) == pytest.approx(noise_of(noisy, HOFFMANN), rel=0.05)
    few = taken(noisy, slice(0, 8))
    r = np.log(loss(HOFFMANN, few.parameters, few.tokens) / few.loss)
    assert noise_of(few, HOFFMANN) == pytest.approx(1.4826 * np.median(abs(r)) * math.sqrt(8 / 3))


def test_grid():
    points = grid((1e8, 1e10), (1e20, 1e22), 5, 3, tokens_each=(1.0, 1000.0))
    each = points.tokens / points.parameters
    assert 1 <= each.min() and each.max() <= 1000 and 5 < len(each) < 15
    full = grid((1e8, 1e10), (1e20, 1e22), 5, 3, tokens_each=(1e-9, 1e9))
    np.testing.assert_allclose(6 * full.parameters * full.tokens, np.tile([1e20, 1e21, 1e22], 5), rtol=1e-12)


GOOD = {"target": 1e24, "budget": 1e22, "candidates": grid((1e8, 1e10), (1e20, 1e22)), "noise": 0.01}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"target": 0.0}, "target"),
        ({"budget": math.nan}, "budget"),
        ({"candidates": Points(np.array([1e9]), np.array([-1.0]))}, "candidates: tokens"),
        ({"candidates": Points(np.ones(2), np.ones(3))}, "one shape"),
        ({"cost": lambda n, d: 0 * n}, "cost must be positive"),
        ({"cost": lambda n, d: 1.0}, "one number for each"),
        ({"n": 0}, "n must be"),
        ({"repeats": 0}, "repeats"),
        ({"of": "tokens"}, "of must be"),
        ({"noise": None}, "lie on the law"),
        ({"noise": -1.0}, "noise"),
        ({"prior": (1.0,)}, "5 standard deviations"),
        ({"law": HOFFMANN._replace(A=0.0)}, "law"),
        ({"runs": taken(on_grid(HOFFMANN), slice(0, 4)), "prior": None}, "do not determine"),
        ({"runs": Runs(*(np.repeat(x[:2], 4) for x in on_grid(HOFFMANN))), "prior": None}, "do not determine"),
        ({"runs": taken(on_grid(HOFFMANN), slice(0, 7)), "noise": None}, "8 are needed"),
    ],
    ids=range(16),
)
def test_refusals(more, says):
    given = {"runs": on_grid(HOFFMANN), "law": HOFFMANN, **GOOD, **more}
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match=says):
        propose(**given)


@pytest.mark.parametrize(
    ("args", "more"),
    [
        (((1e9, 1e8), (1e20, 1e21)), {}),
        (((1e8, 1e9), (0.0, 1e21)), {}),
        (((1e8, 1e9), (1e20, 1e21), 0), {}),
        (((1e8, 1e9), (1e20, 1e21)), {"tokens_each": (1e9, 1e10)}),
    ],
)
def test_refused_grids(args, more):
    with pytest.raises(ValueError, match=r"parameters|flops|sizes|candidates"):
        grid(*args, **more)
