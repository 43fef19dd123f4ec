"""SIGTERM and Ctrl-C. Oracles: the uninterrupted run; exit statuses of the shell; processes that really get signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import pretrain, signals
from experiments.loop import train
from experiments.parallel import Parallel
from experiments.setup import start
from purelm import checkpoint, tree
from purelm.dist.world import World, rank_of, size_of
from tests.dist import processes
from tests.experiments.small import rows, small, trained

ROOT = Path(__file__).resolve().parents[2]


def with_signal(ready, number, step, times=1, when=lambda: True):
    """The same, but that this process gets a signal within a step."""

    def run(state, batch):
        if int(state.step) + 1 == step and when():
            for _ in range(times):
                os.kill(os.getpid(), number)
        return ready.run.step(state, batch)

    return ready._replace(run=ready.run._replace(step=run))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trained(settings(folder))
    return folder / "run"


def settings(folder, **changes):
    return small(folder, steps=8, save_every=5, eval_every=3, keep_last=9, **changes)


@pytest.mark.parametrize(
    "number,step", [(signal.SIGTERM, 4), (signal.SIGINT, 3), (signal.SIGTERM, 5), (signal.SIGINT, 8)]
)
def test_the_step_is_finished_and_saved_and_the_run_goes_on_to_the_bit(whole, tmp_path, capfd, number, step):
    """Also at a step of an evaluation (3), of a save (5) and at the last."""
    cfg = settings(tmp_path)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as end:
        train(cfg, with_signal(start(cfg), number, step))
    assert end.value.code == 128 + number
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    err = capfd.readouterr().err
    assert f"{signal.Signals(number).name}: finishing the step, then saving; once more ends at once" in err
    assert f"step {step} of 8 is saved in {cfg.run}: the same command and --resume go on from there" in err
    assert checkpoint.latest(cfg.run / "checkpoints") == step
    trained(settings(tmp_path, resume=True))
    assert rows(cfg.run) == rows(whole)
    a, b = (checkpoint.load(run / "checkpoints")[0] for run in (whole, cfg.run))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


TWICE = """
import sys
from pathlib import Path
from experiments import pretrain, setup
from tests.experiments.small import small
from tests.experiments.test_signals import with_signal
start = setup.start
pretrain.start = lambda cfg, world: with_signal(start(cfg, world), int(sys.argv[2]), 3, times=int(sys.argv[3]))
pretrain.main(small(Path(sys.argv[1]), steps=8, heldout=None))
"""


@pytest.mark.parametrize("number,times,status", [(signal.SIGINT, 1, 130), (signal.SIGTERM, 2, -signal.SIGTERM)])
def test_the_status_of_a_process(tmp_path, number, times, status):
    """One signal: 128 + its number, with a checkpoint. Two: the signal itself, with what was there before."""
    command = [sys.executable, "-c", TWICE, str(tmp_path), str(int(number)), str(times)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == (3 if times == 1 else 2)
    assert "Traceback" not in done.stderr


def test_what_torchrun_passes_on_is_the_same_wish(monkeypatch):
    """Its processes get Ctrl-C from the terminal and from torchrun: the second within seconds counts for nothing."""
    now, killed = [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: killed.append(number))
    monkeypatch.setattr(signals.signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    wish = signals._Wish(World(1, 2, torch.device("cpu")))
    wish.take(signal.SIGINT, None)
    now[0] += signals.PASSED_ON / 2
    wish.take(signal.SIGTERM, None)
    assert wish.number == signal.SIGINT and not killed
    now[0] += signals.PASSED_ON
    wish.take(signal.SIGTERM, None)
    assert killed == [signal.SIGTERM]


def on_rank_stop(folder, mode):
    """What a rank's end is, when rank 1 alone gets a signal within step 3."""
    rank = rank_of(None)
    cfg = settings(Path(folder), parallel=Parallel(mode=mode))
    ready = start(cfg, World(rank, size_of(None), torch.device("cpu")))
    try:
        train(cfg, with_signal(ready, signal.SIGTERM, 3, when=lambda: rank == 1))
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_all_ranks_stop_after_the_same_step(tmp_path, mode):
    """A signal to one of two: both end with its status, one step later, with one checkpoint that goes on."""
    cfg = settings(tmp_path)
    assert processes.run(on_rank_stop, str(tmp_path), mode) == [143, 143]
    assert checkpoint.steps(cfg.run / "checkpoints") == [4]
    trained(settings(tmp_path, resume=True))
    assert [row["step"] for row in rows(cfg.run) if "loss" in row] == list(range(1, 9))


def test_pretrain_uses_start():
    """`TWICE` replaces what the program calls."""
    assert pretrain.start is start
