"""Laws and what follows from them.

Oracles: the optimum by scipy's search along N D = C; derivatives by torch; McCandlish et al.'s identity; brute force
over curves; scipy's quadrature of what repetitions are worth.
"""

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.scaling import counting, hyperparameters, repeated
from purelm.scaling.envelope import Curve, envelope
from purelm.scaling.isoflop import laws_of
from purelm.scaling.laws import FLOPS, Law, PowerLaw, exponents, loss, optimum, power

HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)
LAWS = st.builds(
    Law, st.floats(0.5, 3), st.floats(50, 5000), st.floats(50, 5000), st.floats(0.1, 0.8), st.floats(0.1, 0.8)
)


@settings(max_examples=60, deadline=None)
@given(LAWS, st.floats(17, 27))
def test_the_optimum_is_the_least_loss_of_a_budget(law, log_c):
    """Oracle: a bounded scalar search over log N; its place to the root of its tolerance, as minima are flat."""
    c = 10**log_c
    best = optimum(law, c)
    assert FLOPS * best.parameters * best.tokens == pytest.approx(c, rel=1e-9)

    def of(log_n):
        return loss(law, np.exp(log_n), c / (FLOPS * np.exp(log_n)))

    middle = np.log(best.parameters)
    ends = (middle - 6, middle + 7)
    found = scipy.optimize.minimize_scalar(of, bounds=ends, method="bounded", options={"xatol": 1e-9})
    assert best.loss == pytest.approx(found.fun, rel=1e-9) and best.loss <= found.fun * (1 + 1e-15)
    assert best.loss == pytest.approx(of(middle), rel=1e-12)
    a, b = exponents(law)
    assert a + b == pytest.approx(1)
    ten = optimum(law, 10 * c)
    assert ten.parameters / best.parameters == pytest.approx(10**a) and ten.tokens / best.tokens == pytest.approx(10**b)


def test_many_laws_and_tensors():
    """Exact: a law of arrays is each law; torch's derivative of the loss is -alpha A N^(-alpha - 1)."""
    many = Law(*(np.array([x, 1.1 * x]) for x in HOFFMANN))
    for i, scale in enumerate((1.0, 1.1)):
        one = optimum(Law(*(scale * x for x in HOFFMANN)), 1e22)
        np.testing.assert_allclose([x[i] for x in optimum(many, 1e22)], one, rtol=1e-12)
    n = torch.tensor(1e9, dtype=torch.float64, requires_grad=True)
    loss(HOFFMANN, n, 1e10).backward()
    assert float(n.grad) == pytest.approx(-0.34 * 406.4 * 1e9**-1.34)
    assert power(PowerLaw(2.0, 0.5), 9.0) == 6.0


def test_envelope_of_curves():
    """Oracle: brute force at each budget over the law's own curves; sizes at the edges are marked."""
    sizes = np.geomspace(1e7, 1e9, 9)
    tokens = np.geomspace(1e7, 1e12, 400)
    curves = [Curve(n, tokens, loss(HOFFMANN, n, tokens)) for n in sizes]
    found = envelope(curves, 200)
    for c, n, y in zip(found.flops, found.parameters, found.loss, strict=True):
        d = c / (FLOPS * sizes)
        there = (d >= tokens[0] * (1 - 1e-9)) & (d <= tokens[-1] * (1 + 1e-9))
        exact = np.where(there, loss(HOFFMANN, sizes, d), np.inf)
        assert y == pytest.approx(exact.min(), rel=1e-4)  # linear between points in log-log
        assert exact[np.flatnonzero(sizes == n)[0]] == pytest.approx(exact.min(), rel=1e-4)
    inside = found.inside > 0
    assert inside.any() and not inside.all()
    n_of_c, _ = laws_of(type(found)(*(x[inside] for x in found)))
    assert n_of_c.exponent == pytest.approx(exponents(HOFFMANN)[0], abs=0.05)  # of a grid of sizes


