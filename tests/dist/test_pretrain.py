"""`experiments.pretrain` on two Gloo processes. Oracle: the same run in one process.

Processes that are there already train, but where it matters that torchrun starts them.
"""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
import tyro

from experiments import pretrain as program
from experiments.config import Pretrain
from purelm.dist.world import World, rank_of, size_of
from tests.dist.processes import ENVIRONMENT, ROOT, TIMEOUT, launcher, run

FLAGS = (
    "--model.vocab-size 61 --model.d-model 32 --model.n-layers 2 --model.n-heads 4 --model.context-length 32 "
    "--batch-size 8 --log-every 1 --eval-every 8 --eval-tokens 2000 --eval-stride 16 --save-every 8 --keep-last 9 "
    "--device cpu --optim.warmup-steps 4 --optim.lr 1e-2 --token-dtype uint16"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A sequence that can be learned: a walk over 61 ids."""
    folder = tmp_path_factory.mktemp("data")
    walk = np.cumsum(np.random.default_rng(0).integers(0, 3, 20000)) % 61
    walk.astype("uint16").tofile(folder / "train.bin")
    walk[:3001].astype("uint16").tofile(folder / "heldout.bin")
    return folder


def arguments(data, folder, *flags):
    files = ["--run", str(folder), "--train", str(data / "train.bin"), "--heldout", str(data / "heldout.bin")]
    return [*files, *FLAGS, *flags]


def command(*args, restarts=0):
    """Under torchrun, on two processes."""
    return [*launcher(2, f"--max-restarts={restarts}"), "experiments.pretrain", *arguments(*args)]


def on_rank_pretrain(flags):
    program.run(tyro.cli(Pretrain, args=flags), World(rank_of(None), size_of(None), torch.device("cpu")))


def pretrain(data, folder, *flags, n=1):
    flags = arguments(data, folder, *flags)
    if n == 1:
        on_rank_pretrain(flags)
    else:
        run(on_rank_pretrain, flags, size=n)
    return rows(folder)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(a, b, rtol):
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for x, y in zip(a, b, strict=True):
        for name in ("loss", "lr", "grad_norm", "heldout_loss", "n_targets"):
            if name in y:
                assert x[name] == pytest.approx(y[name], rel=rtol), (name, y["step"])


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    return pretrain(data, tmp_path_factory.mktemp("alone") / "run", "--steps", "16", "--compile", "no")


@pytest.mark.parametrize("mode", ["ddp", "zero1", "fsdp"])
def test_two_processes_have_the_curve_of_one_and_one_goes_on_from_them(data, tmp_path, alone, mode):
    """fp32 sums in another order: 1e-4 after 16 steps. Then the checkpoint of step 8, alone: the same second half."""
    flags = ["--steps", "16", "--compile", "no", "--parallel.mode", mode]
    found = pretrain(data, tmp_path / "run", *flags, "--microbatches", "2", n=2)
    assert_same_curve(found, alone, 1e-4)
    newest = tmp_path / "run" / "checkpoints" / "step-00000016"
    newest.rename(tmp_path / "newest")
    again = pretrain(data, tmp_path / "run", "--steps", "16", "--compile", "no", "--resume")
    assert_same_curve(again, alone, 1e-4)


def test_muon_goes_on_on_another_number_of_processes(data, tmp_path):
    """On whole matrices, which have owners: zero1 on two, then on three, against one process."""
    flags = ["--compile", "no", "--optim.name", "muon", "--optim.schedule", "constant", "--batch-size", "6"]
    expected = pretrain(data, tmp_path / "one", *flags, "--steps", "16")
    flags += ["--parallel.mode", "zero1"]
    pretrain(data, tmp_path / "run", *flags, "--steps", "8", n=2)
    found = pretrain(data, tmp_path / "run", *flags, "--steps", "16", "--resume", n=3)
    assert_same_curve([r for r in found if "loss" in r], [r for r in expected if "loss" in r], 1e-3)


@pytest.mark.compile
def test_compiled(data, tmp_path, alone):
    flags = ["--steps", "16", "--compile", "yes", "--parallel.mode", "fsdp", "--remat"]
    assert_same_curve(pretrain(data, tmp_path / "run", *flags, n=2), alone, 1e-3)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_a_restart_goes_on(data, tmp_path):
    """kill -9 of one rank after the first checkpoint; torchrun starts both again; the curve has no gap.

    Over NCCL where there are two GPUs.
    """
    folder = tmp_path / "run"
    device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    flags = ["--steps", "150", "--compile", "no", "--save-every", "20", "--keep-last", "2", "--eval-every", "0"]
    flags += ["--device", device]
    process = subprocess.Popen(
        command(data, folder, *flags, restarts=1), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (folder / "checkpoints" / "step-00000020").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "resumed from step" in errors
    assert [r["step"] for r in rows(folder) if "loss" in r] == list(range(1, 151))


@pytest.mark.slow
def test_what_cannot_be_divided_is_said(data, tmp_path):
    flags = ["--steps", "4", "--compile", "no", "--microbatches", "3"]
    line = command(data, tmp_path / "run", *flags)
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "error: batch_size 8 is not divisible by 2 processes x 3 microbatches" in done.stderr
