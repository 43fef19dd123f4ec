"""From results to the next runs: closed forms, known laws, and plain searches."""

import datetime as dt
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.scaling import decide
from experiments.scaling.decide import (
    Shape,
    Speed,
    best_rate,
    best_run,
    config,
    counted,
    rate_law,
    rate_of,
    speed_of,
)
from experiments.scaling.service.real import model_of
from experiments.scaling.service.schemas import Completed, Experiment, Rules, problem
from purelm import accounting
from purelm.scaling.laws import Law, loss

RULES = Rules(seq_len=128, n_val_tokens=2**14, min_vocab_size=1000, max_train_tokens=10**7)
LAW = Law(1.7, 300.0, 900.0, 0.4, 0.45)
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def run(shape, tokens, seconds, value=3.0, number=1):
    cfg = config(shape, tokens, 1e-3, RULES, batch=8, evals=2, seconds=1000.0)
    status = Completed(queued_at=NOW, dispatched_at=NOW, run_id="x", used_runtime_seconds=seconds, val_losses=[value],
                       completed_at=NOW)  # fmt: skip
    return Experiment(experiment_id=number, training_config=cfg, status=status)


@given(width=st.integers(1, 20), tokens=st.integers(1, 10**7), batch=st.integers(1, 70), evals=st.integers(1, 9))
def test_every_configuration_is_one_that_the_service_takes(width, tokens, batch, evals):
    cfg = config(decide.shapes([16 * width])[0], tokens, 1e-3, RULES.model_copy(update={"max_train_tokens": 10**9}),
                 batch=batch, evals=evals, seconds=10.0)  # fmt: skip
    assert problem(cfg, RULES.model_copy(update={"max_train_tokens": 10**9})) is None
    chunk = 128 * batch * evals
    assert abs(cfg.total_train_tokens - max(tokens, chunk)) <= chunk / 2 + 1 or cfg.total_train_tokens == chunk


def test_parameters_are_those_that_multiply():
    """Oracle: accounting of the model, less its token embeddings."""
    a = config(Shape(64, 3), 1, 1e-3, RULES, batch=8, evals=2, seconds=10.0).architecture_config
    assert counted(a) == accounting.n_params(model_of(a, 128)) - 1000 * 64


@given(u=st.sampled_from([0.0, 1e-6, 1e-4]), v=st.sampled_from([1e-12, 1e-10]))
def test_the_law_of_speed_is_found(u, v):
    """Oracle: times made by a law."""
    done = []
    for shape, tokens in ((Shape(32, 2), 10**5), (Shape(64, 2), 3 * 10**5), (Shape(128, 4), 10**6)):
        made = run(shape, tokens, 1.0)
        seconds = decide.seconds_of(made.training_config, Speed(u, v), RULES)
        done.append(run(shape, tokens, seconds))
    found = speed_of(done, RULES)
    assert found.a_parameter == pytest.approx(v, rel=1e-6) and found.a_token == pytest.approx(u, rel=1e-5, abs=1e-12)


def test_a_speed_is_never_negative():
    """Small models that are as slow as large ones leave nothing for the parameters, and one run is not two unknowns."""
    found = speed_of([run(Shape(32, 2), 10**6, 50.0), run(Shape(128, 4), 10**6, 40.0)], RULES)
    assert found.a_parameter == 0 and found.a_token > 0
    assert min(speed_of([run(Shape(32, 2), 10**6, 50.0)], RULES)) == 0
    with pytest.raises(ValueError, match="nothing is known"):
        speed_of([], RULES)


