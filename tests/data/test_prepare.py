"""A corpus prepared: the held-out part, limits, what is refused. Oracles: the documents themselves, and kills."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.data import corpora as corpora_module
from purelm.data.corpora import DELIMITER, documents, open_prepared, prepare

TEXTS = ["One day,\nthere was a cat.\n", "\u00e9t\u00e9 \u4e2d\u6587 \U0001f600", " spaces are kept \n"]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return file.read().split(DELIMITER)


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="|"), min_size=1, max_size=9), min_size=25,
                   max_size=60).filter(lambda texts: len({t.strip() for t in texts} - {""}) >= 20),
    fraction=st.sampled_from([0.01, 0.05, 0.3, 0.9]),
    seed=st.integers(-5, 5),
)  # fmt: skip
def test_documents_held_out(tmp_path_factory, texts, fraction, seed):
    """Oracle: multisets. The parts together are the corpus, share no document, and do not depend on its order."""
    folder = tmp_path_factory.mktemp("prepare")
    prepared = prepare(texts, folder, heldout_fraction=fraction, seed=seed)
    train, heldout = read(prepared.train_path), read(prepared.heldout_path)
    texts = [text for text in texts if text.encode().strip()]
    assert prepared.rule == "documents" and sorted(train + heldout) == sorted(texts)
    assert not {t.strip() for t in train} & {t.strip() for t in heldout}
    distinct = {text.encode().strip() for text in texts}
    assert len({t.encode().strip() for t in heldout}) == max(1, round(fraction * len(distinct)))
    assert (prepared.n_train_documents, prepared.n_heldout_documents) == (len(train), len(heldout))
    assert prepared.n_documents == len(texts) and prepared.n_bytes == sum(len(t.encode()) for t in texts)
    assert prepared.n_train_bytes == sum(len(t.encode()) for t in train)
    assert open_prepared(folder) == prepared
    again = prepare(texts[::-1], folder, heldout_fraction=fraction, seed=seed)
    assert read(again.train_path) == train[::-1] and read(again.heldout_path) == heldout[::-1]


def test_copies_with_other_white_space_stay_together(tmp_path):
    """Copies that differ in outer white space alone are on one side."""
    texts = [outer + f"story {i}" + outer for i in range(100) for outer in ("", "\n", " \n")]
    prepared = prepare(texts, tmp_path, heldout_fraction=0.5)
    train, heldout = ({text.strip() for text in read(path)} for path in (prepared.train_path, prepared.heldout_path))
    assert not train & heldout and len(heldout) == 50


def test_many_documents(tmp_path, monkeypatch):
    """Oracle: the binomial. Beyond the first look each document is held out by its own hash, within 5 sigma."""
    texts = [f"story {i % 20_000}" for i in range(21_000)]
    prepared = prepare(texts, tmp_path)
    train, heldout = read(prepared.train_path), read(prepared.heldout_path)
    assert not set(train) & set(heldout) and sorted(train + heldout) == sorted(texts)
    assert abs(len(set(heldout)) - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5
    other = prepare(texts, tmp_path / "seed", seed=1)
    assert len(set(heldout) & set(read(other.heldout_path))) < 150  # 50 expected of independent choices
    # Reading stops, and the rule does not depend on how much was looked at first.
    monkeypatch.setattr(corpora_module, "HEAD_BYTES", 100)
    small = prepare(texts, tmp_path / "small")
    assert read(small.heldout_path) == heldout


def test_few_documents_lose_their_tails(tmp_path):
    """With few documents the end of each is held out at a newline; joined again the parts are the documents."""
    texts = ["".join(f"document {d} line {i}\n" for i in range(100)) for d in range(3)] + ["no newline here at all"]
    prepared = prepare(texts, tmp_path, heldout_fraction=0.1)
    train, heldout = read(prepared.train_path), read(prepared.heldout_path)
    assert prepared.rule == "tails" and [a + b for a, b in zip(train, heldout, strict=True)] == texts
    assert all(text.endswith("\n") for text in train[:3])
    assert all(0.09 < len(b) / (len(a) + len(b)) < 0.12 for a, b in zip(train[:3], heldout, strict=False))
    assert prepared.n_documents == 8 and prepared.n_bytes == sum(map(len, texts))


def test_max_bytes(tmp_path):
    """The limit is kept, the crossing document is cut at a newline, and nothing beyond is read."""

    def endless():
        for i in range(10**9):
            assert i < 400
            yield f"{i}: one line\nand another line\n"

    prepared = prepare(endless(), tmp_path, max_bytes=9000)
    assert 8950 < prepared.n_bytes <= 9000
    assert all(text.endswith("\n") for text in read(prepared.train_path) + read(prepared.heldout_path))
    assert prepare(["abcdefgh" * 99], tmp_path, max_bytes=100).n_bytes == 100


def test_delimiter_inside_a_document(tmp_path):
    """A string that holds the delimiter is the documents between."""
    prepared = prepare([f"{i}{DELIMITER}{i}x" for i in range(30)], tmp_path)
    both = read(prepared.train_path) + read(prepared.heldout_path)
    assert sorted(both) == sorted([f"{i}" for i in range(30)] + [f"{i}x" for i in range(30)])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "source: empty corpus"),
        (["", " \n"], {}, "source: empty corpus"),
        ([DELIMITER], {}, "source: empty corpus"),
        (["\ud800"], {}, "source: document 0 is no valid Unicode"),
        (["x"], {}, "the training part would be empty .* 1 documents"),
        (["same"] * 50, {"heldout_fraction": 1e-9}, None),
        ([str(i) for i in range(30)], {"heldout_fraction": 0.999}, "the training part would be empty"),
        (["x"], {"heldout_fraction": 0}, "heldout_fraction=0"),
        (["x"], {"heldout_fraction": 1}, "heldout_fraction=1"),
        (["x"], {"max_bytes": 0}, "max_bytes=0"),
    ],
)
def test_prepare_refuses(tmp_path, source, options, message):
    """Empty corpora and empty parts are refused, and the corpus on disk stays."""
    before = prepare([f"text {i}" for i in range(40)], tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(files) == ["heldout.txt", "prepared.json", "train.txt"]
    if message is None:
        prepare(source, tmp_path, **options)
        return
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path, **options)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    assert open_prepared(tmp_path) == before


def test_empty_file(tmp_path):
    """An empty file is an empty corpus, by name."""
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt: empty corpus"):
        prepare(tmp_path / "empty.txt", tmp_path / "out")


def test_kill_between_renames(tmp_path, monkeypatch):
    """A kill at any rename leaves the old corpus, the new one, or none that claims to be complete."""
    old, new = [f"old {i}" for i in range(40)], [f"new {i}" for i in range(50)]
    for step in range(4):
        folder = tmp_path / str(step)
        before = prepare(old, folder)
        calls = []
        real = os.replace

        def replace(source, target, *, calls=calls, step=step, real=real):
            calls.append(target)
            if len(calls) - 1 == step:
                raise KeyboardInterrupt
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            if step == 3:
                assert prepare(new, folder) == open_prepared(folder) != before
                continue
            with pytest.raises(KeyboardInterrupt):
                prepare(new, folder)
        with pytest.raises(FileNotFoundError, match="cut short; prepare it again"):
            open_prepared(folder)
    (folder / "prepared.json").write_text("{}")
    with pytest.raises(ValueError, match=r"prepared\.json: damaged"):
        open_prepared(folder)


def test_real_text(shared_data, tmp_path):
    """Oracle: counts taken with other tools (grep, zipinfo) of the public files."""
    stories = list(documents(shared_data / "text" / "tinystories-2MiB.txt"))
    assert len(stories) == 2317 and sum(len(s.encode()) for s in stories) + 2316 * 13 == 2**21
    assert len(list(documents(shared_data / "text" / "movie_reviews.zip"))) == 2000
    assert len(list(documents(shared_data / "multilingual" / "udhr2.zip"))) == 387  # of 388 one is empty
    (web,) = (shared_data / "web").glob("*.jsonl.gz")
    assert len(list(documents(web))) == 670  # of 697, 27 have no text
    message = r"abc\.zip!abc/science\.txt: not utf-8 at byte 83064 \(line \d+, byte value 0xb0"
    with pytest.raises(ValueError, match=message):
        list(documents(shared_data / "text" / "abc.zip"))
    assert len(list(documents(shared_data / "text" / "abc.zip", encoding=("utf-8", "cp1252", "latin-1")))) == 2
    prepared = prepare(shared_data / "text" / "tinyshakespeare.txt", tmp_path)
    assert prepared.rule == "tails" and prepared.n_bytes == 1115394
    assert 0.05 <= prepared.n_heldout_bytes / prepared.n_bytes < 0.051
