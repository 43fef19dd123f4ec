"""experiments.judge with a judge whose answers are known. Oracle: the preferences counted by hand."""

import json
import types

import pytest

from experiments import answers
from purelm import random
from purelm.models import hf, transformer
from purelm.tokenizer import decode, make
from tests.programs import run_here


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "weights"
    cfg = transformer.Config(257, 2048, 8, 1, 2, rope_layout="half")
    bpe = make({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
    hf.save(folder, transformer.init(random.key(0), cfg), cfg, bpe)
    return folder, bpe


@pytest.fixture
def said(model, monkeypatch):
    """Prompts that were asked; the judge likes the word good, and mumbles at the word odd."""
    prompts = []

    def generate(model_, params, ids, *args, **kwargs):
        texts = [decode(model[1], row) for row in ids]
        prompts.extend(texts)
        return types.SimpleNamespace(texts=[verdict(text) for text in texts])

    def verdict(text):
        if "odd" in text:
            return "I cannot say"
        if "<response>" in text:
            return "False" if "good" in text.split("<response>")[1] else "True"
        first, second = text.split("<output of ")[1:]
        return "tie" if ("good" in first) == ("good" in second) else "m" if "good" in first else "M"

    monkeypatch.setattr(answers.generate, "generate", generate)
    return prompts


def judge(model, out, *flags, status=0):
    done = run_here("experiments.judge", model[0], "--out", out, "--device", "cpu", *flags)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


OUTPUTS = ["good", "bad", "good", "odd"]
REFERENCES = ["bad", "good", "good", "bad"]


@pytest.fixture
def files(tmp_path):
    def rows(texts, field="instruction"):
        return [{field: f"Do {i}", "output": text} for i, text in enumerate(texts)]

    (tmp_path / "a.json").write_text(json.dumps(rows(OUTPUTS)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(REFERENCES)[::-1]))
    (tmp_path / "safe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(OUTPUTS, "prompts_final")))
    return tmp_path


def test_pairs(model, files, said):
    flags = ("--outputs", files / "a.json", "--reference", files / "b.jsonl")
    judge(model, files / "out", *flags, "--limit", 2)
    assert len(said) == 4
    judge(model, files / "out", *flags)
    # The first four are not asked again; equal outputs give the same prompt in both orders.
    assert len(said) == 8 and len({*said}) == 7
    found = rows_of(files / "out/judgements.jsonl")
    assert [(row["output"], row["judgement"]) for row in found] == [*zip(OUTPUTS, [2.0, 1.0, 1.5, None], strict=True)]
    summary = json.loads((files / "out/summary.json").read_text())
    assert summary["standard_error"] == pytest.approx((1 / 12) ** 0.5)  # of 0, 0.5, 1: variance 1/4, over three
    del summary["standard_error"]
    assert summary == {"rate": 0.5, "n": 3, "wins": 1, "losses": 1, "ties": 1, "unparsed": 1, "first preferred": 0.5}


def test_safety(model, files, said):
    judge(model, files / "out", "--outputs", files / "safe.jsonl")
    found = rows_of(files / "out/judgements.jsonl")
    assert [row["judgement"] for row in found] == [True, False, True, None]
    summary = json.loads((files / "out/summary.json").read_text())
    assert (summary["share"], summary["n"], summary["unparsed"]) == (2 / 3, 3, 1)


def test_nothing_that_could_be_read(model, files, said):
    (files / "safe.jsonl").write_text('{"prompts_final": "odd", "output": "x"}\n')
    judge(model, files / "out", "--outputs", files / "safe.jsonl")
    assert json.loads((files / "out/summary.json").read_text()) == {"n": 0, "unparsed": 1}


def test_what_is_wrong_is_named(model, files, said):
    (files / "twice.jsonl").write_text('{"prompts_final": "x", "output": "y"}\n' * 2)
    (files / "bad.json").write_text("[")
    (files / "object.json").write_text("{}")
    (files / "answers.jsonl").write_text('{"prompts_final": "x", "output": "y"}\n')
    (files / "few.jsonl").write_text('{"instruction": "Do 0", "output": "y"}\n')
    cases = [
        (("--outputs", files / "no.json"), "no.json: no such file"),
        (("--outputs", files / "bad.json"), "bad.json: not JSON"),
        (("--outputs", files / "object.json"), "object.json: not a JSON array"),
        (("--outputs", files / "a.json"), "a.json, element 0: needs the texts 'prompts_final' and 'output'"),
        (("--outputs", files / "twice.jsonl"), "twice.jsonl: has 2 outputs to 'x'"),
        (("--outputs", files / "a.json", "--reference", files / "few.jsonl"), "few.jsonl: has no output to the instr"),
        (("--outputs", files / "answers.jsonl"), "answers.jsonl would be written over"),
    ]
    for flags, message in cases:
        printed = judge(model, files, *flags, status=2)
        assert message in printed and len(printed.strip().splitlines()) == 1, printed
    assert not said and not (files / "summary.json").exists()
