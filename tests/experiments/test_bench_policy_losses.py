"""experiments.bench.policy_losses on a small model. Oracle: its rows, of each other; the loss by hand."""

import json
import math

import pytest
import torch

from experiments.bench import policy_losses as bench
from experiments.bench import train_step
from purelm import random
from purelm.align.recipes import RECIPES
from purelm.models import transformer

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(train_step.SIZES, "small", (64, 32, 1, 2, 64, 16, 8, 8))


def test_rows(small, tmp_path):
    args = bench.Args("cpu", "small", ("course2026_grpo", "dapo"), 1, 4, tmp_path / "rows.json")
    bench.main(args)
    rows = json.loads((tmp_path / "rows.json").read_text())
    names = [r["metric"].split(",")[0] for r in rows]
    assert names == ["course2026_grpo alone", "course2026_grpo", "dapo alone", "dapo"]
    assert all(math.isfinite(r["value"]) and r["value"] > 0 for r in rows)
    assert len({r["peer_value"] for r in rows}) == 1


def test_a_step_is_of_the_model_and_the_least_of_losses_that_of_the_weights(small):
    """Oracle: -sum of log p times the token weights, by torch's log_softmax."""
    cfg, rows = train_step.shapes("small", CPU)
    batch, rewards = bench.rollouts(rows, cfg.context_length, CPU)
    data = train_step.batches(cfg, rows, CPU)[0]
    batch = {**batch, "tokens": data["tokens"], "targets": data["targets"], "weights": batch["mask"]}
    given = bench.with_advantages(RECIPES["course2026_grpo"], batch, rewards, 4)
    params = transformer.init(random.key(0), cfg)
    loss, metrics = bench.least(transformer.make(cfg))(params, given)
    log_p = torch.log_softmax(transformer.apply(params, data["tokens"], cfg), -1)
    chosen = log_p.gather(-1, data["targets"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(loss, -(chosen * given["token_weights"]).sum(), rtol=1e-5, atol=1e-5)
    assert metrics == {}
    step = bench.full(RECIPES["course2026_grpo"], cfg, CPU, batch, rewards, 4)
    assert {"loss", "grad_norm", "entropy"} <= {*step()}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (bench.Args("cpu", "small", ("nonsense",)), "nonsense"),
        (bench.Args("cpu", "small", group_size=3), "group_size"),
        (bench.Args("cpu", "tiny"), "tiny"),
    ],
    ids=["recipe", "group", "size"],
)
def test_what_cannot_be_is_refused(small, args, says, capsys):
    with pytest.raises(SystemExit):
        bench.main(args)
    assert says in capsys.readouterr().err
