"""experiments.grpo on a small model that was fine-tuned a little.

Oracles: the uninterrupted run, to the last bit; one pass over all rows, for passes, dropped rows and padding; the
definition of the order of problems; graders, for what is logged.
"""

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from experiments.grading import grader_named
from experiments.rl.problems import order, read_problems
from experiments.rl.sampling import collect
from experiments.rl.update import Trainer, loss_of, minibatches, padded, prepared, stepped, update
from purelm import checkpoint, tree
from purelm.align.recipe import adapted
from purelm.align.recipes import RECIPES
from purelm.models import hf
from purelm.optim import sgd
from purelm.optim.schedules import constant
from purelm.train import init_state, make_step
from tests.experiments.small_policy import CPU, FLAGS, sampler_of, write_policy
from tests.programs import run_here


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with train.jsonl and start/, a model that is right now and then."""
    return write_policy(tmp_path_factory.mktemp("grpo"))


def grpo(inputs, run, *flags, status=0):
    train_file = str(inputs / "train.jsonl")
    command = ["--run", str(run), "--model", str(inputs / "start"), "--train", train_file, "--heldout", train_file]
    done = run_here("experiments.grpo", *command, *FLAGS, *flags)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns_and_resumes(inputs, tmp_path):
    """Rewards rise; a run that is stopped and goes on is the run without a break, rollouts and all."""
    flags = ["--recipe", "olmo3", "--steps"]
    grpo(inputs, tmp_path / "whole", *flags, "24")
    grpo(inputs, tmp_path / "part", *flags, "3")
    assert "resumed from rollout batch 3" in grpo(inputs, tmp_path / "part", *flags, "24", "--resume")
    a, b = (checkpoint.load(tmp_path / name / "checkpoints", 24)[0] for name in ("whole", "part"))
    assert tree.structure(a) == tree.structure(b)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))
    found = [r for r in rows(tmp_path / "whole/metrics.jsonl") if "reward" in r]
    assert len(found) == 24
    timed = ("seconds_sampling", "seconds_training")
    for x, y in zip(found, [r for r in rows(tmp_path / "part/metrics.jsonl") if "reward" in r], strict=True):
        assert {k: v for k, v in x.items() if k not in timed} == {k: v for k, v in y.items() if k not in timed}
    first, last = (sum(r["reward"] for r in part) / 6 for part in (found[:6], found[-6:]))
    assert first < 0.6 and last > first + 0.2, (first, last)
    assert 0 < max(r["sampler_gap_largest"] for r in found) < 1e-5  # of fp32, in another order of sums
    for r in rows(tmp_path / "whole/rollouts.jsonl"):
        assert r["reward"] == grader_named("number")(r["response"], r["gold"])["reward"]
    assert (tmp_path / "whole/report.html").is_file() and hf.load(tmp_path / "whole/export")[1].vocab_size == 288


def test_the_kl_of_rewards_is_logged(inputs, tmp_path):
    """0 until the policy has left the reference; not after. The reward that is logged is the graders'."""
    grpo(inputs, tmp_path / "run", "--recipe", "rloo", "--steps", "4")
    found = [r for r in rows(tmp_path / "run/metrics.jsonl") if "reward" in r]
    before = [0, *(r["updates"] for r in found)]
    assert 0 < before[3] and all((r["kl_reward"] != 0) == (n > 0) for r, n in zip(found, before, strict=False))
    assert all(r["reward"] * 16 == int(r["reward"] * 16) for r in found) and "kl" not in found[0]


