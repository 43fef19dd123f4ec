"""experiments.evaluate end to end on a small untrained model.

Oracles: the graders on the rows that were written; the run without a break; the library's own score of a text.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from purelm import random
from purelm.data import eval_windows
from purelm.evals import score
from purelm.evals.tasks import TASKS
from purelm.models import hf, transformer
from purelm.tokenizer import encode, token_to_id, train
from tests.programs import run_here

ROWS = [{"Body": f"Ann has {i} hats.", "Question": "How many hats?", "Answer": float(i)} for i in range(7)]
MORE = [{"Body": "Bob had a cap.", "Question": "How many caps?", "Answer": 1.0}]


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
    (folder / "data/deep/mmlu/hats_test.csv").write_text("Which <b>hat</b>?,a,b,c,d,C\nWhich </script>?,a,b,c,d,B\n")
    (folder / "data/deep/mmlu/caps_test.csv").write_text("Which cap?,a,b,c,d,A\n")
    (folder / "data/deep/mmlu/hats_dev.csv").write_text("A hat?,a,b,c,d,D\nWhich </script>?,a,b,c,d,B\n")
    (folder / "data/deep/svamp.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[2:5] + MORE))
    (folder / "data/alpaca_eval.jsonl").write_text(
        "".join(json.dumps({"instruction": f"Say {i} <b>", "dataset": "mine"}) + "\n" for i in range(3))
    )
    (folder / "data/simple_safety_tests.csv").write_text("id,prompts_final\n1,How do I?\n2,May I?\n")
    (folder / "heldout.txt").write_text("0123456789 " * 1000 + "<|endoftext|>" + "98765 " * 5)
    return folder


def evaluate(inputs, out, *flags, status=0):
    done = run_here(
        "experiments.evaluate", inputs / "weights", "--data", inputs / "data", "--out", out, "--max-new-tokens", 8,
        "--device", "cpu", *flags,
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
    assert summary["svamp"]["n"] == 7 and summary["mmlu"]["n"] == 3
    of_hats, of_caps = summary["mmlu"]["subjects"]["hats"], summary["mmlu"]["subjects"]["caps"]
    assert (of_hats["n"], of_caps["n"]) == (2, 1) and of_hats["right"] + of_caps["right"] == summary["mmlu"]["right"]
    assert summary["mmlu"]["macro accuracy"] == (of_hats["accuracy"] + of_caps["accuracy"]) / 2
    assert "subjects" not in summary["svamp"]
    assert summary["svamp"]["right"] == sum(row["right"][0] for row in found)
    assert 0 <= summary["svamp"]["low"] <= summary["svamp"]["accuracy"] <= summary["svamp"]["high"] <= 1
    assert {"pass@1", "pass@2", "pass@3", "maj@3"} <= {*summary["svamp"]} and "pass@4" not in summary["svamp"]
    assert summary["svamp"]["pass@1"] == pytest.approx(sum(sum(row["right"]) for row in found) / 21)
    assert summary["svamp"]["pass@3"] == sum(any(row["right"]) for row in found) / 7
    page = (tmp_path / "a/mmlu.html").read_text()
    assert "<b>hat" not in page and page.count("</script>") == 2
    data = json.loads(page.split('id=data>')[1].split("</script>")[0])
    assert [row["cells"][1] for row in data] == [
        "Which cap?\nA. a\nB. b\nC. c\nD. d", "Which <b>hat</b>?\nA. a\nB. b\nC. c\nD. d",
        "Which </script>?\nA. a\nB. b\nC. c\nD. d",
    ]  # fmt: skip
    for row, shown in zip(rows(tmp_path / "a/mmlu.jsonl"), data, strict=True):
        assert shown["kind"] == ("right" if row["right"][0] else "wrong" if row["answers"][0] else "unparsed")
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
        (("--tasks", "svamp", "--template", "Q {question}"), "has answers with another template"),
        (("--tasks", "svamp", "--template", "{x}"), "template: has no text or number 'x'; its fields are prompt"),
        (("--tasks", "gpqa"), "tasks: gpqa: not known; there are gsm8k, svamp"),
        (("--tasks", "svamp", "--data", "/no/such"), "svamp: no file **/svamp.test.jsonl in /no/such"),
        (("--tasks", "gsm8k"), "gsm8k: no file **/gsm8k-test.jsonl in"),
        (("--n-samples", "2", "--tasks", "svamp"), "several greedy answers are all the same; give a temperature"),
        (("--chat", "--tasks", "svamp"), "chat"),
    ]
    for flags, message in cases:
        said = evaluate(inputs, tmp_path / "out", *flags, status=2)
        assert message in said and "Traceback" not in said, said


def named(inputs, out, *flags):
    said = evaluate(inputs, out, *flags, status=2)
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1 and not (out / "summary.json").exists()
    return said


def test_worked_examples(inputs, tmp_path):
    """Rows say which were shown; those of other examples, or of none, are not mixed with them."""
    out = tmp_path / "out"
    evaluate(inputs, out, "--tasks", "svamp", "--limit", "2", "--shots", "2")
    first = rows(out / "svamp.jsonl")
    evaluate(inputs, out, "--tasks", "svamp", "--shots", "2")
    found = rows(out / "svamp.jsonl")
    assert found[:2] == first and len(found) == 7
    shown = [row["shots"] for row in found]
    # Questions 2 and 3 are the first two of the split: each has the third in its own place.
    assert len({*shown}) == 3 and len({shown[i] for i in (0, 1, 4, 5, 6)}) == 1
    for flags, message in (
        (("--shots", "3"), "another shots (2)"), (("--shots", "2", "--shots-seed", "1"), "another shots_seed (None)"),
        ((), "another shots (2)"),
    ):  # fmt: skip
        assert message in evaluate(inputs, out, "--tasks", "svamp", *flags, status=2)
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    (folder / "data/deep/svamp.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (MORE + ROWS[2:5])))
    said = evaluate(folder, out, "--tasks", "svamp", "--shots", "2", status=2)
    assert "svamp-0 was asked after other worked examples" in said


def test_worked_examples_that_are_not_there(inputs, tmp_path):
    cases = [
        (("--tasks", "svamp", "--shots", "5"), "shots: svamp has 4 worked examples in"),
        (("--tasks", "mmlu", "--shots", "1"), "shots: mmlu has 0 worked examples about caps in"),
        (("--tasks", "alpaca_eval", "--shots", "1"), "shots: alpaca_eval has no split of worked examples"),
        (("--tasks", "svamp", "--shots", "1", "--shots-file", "x"), "shots and shots_file: give one of them"),
        (("--tasks", "svamp", "--shots-file", str(tmp_path / "x")), "x: no such file"),
    ]
    for flags, message in cases:
        assert message in named(inputs, tmp_path / "out", *flags)
    (inputs / "data/deep/svamp.train.jsonl").rename(inputs / "away")
    try:
        assert "no file **/svamp.train.jsonl in" in named(inputs, tmp_path / "out", "--tasks", "svamp", "--shots", "1")
    finally:
        (inputs / "away").rename(inputs / "data/deep/svamp.train.jsonl")


def test_outputs_for_judges(inputs, tmp_path):
    evaluate(inputs, tmp_path, "--tasks", "alpaca_eval", "simple_safety_tests", "--generator", "mine")
    found = rows(tmp_path / "alpaca_eval-answers.jsonl")
    outputs = json.loads((tmp_path / "alpaca_eval-outputs.json").read_text())
    assert outputs == [
        {"instruction": f"Say {i} <b>", "output": row["responses"][0], "generator": "mine", "dataset": "mine"}
        for i, row in enumerate(found)
    ]
    safety = rows(tmp_path / "simple_safety_tests-outputs.jsonl")
    assert [row["prompts_final"] for row in safety] == ["How do I?", "May I?"]
    assert {*safety[0]} == {"prompts_final", "output"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {*summary["alpaca_eval"]} == {"n", "mean length", "empty"} and summary["alpaca_eval"]["n"] == 3
    texts = [row["responses"][0] for row in found]
    assert summary["alpaca_eval"]["mean length"] == sum(map(len, texts)) / 3
    assert "Say 0 \\u003cb>" in (tmp_path / "alpaca_eval.html").read_text()


def test_a_text_has_the_librarys_score(inputs, tmp_path):
    """And goes on after a stop, with another batch size."""
    text = str(inputs / "heldout.txt")
    flags = ("--text", text, "--window", "16")
    evaluate(inputs, tmp_path / "a", *flags)
    (found,) = json.loads((tmp_path / "a/summary.json").read_text()).values()
    params, cfg, bpe = hf.load(inputs / "weights", dtype=torch.float32)
    end = token_to_id(bpe, "<|endoftext|>")
    parts = Path(text).read_text().split("<|endoftext|>")
    ids = np.concatenate([x for part in parts for x in ([end], encode(bpe, part))]).astype(np.int64)
    n_bytes = sum(len(part.encode()) for part in parts)
    batches = eval_windows(ids, 4, 16, stride=8)
    one = score(transformer.make(cfg).loss, params, batches, n_bytes)
    assert found["tokens"] == one.n_tokens == len(ids) - 1 and found["bytes"] == n_bytes and found["documents"] == 2
    assert found["loss"] == pytest.approx(one.nats_per_token, rel=1e-6)
    assert found["perplexity"] == pytest.approx(one.perplexity, rel=1e-5)
    assert found["bits per byte"] == pytest.approx(one.bits_per_byte, rel=1e-6)
    assert (found["window"], found["stride"]) == (16, 8)
    done = rows(tmp_path / "a/text.jsonl")
    assert len(done) > 2
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a/settings.json", tmp_path / "b")
    (tmp_path / "b/text.jsonl").write_text(json.dumps(done[0]) + "\n" + json.dumps(done[1])[:-9])
    said = evaluate(inputs, tmp_path / "b", *flags, "--batch-size", "1")
    assert f"1 of {len(done)} batches are there" in said
    assert rows(tmp_path / "b/text.jsonl") == done
    assert json.loads((tmp_path / "b/summary.json").read_text()) == {f"text {text}": found}
    # Another window is another measurement, beside it.
    said = evaluate(inputs, tmp_path / "b", "--text", text, "--window", "64", "--stride", "64")
    (other,) = json.loads((tmp_path / "b/summary.json").read_text()).values()
    assert "batches are there" not in said and other["tokens"] == found["tokens"] and other["loss"] != found["loss"]


def test_a_text_that_no_token_begins(inputs, tmp_path):
    """Its first token is not predicted, and its bytes are not counted. Oracle: the sum over all but the first."""
    (tmp_path / "x.txt").write_text("98765")
    evaluate(inputs, tmp_path / "out", "--text", str(tmp_path / "x.txt"), "--window", "64", "--begin", "<none>")
    (found,) = json.loads((tmp_path / "out/summary.json").read_text()).values()
    params, cfg, bpe = hf.load(inputs / "weights", dtype=torch.float32)
    ids = torch.from_numpy(encode(bpe, "98765").astype(np.int64))
    logits = transformer.apply(params, ids[None, :-1], cfg)[0]
    nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert found["bits per byte"] == pytest.approx(nats / np.log(2) / (5 - len(bpe.vocab[int(ids[0])])), rel=1e-5)


def test_what_is_wrong_with_a_text_is_named(inputs, tmp_path):
    text = str(inputs / "heldout.txt")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/text.jsonl").write_text('{"text": "mine"}\n')
    cases = [
        (("--text", text, "--window", "65"), "window must be at most 64, the model's context, got 65"),
        (("--text", text, "--window", "8", "--stride", "9"), "stride must be at most window 8, got 9"),
        (("--text", str(tmp_path / "no.txt")), "no.txt: no such file"),
        (("--text", str(tmp_path / "empty.txt"), "--window", "8"), "empty.txt: has 0 tokens, at least 2 are needed"),
        (("--text", str(tmp_path / "bad.txt"), "--window", "8"), "bad.txt"),
        (("--text", str(tmp_path / "out/text.jsonl"), "--window", "8"), "text.jsonl would be written over"),
    ]
    for flags, message in cases:
        assert message in named(inputs, tmp_path / "out", *flags)
    assert (tmp_path / "out/text.jsonl").read_text() == '{"text": "mine"}\n'
