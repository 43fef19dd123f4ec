"""experiments.bench.data_parallel at toy size, on two Gloo processes: every way runs, beside its peer."""

import json

import pytest

from tests.dist import processes

WAYS = ("alone", "per_leaf", "flat", "bucketed", "overlapped", "zero1", "zero2", "fsdp", "torch_ddp", "torch_fsdp2")


def program(*args, n_ranks=2):
    small = ["--device", "cpu", "--sizes", "3m", "--batch-size", "1", "--context-length", "16", "--steps", "1"]
    return processes.program("experiments.bench.data_parallel", *small, *args, n_ranks=n_ranks)


def test_every_way_has_a_row_and_a_peer(tmp_path):
    done = program("--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {r["metric"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    for way in WAYS[:8]:
        row = rows[f"3m, 1 x 16 a rank, {way}"]
        assert row["peer"] == ("torch_fsdp2" if way == "fsdp" else "torch_ddp") and row["ratio"] > 0
        if way != "alone":
            alone = rows["3m, 1 x 16 a rank, alone"]["value"]
            assert row["value"] - rows[f"3m, {way}, exposed communication"]["value"] == pytest.approx(alone)
            assert row["value"] * rows[f"3m, {way}, weak scaling"]["value"] / 100 == pytest.approx(alone)
    assert done.stdout.count("| metric |") == 1


def test_what_is_unknown_or_alone_is_said():
    assert "ways: magic is not one of alone, per_leaf" in program("--ways", "magic").stderr
    assert "error: one process has nobody to talk to" in program(n_ranks=1).stderr
