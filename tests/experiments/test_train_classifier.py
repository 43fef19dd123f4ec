"""train_classifier. Oracles: the model that it writes, applied to what was read; scores and tables counted again."""

import gzip
import json
from hashlib import blake2b

import numpy as np
import pytest

from experiments.train_classifier import part_of
from purelm.curate.classes import scorer
from purelm.curate.classifier_files import load_classifier
from tests.programs import run_here

PROGRAM = "experiments.train_classifier"
FLAGS = ("--buckets", 4096, "--word-ngrams", 1, "--batch", 16, "--held-out", 0.5)


def texts(n, marks, seed):
    draw = np.random.default_rng(seed)
    return [" ".join([*draw.choice([f"w{i}" for i in range(40)], 12), str(draw.choice(marks))]) for _ in range(n)]


def read():
    """(whether positive, text) of all texts of `files`; folding leaves them as they are."""
    return [(y, t) for y, marks, seed in ((True, ["sun", "moon"], 1), (False, ["tax", "law"], 2))
            for t in texts(120, marks, seed)]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.jsonl.gz"
    good.write_text("<|endoftext|>".join(texts(120, ["sun", "moon"], 1)))
    rows = [json.dumps({"text": text}) for text in texts(120, ["tax", "law"], 2)]
    bad.write_bytes(gzip.compress("\n".join([*rows, rows[0], '{"no": 1}']).encode()))
    return good, bad


def test_a_model_is_trained_and_what_is_said_of_it_true(tmp_path, files):
    out = tmp_path / "m.safetensors"
    done = run_here(PROGRAM, "--positive", files[0], "--negative", files[1], "--out", out, *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "left out: 1 copies, 1 without text or too short" in done.stderr
    model = load_classifier(out)
    assert model.cfg.labels == ("positive", "negative") and model.cfg.features.buckets == 4096
    sizes = [int(x) for x in done.stdout.replace(",", "").split() if x.isdigit()][:3]
    assert sum(sizes) == 240 and min(sizes) > 30
    good = scorer(out, "positive")
    tested = [(t, y) for y, t in read() if part_of(blake2b(t.encode(), digest_size=16).digest(), 0, 0.5) == 2]
    assert len(tested) == sizes[2]
    scores = [good(t)[1] for t, _ in tested]
    right = [(s > 0.5) == y for s, (_, y) in zip(scores, tested, strict=True)]
    pairs = [a > b for a, (_, x) in zip(scores, tested, strict=True) if x
             for b, (_, y) in zip(scores, tested, strict=True) if not y]  # fmt: skip
    assert f"accuracy {np.mean(right):.4f}   AUC {np.mean(pairs):.4f}\n" in done.stdout and np.mean(pairs) > 0.9
    for line in done.stdout.splitlines():
        if line.strip().startswith(("0.20 ", "0.80 ")):
            least, kept, precision, recall = map(float, line.split())
            over = [y for s, (_, y) in zip(scores, tested, strict=True) if s >= least]
            assert kept == pytest.approx(len(over) / len(tested), abs=5e-4)
            assert precision == pytest.approx(np.mean(over), abs=5e-5)
            assert recall == pytest.approx(sum(over) / sum(y for _, y in tested), abs=5e-4)
    before = out.read_bytes()
    again = run_here(PROGRAM, "--positive", files[0], "--negative", files[1], "--out", out, *FLAGS)
    assert again.returncode == 2 and "exists" in again.stderr and out.read_bytes() == before
    forced = run_here(PROGRAM, "--positive", files[0], "--negative", files[1], "--out", out, "--overwrite", *FLAGS)
    assert forced.returncode == 0 and out.read_bytes() == before  # the same run gives the same bytes
    assert sorted(x.name for x in tmp_path.iterdir()) == ["bad.jsonl.gz", "good.txt", "m.safetensors"]


def test_the_table_is_of_a_part_that_nothing_was_fitted_on(tmp_path):
    """Random labels: a test of seen texts would say 1, one of unseen texts says a half (5 standard errors at 600)."""
    a, b, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "m.safetensors"
    a.write_text("\n\n".join(texts(1000, ["x"], 1)))
    b.write_text("\n\n".join(texts(1000, ["x"], 2)))
    flags = ("--separator", "\\n\\n", "--held-out", 0.6, "--epochs", 10)
    done = run_here(PROGRAM, "--positive", a, "--negative", b, "--out", out, *FLAGS[:4], *flags)
    accuracy = float(done.stdout.split("accuracy ")[1].split()[0])
    assert abs(accuracy - 0.5) < 0.11


def test_parts_are_of_the_text_alone():
    keys = [i.to_bytes(16, "big") for i in range(4000)]
    parts = [part_of(key, 0, 0.3) for key in keys]
    assert parts == [part_of(key, 0, 0.3) for key in keys]
    assert parts != [part_of(key, 1, 0.3) for key in keys]
    for part, share in ((0, 0.7), (1, 0.15), (2, 0.15)):
        assert abs(parts.count(part) / 4000 - share) < 0.04  # five standard errors


def test_what_is_refused(tmp_path, files):
    good, bad = files
    out = tmp_path / "m.safetensors"
    both = tmp_path / "both.txt"
    both.write_text(good.read_text().split("<|endoftext|>")[3].upper() + " !")
    few = tmp_path / "few.txt"
    few.write_text("one text")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for positive, negative, more, message in [
        (good, good, (), "is positive and negative"),
        (good, both, (), "a text is positive and negative"),
        (good, few, (), "negative: 1 texts, of which"),
        (empty, bad, (), "positive: 0 texts, of which"),
        (good, bad, ("--labels", "a", "a"), "labels: 'a' twice"),
        (good, bad, ("--held-out", 0.95), "held_out must be"),
        (good, bad, ("--lr", 0), "lr must be"),
        (good, bad, ("--word-ngrams", 6), "word_ngrams must be"),
        (good, bad, ("--character-ngrams", 4, 3), "least_characters=4"),
        (tmp_path / "none.txt", bad, (), "no such file"),
        (tmp_path / "none.pdf", bad, (), "names end in"),
    ]:
        done = run_here(PROGRAM, "--positive", positive, "--negative", negative, "--out", out, *more)
        assert done.returncode == 2 and message in done.stderr, (message, done.stderr)
        assert len(done.stderr.strip().splitlines()[-1:]) == 1 and not out.exists()
    done = run_here(PROGRAM, "--positive", good, "--negative", bad, "--out", tmp_path / "m.bin")
    assert done.returncode == 2 and "must end in .safetensors" in done.stderr
    done = run_here(PROGRAM, "--positive", good, "--negative", bad, "--out", tmp_path / "no" / "m.safetensors")
    assert done.returncode == 2 and "its folder does not exist" in done.stderr