@pytest.mark.parametrize("seconds", [30.0, 300.0, 3000.0, 1e6])
def test_the_best_run_is_the_best_of_a_plain_search(seconds):
    """Oracle: all shapes with all numbers of tokens that fit."""
    among, speed = decide.shapes([32, 64, 96, 128, 192]), Speed(2e-5, 3e-10)
    best = best_run(LAW, speed, among, seconds, RULES, batch=8, evals=2)
    found = []
    for shape in among:
        for k in range(1, 10**7 // 2048 + 1, 7):
            cfg = config(shape, 2048 * k, 1e-3, RULES, batch=8, evals=2, seconds=10.0)
            if decide.seconds_of(cfg, speed, RULES) <= seconds:
                n = counted(cfg.architecture_config)
                found.append((float(loss(LAW, n, cfg.total_train_tokens)), shape))
    value, shape = min(found)
    assert best.shape == shape and best.loss <= value and best.loss == pytest.approx(value, rel=1e-3)
    assert best.tokens <= 10**7 and best.tokens % 2048 == 0 and best.seconds <= seconds


def test_too_little_time_is_said():
    with pytest.raises(ValueError, match="too few for any"):
        best_run(LAW, Speed(1e-3, 0.0), decide.shapes([32]), 1.0, RULES, batch=8, evals=2)


@given(center=st.floats(-7, -4), curve=st.floats(0.01, 2), ends=st.booleans())
def test_the_best_rate_of_a_parabola_is_its_least(center, curve, ends):
    """Oracle: the parabola's centre; where that is outside, the nearest rate."""
    x = np.linspace(-6.5, -4.5, 6)
    found = math.log(best_rate(np.exp(x)[::-1].tolist(), (curve * (x - center) ** 2)[::-1].tolist()))
    inside = x[0] + 0.2 < center < x[-1] - 0.2
    assert found == pytest.approx(center, abs=1e-4) if inside else x[0] - 1e-9 <= found <= x[-1] + 1e-9


@given(p=st.floats(0, 0.75), q=st.floats(-0.5, 0.35))
def test_the_law_of_rates(p, q):
    """Oracle: rates of a law, at the places of three sweeps."""
    n, d = np.array([1e4, 1e6, 1e4]), np.array([1e6, 1e5, 8e6])
    found = rate_law(n, d, 3.0 * n**-p * d**q)
    assert found.parameters == pytest.approx(p, abs=1e-9) and found.tokens == pytest.approx(q, abs=1e-9)
    assert rate_of(found, 1e5, 1e6) == pytest.approx(3.0 * 1e5**-p * 1e6**q, rel=0.006)  # three digits


@given(rates=st.lists(st.floats(1e-5, 1.0), min_size=3, max_size=3))
def test_the_law_of_rates_in_its_bounds(rates):
    """Oracle: the best of a grid of 41 x 41 exponents; the exact one is no worse."""
    n, d = np.array([1e4, 1e6, 3e4]), np.array([1e6, 1e5, 8e6])

    def cost(p, q):
        return float(np.var(np.log(rates) + p * np.log(n) - q * np.log(d)))

    found = rate_law(n, d, rates)
    grid = [cost(p, q) for p in np.linspace(*decide.STEEP_N, 41) for q in np.linspace(*decide.STEEP_D, 41)]
    assert cost(found.parameters, found.tokens) <= min(grid) + 1e-12
    assert 0 <= found.parameters <= 0.75 and -0.5 <= found.tokens <= 0.35


def test_rates_that_are_too_steep_or_unknown():
    n, d = [1e4, 1e6, 1e4], [1e6, 1e6, 1e7]
    assert rate_law(n, d, [1e-3, 1e-2, 1e-3]).parameters == 0.0
    assert rate_law(n, d, [1e-1, 1e-5, 1e-1]).parameters == 0.75
    assert rate_law(n, d, [1e-3, 1e-3, 1e-2]).tokens == 0.35 and rate_law(n, d, [1e-2, 1e-2, 1e-4]).tokens == -0.5
    alone = rate_law([1e5], [1e6], [3e-3])
    assert alone[1:] == (0.0, pytest.approx(0, abs=0.01)) and rate_of(alone, 1e5, 1e6) == 3e-3
