"""Forecasts and outcomes are written once, and only added."""

import datetime as dt
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments.scaling.forecasts import Forecast, read_rows, register, settle

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
ONE = Forecast("one", "a | b", 100.0, 400.0, 1000, 50_000, 3.0, 2.9, 3.1, 0.9, 12, 1e7, 3e8)


def test_a_forecast_and_its_outcome(tmp_path):
    file = tmp_path / "new" / "f.jsonl"
    register(file, ONE, NOW)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="'one' has been forecast already"):
        register(file, ONE._replace(loss=2.0), NOW)
    assert file.read_bytes() == before
    page = file.with_suffix(".md").read_text()
    assert "| 3.0000 | 90 %: 2.9000 to 3.1000 |  |  |  |" in page and "a / b" in page and "30.0" in page
    assert settle(file, "one", 3.05, 380.0, NOW) is True
    assert file.read_bytes().startswith(before)
    with pytest.raises(ValueError, match="has an outcome already"):
        settle(file, "one", 3.0, 380.0, NOW)
    assert "| 3.0500 | +1.67 % | yes |" in file.with_suffix(".md").read_text()
    register(file, ONE._replace(name="two"), NOW)
    assert settle(file, "two", 3.2, 380.0, NOW) is False
    assert "| 3.2000 | +6.67 % | no |" in file.with_suffix(".md").read_text()
    with pytest.raises(ValueError, match="nothing was forecast under the name 'three'"):
        settle(file, "three", 3.0, 1.0, NOW)


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    file = tmp_path / "f.jsonl"
    register(file, ONE, NOW)
    whole = file.read_bytes()
    with file.open("ab") as out:
        out.write(b'{"kind": "outc')
    settle(file, "one", 3.0, 1.0, NOW)
    assert file.read_bytes().startswith(whole) and file.read_bytes().count(b"\n") == 2


def test_forecasts_made_at_once_are_all_there(tmp_path):
    """Oracle: the names. Eight threads, each with a descriptor of its own, which is what flock goes by."""
    file = tmp_path / "f.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: register(file, ONE._replace(name=str(i)), NOW), range(40)))
    assert sorted(int(row["name"]) for row in read_rows(file)) == list(range(40))


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n')
    for call in (lambda: register(file, ONE), lambda: settle(file, "one", 3.0, 1.0), lambda: read_rows(file)):
        with pytest.raises(ValueError, match="line 1 is neither a forecast nor an outcome"):
            call()
    assert file.read_text() == '{"step": 1, "loss": 2.0}\n'
