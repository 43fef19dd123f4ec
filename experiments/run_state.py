"""What a run that fine-tunes or learns from rewards has in its folder, and goes on from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.console import say
from experiments.parallel import Run
from purelm import track
from purelm.dist.agreement import non_finite_ranks
from purelm.dist.world import World
from purelm.tokenizer import BPE
from purelm.tokenizer import save as save_tokenizer
from purelm.train import TrainState

__all__ = ["begin_files", "first_state", "save_state"]


def begin_files(
    folder: Path, names: Sequence[str], config: Any, bpe: BPE, world: World, *, done: int
) -> Callable[[dict[str, Any]], None]:
    """The run's folder as it is before the first step; a function that adds a row to metrics.jsonl.

    names: of the files of rows, which keep those up to step `done`, and none if that is 0. Only the first process
    writes.
    """
    if world.rank:
        return lambda row: None
    for name in names:  # rows that come again, and what a run without checkpoint left
        track.drop_rows(folder / name, lambda row: done == 0 or row["step"] > done)
    folder.mkdir(parents=True, exist_ok=True)
    track.write_json(folder / "config.json", config)
    save_tokenizer(bpe, folder / "tokenizer.json")
    return track.jsonl_sink(folder / "metrics.jsonl")


def first_state(folder: Path, run: Run, world: World, *, done: int, unit: str) -> TrainState:
    """The state of the newest checkpoint, which is of step `done`; the run's own first one if that is 0.

    unit: what a step is called. A checkpoint says in "updates" how many optimizer steps there were, if not `done`.
    """
    if done == 0:
        return run.init()
    trees, meta = run.load(folder / "checkpoints")
    if world.rank == 0:
        say(f"resumed from {unit} {done:,}")
    step = torch.full((), meta.get("updates", done), dtype=torch.int64, device=world.device)
    return TrainState(trees["params"], trees["opt_state"], step)


def save_state(
    folder: Path, run: Run, state: TrainState, number: int, meta: dict[str, Any], *, keep_last: int, unit: str
) -> None:
    """A checkpoint of step `number`; ValueError, and nothing written, where anything in it is inf or nan."""
    trees = {"params": state.params, "opt_state": state.opt_state}
    for name, values in trees.items():
        if non_finite_ranks(values):
            raise ValueError(f"{name} hold inf or nan after {unit} {number}: nothing is saved; lower optim.lr")
    run.save(folder / "checkpoints", number, trees, meta=meta, keep_last=keep_last, finite=True)
