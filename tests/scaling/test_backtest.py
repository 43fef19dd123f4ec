"""experiments.scaling.backtest on runs of a known law. Oracles: that law, and the ways' definitions."""

import csv
import json
import math

import numpy as np
import pytest

from experiments.scaling import backtest
from experiments.scaling.backtest import WAYS, Args, known, main
from purelm.scaling.laws import Law, loss
from purelm.scaling.runs import Runs

LAW = Law(1.7, 400.0, 410.0, 0.34, 0.28)


def runs_of(seed=0, noise=0.004):
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e5, 1e7, 6), np.geomspace(1e6, 1e8, 6)))
    return Runs(n, d, loss(LAW, n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=n.shape)))


@pytest.fixture
def path(tmp_path):
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["parameters", "tokens", "loss"])
        rows.writerows(zip(*runs_of(), strict=True))
    return tmp_path / "runs.csv"


def test_the_known_runs_are_the_small_ones(path):
    runs = runs_of()
    draws = list(known(Args(path, shares=(0.5,), sizes=(10, 18, 30), repeats=4), runs))
    size, first = draws[0]
    assert size == 0 and len(first) == 18
    others = np.setdiff1d(np.arange(36), first)
    assert runs.flops[first].max() <= runs.flops[others].min()
    assert [size for size, _ in draws[1:]] == [10] * 4  # 18 and 30 are no fewer than there are
    assert all(len(np.unique(at)) == 10 and np.isin(at, first).all() for _, at in draws[1:])
    assert len({tuple(at) for _, at in draws[1:]}) == 4
    again = list(known(Args(path, shares=(0.5,), sizes=(10, 18, 30), repeats=4), runs))
    assert all((a[1] == b[1]).all() for a, b in zip(draws, again, strict=True))


def test_forecasts_of_a_law_that_holds_everywhere(path, tmp_path, capsys):
    """Errors are of the noise's size, and most intervals hold: 0.4 % of noise and what the fits add."""
    out = tmp_path / "out.json"
    main(Args(path, shares=(0.5, 0.7), sizes=(14,), repeats=2, beyond=1.0, bootstrap=50, out=out))
    rows = json.loads(out.read_text())["rows"]
    assert [(x["known"], x["way"]) for x in rows] == [(k, way) for k in ("all", 14) for way in WAYS]
    for row in rows:
        assert row["error"] < 0.03 and row["held"] >= 0.6 and 0.004 < row["width"] < 0.2
    assert rows[1]["width"] >= rows[0]["width"]
    table = capsys.readouterr().out
    assert table.count("\n|") == 5 and f"{100 * rows[0]['width']:.1f} %" in table


def test_only_runs_beyond_are_foretold(path):
    runs, args = runs_of(), Args(path, beyond=7.0, most=1000, bootstrap=20)
    first = np.argsort(runs.flops)[:20]
    told = backtest.foretold(args, backtest.random.key(0), runs, 0, first)
    assert len(told) == 2 * int((runs.flops > 7.0 * runs.flops[first].max()).sum()) > 0
    measured = {x.error for x in told}
    assert len(told) == 2 * len(measured)  # both ways have the law of all known runs in the middle
    few = backtest.foretold(Args(path, beyond=7.0, most=3, bootstrap=20), backtest.random.key(0), runs, 0, first)
    assert len(few) == 6 and {x.error for x in few} <= measured


@pytest.mark.parametrize("flags, what", [
    ({"coverage": 1.0}, "coverage"),
    ({"shares": ()}, "shares"),
    ({"drop_highest": 36}, "drop_highest"),
    ({"beyond": 1e9}, "beyond"),
    ({"shares": (1.5,)}, "shares"),
])  # fmt: skip
def test_what_is_wrong_is_named(path, capsys, flags, what):
    with pytest.raises(SystemExit) as end:
        main(Args(path, **flags))
    assert end.value.code == 2 and what in capsys.readouterr().err


def test_too_few_known_runs_are_told(path, capsys):
    """Four runs determine no law of five numbers; the other share still counts."""
    main(Args(path, shares=(0.1, 0.6), beyond=1.0, bootstrap=20))
    told = capsys.readouterr()
    assert "4 runs:" in told.err and told.out.count("| all |") == 2
    assert math.isfinite(float(told.out.split("|")[-2].split()[0]))
