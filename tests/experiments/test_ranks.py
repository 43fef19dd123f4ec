"""Ranks that were started differently, or go wrong differently. Oracle: what was changed on rank 1, by name."""

import dataclasses
from pathlib import Path

import pytest
import torch

from experiments.config import Optim
from experiments.loop import train
from experiments.parallel import Parallel
from experiments.setup import start
from purelm import checkpoint
from purelm.dist.world import World, rank_of, size_of
from tests.dist import processes
from tests.experiments.small import MODEL, small, token_file

CHANGES = {
    "seed": {"seed": 1},
    "batch_size": {"batch_size": 8},
    "optim.lr": {"optim": Optim(lr=0.5, warmup_steps=1, schedule="constant")},
    "optim.schedule": {"optim": Optim(warmup_steps=1, schedule="cosine")},
    "compute": {"compute": "bf16"},
    "order": {"order": "shuffled"},
    "model.context_length": {"model": dataclasses.replace(MODEL, context_length=8)},
    "model.rope_theta": {"model": dataclasses.replace(MODEL, rope_theta=500.0)},
    "steps": {"steps": 5},
    "save_every": {"save_every": 3},
    "eval_every": {"eval_every": 1},
    "eval_tokens": {"eval_tokens": 100},
    "microbatches": {"microbatches": 2},
    "remat": {"remat": True},
    "parallel.mode": {"parallel": Parallel(mode="zero1")},
    "parallel.wire": {"parallel": Parallel(wire="bf16")},
    "train": {"train": "other.bin"},
    "heldout": {"heldout": "other.bin"},
}
ALLOWED = {"train": "same.bin", "device": "auto", "tensorboard": False}


def here():
    return World(rank_of(None), size_of(None), torch.device("cpu"))


def changed(folder, change):
    paths = {name: folder / value for name, value in change.items() if name in ("train", "heldout")}
    return small(folder, **{**change, **paths})


def on_rank_start(folder):
    """What start says to each change on rank 1."""
    found = {}
    for name, change in CHANGES.items():
        try:
            start(changed(Path(folder), change if rank_of(None) == 1 else {}), here())
        except ValueError as error:
            found[name] = str(error)
    start(changed(Path(folder), ALLOWED if rank_of(None) == 1 else {}), here())
    return found


def test_what_differs_is_named_with_the_ranks_before_anything_is_written(tmp_path):
    small(tmp_path)
    token_file(tmp_path / "other.bin", 5, 400)
    token_file(tmp_path / "same.bin", 0, 400)
    both = processes.run(on_rank_start, str(tmp_path))
    for found in both:
        assert set(found) == set(CHANGES)
        for name, text in found.items():
            assert text.startswith("ranks differ: ") and f"{name} is " in text and "on rank 1" in text, text
    assert not (tmp_path / "run").exists()


def on_rank_poison(folder, mode):
    """A nan in rank 1's part alone, after step 3."""
    cfg = small(Path(folder), save_every=1, keep_last=1, log_every=20, heldout=None, parallel=Parallel(mode=mode))
    ready = start(cfg, here())

    def poisoned(state, batch):
        state, metrics = ready.run.step(state, batch)
        if int(state.step) == 3 and rank_of(None) == 1:
            weight = state.params["layers"][0]["ffn"]["w1"]["weight"]
            state.params["layers"][0]["ffn"]["w1"]["weight"] = weight * float("nan")
        return state, metrics

    try:
        train(cfg, ready._replace(run=ready.run._replace(step=poisoned)))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_all_ranks_refuse_to_save_what_is_not_finite_on_one(tmp_path, mode):
    small(tmp_path)
    first, second = processes.run(on_rank_poison, str(tmp_path), mode)
    assert first == second and first.startswith("params hold inf or nan on rank 1 after step 3: nothing is saved")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
