"""The programs train_tokenizer and tokenize_corpus, end to end on small corpora; oracle: the functions they compose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.tokenize_corpus import Args as CorpusArgs
from experiments.tokenize_corpus import main as tokenize_corpus
from experiments.train_tokenizer import Args as TrainArgs
from experiments.train_tokenizer import main as train_tokenizer
from purelm.data.tokens import open_tokens
from purelm.tokenizer import encode, load, train

EOT = "<|endoftext|>"
STORIES = [f"Once there was a dog number {i}. It ran and ran, {'very ' * (i % 7)}fast.\n" for i in range(60)]
TEXT = EOT.join(STORIES)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text(TEXT)
    lines = [json.dumps({"text": story}) + "\n" for story in STORIES]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    return tmp_path


def same(a, b) -> bool:
    return (a.vocab, a.merges, a.special_tokens, a.pattern) == (b.vocab, b.merges, b.special_tokens, b.pattern)


def test_train_tokenizer(corpus, capsys):
    """A .txt file and the same documents as .jsonl give the tokenizer of `train`; the summary says what matters."""
    expected = train([TEXT], 350, [EOT])
    for name in ("corpus.txt", "corpus.jsonl"):
        out = corpus / "new" / f"{name}.json"
        train_tokenizer(TrainArgs(str(corpus / name), 350, out))
        assert same(load(out), expected)
    told = capsys.readouterr().err
    n_tokens = sum(len(encode(expected, story)) for story in STORIES)
    assert f"{sum(map(len, STORIES)) / n_tokens:.3f} bytes per token" in told
    assert "longest tokens: ' number'" in told and "93 merges" in told
    train_tokenizer(TrainArgs(str(corpus / "corpus.txt"), 20_000, out, tie_break="hf", pattern="cl100k"))
    assert same(load(out), train([TEXT], 20_000, [EOT], "cl100k", "hf"))
    assert "no more pairs to merge" in capsys.readouterr().err


def test_tokenize_corpus_with_a_part_held_out(corpus, capsys):
    bpe_path, out = corpus / "tokenizer.json", corpus / "out"
    train_tokenizer(TrainArgs(str(corpus / "corpus.txt"), 300, bpe_path))
    bpe = load(bpe_path)
    tokenize_corpus(CorpusArgs(str(corpus / "corpus.jsonl"), bpe_path, out, heldout_fraction=0.25))
    parts = []
    for name in ("train", "heldout"):
        text = (out / f"{name}.txt").read_text()
        tokens = open_tokens(out / f"{name}.bin")
        assert np.array_equal(tokens.tokens, encode(bpe, text))
        assert tokens.n_bytes == len(text.replace(EOT, "").encode())
        parts += text.split(EOT)
    assert sorted(parts) == sorted(STORIES)


def test_tokenize_corpus_with_its_own_heldout(corpus):
    bpe_path, out = corpus / "tokenizer.json", corpus / "out"
    train_tokenizer(TrainArgs(str(corpus / "corpus.txt"), 300, bpe_path))
    bpe = load(bpe_path)
    tokenize_corpus(CorpusArgs(str(corpus / "corpus.txt"), bpe_path, out, heldout=str(corpus / "corpus.jsonl")))
    assert np.array_equal(open_tokens(out / "train.bin").tokens, encode(bpe, TEXT))
    assert np.array_equal(open_tokens(out / "heldout.bin").tokens, encode(bpe, TEXT + EOT))
    assert not (out / "train.txt").exists()
    only = corpus / "only"
    tokenize_corpus(CorpusArgs(str(corpus / "corpus.jsonl"), bpe_path, only, heldout_fraction=0, max_bytes=500))
    tokens = open_tokens(only / "train.bin")
    assert 500 <= tokens.n_bytes < 600 and not (only / "heldout.bin").exists()


def test_encoding_is_an_argument(tmp_path):
    """Latin-1 is refused by name and place; named, it gives the tokenizer of the same text in UTF-8."""
    story = "caf\u00e9 au lait " * 20
    (tmp_path / "latin.txt").write_bytes(story.encode("latin-1"))
    out = tmp_path / "tokenizer.json"
    with pytest.raises(SystemExit):
        train_tokenizer(TrainArgs(str(tmp_path / "latin.txt"), 270, out))
    train_tokenizer(TrainArgs(str(tmp_path / "latin.txt"), 270, out, encoding=("utf-8", "latin-1")))
    assert same(load(out), train([story], 270, [EOT]))


def run(module: str, *arguments: str) -> tuple[int, str]:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    return done.returncode, done.stderr


def test_user_errors_are_one_line_and_status_2(corpus):
    """From the command line: bad input, then a run that works."""
    bpe_path = str(corpus / "tokenizer.json")
    (corpus / "bad.txt").write_bytes(b"one\ntwo \xff")
    status, told = run("train_tokenizer", "--input", str(corpus / "bad.txt"), "--vocab-size", "300", "--out", bpe_path)
    assert (status, told.count("error:")) == (2, 1) and "bad.txt: not UTF-8 at byte 8, line 2" in told
    assert "Traceback" not in told and not Path(bpe_path).exists()
    good = str(corpus / "corpus.txt")
    status, told = run("train_tokenizer", "--input", good, "--vocab-size", "300", "--out", bpe_path)
    assert status == 0 and "bytes per token" in told, told
    status, told = run("tokenize_corpus", "--input", "absent.txt", "--tokenizer", bpe_path, "--out", str(corpus))
    assert status == 2 and told.strip().splitlines()[-1].startswith("error: absent.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 256}, "vocab_size is 256"),
        ({"out": "x.bin"}, "must end in .json or .tiktoken"),
        ({"input": "absent.zip"}, "absent.zip"),
        ({"pattern": "gtp2"}, "pattern is 'gtp2'"),
        ({"n_workers": 0}, "n_workers is 0"),
        ({"max_bytes": 5}, "max-bytes"),
    ],
)
def test_bad_arguments_of_train_tokenizer(corpus, capsys, changes, message):
    out = Path(changes.get("out", corpus / "tokenizer.json"))
    args = TrainArgs(**{"input": str(corpus / "corpus.txt"), "vocab_size": 300, **changes, "out": out})
    with pytest.raises(SystemExit) as stop:
        train_tokenizer(args)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not out.exists()


def test_tokenizer_without_the_delimiter_is_refused(corpus, capsys):
    bpe_path = corpus / "tokenizer.json"
    train_tokenizer(TrainArgs(str(corpus / "corpus.txt"), 300, bpe_path, special_tokens=()))
    with pytest.raises(SystemExit):
        tokenize_corpus(CorpusArgs(str(corpus / "corpus.txt"), bpe_path, corpus / "out"))
    assert "<|endoftext|> is no special token" in capsys.readouterr().err
    assert not (corpus / "out").exists()
