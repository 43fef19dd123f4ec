"""experiments.bench.data_parallel at toy size, on two Gloo processes: every way runs, beside its peer."""

import json
import subprocess

import pytest
import torch

from experiments.bench.data_parallel import enough_memory
from purelm.dist.world import World
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


RUNS_OUT = """
import os
import sys
import torch
import tyro
from experiments.bench import data_parallel

our_step = data_parallel.our_step

def too_large(way, *args):
    if way == "flat" and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
    return our_step(way, *args)

data_parallel.our_step = too_large
data_parallel.main(tyro.cli(data_parallel.Args))
"""


@pytest.mark.slow
def test_a_rank_without_memory_ends_the_program_and_what_was_measured_is_kept(tmp_path):
    script = tmp_path / "runs_out.py"
    script.write_text(RUNS_OUT)
    flags = "--device cpu --sizes 3m --batch-size 1 --context-length 16 --steps 1 --ways per_leaf flat bucketed --json"
    command = [*processes.script_launcher(2), str(script), *flags.split(), str(tmp_path / "rows.json")]
    limits = {"timeout": processes.TIMEOUT, "cwd": processes.ROOT, "env": processes.ENVIRONMENT}
    done = subprocess.run(command, capture_output=True, text=True, **limits)
    assert done.returncode != 0
    assert "error: flat does not fit into the memory of rank 1: leave it out of --ways" in done.stderr
    assert "(CUDA out of memory)" in done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r["metric"] for r in rows] == ["3m, 1 x 16 a rank, per_leaf"]


def test_enough_memory_is_silent_and_other_errors_pass():
    here = World(0, 1, torch.device("cpu"))
    with enough_memory("flat", here):
        pass
    with pytest.raises(KeyError), enough_memory("flat", here):
        raise KeyError
