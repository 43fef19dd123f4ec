"""experiments.bench.data_parallel at toy size, on two Gloo processes: every way runs, beside its peer."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.dist.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("alone", "per_leaf", "flat", "bucketed", "overlapped", "zero1", "fsdp", "torch_ddp", "torch_fsdp2")


def program(*args, n_ranks=2):
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={n_ranks}", f"--master-port={free_port()}"]
    small = ["--device", "cpu", "--sizes", "3m", "--batch-size", "1", "--context-length", "16", "--steps", "1"]
    return subprocess.run(
        [sys.executable, *torchrun, "-m", "--", "experiments.bench.data_parallel", *small, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_every_way_has_a_row_and_a_peer(tmp_path):
    done = program("--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {r["metric"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    for way in WAYS[:7]:
        row = rows[f"3m, 1 x 16 a rank, {way}"]
        assert row["peer"] == ("torch_fsdp2" if way == "fsdp" else "torch_ddp") and row["ratio"] > 0
        assert way == "alone" or f"3m, {way}, exposed communication" in rows
    assert done.stdout.count("| metric |") == 1


def test_what_is_unknown_or_alone_is_said():
    assert "ways: magic is not one of alone, per_leaf" in program("--ways", "magic").stderr
    assert "error: one process has nobody to talk to" in program(n_ranks=1).stderr
