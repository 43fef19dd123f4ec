"""Fits of scaling laws.

Oracles: the law that noise-free runs were made of; published values and refits of public data; scipy's minimisers;
finite differences; least squares by numpy.
"""

import csv
import json

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm import random
from purelm.scaling import bootstrap, isoflop, parametric, variable_projection
from purelm.scaling.laws import Law, exponents, loss, optimum, power
from purelm.scaling.minimise import minimise
from purelm.scaling.runs import Runs, budgets, of_budgets, taken

HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)


def grid(law, n=(1e8, 1e10), budgets=(1e20, 1e22), sizes=6, n_budgets=5):
    """Runs of the law without noise, on IsoFLOP lines."""
    c, p = np.meshgrid(np.geomspace(*budgets, n_budgets), np.geomspace(*n, sizes))
    c, p = c.ravel(), p.ravel()
    return Runs(p, c / (6 * p), loss(law, p, c / (6 * p)))


def chinchilla(shared_data):
    """The 240 runs of Besiroglu et al., read off Hoffmann et al.'s figure 4; the 5 highest losses are left out."""
    path = shared_data / "scaling/chinchilla-figure4.csv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    n, c, y = (np.array([float(r[k]) for r in rows]) for k in ("Model Size", "Training FLOP", "loss"))
    return taken(Runs(n, c / (6 * n), y), np.sort(np.argsort(y)[:-5]))


def isoflops(shared_data):
    path = shared_data / "scaling/isoflops_curves.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return of_budgets(json.loads(path.read_text()))


def test_isoflops_of_the_course(shared_data):
    """Oracle: spec values, from least squares and polyfit by other code; and the law that the file was made of."""
    runs = isoflops(shared_data)
    assert len(budgets(runs)) == 9 and all(len(group) == 8 for _, group in budgets(runs))
    for how, nearest, n23, n24 in (
        ("lowest", None, 7.005e10, 2.061e11),
        ("parabola", None, 9.114e10, 2.981e11),
        ("parabola", 5, 9.169e10, 2.997e11),
    ):
        n, d = isoflop.laws_of(isoflop.minima(runs, how, nearest=nearest))
        assert power(n, 1e23) == pytest.approx(n23, rel=1e-3) and power(n, 1e24) == pytest.approx(n24, rel=1e-3)
        assert n.exponent + d.exponent == pytest.approx(1, abs=1e-9)
    lowest = isoflop.minima(runs, "lowest")
    assert lowest.parameters[0] == pytest.approx(7.62e8, rel=1e-3)
    tokens = isoflop.laws_of(lowest)[1]
    assert power(tokens, 1e23) == pytest.approx(2.379e11, rel=1e-3)
    assert power(tokens, 1e24) == pytest.approx(8.086e11, rel=1e-3)
    for huber in (None, 1e-3):
        law = variable_projection.fit(runs, huber=huber)
        np.testing.assert_allclose(law, (2.69, 1606.4, 3210.7, 0.34, 0.36), rtol=1e-6)
    best = optimum(law, np.array([1e23, 1e24]))
    np.testing.assert_allclose(best.parameters, (9.189e10, 3.003e11), rtol=1e-3)
    np.testing.assert_allclose(best.loss, (3.2750, 3.0811), atol=1e-4)


