"""The 8B step at toy size, on two processes. Oracle: the loss of one process on both batches."""

import json
import re
from functools import partial

import pytest
import torch

from experiments.bench import step_8b
from purelm import random
from purelm.models import transformer
from purelm.optim import adamw, schedules
from purelm.train import init_state, make_step
from tests.dist.processes import program

TOY = step_8b.Args(
    device="cpu", n_layers=2, d_model=16, d_ff=32, n_heads=2, vocab_size=37, context_length=24, ops="reference"
)
FLAGS = (
    "--device cpu --n-layers 2 --d-model 16 --d-ff 32 --n-heads 2 --vocab-size 37 --context-length 24 --ops reference"
).split()


def expected():
    """Losses of four steps of AdamW in one process."""
    batches = [step_8b.batch_of(TOY, step_8b.world.World(rank, 2, torch.device("cpu"))) for rank in range(2)]
    batch = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    cfg = step_8b.config(TOY)
    optimizer = adamw(betas=(0.9, 0.95), weight_decay=0.1)
    step = make_step(partial(transformer.loss, cfg=cfg), optimizer, schedules.constant(step_8b.LR))
    state, losses = init_state(transformer.init(random.key(0), cfg), optimizer), []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].item())
    return losses


@pytest.mark.parametrize("keep", ["inputs", "attention", "all"])
def test_losses_are_those_of_one_process(keep, tmp_path):
    """fp32 sums in another order: 1e-4; four digits are printed."""
    flags = [*FLAGS, "--keep", keep, *(["--profile"] if keep == "all" else [])]
    done = program("experiments.bench.step_8b", *flags, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr[-3000:]
    text = done.stdout + done.stderr
    # Not by lines: the other rank's warnings may come on the same one.
    losses = [float(x) for x in re.findall(r"step \d: [\d.]+ s, loss ([\d.]+)", text)]
    assert losses == pytest.approx(expected(), abs=2e-4)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r["unit"] for r in rows] == ["s", "tokens/s"] and rows[0]["value"] > 0
    assert ("aten::mm" in text) == (keep == "all")
