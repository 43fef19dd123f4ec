"""Rows of parquet files and of the hub. Oracles: a stand-in for datasets; datasets itself where it is installed."""

import json
import sys
import types

import pytest

from purelm.data.tables import table_rows


def stand_in(monkeypatch, tables):
    """A module datasets whose load_dataset gives tables[file or name]; an exception in them is raised."""
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        for row in tables[options.get("data_files", args[0]).split("/")[-1]]:
            if isinstance(row, Exception):
                raise row
            yield row

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_parquet(tmp_path, monkeypatch):
    """In the order of names, streamed, and without the network."""
    for name in ("b.parquet", "a.parquet", "notes.txt"):
        (tmp_path / name).touch()
    calls = stand_in(monkeypatch, {"a.parquet": [{"x": 1}, {"x": 2}], "b.parquet": [{"x": 3}, OSError("bad\nmore")]})
    rows = table_rows(tmp_path)
    assert [next(rows) for _ in range(3)] == [
        (f"{tmp_path}/a.parquet, row 0", {"x": 1}), (f"{tmp_path}/a.parquet, row 1", {"x": 2}),
        (f"{tmp_path}/b.parquet, row 0", {"x": 3}),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"b.parquet: cannot be read \(OSError: bad\)$"):
        next(rows)
    files = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    assert calls == [(("parquet",), {"data_files": file, "split": "train", "streaming": True}) for file in files]
    assert list(table_rows(tmp_path / "a.parquet")) == [
        (f"{tmp_path}/a.parquet, row {i}", {"x": i + 1}) for i in range(2)
    ]


def test_hub_and_lines(tmp_path, monkeypatch):
    calls = stand_in(monkeypatch, {"n": [{"x": 1}]})
    assert list(table_rows("hub:o/n:extended")) == [("hub:o/n:extended: record 0", {"x": 1})]
    assert calls == [(("o/n", "extended"), {"split": "train", "streaming": True})]
    (tmp_path / "x.jsonl").write_text(json.dumps({"x": 5}))
    assert [row for _, row in table_rows(tmp_path / "x.jsonl")] == [{"x": 5}] and len(calls) == 1


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"none: no such file or folder; a set of the hub is named hub:OWNER/NAME"):
        list(table_rows(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"no .parquet file in it"):
        list(table_rows(tmp_path))
    for name in ("data", "extended"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.parquet").touch()
    with pytest.raises(ValueError, match=r"its parquet files lie in data, extended: name one of these folders"):
        list(table_rows(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs datasets: pip install 'purelm\[hub\]'"):
        list(table_rows(tmp_path / "data"))


def test_real_parquet(tmp_path):
    """Oracle: pyarrow, which writes the file."""
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"problem": f"p{i}", "generations": ["a", "b"], "ok": [True, None], "none": None} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [row for _, row in table_rows(tmp_path / "x.parquet")] == rows
    (tmp_path / "y.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"y.parquet: cannot be read"):
        list(table_rows(tmp_path / "y.parquet"))
