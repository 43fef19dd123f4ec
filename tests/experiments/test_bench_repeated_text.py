"""experiments.bench.repeated_text and clusters in small. Oracle: their rows, and what is counted by hand."""

import json
import math

import numpy as np
import pytest

from experiments.bench import clusters, repeated_text
from purelm.curate.near_duplicates import near_duplicates
from tests.programs import run_here


def rows_of(module, path, *flags):
    done = run_here(f"experiments.bench.{module}", *flags, "--json", path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((path / "rows.json").read_text())
    assert all(math.isfinite(r["value"]) and r["value"] >= 0 for r in rows)
    return rows, done.stderr


def test_rows_of_repeated_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in ("one\ntwo\n", "two\nthree", "")))
    rows, said = rows_of("repeated_text", tmp_path, "--data", tmp_path / "a.jsonl", "--megabytes", 0.02, "--rounds", 1)
    kinds = ("lines", "lines, sorted in files", "substrings")
    assert [r["metric"] for r in rows] == [f"{kind}, {name}" for name in ("a.jsonl", "made up") for kind in kinds]
    # Without the last text, which is empty: "two" is there twice, of 19 bytes in five lines.
    assert "a.jsonl: 5 lines of 4 bytes in the mean; 42.1% are left out" in said
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    done = run_here("experiments.bench.repeated_text", "--data", tmp_path / "a.jsonl", "--megabytes", 0.02)
    assert done.returncode == 2 and "a.jsonl: no text" in done.stderr


def test_lines_by_python(tmp_path):
    (tmp_path / "a").write_bytes(b"a\nb\na\n")
    (tmp_path / "out").mkdir()
    repeated_text.lines_by_python(tmp_path / "a", tmp_path / "out")
    assert (tmp_path / "out" / "a").read_bytes() == b"b\n"


def test_substrings_of_both_ways():
    """Twice 210 bytes, in two documents and not across them."""
    draw = np.random.default_rng(0)
    part, rest = draw.integers(0, 256, 210), draw.integers(0, 256, (3, 300))
    items = np.concatenate([rest[0], part, rest[1], part, rest[2]]).astype(np.uint8)
    for starts, wanted in (([0, 600, 1320], 420), ([0, 305, 1320], 410), ([0, 480, 1320], 0)):
        assert repeated_text.spans_by_us(items, np.array(starts)) == wanted
        pytest.importorskip("pydivsufsort")
        theirs = repeated_text.spans_by_suffix_array(items, np.array(starts))
        assert theirs == wanted if starts[1] == 600 else wanted < theirs <= 420  # it compares over ends of documents


def test_rows_of_clusters(tmp_path, monkeypatch):
    """In this process."""
    def measured(way, folder, memory):
        sent = []
        clusters._measured(type("Pipe", (), {"send": staticmethod(sent.append)}), way, folder, memory)
        assert sent[0][0] > 0 and sent[0][1] >= 0
        return 2.0, 4_000_000, sent[0][2]

    monkeypatch.setattr(clusters, "measure", measured)
    flags = ["--n-documents", 300, "--memory-megabytes", 0.01]
    rows, _ = rows_of("clusters", tmp_path, *flags, "--no-datasketch")
    assert [r["metric"] for r in rows] == ["clusters in files", "peak memory"]
    assert {r["peer"] for r in rows} == {"in memory"} and [r["value"] for r in rows] == [150.0, 4.0]


def test_ways_to_clusters(tmp_path, monkeypatch):
    """Oracle: near_duplicates of the texts, signed in files of 70."""
    monkeypatch.setattr(clusters, "IN_A_FILE", 70)
    clusters.write(tmp_path, 300)
    texts = list(clusters.made_up(300))
    wanted = near_duplicates(texts, clusters.CFG)
    assert len(clusters.signature_files(tmp_path)) == 5 and 3 < (wanted != np.arange(300)).sum() < 60
    assert [clusters.texts_of(tmp_path)(i) for i in (0, 299)] == [texts[0], texts[299]]
    for way in (clusters.in_files, clusters.in_memory):
        assert way(tmp_path, 10_000).tolist() == wanted.tolist()
    pytest.importorskip("datasketch")
    found = clusters.by_datasketch(tmp_path, 0)
    assert ((found < np.arange(300)) >= (wanted < np.arange(300))).all()
