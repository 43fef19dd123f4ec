"""experiments.grpo on two processes over Gloo. Oracle: one process; the uninterrupted run, to the last bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.parallel import Parallel
from experiments.rl.config import Grpo
from experiments.rl.policy import start
from experiments.rl.sampling import answers, collect
from experiments.rl.shares import ONE
from experiments.rl.update import Trainer, prepared
from purelm import checkpoint, random, tree
from purelm.align.recipe import adapted
from purelm.align.recipes import RECIPES
from purelm.dist.world import World, rank_of, size_of
from tests.dist import processes
from tests.experiments.small_policy import CPU, FLAGS, sampler_of, write_policy

# Shares and passes of unequal numbers of rows: 5 problems, 3 rows a pass, two steps of each of two epochs.
UNEVEN = ["--prompts", "5", "--minibatches", "2", "--epochs", "2", "--rows-per-pass", "3", "--sample-rows", "7"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("ranks"))


def grpo(inputs, run, *flags, n_ranks):
    train_file = inputs / "train.jsonl"
    command = ["--run", run, "--model", inputs / "start", "--train", train_file, "--heldout", train_file, *FLAGS]
    # Adam's first steps are signs of gradients: with this eps they are smooth, and rounding stays small.
    done = processes.program("experiments.grpo", *command, "--optim.eps", "1e-2", *UNEVEN, *flags, n_ranks=n_ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def final(run, number):
    return checkpoint.load(run / "checkpoints", number)[0]


def differ(a, b):
    """The largest difference of two trees."""
    assert tree.structure(a) == tree.structure(b)
    return max(float((x - y).abs().max()) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--parallel.mode", "ddp", "--recipe", "olmo3_32b_think"),
        ("--parallel.mode", "fsdp", "--recipe", "dapo"),
        ("--parallel.mode", "zero1", "--recipe", "grpo"),
    ],
)
def test_two_processes_learn_as_one(inputs, tmp_path, flags):
    """After two rollout batches; the steps are of 3e-3, what is left is the order of sums in fp32."""
    flags = (*flags, "--max-rounds", "40", "--steps")
    grpo(inputs, tmp_path / "one", *flags, "2", n_ranks=1)
    said = grpo(inputs, tmp_path / "two", *flags, "2", n_ranks=2)
    assert said.count("2 processes") == 1  # of the first process alone
    one, two = final(tmp_path / "one", 2), final(tmp_path / "two", 2)
    begin = checkpoint_of_start(inputs)
    assert differ(one["params"], begin) > 1e-3 and differ(one["params"], two["params"]) < 2e-5
    first, second = (rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [sorted(r) for r in first] == [sorted(r) for r in second]
    for a, b in zip(first, second, strict=True):
        for name in a:
            if not name.startswith("seconds") and name != "sampler_gap_largest":
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), (name, a, b)
    assert rows(tmp_path / "one/rollouts.jsonl") == rows(tmp_path / "two/rollouts.jsonl")
    # What two processes saved goes on alone, as what one has saved.
    for name in ("one", "two"):
        assert "resumed from rollout batch 2" in grpo(inputs, tmp_path / name, *flags, "3", "--resume", n_ranks=1)
    assert differ(final(tmp_path / "one", 3)["params"], final(tmp_path / "two", 3)["params"]) < 4e-5


def checkpoint_of_start(inputs):
    return sampler_of(inputs)[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_killed_runs_go_on(inputs, tmp_path, mode):
    """Killed in the third rollout batch, after the second was saved: to the last bit the run without a break."""
    flags = ("--parallel.mode", mode, "--recipe", "course2026_off_clip", "--save-every", "1", "--steps", "3")
    grpo(inputs, tmp_path / "run", *flags, n_ranks=2)
    whole, logged = final(tmp_path / "run", 3), rows(tmp_path / "run/metrics.jsonl")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000003")
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [2]
    assert "resumed from rollout batch 2" in grpo(inputs, tmp_path / "run", *flags, "--resume", n_ranks=2)
    again = final(tmp_path / "run", 3)
    assert differ(whole, again) == 0.0
    timed = ("seconds_sampling", "seconds_training")
    for a, b in zip(logged, rows(tmp_path / "run/metrics.jsonl"), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def here():
    return World(rank_of(None), size_of(None), CPU)


def sampled(folder, world, n):
    """(a rollout batch of n problems, its prepared rows) on this process."""
    sampler, params, problems = sampler_of(Path(folder), world=world)
    recipe = adapted(RECIPES["grpo"], group_size=3, max_new_tokens=4)
    batch = collect(sampler, recipe, params, problems, prompts=n, seed=5, i=2, max_rounds=1, device=CPU)
    trainer = Trainer(
        sampler.model, recipe, lambda n: None, 2, 0, None, torch.float32, True, params, False, 3, world
    )  # fmt: skip
    return batch, prepared(trainer, params, batch.rollouts, CPU)[0]


@pytest.mark.parametrize("n", [1, 5])
def test_all_have_the_batch_of_one_process(inputs, n):
    """Texts, rewards and ids are equal; log-probabilities up to fp32 rounding. Of one problem the second has none."""
    both = processes.run(sampled_here, str(inputs), n)
    alone, rows_of_one = sampled(inputs, ONE, n)
    for batch, prepared_rows in both:
        assert batch.texts == alone.texts and batch.parts == alone.parts
        assert [x.text for x in batch.problems] == [x.text for x in alone.problems]
        assert batch.rollouts.finish_reasons == alone.rollouts.finish_reasons
        for a, b in zip(batch.rollouts.responses, alone.rollouts.responses, strict=True):
            assert a.tolist() == b.tolist()
        assert sorted(prepared_rows) == sorted(rows_of_one)
        for name, x in rows_of_one.items():
            torch.testing.assert_close(prepared_rows[name], x, rtol=0, atol=1e-5)
    for a, b in zip(*(x[1].values() for x in both), strict=True):
        assert torch.equal(a, b)


def sampled_here(folder, n):
    return sampled(folder, here(), n)


def refused(folder):
    """What is said to the second process's own parameters, problems, key, seed and recipe."""
    sampler, params, problems = sampler_of(Path(folder), world=here())
    key, found = random.key(0), {}
    odd = rank_of(None) == 1
    path, *_ = tree.paths(params)
    other = tree.map_with_path(lambda p, x: x * (1 + 2**-20) if p == path else x, params)
    cases = {
        "parameters": (other if odd else params, problems, key),
        "problems": (params, problems[::-1] if odd else problems, key),
        "key": (params, problems, random.key(1) if odd else key),
    }
    for name, case in cases.items():
        try:
            answers(sampler, *case, n_samples=1, temperature=0.0)
        except ValueError as error:
            found[name] = str(error)
    cfg = Grpo(
        run=Path(folder) / "run", model=Path(folder) / "start", train=Path(folder) / "train.jsonl", prompt="{question}",
        gold="{answer}", max_new_tokens=4, device="cpu", compute="fp32",
    )  # fmt: skip
    changes = {"seed": 1, "recipe": "dapo", "parallel.mode": Parallel(mode="zero1")}
    for name, value in changes.items():
        try:
            start(replace(cfg, **({name.split(".")[0]: value} if odd else {})), here())
        except ValueError as error:
            found[name] = str(error)
    return found


def test_processes_that_differ_are_refused(inputs):
    """By name, on both, before anything is written. A last bit of one leaf is a difference."""
    for found in processes.run(refused, str(inputs)):
        assert list(found) == ["parameters", "problems", "key", "seed", "recipe", "parallel.mode"]
        for name, text in found.items():
            assert text.startswith("ranks differ: ") and f"{name} is " in text and "on rank 1" in text, text
    assert not (inputs / "run").exists()
