"""Runs from the training service's answer to GET /experiments.

Oracles: the models of the wire format, which write the answer; counts of each part by hand; the surrogate's hidden law,
which a fit to its experiments must find.
"""

import datetime as dt
import json
import math

import numpy as np
import pytest

from experiments.scaling.collect import runs_of
from experiments.scaling.count import count
from experiments.scaling.read import read
from experiments.scaling.service.backend import Broken, Done, Late
from experiments.scaling.service.hidden_law import Surrogate, centres, draw, setup_of
from experiments.scaling.service.schemas import (
    Completed,
    Experiment,
    Failed,
    Queued,
    Rules,
    Running,
    Timeout,
    TrainingConfig,
    Unexpected,
)
from experiments.scaling.service.surrogate import trajectory
from purelm.scaling.laws import optimum
from purelm.scaling.runs import Runs, lowest_of_each
from tests.programs import run_here

AT = dt.datetime(2026, 4, 1, tzinfo=dt.UTC)
RULES, SETTINGS, SEED = Rules(seq_len=8), Surrogate(noise=0.0, shape=0.0), 11


def config(layers=2, heads=2, tokens=8 * 160, batch=10, lr=1e-3, tied=False, bias=False):
    return TrainingConfig.model_validate({
        "architecture_config": {
            "attention_bias": bias, "head_dim": 64, "hidden_size": 64 * heads, "intermediate_size": 170 * heads,
            "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": heads,
            "rms_norm_eps": 1e-5, "rope_theta": 10_000, "tie_word_embeddings": tied, "dtype": "float32",
            "vocab_size": 10**6,
        },
        "optimizer_config": {"lr_scheduler": {"peak_value": lr}, "weight_decay": 0.1}, "train_batch_size": batch,
        "val_batch_size": 64, "n_evals": 1, "total_train_tokens": tokens, "max_runtime_seconds": 43_200,
    })  # fmt: skip


def status(outcome):
    times = {"queued_at": AT, "dispatched_at": AT, "run_id": "r"}
    if isinstance(outcome, Done):
        return Completed(
            **times, used_runtime_seconds=outcome.seconds, val_losses=list(outcome.val_losses), completed_at=AT
        )
    late = isinstance(outcome, Late)
    reason = Timeout(partial_val_losses=list(outcome.val_losses)) if late else Unexpected(failure=outcome.failure)
    return Failed(**times, used_runtime_seconds=outcome.seconds, reason=reason, failed_at=AT)


def answer(path, pairs):
    """What the service would send, as a file."""
    rows = [Experiment(experiment_id=i, training_config=c, status=s) for i, (c, s) in enumerate(pairs, 1)]
    path.write_text(json.dumps([row.model_dump(mode="json") for row in rows]))
    return path


def test_counting_by_hand():
    """Each part of a small model, with and without biases and tying."""
    for tied, bias in ((False, False), (True, False), (False, True)):
        a = config(3, 2, tied=tied, bias=bias).architecture_config
        d, inner = 128, 340
        layer = 4 * d * d + (4 * d if bias else 0) + 3 * d * inner + 2 * d + 2 * 64
        blocks = 3 * layer + d
        assert count(a, "blocks") == blocks and count(a, "kaplan") == 12 * 3 * d * d
        assert count(a, "all") == blocks + (1 if tied else 2) * 10**6 * d
        assert count(a, "head") == blocks + 10**6 * d


