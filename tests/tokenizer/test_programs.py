"""The programs train_tokenizer and tokenize_corpus, end to end on small corpora; oracle: the functions they compose."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.tokenize_corpus import Args as CorpusArgs
from experiments.tokenize_corpus import main as tokenize_corpus
from experiments.tokenize_corpus import publish
from experiments.train_tokenizer import Args as TrainArgs
from experiments.train_tokenizer import main as train_tokenizer
from purelm.data.tokens import open_tokens
from purelm.files import hold, staging
from purelm.tokenizer import encode, load, train
from tests.programs import run_here

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
    assert 400 < tokens.n_bytes <= 500 and not (only / "heldout.bin").exists()


def test_max_bytes_is_a_limit(corpus, capsys):
    """Oracle: the bytes written. Of one .txt file too, in both programs and in both parts; the last document is cut."""
    bpe_path, text = corpus / "tokenizer.json", str(corpus / "corpus.txt")
    train_tokenizer(TrainArgs(text, 300, bpe_path, max_bytes=1000))
    told = capsys.readouterr().err.splitlines()
    assert 900 < int(next(line for line in told if "pre-tokens" in line).split()[0].replace(",", "")) <= 1000
    tokenize_corpus(CorpusArgs(text, bpe_path, corpus / "a", max_bytes=700, heldout_fraction=0.3))
    parts = [open_tokens(corpus / "a" / f"{name}.bin").n_bytes for name in ("train", "heldout")]
    assert 600 < sum(parts) <= 700
    tokenize_corpus(CorpusArgs(text, bpe_path, corpus / "b", max_bytes=300, heldout=str(corpus / "corpus.jsonl")))
    for name in ("train", "heldout"):
        assert 200 < open_tokens(corpus / "b" / f"{name}.bin", verify=True).n_bytes <= 300
    whole = len(TEXT.encode())
    tokenize_corpus(CorpusArgs(text, bpe_path, corpus / "c", max_bytes=whole, heldout_fraction=0, verify=True))
    assert np.array_equal(open_tokens(corpus / "c" / "train.bin").tokens, encode(load(bpe_path), TEXT))


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def tokenized(corpus):
    """corpus with tokenizer.json and out/, a corpus of it with a part held out."""
    train_tokenizer(TrainArgs(str(corpus / "corpus.txt"), 300, corpus / "tokenizer.json"))
    tokenize_corpus(CorpusArgs(str(corpus / "corpus.txt"), corpus / "tokenizer.json", corpus / "out"))
    return corpus


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "out/train.txt"}, "is an input, and the output"),
        ({"input": "link.txt"}, "is an input, and the output"),
        ({"input": "out"}, "would become a part of it"),
        ({"input": "."}, "would become a part of it"),
        ({"tokenizer": "out/train.json", "heldout": "corpus.jsonl"}, "train.json: is an input"),
        ({"heldout": "corpus.txt"}, "is the input; held-out text must be other text"),
        ({"heldout_fraction": 0.0}, "heldout.bin: is of another run"),
        ({"heldout_fraction": float("nan")}, "heldout_fraction=nan: allowed is 0 to less than 1"),
        ({"heldout_fraction": -0.1}, "heldout_fraction=-0.1"),
        ({"heldout_fraction": 1.0}, "heldout_fraction=1.0"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"seed": 2**70}, "seed=1180591620717411303424"),
        ({"n_workers": 0}, "n_workers is 0"),
        ({"n_workers": 10**12}, "n_workers is 1000000000000"),
        ({"encoding": ()}, "encoding=()"),
        ({"encoding": ("klingon",)}, "encoding='klingon'"),
        ({"input": ""}, "input is empty"),
        ({"heldout": ""}, "heldout is empty"),
        ({"input": "pipe.txt"}, "pipe.txt: is a pipe"),
        ({"input": "absent.txt"}, "absent.txt: no such file"),
        ({"heldout": "absent.txt"}, "absent.txt: no such file"),
        ({"input": "hub:x"}, "allowed is hub:owner/name"),
        ({"input": "latin.txt"}, "not utf-8 at byte 3"),
        ({"out": "corpus.txt"}, "is a file; a folder is expected"),
        ({"tokenizer": "absent.json"}, "absent.json"),
    ],
)
def test_what_is_refused_changes_nothing(tokenized, monkeypatch, capsys, changes, message):
    """One line and status 2; oracle: every byte below the folder is as before, inputs and earlier results alike."""
    monkeypatch.chdir(tokenized)
    os.mkfifo("pipe.txt")
    os.link("out/train.txt", "link.txt")
    (tokenized / "latin.txt").write_bytes(b"caf\xe9 " * 9)
    if "tokenizer" in changes and changes["tokenizer"].startswith("out"):
        os.replace("tokenizer.json", "out/train.json")
    before = snapshot(tokenized)
    given = {"input": "corpus.txt", "tokenizer": "tokenizer.json", "out": "out", **changes}
    args = CorpusArgs(**{**given, "tokenizer": Path(given["tokenizer"]), "out": Path(given["out"])})
    with pytest.raises(SystemExit) as stop:
        tokenize_corpus(args)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and message in told and told.count("error:") == 1
    assert snapshot(tokenized) == before and not list(tokenized.rglob(".new-*"))


class Kill(BaseException):
    """Stands for kill -9 in the middle of renaming."""


def kill_at(patch, step, after):
    """Make the step-th renaming or removal die, before or after it has taken effect."""
    calls = []

    def wrap(function):
        def wrapped(*arguments, **named):
            calls.append(function)
            dies = len(calls) - 1 == step
            if after or not dies:
                result = function(*arguments, **named)
            if dies:
                raise Kill
            return result

        return wrapped

    for owner, name in [(os, "replace"), (Path, "unlink")]:
        patch.setattr(owner, name, wrap(getattr(owner, name)))


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_never_pairs_new_with_old(tokenized, tmp_path, monkeypatch, after):
    """Killed at each step of publishing, a train file that can be opened has its own held-out file with it, or none."""
    out = tokenized / "out"
    old = {name: open_tokens(out / f"{name}.bin")[:].tolist() for name in ("train", "heldout")}
    before = snapshot(out)
    args = CorpusArgs(str(tokenized / "corpus.txt"), tokenized / "tokenizer.json", tmp_path / "new", seed=1)
    tokenize_corpus(args)
    staged = snapshot(tmp_path / "new")
    new = {name: open_tokens(tmp_path / "new" / f"{name}.bin")[:].tolist() for name in ("train", "heldout")}
    assert new["train"] != old["train"] and new["heldout"] != old["heldout"]
    outcomes = set()
    for step in range(40):
        for folder, files in ((out, before), (tmp_path / "staged", staged)):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name, data in files.items():
                (folder / name).write_bytes(data)
        killed = False
        with monkeypatch.context() as patch:
            kill_at(patch, step, after)
            try:
                publish(tmp_path / "staged", out)
            except Kill:
                killed = True
        found = []
        for name in ("train", "heldout"):
            try:
                ids = open_tokens(out / f"{name}.bin")[:].tolist()
                found.append("old" if ids == old[name] else "new" if ids == new[name] else "damaged")
            except (OSError, ValueError):
                found.append("none")
        assert tuple(found) in {("old", "old"), ("old", "none"), ("new", "none"), ("new", "new")}
        outcomes.add(tuple(found))
        if not killed:
            break
    assert tuple(found) == ("new", "new") and len(outcomes) == 4


def test_leftovers_of_a_killed_run_go(tokenized):
    """A folder that no living process holds goes with the next run; one that is held stays."""
    out = tokenized / "out"
    dead, held = out / (".new-" + "d" * 16), out / (".new-" + "f" * 16)
    dead.mkdir()
    held.mkdir()
    (dead / "train.txt").write_text("half")
    with staging(tokenized / "other") as staged:
        assert staged.is_dir()
    assert not (tokenized / "other").exists()
    descriptor = os.open(held, os.O_RDONLY)
    assert hold(descriptor)
    tokenize_corpus(CorpusArgs(str(tokenized / "corpus.txt"), tokenized / "tokenizer.json", out))
    names = [f"{name}.{ending}" for name in ("heldout", "train") for ending in ("bin", "json", "txt")]
    assert sorted(path.name for path in out.iterdir()) == sorted([held.name, "prepared.json", *names])
    os.close(descriptor)


def test_encoding_is_an_argument(tmp_path):
    """Latin-1 is refused by name and place; named, it gives the tokenizer of the same text in UTF-8."""
    story = "caf\u00e9 au lait " * 20
    (tmp_path / "latin.txt").write_bytes(story.encode("latin-1"))
    out = tmp_path / "tokenizer.json"
    with pytest.raises(SystemExit):
        train_tokenizer(TrainArgs(str(tmp_path / "latin.txt"), 270, out))
    train_tokenizer(TrainArgs(str(tmp_path / "latin.txt"), 270, out, encoding=("utf-8", "latin-1")))
    assert same(load(out), train([story], 270, [EOT]))


def run(module: str, *arguments: object) -> tuple[int, str]:
    done = run_here(f"experiments.{module}", *arguments)
    return done.returncode, done.stderr


def test_user_errors_are_one_line_and_status_2(corpus):
    """From the command line: bad input, then a run that works."""
    bpe_path = str(corpus / "tokenizer.json")
    (corpus / "bad.txt").write_bytes(b"one\ntwo \xff")
    bad = ("--input", corpus / "bad.txt", "--vocab-size", 300, "--out", bpe_path)
    status, told = run("train_tokenizer", *bad)
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
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"n_workers": 10**12}, "n_workers is 1000000000000"),
        ({"pattern": r"\w+"}, "bpe.pattern cannot be saved"),
        ({"pattern": "\ud800+"}, "lone surrogate"),
        ({"special_tokens": ("\udcff",)}, "lone surrogate"),
        ({"input": ""}, "input is empty"),
        ({"input": "/dev/zero"}, "/dev/zero: is a device"),
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