def test_chinchilla_from_the_default_fit_and_bootstrap(shared_data):
    """Oracle: a refit from 4,500 starts by scipy's BFGS, with its objective; published intervals (wider tolerance)."""
    runs = chinchilla(shared_data)
    law = variable_projection.fit(runs)
    np.testing.assert_allclose(law[1:3], (477.83, 2143.4), rtol=1e-3)
    np.testing.assert_allclose((law.E, law.alpha, law.beta), (1.8172, 0.3473, 0.3672), atol=2e-4)
    assert parametric.objective(runs, law) == pytest.approx(1.018274e-3, abs=1e-9)
    few = parametric.starts()[::45]
    again, found = parametric.fit(runs, begin=few)
    np.testing.assert_allclose(again, law, rtol=1e-4)
    assert found.value.min() >= parametric.objective(runs, law) - 1e-12
    laws = bootstrap.resampled(random.key(0), runs, law, 300)
    # 95 % of 4,000 samples, Besiroglu et al.; ends of 300 samples vary by some percent of the interval's width.
    published = {
        "E": (1.769, 1.871), "A": (285, 744), "B": (1042, 5810), "alpha": (0.317, 0.373), "beta": (0.331, 0.415)
    }  # fmt: skip
    for name, ends in published.items():
        width = ends[1] - ends[0]
        assert bootstrap.interval(getattr(laws, name)) == pytest.approx(ends, abs=0.2 * width), name
    assert bootstrap.interval(exponents(laws)[0], 0.8) == pytest.approx((0.491, 0.542), abs=0.01)


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.5, 3), st.floats(4, 8), st.floats(4, 9), st.floats(0.2, 0.6), st.floats(0.2, 0.6)
)  # fmt: skip
def test_a_law_without_noise_is_found(E, log_a, log_b, alpha, beta):
    """Oracle: the law, where both terms change the loss by 1 % over the runs; else the loss within 1e-3, since another
    term may take over what a small one explains.
    """
    law = Law(E, np.exp(log_a), np.exp(log_b), alpha, beta)
    runs = grid(law)
    terms = law.A * runs.parameters**-alpha, law.B * runs.tokens**-beta
    small = any(np.ptp(term) < 0.01 * runs.loss.min() for term in terms)
    if small:
        for huber in (None, 1e-3):
            found = variable_projection.fit(runs, huber=huber)
            np.testing.assert_allclose(loss(found, runs.parameters, runs.tokens), runs.loss, rtol=1e-3)
        return
    for huber in (None, 1e-3):
        found = variable_projection.fit(runs, huber=huber)
        np.testing.assert_allclose(loss(found, runs.parameters, runs.tokens), runs.loss, rtol=1e-7)
        np.testing.assert_allclose((found.E, found.alpha, found.beta), (E, alpha, beta), rtol=1e-3)


def test_published_law_is_found_by_both_fits():
    runs = grid(HOFFMANN)
    np.testing.assert_allclose(variable_projection.fit(runs), HOFFMANN, rtol=1e-5)
    law, found = parametric.fit(runs, begin=parametric.starts()[::90])
    np.testing.assert_allclose(law, HOFFMANN, rtol=1e-3)
    assert found.converged.mean() > 0.5


def test_the_linear_part_is_least_squares_without_negative_numbers():
    """Oracle: scipy's nnls for each pair of exponents."""
    runs = grid(HOFFMANN)
    noise = np.random.default_rng(0).normal(size=len(runs.loss))
    runs = runs._replace(loss=runs.loss * (1 + 0.02 * noise))
    alpha, beta = (x.ravel() for x in np.meshgrid([0.05, 0.3, 1.5], [0.02, 0.3, 1.9]))
    got, cost = variable_projection.linear(runs, alpha, beta)
    assert (got >= 0).all() and (got == 0).any()
    for i, (a, b) in enumerate(zip(alpha, beta, strict=True)):
        columns = np.stack([np.ones_like(runs.loss), (runs.parameters / 1e9) ** -a, (runs.tokens / 1e11) ** -b], 1)
        want, norm = scipy.optimize.nnls(columns / runs.loss[:, None], np.ones(len(runs.loss)))
        assert cost[i] == pytest.approx(norm**2, rel=1e-7)
        np.testing.assert_allclose(got[i], want * (1, 1e9**a, 1e11**b), rtol=1e-5, atol=1e-9)


def test_gradient_of_the_objective():
    """Oracle: central differences of the objective, whose third derivative is bounded between its corners."""
    runs = grid(HOFFMANN)
    x = parametric.unknowns_of(Law(*(np.array([v, 1.3 * v]) for v in HOFFMANN)))
    for delta in (1e-3, 10.0):
        _, got = parametric._value_and_gradient(x, *parametric.logs(runs), delta)
        for k in range(5):
            step = np.zeros(5)
            step[k] = 1e-6
            up, down = (parametric._value_and_gradient(x + s * step, *parametric.logs(runs), delta)[0] for s in (1, -1))
            np.testing.assert_allclose(got[:, k], (up - down) / 2e-6, rtol=1e-4, atol=1e-6)


