"""experiments.prepare_task. Oracles: the library's split; the files' hashes; sft and grpo, which read what it makes."""

import hashlib
import json

import pytest

from purelm.align.data import word_problems
from purelm.align.data.tasks import Sort, split
from purelm.models import hf
from purelm.tokenizer import decode, encode, load
from tests.programs import run_here

SMALL = ["--model.d-model", "16", "--model.n-layers", "1", "--model.n-heads", "2", "--model.context-length", "32"]


def prepare(*flags, status=0):
    done = run_here("experiments.prepare_task", *flags)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_it_leaves(tmp_path):
    """The library's problems, bytes as tokens, weights that load; twice the same bytes."""
    flags = ["--task", "sort", "--n-train", "30", "--n-heldout", "7", "--sort.n-numbers", "2", "3", "--seed", "4"]
    for name in ("a", "b"):
        said = prepare(*flags, "--out", tmp_path / name, *SMALL)
    train, heldout = split(Sort((2, 3)), 4, n_train=30, n_heldout=7)
    assert rows(tmp_path / "a/train.jsonl") == train and rows(tmp_path / "a/heldout.jsonl") == heldout
    assert "30 + 7 problems" in said and "random parameters" in said
    bpe = load(tmp_path / "a/tokenizer.json")
    assert encode(bpe, "7 ->").tolist() == list(b"7 ->") and decode(bpe, [256]) == "<|endoftext|>"
    _, cfg, inside = hf.load(tmp_path / "a/start")
    assert (cfg.vocab_size, cfg.d_model, cfg.n_layers) == (257, 16, 1) and inside == bpe
    told = json.loads((tmp_path / "a/provenance.json").read_text())
    assert told["ranges"] == {"n_numbers": [2, 3], "numbers": [0, 9]} and told["seed"] == 4
    for name, found in told["sha256"].items():
        assert found == hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest()
    files = [sorted(p.relative_to(tmp_path / x) for p in (tmp_path / x).rglob("*") if p.is_file()) for x in "ab"]
    assert files[0] == files[1] and len(files[0]) == 7
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in files[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_words_have_no_start(tmp_path):
    """The library's problems, and nothing else; twice the same bytes."""
    flags = ["--task", "words", "--n-train", "20", "--n-heldout", "5", "--words.numbers", "3", "30", "--seed", "4"]
    for name in ("a", "b"):
        said = prepare(*flags, "--out", tmp_path / name)
    task = word_problems.WordProblems(numbers=(3, 30))
    train, heldout = word_problems.split(task, 4, n_train=20, n_heldout=5)
    assert rows(tmp_path / "a/train.jsonl") == train and rows(tmp_path / "a/heldout.jsonl") == heldout
    assert "20 + 5 problems" in said and "random parameters" not in said
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["heldout.jsonl", "provenance.json", "train.jsonl"]
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in names)
    told = json.loads((tmp_path / "a/provenance.json").read_text())
    assert told["ranges"] == {"n_steps": [1, 2], "numbers": [3, 30], "most": 1000} and "model" not in told
    out = tmp_path / "c"
    for more, message in (
        (("--style", "worded"), "style: is worded, but words has sentences of its own"),
        (("--model-seed", "3"), "model, model_seed: words comes without a model"),
        (("--model.n-layers", "2"), "model, model_seed: words comes without a model"),
        (("--sort.numbers", "1", "3"), "sort: has ranges of its own, but the task is words"),
        (("--words.numbers", "1", "9"), "numbers 1 to 9: needs 2 <= low"),
    ):
        assert message in prepare("--task", "words", "--out", out, *more, status=2)
        assert not out.exists()


def test_what_is_wrong_leaves_nothing(tmp_path):
    out = tmp_path / "deep" / "out"
    for flags, message in (
        (("--modular.modulus", "5"), "modular: has ranges of its own, but the task is sort"),
        (("--sort.n-numbers", "2", "2"), "of length 2, of which there are only 100"),
        (("--model.context-length", "8"), "model.context_length is 8: a problem and its answer have 23"),
        (("--model.vocab-size", "100"), "model.vocab_size is 100: the tokenizer has 257 ids"),
        (("--model.n-heads", "3"), "n_heads"),
        (("--n-train", "0"), "n_train must be at least 1, got 0"),
        (("--seed", "-1"), "seed must be at least 0"),
    ):
        said = prepare("--task", "sort", "--out", out, *flags, status=2)
        assert message in said, said
        assert not out.parent.exists()
    out.mkdir(parents=True)
    assert "exists; remove it first" in prepare("--task", "sort", "--out", out, status=2)
    assert not any(out.iterdir())


@pytest.mark.slow
def test_from_nothing_to_a_model_that_was_reinforced(tmp_path):
    """The README's three commands, at tiny sizes. Oracle: rewards rise in training of each kind."""
    task, started, run = tmp_path / "task", tmp_path / "sft", tmp_path / "grpo"
    prepare("--task", "sort", "--sort.n-numbers", "2", "2", "--sort.numbers", "1", "3", "--n-train", "7", "--n-heldout",
            "2", "--out", task, *SMALL)  # fmt: skip
    data = ["--train", task / "train.jsonl", "--heldout", task / "heldout.jsonl", "--device", "cpu", "--grade", "exact"]
    done = run_here(
        "experiments.sft", "--run", started, "--model", task / "start", *data, "--response", " {response}",
        "--max-length", "32", "--steps", "60", "--optim.lr", "1e-2", "--batch-size", "7", "--max-new-tokens", "8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run_here(
        "experiments.grpo", "--run", run, "--model", started / "export", *data, "--gold", "{response}", "--steps", "25",
        "--prompts", "7", "--group-size", "8", "--max-new-tokens", "6", "--optim.lr", "1e-2", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rewards = [r["reward"] for r in rows(run / "metrics.jsonl") if "reward" in r]
    assert 0.1 < sum(rewards[:4]) / 4 < 0.8 and sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2, rewards
