"""experiments.bench.near_duplicates in small. Oracle: its rows; by hand, what all ways are given."""

import json
import math

from experiments.bench import near_duplicates
from tests.programs import run_here


def test_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"some words and {i} more words"}) + "\n" for i in range(9))
    )
    for data in ([], ["--data", str(tmp_path / "a.jsonl")]):
        flags = ["--n-documents", "5", "--rounds", "1", "--json", str(tmp_path / "rows.json"), *data]
        done = run_here("experiments.bench.near_duplicates", *flags)
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert [r["metric"] for r in rows] == ["signatures", "signatures", "with folding"]
        assert [r["peer"] for r in rows] == ["datasketch", "rensa", "datasketch"]
        assert all(math.isfinite(r["value"]) and r["value"] > 0 for r in rows)


def test_runs_of_words():
    assert near_duplicates.runs("a b c d e f") == ["a b c d e", "b c d e f"] and near_duplicates.runs("a b") == ["a b"]