def test_minimise_many_at_once():
    """Oracle: Rosenbrock's function of four unknowns has these two minima alone; problems that know their own."""

    def function(x, at):
        del at
        value = (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)
        return value, np.stack([scipy.optimize.rosen_der(row) for row in x])

    starts = np.random.default_rng(1).uniform(-2, 2, (30, 4))
    found = minimise(function, starts, most_steps=1000)
    assert found.converged.all()
    for x in found.x:
        assert min(np.abs(x - 1).max(), np.abs(x - (-0.77565923, 0.61309337, 0.38206285, 0.14597202)).max()) < 1e-6
    alone = minimise(function, starts[3:4], most_steps=1000)
    np.testing.assert_array_equal(alone.x[0], found.x[3])  # a problem does not depend on the others

    def by_problem(x, at):
        return ((x - at[:, None]) ** 2).sum(1), 2 * (x - at[:, None])

    np.testing.assert_allclose(minimise(by_problem, np.zeros((6, 2))).x, np.arange(6)[:, None] * [1.0, 1.0], atol=1e-9)


def test_minimise_what_has_no_value_or_no_step():
    def function(x, at):
        return np.where(at == 0, np.nan, x[:, 0] ** 2), np.where((at == 0)[:, None], np.nan, 2 * x)

    found = minimise(function, np.array([[1.0], [2.0], [0.0]]))
    assert found.converged.tolist() == [False, True, True] and found.x[0, 0] == 1.0 and found.steps[2] == 0
    assert abs(found.x[1, 0]) < 1e-9


def test_bootstrap_follows_its_key_alone():
    runs = grid(HOFFMANN)
    runs = runs._replace(loss=runs.loss * (1 + 0.01 * np.random.default_rng(0).normal(size=len(runs.loss))))
    law = variable_projection.fit(runs)
    a, b, c = (bootstrap.resampled(random.key(k), runs, law, 20) for k in (0, 0, 1))
    np.testing.assert_array_equal(a.E, b.E)
    assert (a.E != c.E).any() and len(a.alpha) == 20
    assert bootstrap.interval(np.arange(101.0), 0.9) == pytest.approx((5, 95))


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        (Runs([1e9] * 6, np.geomspace(1e9, 1e10, 6), [3.0] * 6), "parameters must have at least 3"),
        (Runs(np.geomspace(1e8, 1e9, 6), np.geomspace(1e9, 1e10, 6), [3.0] * 6), "does not tell A from B"),
        (Runs([1e9] * 4, [1e9] * 4, [3.0] * 4), "at least 5"),
        (Runs([1e9] * 5, [1e9] * 5, [3.0, 3, 3, 3, np.nan]), "loss of run 4"),
        (Runs([1e9] * 5, [1e9] * 4, [3.0] * 5), "one shape"),
        (Runs([1e9, 1e9, -1e9, 1e9, 1e9], [1e9] * 5, [3.0] * 5), "parameters of run 2"),
    ],
    ids=range(6),
)
def test_runs_that_determine_no_law_are_refused(runs, says):
    with pytest.raises(ValueError, match=says):
        variable_projection.fit(runs)


def test_other_bad_arguments():
    runs = grid(HOFFMANN)
    for call, says in (
        (lambda: variable_projection.fit(runs, huber=0.0), "huber"),
        (lambda: variable_projection.fit(runs, exponents=(0.5, 0.1)), "exponents"),
        (lambda: parametric.fit(runs, delta=-1.0), "delta"),
        (lambda: isoflop.minima(runs, "best"), "how"),
        (lambda: isoflop.minima(runs, nearest=2), "nearest"),
        (lambda: isoflop.minima(taken(runs, slice(0, 5))), "needs 3 sizes"),
        (lambda: isoflop.minima(taken(runs, slice(0, 5)), "lowest"), "needs 3 sizes"),
        (lambda: isoflop.minima(runs._replace(loss=10 - runs.loss)), "opens downwards"),
        (lambda: isoflop.power_law([1.0], [2.0]), "at least 2"),
        (lambda: bootstrap.resampled(random.key(0), runs, HOFFMANN, 0), "n must"),
        (lambda: bootstrap.interval([1.0], 1.0), "coverage"),
        (lambda: of_budgets([{"parameters": 1.0}]), "rows need numbers"),
        (lambda: budgets(runs, 1.0), "tolerance"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