@pytest.mark.parametrize(
    ("curves", "says"),
    [
        ([Curve(1e9, np.array([1.0, 2.0]), np.array([3.0, 2.0]))], "at least 2"),
        ([Curve(1e9, np.array([2.0, 1.0]), np.array([3.0, 2.0]))] * 2, "curve 0: .*rise"),
        ([Curve(1e9, np.array([1.0, 2.0]), np.array([3.0]))] * 2, "one shape"),
        ([Curve(1e9, np.array([1.0, 2.0]), np.array([3.0, np.nan]))] * 2, "finite"),
    ],
    ids=range(4),
)
def test_bad_curves(curves, says):
    with pytest.raises(ValueError, match=says):
        envelope(curves)


def test_learning_rates_and_batches():
    """Oracle: the formulas in logarithms; published examples by order of magnitude; McCandlish et al.'s identity."""
    lr, batch = hyperparameters.deepseek(1e20)
    assert np.log([lr, batch]) == pytest.approx(np.log([0.3118, 0.2920]) + np.array([-0.125, 0.3271]) * np.log(1e20))
    assert 5e-4 < lr < 2e-3 and 5e5 < batch < 2e6
    lr, batch = hyperparameters.steplaw(1e9, 1e11)
    assert np.log(lr) == pytest.approx(np.log(1.79) - 0.713 * np.log(1e9) + 0.307 * np.log(1e11))
    assert 1e-3 < lr < 3e-3 and 1e6 < batch < 2e6
    assert hyperparameters.critical_batch(3.0) == pytest.approx(2.1e8 / 3 ** (1 / 0.21))
    for b in (1e4, 1e6, 1e8):
        steps, tokens = hyperparameters.steps_and_tokens(b, 1e6, 1000)
        assert (steps / 1000 - 1) * (tokens / 1e9 - 1) == pytest.approx(1) and tokens == steps * b
    for call in (
        lambda: hyperparameters.deepseek(0.0),
        lambda: hyperparameters.steplaw(1e9, float("nan")),
        lambda: hyperparameters.critical_batch(-1.0),
        lambda: hyperparameters.steps_and_tokens(1.0, 1.0, float("inf")),
    ):
        with pytest.raises(ValueError, match="positive and finite"):
            call()
    assert counting.six_n(7) == 42 and counting.kaplan_parameters(2, 8) == 2 * (4 * 64 + 8 * 64)
    assert counting.non_embedding_flops(2, 8, 5) == 6 * 12 * 2 * 64 + 12 * 2 * 8 * 5


@settings(max_examples=50, deadline=None)
@given(st.floats(1e6, 1e12), st.floats(0.01, 1000), st.floats(0.5, 30))
def test_what_repeated_data_are_worth(unique, epochs, decay):
    """Oracle: the integral over repetitions of U exp(-r / R*); never more than all, nor than U (1 + R*)."""
    got = float(repeated.effective(epochs * unique, unique, decay))
    more, _ = scipy.integrate.quad(lambda r: np.exp(-r / decay), 0, min(max(epochs - 1, 0), 60 * decay), limit=200)
    assert got == pytest.approx(unique * (min(epochs, 1) + more), rel=1e-6)
    assert got <= epochs * unique * (1 + 1e-12) and got <= unique * (1 + decay) * (1 + 1e-12)
    once = repeated.loss_of_repeated(HOFFMANN, 1e6, min(epochs, 1.0) * unique, unique)
    best = repeated.parameters_for(HOFFMANN, min(epochs, 1.0) * unique)
    if best >= 1e6:
        assert once == pytest.approx(loss(HOFFMANN, 1e6, min(epochs, 1.0) * unique))


def test_parameters_for_tokens_is_the_inverse_of_the_optimum():
    best = optimum(HOFFMANN, 3e21)
    assert repeated.parameters_for(HOFFMANN, best.tokens) == pytest.approx(best.parameters)
    again = repeated.loss_of_repeated(HOFFMANN, best.parameters, 10 * best.tokens, best.tokens)
    assert best.loss > again > loss(HOFFMANN, best.parameters, 10 * best.tokens)
    with pytest.raises(ValueError, match="decay"):
        repeated.effective(1.0, 1.0, 0.0)