def test_rollout_batches(inputs):
    """The same twice; other answers in the next batch; a recipe that replaces flat groups has none."""
    sampler, params, problems = sampler_of(inputs)
    options = dict(prompts=3, seed=5, max_rounds=40, device=CPU)
    plain = adapted(RECIPES["course2026_grpo"], group_size=4, max_new_tokens=4)
    first, again, other = (collect(sampler, plain, params, problems, i=i, **options) for i in (0, 0, 1))
    assert first.texts == again.texts and first.texts != other.texts and first.n_sampled == 3
    assert [x.text for x in first.problems] == [problems[k].text for k in order(16, 3, 5, 0)]
    for k, text in enumerate(first.texts):
        assert first.parts[k] == grader_named("number")(text, first.problems[k // 4].gold)
        assert first.rollouts.prompts[k].tolist() == first.problems[k // 4].ids.tolist()
    dapo = adapted(RECIPES["dapo"], group_size=4, max_new_tokens=4)
    kept = collect(sampler, dapo, params, problems, i=0, **options)
    rewards = kept.rollouts.rewards_B.view(3, 4)
    assert bool((rewards.amax(1) > rewards.amin(1)).all()) and kept.n_sampled >= 3 and kept.n_sampled % 3 == 0
    with pytest.raises(ValueError, match="of 3 groups in 1 rounds, rewards differ in 0, and 3 are wanted"):
        collect(sampler._replace(reward=lambda text, gold: {"reward": 1.0}), dapo, params, problems, i=0,
                **{**options, "max_rounds": 1})  # fmt: skip


@pytest.mark.parametrize("name", ["course2026_dr_grpo", "dapo", "scalerl", "olmo3_32b_think", "gspo", "grpo"])
def test_passes_and_dropped_rows_change_nothing(inputs, name):
    """Oracle: one pass over all rows, none dropped. fp64; 1e-9 of an update is the order of sums."""
    sampler, params, problems = sampler_of(inputs)
    recipe = adapted(RECIPES[name], group_size=4, max_new_tokens=4)
    recipe = type(recipe)(**{**recipe.__dict__, "flat_groups": "keep"})
    batch = collect(sampler, recipe, params, problems, prompts=6, seed=1, i=0, max_rounds=1, device=CPU)
    start = tree.cast(params, torch.float64)
    # A policy that has moved on from the one that sampled, so that ratios are not 1.
    moved = tree.map(lambda x: x + 0.01 * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape), start)
    optimizer = sgd()
    loss = loss_of(sampler.model, recipe.objective, recipe.temperature, None)

    def after(rows_per_pass, drops):
        def step(n):
            return make_step(loss, optimizer, constant(1.0), microbatches=n, precision=_f64())

        reference = start if recipe.objective.kl is not None else None
        trainer = Trainer(
            sampler.model, recipe, step, rows_per_pass, 0, None, torch.float64, False, reference, drops, 3
        )
        state = init_state(moved, optimizer, _f64())
        state, metrics, _ = update(trainer, state, batch.rollouts, 0, epochs=1, n_minibatches=2, device=CPU)
        return state, metrics

    whole, metrics = after(1000, False)
    assert len(metrics) == 2 and not all(
        torch.equal(x, y) for x, y in zip(tree.leaves(whole.params), tree.leaves(moved), strict=True)
    )
    drops = [False] if recipe.objective.kl is not None else [False, True]
    for rows_per_pass in (3, 5):
        for drop in drops:
            other, found = after(rows_per_pass, drop)
            for x, y in zip(tree.leaves(other.params), tree.leaves(whole.params), strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
            for x, y in zip(found, metrics, strict=True):
                assert x["loss"] == pytest.approx(y["loss"], abs=1e-9)
                if not drop:
                    for k in ("ratio_mean", "entropy", "kl_old", "n_tokens"):
                        assert x[k] == pytest.approx(y[k], rel=1e-5)


def test_a_loss_that_cancels_is_no_mean(inputs):
    """make_step tries on the first pass whether a loss may be added up: also where its value is rounding alone, as of
    one answer with advantages whose sum is 0. Oracle: sums of rows double with them."""
    sampler, params, problems = sampler_of(inputs)
    recipe = adapted(RECIPES["course2026_dr_grpo"], group_size=7, max_new_tokens=4)
    loss = loss_of(sampler.model, recipe.objective, 1.0, None)
    for k in range(len(problems)):
        ids = torch.from_numpy(problems[k].ids).repeat(14, 1)
        part = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": torch.ones(ids[:, 1:].shape)}
        part["advantages"] = torch.tensor([1.0, -0.1, -0.2, -0.3, -0.15, -0.05, -0.2]).repeat(2) / 7
        part["old_log_probs"] = torch.zeros_like(part["weights"])
        trainer = Trainer(
            sampler.model, recipe, lambda n: make_step(loss, sgd(), constant(1.0), microbatches=n), 7, 0, None,
            torch.float32, False, None, False, 3,
        )  # fmt: skip
        assert abs(stepped(trainer, init_state(params, sgd()), part)[1]["loss"]) < 1e-5


@pytest.mark.parametrize("recompute", [True, False])
def test_kl_in_the_reward(inputs, recompute):
    """Oracle: a float64 loop over answers and tokens, with the model's logits; the loss has no KL term."""
    sampler, params, problems = sampler_of(inputs)
    recipe = adapted(RECIPES["rloo"], group_size=3, max_new_tokens=4, kl_in_reward=0.3, temperature=0.7)
    batch = collect(sampler, recipe, params, problems, prompts=5, seed=1, i=0, max_rounds=1, device=CPU).rollouts
    reference = tree.map(lambda x: x + 0.05 * torch.cos(torch.arange(x.numel())).view(x.shape), params)
    trainer = Trainer(
        sampler.model, recipe, lambda n: None, 4, 0, None, torch.float64, recompute,
        tree.cast(reference, torch.float64), False, 3,
    )  # fmt: skip
    found, aux = prepared(trainer, params, batch, CPU)

    def log_p(params, prompt, answer):
        ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
        logits = sampler.model.apply(tree.cast(params, torch.float64), ids)[0] / 0.7
        return [float(logits[len(prompt) + t - 1].log_softmax(-1)[k]) for t, k in enumerate(answer)]

    taken = []
    for b, (prompt, answer) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        old = log_p(params, prompt, answer) if recompute else batch.sampler_log_probs[b].tolist()
        taken.append(-0.3 * sum(x - y for x, y in zip(old, log_p(reference, prompt, answer), strict=True)))
    assert max(map(abs, taken)) > 0.02
    rewards = [float(r) + x for r, x in zip(batch.rewards_B, taken, strict=True)]
    for b, r in enumerate(rewards):
        others = [rewards[k] for k in range(b // 3 * 3, b // 3 * 3 + 3) if k != b]
        assert float(found["advantages"][b]) == pytest.approx(r - sum(others) / 2, abs=1e-5)
    assert float(aux["kl_reward"]) == pytest.approx(sum(taken) / len(taken), abs=1e-6)
    assert "ref_log_probs" not in found


def _f64():
    from purelm.train import Precision

    return Precision(torch.float64, torch.float64, torch.float64)


def test_order_and_minibatches():
    """Every problem once in n; every group once an epoch, whole, in parts of nearly one size."""
    for n, size in ((5, 2), (4, 7), (6, 3)):
        drawn = [k for i in range(3 * n) for k in order(n, size, 0, i)]
        assert len(drawn) == 3 * n * size
        for epoch in range(3 * size):
            assert sorted(drawn[epoch * n : epoch * n + n]) == list(range(n))
    batch = {"tokens": torch.arange(14).view(14, 1), "x": torch.arange(14)}
    parts = list(minibatches(batch, 2, 3, 0, 0, 0))
    assert sorted(len(p["x"]) for p in parts) == [4, 4, 6]
    seen = Counter(int(x) for p in parts for x in p["x"])
    assert seen == Counter(range(14)) and all((p["x"][1::2] == p["x"][::2] + 1).all() for p in parts)
    assert [p["x"].tolist() for p in parts] != [p["x"].tolist() for p in minibatches(batch, 2, 3, 0, 0, 1)]
    longer = padded({**batch, "n": torch.tensor(3.0)}, 4)
    assert longer["x"].tolist() == [*range(14), 0, 0] and longer["n"].ndim == 0
    assert len(list(minibatches(batch, 2, 99, 0, 0, 0))) == 7


def test_long_problems_are_left_out(inputs, capfd):
    read = partial(read_problems, bpe=hf.load(inputs / "start")[2], gold="{answer}", before=[], chat=None)
    assert len(read(inputs / "train.jsonl", prompt="{question}", longest=30)) == 16
    with pytest.raises(ValueError, match="has no problem of at most 1 tokens"):
        read(inputs / "train.jsonl", prompt="{question}", longest=1)
    assert "16 of 16 problems have more than 1 tokens" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: has no text or number 'x'"):
        read(inputs / "train.jsonl", prompt="{x}", longest=30)


def test_what_is_wrong_is_named(inputs, tmp_path):
    cases = [
        (("--recipe", "ppo"), "recipe: 'ppo' is not known; there are course2025"),
        (("--grade", "none"), "grade: none is no reward"),
        (("--chat",), "has no chat template"),
        (("--exact",), "exact: needs a GPU"),
        (("--max-new-tokens", "32"), "max_new_tokens must be below the model's context_length 32"),
        (("--gold", "x", "--grade", "number"), "gold is 'x': allowed is a text with #### and a number"),
        (("--prompt", "{question"), "prompt: '{question' names no field of the rows"),
        (("--gold", "{answer"), "gold: '{answer' names no field of the rows"),
        (("--resume",), "has no checkpoint to go on from"),
        (("--group-size", "1"), "group_size must be at least 2"),
        (("--temperature", "0"), "temperature must be"),
    ]  # fmt: skip
    for flags, message in cases:
        said = grpo(inputs, tmp_path / "run", *flags, "--steps", "1", status=2)
        assert message in said, said
        assert not (tmp_path / "run").exists()
