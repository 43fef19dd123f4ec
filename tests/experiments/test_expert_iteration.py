"""experiments.expert_iteration on a small model that was fine-tuned a little.

Oracles: the uninterrupted run, to the last bit; one process; the loss of the model on the same answers; the recipe
course2026_rft; graders; a loop over rows, for what is kept.
"""

import json
import shutil
from itertools import chain

import numpy as np
import pytest
import torch

from experiments.grading import grader_named
from experiments.rl.config import ExpertIteration
from experiments.rl.expert import fine_tuned, kept, recipe_of
from experiments.rl.sampling import collect
from experiments.rl.update import Trainer, loss_of, update
from purelm import checkpoint, tree
from purelm.align.recipe import adapted
from purelm.align.recipes import RECIPES
from purelm.align.responses import response_batch
from purelm.align.rollouts import Rollouts, take
from purelm.models import hf
from purelm.optim import sgd
from purelm.optim.schedules import constant
from purelm.train import Precision, init_state, make_step
from tests.dist import processes
from tests.experiments.small_policy import CPU, FLAGS, sampler_of, write_policy

F64 = Precision(torch.float64, torch.float64, torch.float64)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with train.jsonl and start/, a model that is right now and then."""
    return write_policy(tmp_path_factory.mktemp("expert"))


def run(inputs, folder, *flags, status=0, n_ranks=1):
    train_file = inputs / "train.jsonl"
    command = ["--run", folder, "--model", inputs / "start", "--train", train_file, "--heldout", train_file, *FLAGS,
               "--prompts", "16", "--min-new-tokens", "1", "--batch-size", "8", "--eval-every", "1"]  # fmt: skip
    done = processes.program("experiments.expert_iteration", *command, *flags, n_ranks=n_ranks)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def params_of(folder, number):
    return checkpoint.load(folder / "checkpoints", number)[0]


def differ(a, b):
    """The largest difference of two trees."""
    assert tree.structure(a) == tree.structure(b)
    return max(float((x - y).abs().max()) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def test_it_learns_and_resumes(inputs, tmp_path):
    """More answers are right; killed after the second of four iterations and resumed, it is the run without a break."""
    folder, flags = tmp_path / "run", ("--steps", "4", "--group-size", "8", "--epochs", "4", "--optim.lr", "5e-3")
    run(inputs, folder, *flags, "--keep-last", "4")
    whole, logged = params_of(folder, 4), rows(folder / "metrics.jsonl")
    found = [r for r in logged if "kept" in r]
    assert [r["step"] for r in found] == [1, 2, 3, 4] and [r["step"] for r in logged if "heldout_reward" in r] == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip
    for r in found:
        assert r["kept"] == round(r["right"] * 128) and r["reward"] == r["right"]
        assert {"loss", "entropy", "length", "length_right", "grad_norm"} <= set(r)
    assert [r["updates"] for r in found] == np.cumsum([4 * -(-r["kept"] // 8) for r in found]).tolist()
    assert found[-1]["right"] > found[0]["right"] + 0.1
    assert logged[-1]["heldout_reward"] > logged[0]["heldout_reward"]
    for r in rows(folder / "rollouts.jsonl"):
        assert r["reward"] == grader_named("number")(r["response"], r["gold"])["reward"]
    assert "expert iteration run" in (folder / "report.html").read_text()
    assert (folder / "curves.png").is_file() and hf.load(folder / "export")[1].vocab_size == 288
    for number in (3, 4):
        shutil.rmtree(folder / f"checkpoints/step-{number:08d}")
    assert "resumed from rollout batch 2" in run(inputs, folder, *flags, "--resume")
    assert differ(whole, params_of(folder, 4)) == 0.0
    timed = ("seconds_sampling", "seconds_training")
    for a, b in zip(logged, rows(folder / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_learn_as_one(inputs, tmp_path, mode):
    """fp32 sums in another order; with this eps Adam's steps are smooth. Two processes' checkpoint goes on alone."""
    flags = ("--optim.eps", "1e-2", "--parallel.mode", mode, "--rows-per-pass", "3", "--prompts", "7", "--steps")
    for name, n in (("one", 1), ("two", 2)):
        run(inputs, tmp_path / name, *flags, "2", n_ranks=n)
    one, two = (params_of(tmp_path / name, 2)["params"] for name in ("one", "two"))
    assert differ(one, sampler_of(inputs)[1]) > 1e-3 and differ(one, two) < 2e-5
    kept_of = [[r["kept"] for r in rows(tmp_path / name / "metrics.jsonl") if "kept" in r] for name in ("one", "two")]
    assert kept_of[0] == kept_of[1] and sum(kept_of[0]) > 0
    run(inputs, tmp_path / "two", *flags, "3", "--resume")


def test_without_a_right_answer_nothing_is_trained(inputs, tmp_path):
    """It is said, the parameters are those of the start, and the run goes on."""
    said = run(inputs, tmp_path / "run", "--steps", "2", "--grade", "exact", "--gold", "none of {answer}")
    assert [f"iteration {i}: none of 64 answers is right: nothing is trained" in said for i in (1, 2)] == [True, True]
    found = [r for r in rows(tmp_path / "run/metrics.jsonl") if "kept" in r]
    assert [(r["kept"], r["right"], r["updates"]) for r in found] == [(0, 0, 0), (0, 0, 0)]
    trees = params_of(tmp_path / "run", 2)
    assert differ(trees["params"], sampler_of(inputs)[1]) == 0.0


def test_kept_answers():
    """Oracle: by hand. The same answer to another prompt is no duplicate, and neither is another answer."""
    a, b = np.array([1, 2]), np.array([1, 3])
    prompts, answers = [a, a, a, a, b, b], [[7], [7], [7, 8], [7], [7], [9]]
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0, 0.999])
    rollouts = Rollouts(prompts, [np.array(x) for x in answers], [], [], rewards)
    assert kept(rollouts, "keep") == [1, 2, 3, 4]
    assert kept(rollouts, "drop") == [1, 2, 4]
    assert kept(rollouts._replace(rewards_B=torch.zeros(6)), "keep") == []


def config(folder, **changes):
    return ExpertIteration(run=folder, model=folder, train=folder, max_new_tokens=4, min_new_tokens=1, **changes)


def after(inputs, recipe, learn, rows_per_pass):
    """Parameters after a step of plain gradient descent with rate 1 from an fp64 start; the start."""
    sampler, params, _ = sampler_of(inputs)
    loss = loss_of(sampler.model, recipe.objective, 1.0, None)
    trainer = Trainer(
        sampler.model, recipe, lambda n: make_step(loss, sgd(), constant(1.0), microbatches=n, precision=F64),
        rows_per_pass, 0, None, torch.float64, False, None, False, 3,
    )  # fmt: skip
    begin = tree.cast(params, torch.float64)
    return learn(trainer, init_state(begin, sgd(), F64)).params, begin


@pytest.mark.parametrize("mean_over", ["tokens", "answers"])
def test_a_step_is_one_of_supervised_learning_and_of_rft(inputs, tmp_path, mean_over):
    """Oracles, in fp64: model.loss of the right answers; for means of answers course2026_rft, times K / B of B answers
    of which K are right."""
    sampler, params, problems = sampler_of(inputs)
    recipe = recipe_of(config(tmp_path, mean_over=mean_over))
    batch = collect(sampler, recipe, params, problems, prompts=16, seed=1, i=0, max_rounds=1, device=CPU)
    right = [k for k, part in enumerate(batch.parts) if part["reward"] == 1]
    K, B = len(right), len(batch.parts)
    answers = take(batch.rollouts, kept(batch.rollouts, "keep"))
    assert 4 < K < B and len({len(x) for x in answers.responses}) > 1

    def expert(trainer, state):
        return fine_tuned(trainer, state, answers, 0, epochs=1, batch_size=K, device=CPU)[0]

    found, begin = after(inputs, recipe, expert, 3)
    data = response_batch(answers.prompts, answers.responses, pad_id=0)
    if mean_over == "answers":
        data["weights"] = data["weights"] / data["weights"].sum(1, keepdim=True)
        data["denominator"] = torch.tensor(float(K), dtype=torch.float64)
    data["weights"] = data["weights"].double()
    step = make_step(sampler.model.loss, sgd(), constant(1.0), precision=F64)
    assert differ(found, step(init_state(begin, sgd(), F64), data)[0].params) < 1e-7
    assert differ(found, begin) > 1e-2
    if mean_over == "answers":
        rft = adapted(RECIPES["course2026_rft"], group_size=8, max_new_tokens=4)

        def policy(trainer, state):
            return update(trainer, state, batch.rollouts, 0, epochs=1, n_minibatches=1, device=CPU)[0]

        theirs, _ = after(inputs, rft, policy, 5)
        scaled = tree.map(lambda x, y: x + (y - x) * (B / K), begin, theirs)
        assert differ(found, scaled) < 1e-7


def test_every_answer_once_an_epoch(inputs, tmp_path):
    """Oracle: the numbers of rows that steps were given."""
    sampler, params, problems = sampler_of(inputs)
    recipe = recipe_of(config(tmp_path))
    batch = collect(sampler, recipe, params, problems, prompts=3, seed=1, i=0, max_rounds=1, device=CPU)
    seen = []

    def step(n):
        def record(state, part):
            seen.append(sorted(map(tuple, part["tokens"][part["weights"].sum(1) > 0].tolist())))
            zero = torch.zeros(())
            return state, dict.fromkeys(("loss", "entropy", "n_tokens", "grad_norm", "lr"), zero)

        return record

    trainer = Trainer(sampler.model, recipe, step, 99, 0, None, torch.float32, False, None, False, 3)
    state = init_state(params, sgd())
    _, metrics = fine_tuned(trainer, state, batch.rollouts, 2, epochs=2, batch_size=5, device=CPU)
    assert [len(x) for x in seen] == [5, 5, 5, 5, 4] * 2 and len(metrics) == 10
    first, second = seen[:5], seen[5:]
    assert sorted(chain(*first)) == sorted(chain(*second)) and first != second


def test_what_is_wrong_is_named(inputs, tmp_path):
    """One line, no traceback, and no folder."""
    cases = [
        (("--min-new-tokens", "5"), "max_new_tokens is 4: an answer has at least 5 here"),
        (("--grade", "none"), "grade: none is no reward"),
        (("--batch-size", "0"), "batch_size must be"),
        (("--resume",), "has no checkpoint to go on from"),
    ]
    for flags, message in cases:
        said = run(inputs, tmp_path / "run", *flags, status=2)
        assert message in said and "Traceback" not in said, said
        assert not (tmp_path / "run").exists()
