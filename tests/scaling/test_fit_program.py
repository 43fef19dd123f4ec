"""experiments.scaling.fit. Oracle: the law that the runs were made of; the functions of purelm.scaling."""

import csv
import json

import numpy as np
import pytest

from purelm.scaling.laws import Law, loss, optimum
from tests.programs import run_here

LAW = Law(1.9, 900.0, 1200.0, 0.35, 0.33)


def rows(noise=0.0, sizes=6):
    c, n = (x.ravel() for x in np.meshgrid(np.geomspace(1e18, 1e20, 4), np.geomspace(1e7, 1e9, sizes)))
    y = loss(LAW, n, c / (6 * n)) * (1 + noise * np.random.default_rng(0).normal(size=n.shape))
    return [
        {"parameters": float(p), "compute_budget": float(f), "final_loss": float(x)}
        for p, f, x in zip(n, c, y, strict=True)
    ]


def run(path, *flags, status=0):
    done = run_here("experiments.scaling.fit", str(path), *map(str, flags))
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_files_of_all_kinds_give_one_law(tmp_path):
    """Exact to the digits that are printed: JSON, JSON lines, CSV with tokens and other names."""
    data = rows(0.01)
    (tmp_path / "a.json").write_text(json.dumps(data))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
    with open(tmp_path / "c.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["N", "D", "loss"])
        writer.writerows([r["parameters"], r["compute_budget"] / 6 / r["parameters"], r["final_loss"]] for r in data)
    flags = ["--bootstrap", 20, "--budgets", "1e21"]
    a, b, c = (run(tmp_path / name, *flags) for name in ("a.json", "b.jsonl", "c.csv"))
    assert a == b == c and "variable projection" in a and "Fitted without the 6 runs" in a


def test_the_law_is_found_and_written(tmp_path):
    (tmp_path / "runs.json").write_text(json.dumps(rows()))
    run(tmp_path / "runs.json", "--out", tmp_path / "out", "--bootstrap", 10, "--budgets", "1e21", "1e22")
    found = json.loads((tmp_path / "out/fits.json").read_text())
    np.testing.assert_allclose(list(found["law"].values()), LAW, rtol=1e-4)
    for row in found["predicted"]:
        np.testing.assert_allclose(row["parameters"], optimum(LAW, row["flops"]).parameters, rtol=1e-4)
        low, high = row["parameters_interval"]
        assert low == pytest.approx(high, rel=1e-3)  # without noise
    assert abs(found["held_out"]["largest_error"]) < 1e-5 and found["isoflop"]["parabola"]["budgets"] == 4
    assert (tmp_path / "out/fits.png").stat().st_size > 10_000 and "![" in (tmp_path / "out/report.md").read_text()


def test_budgets_of_one_run_have_no_isoflop_curves(tmp_path):
    some = [r for i, r in enumerate(rows(0.01, 40)) if i % 11 == 0]
    for i, row in enumerate(some):
        row["compute_budget"] *= 1 + 0.1 * i
    (tmp_path / "runs.json").write_text(json.dumps(some))
    said = run(tmp_path / "runs.json", "--bootstrap", 0)
    assert "IsoFLOP, lowest, is left out" in said and "needs 3 sizes" in said


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        ("{", (), "Expecting"),
        ("{}", (), "a list of objects"),
        ("[]", (), "has no runs"),
        ('[{"parameters": 1}]', (), "run 1: has no loss"),
        ('[{"parameters": 1, "loss": 2}]', (), "neither tokens nor FLOPs"),
        ('[{"parameters": "x", "loss": 2, "tokens": 3}]', (), "must be a number"),
        ('[{"parameters": 1, "loss": NaN, "tokens": 3}]', (), "positive and finite"),
        (None, ("--drop-highest", "24"), "leave none"),
        (None, ("--coverage", "1"), "coverage"),
        (None, ("--budgets", "0"), "budgets"),
    ],
    ids=range(10),
)
def test_what_cannot_be_fitted_is_refused(tmp_path, text, flags, says):
    (tmp_path / "runs.json").write_text(json.dumps(rows()) if text is None else text)
    assert says in run(tmp_path / "runs.json", "--out", tmp_path / "out", *flags, status=2)
    assert not (tmp_path / "out").exists()


def test_the_largest_budget_held_out(tmp_path):
    """Oracle: the law that the runs are of, at that budget, and a parabola of its runs."""
    (tmp_path / "runs.json").write_text(json.dumps(rows()))
    said = run(tmp_path / "runs.json", "--out", tmp_path / "out", "--bootstrap", 0)
    held = json.loads((tmp_path / "out/fits.json").read_text())["held_out"]
    best = optimum(LAW, 1e20)
    assert held["runs"] == 6 and held["parameters"] == pytest.approx(best.parameters, rel=1e-3)
    assert held["loss"] == pytest.approx(best.loss, abs=1e-4) and f"| {held['parameters']:.4g} |" in said
    n, y = np.array([(r["parameters"], r["final_loss"]) for r in rows() if r["compute_budget"] > 9e19]).T
    a, b, _ = np.polyfit(np.log(n), y, 2)
    assert held["measured_parameters"] == pytest.approx(np.exp(-b / (2 * a)), rel=1e-6) and "by a parabola" in said


@pytest.mark.parametrize("rise", [0.0, 1e-9])
def test_losses_that_do_not_fall_have_no_best_size(tmp_path, rise):
    """Equal losses, and losses that rise with N: two lines and status 2, no traceback."""
    sizes = [(n, d) for n in (1e6, 5e6, 2e7, 1e8) for d in (1e8, 3e8, 1e9)]
    rows = [{"parameters": n, "tokens": d, "loss": 3.0 + rise * n} for n, d in sizes]
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(rows))
    done = run_here("experiments.scaling.fit", file, "--bootstrap", 0)
    assert done.returncode == 2 and "do not fall with parameters" in done.stderr
    assert "Traceback" not in done.stderr
