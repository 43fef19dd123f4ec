"""experiments.evaluate end to end on a small untrained model.

Oracles: the graders on the rows that were written; the run without a break.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from purelm import random
from purelm.evals.tasks import TASKS
from purelm.models import hf, transformer
from purelm.tokenizer import train
from tests.dist.processes import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"Body": f"Ann has {i} hats.", "Question": "How many hats?", "Answer": float(i)} for i in range(7)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with weights/ and data/; the model's answers are noise, digits among them."""
    folder = tmp_path_factory.mktemp("evaluate")
    text = folder / "text"
    text.write_text("0123456789 " * 50)
    bpe = train(text, 260, ["<|endoftext|>"])
    cfg = transformer.Config(272, 64, 16, 1, 2, rope_layout="half")  # more rows than tokens
    hf.save(folder / "weights", transformer.init(random.key(0), cfg), cfg, bpe)
    (folder / "data/deep/mmlu").mkdir(parents=True)
    (folder / "data/deep/svamp.test.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    (folder / "data/deep/mmlu/hats_test.csv").write_text("Which <b>hat</b>?,a,b,c,d,C\n")
    return folder


def evaluate(inputs, out, *flags, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", str(inputs / "weights"), "--data", str(inputs / "data"), "--out",
         str(out), "--max-new-tokens", "8", "--device", "cpu", *flags],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_graded_shown_and_go_on(inputs, tmp_path):
    flags = ("--tasks", "svamp", "mmlu", "--temperature", "1.0", "--n-samples", "3")
    evaluate(inputs, tmp_path / "a", *flags, "--batch-size", "6")
    found = rows(tmp_path / "a/svamp.jsonl")
    examples = TASKS["svamp"].load(inputs / "data/deep/svamp.test.jsonl")
    assert [row["id"] for row in found] == [x.id for x in examples]
    for row, example in zip(found, examples, strict=True):
        graded = [TASKS["svamp"].grade(text, example) for text in row["responses"]]
        assert row["answers"] == [g.answer for g in graded] and row["right"] == [g.right for g in graded]
    assert len({text for row in found for text in row["responses"]}) > 10
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["svamp"]["n"] == 7 and summary["mmlu"]["n"] == 1
    assert summary["svamp"]["right"] == sum(row["right"][0] for row in found)
    assert 0 <= summary["svamp"]["low"] <= summary["svamp"]["accuracy"] <= summary["svamp"]["high"] <= 1
    assert {"pass@3", "maj@3", "mean accuracy"} <= {*summary["svamp"]}
    page = (tmp_path / "a/mmlu.html").read_text()
    assert "&lt;b&gt;hat" in page and "<b>hat" not in page
    # Cut off after two answers, and with other batches: the same rows.
    evaluate(inputs, tmp_path / "b", *flags, "--limit", "2")
    assert len(rows(tmp_path / "b/svamp.jsonl")) == 2
    said = evaluate(inputs, tmp_path / "b", *flags, "--batch-size", "3")
    assert "2 of 7 answers are there" in said
    assert rows(tmp_path / "b/svamp.jsonl") == found
    # A line that a kill cut short is answered again.
    path = tmp_path / "b/svamp.jsonl"
    path.write_text(path.read_text()[:-20])
    evaluate(inputs, tmp_path / "b", *flags)
    assert rows(path) == found


def test_answers_of_another_model_or_to_other_questions_are_not_mixed(inputs, tmp_path):
    """The same paths, with other contents."""
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    evaluate(folder, tmp_path / "out", "--tasks", "svamp", "--limit", "2")
    (folder / "data/deep/svamp.test.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1])) + "\n")
    said = evaluate(folder, tmp_path / "out", "--tasks", "svamp", status=2)
    assert "svamp-0 is another question than in" in said
    _, cfg, bpe = hf.load(folder / "weights")
    shutil.rmtree(folder / "weights")
    hf.save(folder / "weights", transformer.init(random.key(1), cfg), cfg, bpe)
    assert "has answers with another model (" in evaluate(folder, tmp_path / "out", "--tasks", "svamp", status=2)


def test_what_is_wrong_is_named(inputs, tmp_path):
    evaluate(inputs, tmp_path / "out", "--tasks", "svamp", "--limit", "1")
    cases = [
        (("--tasks", "svamp", "--temperature", "0.5"), "has answers with another temperature (0.0): give"),
        (("--tasks", "svamp", "--template", "{x}"), "has answers with another template"),
        (("--tasks", "gpqa"), "tasks: gpqa: not known; there are gsm8k, svamp"),
        (("--tasks", "gsm8k"), "gsm8k: no file **/gsm8k-test.jsonl in"),
        (("--n-samples", "2", "--tasks", "svamp"), "several greedy answers are all the same; give a temperature"),
        (("--chat", "--tasks", "svamp"), "chat"),
    ]
    for flags, message in cases:
        said = evaluate(inputs, tmp_path / "out", *flags, status=2)
        assert message in said and "Traceback" not in said, said
