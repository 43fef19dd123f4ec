"""experiments.prepare_pairs on a small model that was fine-tuned a little, and `experiments.dpo` on what it makes.

Oracles: the grader, on every text of every pair; the rules of the docstring; the same bytes from the same command.
"""

import json

import pytest

from experiments.grading import grader_named
from experiments.prepare_pairs import pairs_of
from purelm import random
from tests.experiments.small_policy import write_policy
from tests.programs import run_here


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("pairs"))


def run(inputs, out, *flags, status=0):
    given = {
        "--model": inputs / "start", "--train": inputs / "train.jsonl", "--prompt": "{question}", "--gold": "{answer}",
        "--max-new-tokens": 4, "--group-size": 16, "--pairs": 2, "--device": "cpu", "--compute": "fp32", "--out": out,
    }  # fmt: skip
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    done = run_here("experiments.prepare_pairs", *(str(x) for item in given.items() for x in item))
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_pairs_are_right_and_wrong_and_dpo_takes_them(inputs, tmp_path):
    out, again = tmp_path / "pairs.jsonl", tmp_path / "again.jsonl"
    run(inputs, out)
    run(inputs, again, "--sample-rows", "16")  # how many are sampled at once does not matter
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    reward = grader_named("number")
    by_prompt = {}
    for row in rows:
        assert reward(row["chosen"], row["gold"])["reward"] >= 1 > reward(row["rejected"], row["gold"])["reward"]
        by_prompt.setdefault(row["prompt"], []).extend([row["chosen"], row["rejected"]])
    assert any(len(texts) == 4 for texts in by_prompt.values())
    assert all(len(texts) <= 4 and len({*texts}) == len(texts) for texts in by_prompt.values())
    provenance = json.loads((tmp_path / "pairs.jsonl.provenance.json").read_text())
    assert provenance["counts"]["pairs"] == len(rows) and provenance["counts"]["problems"] == 16
    assert {row["source"] for row in rows} <= {f"problem {i + 1}" for i in range(16)}
    flags = ["--run", tmp_path / "dpo", "--model", inputs / "start", "--train", out, "--prompt", "{prompt}", "--steps",
             "3", "--batch-size", "4", "--max-length", "16", "--device", "cpu", "--generations", "0"]  # fmt: skip
    done = run_here("experiments.dpo", *map(str, flags))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--group-size", "1"), "group_size"),
        (("--temperature", "1e-5"), "temperature"),
        (("--grade", "none"), "grade"),
        (("--problems", "0"), "problems"),
        (("--gold", "99"), "no problem has both"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_nothing_written(inputs, tmp_path, flags, says):
    assert says in run(inputs, tmp_path / "pairs.jsonl", *flags, status=2)
    assert not any(tmp_path.iterdir())


def test_what_exists_is_not_overwritten(inputs, tmp_path):
    out = tmp_path / "pairs.jsonl"
    out.write_text("mine\n")
    assert "exists" in run(inputs, out, status=2)
    assert out.read_text() == "mine\n"


def test_drawn_pairs():
    """Oracle: the rules, and uniform frequencies over many keys (4 standard deviations of a count)."""
    assert pairs_of([], ["a"], 3, random.key(0)) == [] == pairs_of(["a"], [], 3, random.key(0))
    counts = dict.fromkeys("abc", 0)
    for i in range(900):
        found = pairs_of(["x", "y"], ["a", "b", "c"], 1, random.key(i))
        assert len(found) == 1
        counts[found[0][1]] += 1
        assert {*dict(pairs_of(["x", "y"], ["a", "b", "c"], 5, random.key(i)))} == {"x", "y"}
    assert all(abs(n - 300) < 4 * (900 * 2 / 9) ** 0.5 for n in counts.values())