def test_what_did_not_complete_is_left_out_and_counted(tmp_path):
    done = Done(5.0, (4.0, 3.5))
    queued, running = Queued(queued_at=AT), Running(queued_at=AT, dispatched_at=AT, run_id="r", val_losses=[3.0])
    late = status(Late(9.0, (2.0,)))
    every = (status(done), late, status(Broken(1.0, "x")), queued, running, late, status(Done(5.0, (4.5,))))
    pairs = [(config(2 + i), s) for i, s in enumerate(every)]
    runs, left_out, counting = read(answer(tmp_path / "a.json", pairs), "blocks")
    assert counting == "blocks"
    assert left_out == {"timeout": 2, "unexpected": 1, "queued": 1, "running": 1}
    assert runs.loss.tolist() == [3.5, 4.5] and runs.tokens.tolist() == [1280.0, 1280.0]
    assert runs.parameters.tolist() == [count(config(n).architecture_config, "blocks") for n in (2, 8)]
    with pytest.raises(ValueError, match="none of 1 experiments has completed"):
        read(answer(tmp_path / "b.json", [(config(), late)]))
    rows = json.loads((tmp_path / "a.json").read_text())
    rows[1]["training_config"]["architecture_config"]["hidden_size"] = 100
    (tmp_path / "c.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"experiment 2: training_config.architecture_config: .*hidden_size") as error:
        read(tmp_path / "c.json")
    assert "\n" not in str(error.value)


def test_collected_runs_are_those_of_the_answer(tmp_path):
    """Oracle: `read` of the same experiments. Runs that count N differently make no law."""
    pairs = [(config(n), status(Done(5.0, (4.0, 3.0 + n)))) for n in (2, 3)] + [(config(4), status(Late(9.0, (2.0,))))]
    rows = json.loads(answer(tmp_path / "a.json", pairs).read_text())
    file = tmp_path / "runs.json"
    for counting, embeddings in (("blocks", False), ("all", True)):
        file.write_text(json.dumps(runs_of(rows, embeddings=embeddings)))
        mine, there = read(file), read(tmp_path / "a.json", counting)
        assert [x.tolist() for x in mine.runs] == [x.tolist() for x in there.runs]
        assert mine.counting == there.counting == counting
    file.write_text(json.dumps(runs_of(rows) + runs_of(rows, embeddings=True)))
    with pytest.raises(ValueError, match="count parameters differently, all, blocks"):
        read(file)


def test_the_lowest_of_each():
    runs = Runs(*(np.array(x, np.float64) for x in ([1, 2, 1, 2, 1], [5, 5, 5, 5, 6], [3, 2, 1, 4, 9])))
    kept = lowest_of_each(runs)
    assert [x.tolist() for x in kept] == [[1, 2, 1], [5, 5, 6], [1, 2, 9]]


def test_fit_finds_the_law_behind_a_services_answer(tmp_path):
    """Oracle: the surrogate's hidden law. Three learning rates of each size, of which the middle one is the best."""
    pairs, hidden = [], draw(SETTINGS, SEED)
    for layers, heads in ((2, 2), (3, 4), (4, 6), (6, 8), (8, 12)):
        for tokens in (3e7, 1e8, 3e8, 1e9):
            batch = round(0.58 * tokens**0.571 * math.exp(hidden.batch) / 8)
            first = config(layers, heads, 8 * batch * round(tokens / 8 / batch), batch)
            lr, _ = centres(hidden, setup_of(first, RULES))
            for factor in (0.5, 1.0, 2.0):
                cfg = config(layers, heads, first.total_train_tokens, batch, float(lr) * factor)
                pairs.append((cfg, status(trajectory(SETTINGS, cfg, RULES, hidden, SEED).outcome)))
    n_late = sum(isinstance(s, Failed) for _, s in pairs)
    path = answer(tmp_path / "experiments.json", pairs)
    flags = ("--counting", "blocks", "--lowest", "--bootstrap", 0, "--budgets", "1e20", "--out", tmp_path / "out")
    done = run_here("experiments.scaling.fit", path, *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/fits.json").read_text())
    best = optimum(hidden.law, 1e20)
    assert found["predicted"][0]["parameters"] == pytest.approx(best.parameters, rel=0.02)
    assert found["predicted"][0]["loss"] == pytest.approx(best.loss + 0.1 * hidden.decay, abs=2e-3)
    assert n_late and found["left_out"] == {"timeout": n_late} and f"Left out: {n_late} timeout." in done.stdout
    completed = [c for c, s in pairs if isinstance(s, Completed)]
    assert found["runs"] == len({(c.architecture_config, c.total_train_tokens) for c in completed})
    every = run_here("experiments.scaling.fit", path, "--bootstrap", 0)
    assert every.returncode == 0 and f"of {len(pairs) - n_late} runs" in every.stdout
    plan = run_here("experiments.scaling.plan", path, "--counting", "blocks", "--lowest", "--budget", "1e19",
                    "--target", "1e21", "--noise", 0.003)  # fmt: skip
    assert plan.returncode == 0 and "Next runs" in plan.stdout
