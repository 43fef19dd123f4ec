"""A signal to one rank of several over NCCL. Oracle: the checkpoint's step, and the rows of the run that goes on."""

import signal
from pathlib import Path

import pytest
import torch

from experiments.loop import train
from experiments.setup import start
from purelm import checkpoint
from purelm.dist.world import World, rank_of, size_of
from tests.dist.processes import run
from tests.experiments.small import rows, small
from tests.experiments.test_signals import with_signal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
]


def on_rank_stop(folder, resume):
    world = World(rank_of(None), size_of(None), torch.device("cuda", torch.cuda.current_device()))
    cfg = small(Path(folder), steps=8, save_every=5, device="cuda", resume=resume)
    ready = start(cfg, world)
    try:
        train(cfg, ready if resume else with_signal(ready, signal.SIGTERM, 3, when=lambda: world.rank == 1))
    except SystemExit as end:
        return end.code
    return 0


def test_all_ranks_stop_after_the_same_step_and_go_on(tmp_path):
    small(tmp_path)
    assert run(on_rank_stop, str(tmp_path), False, gpus=True) == [143, 143]
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4]
    assert run(on_rank_stop, str(tmp_path), True, gpus=True) == [0, 0]
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == list(range(1, 9))
