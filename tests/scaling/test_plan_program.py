"""experiments.scaling.plan. Oracle: the function of purelm.scaling that it calls, on the same file."""

import json
import math

import numpy as np
import pytest

from purelm.scaling import planner, variable_projection
from purelm.scaling.laws import Law, loss
from purelm.scaling.runs import Runs
from tests.programs import run_here

LAW = Law(1.9, 900.0, 1200.0, 0.35, 0.33)


@pytest.fixture
def runs():
    n, d = planner.grid((1e7, 1e9), (1e18, 1e20), 6, 4)
    return Runs(n, d, loss(LAW, n, d) * np.exp(0.005 * np.random.default_rng(0).normal(size=n.shape)))


def run(path, *flags, status=0):
    done = run_here("experiments.scaling.plan", str(path), *map(str, flags))
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def file(tmp_path, runs):
    rows = [dict(zip(Runs._fields, map(float, row), strict=True)) for row in zip(*runs, strict=True)]
    (tmp_path / "runs.json").write_text(json.dumps(rows))
    return tmp_path / "runs.json"


def test_table_and_json(file, tmp_path, runs):
    flags = ("--budget", "1e20", "--target", "1e22", "--n", 5, "--sizes", 8, "--budgets", 6, "--of", "loss")
    said = run(file, *flags, "--json", tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text())
    law = variable_projection.fit(runs)
    points = planner.grid((runs.parameters.min() / 3, 3 * runs.parameters.max()), (runs.flops.min(), 1e20), 8, 6)
    plan = planner.propose(runs, law, 1e22, 1e20, points, n=5, of="loss")
    np.testing.assert_allclose([r["parameters"] for r in found["plan"]], plan.parameters, rtol=1e-9)
    np.testing.assert_allclose([r["tokens"] for r in found["plan"]], plan.tokens, rtol=1e-9)
    assert found["deviation_after"] == pytest.approx(math.sqrt(plan.variance_after), rel=1e-9)
    assert found["cost"] <= 1e20 and found["settings"]["of"] == "loss" and found["noise"] == pytest.approx(plan.noise)
    assert f"| 5 | {plan.parameters[4]:.4g} | {plan.tokens[4]:.4g} |" in said and "| 6 |" not in said


def test_nothing_fits(file):
    said = run(file, "--budget", "1e17", "--target", "1e22", "--flops", "1e18", "1e19")
    assert "No candidate fits" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--budget", "0"), "budget"),
        (("--target", "nan"), "target"),
        (("--noise", "0"), "noise"),
        (("--n", "0"), "n must be"),
        (("--parameters", "1e9", "1e8"), "parameters"),
        (("--tokens-each", "1e9", "1e10"), "candidates: none"),
    ],
    ids=range(6),
)
def test_refusals(file, tmp_path, flags, says):
    given = {"--budget": ("1e20",), "--target": ("1e22",), flags[0]: flags[1:]}
    said = run(file, *(x for k, v in given.items() for x in (k, *v)), "--json", tmp_path / "plan.json", status=2)
    assert says in said and not (tmp_path / "plan.json").exists()


def test_never_over_the_runs(file):
    before = file.read_bytes()
    assert "is an input" in run(file, "--budget", "1e20", "--target", "1e22", "--json", file, status=2)
    assert file.read_bytes() == before


def test_the_study_spends_no_more_than_the_grid(tmp_path):
    """Oracle: the grid's own cost; planned runs are surer than what both ways begin with."""
    done = run_here("experiments.scaling.plan_study", "--out", tmp_path, "--seeds", 3, "--rounds", 2, "--sizes", 5)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan_study.json").read_text())
    ways = {row["way"]: row for row in found["ways"]}
    assert ways["grid"]["runs"] == ways["planned, as many runs"]["runs"] == 45
    assert ways["first runs alone"]["runs"] == 15
    assert ways["planned"]["median_error"] < ways["first runs alone"]["median_error"]
    assert 0 < found["cost_for_the_grid's_deviation"] < 1
    assert (tmp_path / "plan_study.md").read_text().strip() in done.stdout
