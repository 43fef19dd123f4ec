"""Documents from every kind of source, one clear error for each kind of bad input, and the held-out part."""

import builtins
import gzip
import io
import json
import os
import sys
import types
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.data import archives
from purelm.data import corpora as corpora_module
from purelm.data.corpora import DELIMITER, documents, open_prepared, prepare
from purelm.data.sources import cut_point, parse_hub

TEXTS = ["One day,\nthere was a cat.\n", "\u00e9t\u00e9 \u4e2d\u6587 \U0001f600", " spaces are kept \n"]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))


def zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


TXT = DELIMITER.join(TEXTS).encode()
JSONL = LINES.encode()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.txt", lambda: TXT),
        ("a.TXT", lambda: TXT),
        ("readme.txt", lambda: TXT),  # named outright
        ("a.txt.gz", lambda: gzip.compress(TXT)),
        ("a.gz", lambda: gzip.compress(TXT[:30]) + gzip.compress(TXT[30:])),  # two members
        ("a.txt.zst", lambda: zstd(TXT)),
        ("a.zst", lambda: zstd(TXT[:30]) + zstd(b"") + zstd(TXT[30:])),
        ("a.txt.zst.gz", lambda: gzip.compress(zstd(TXT))),
        ("a.txt.gz.zst", lambda: zstd(gzip.compress(TXT))),
        ("a.jsonl", lambda: JSONL),
        ("b.jsonl", lambda: JSONL.replace(b"\n", b"\r\n\n").rstrip(b"\n")),  # empty lines, no last newline
        ("a.jsonl.gz", lambda: gzip.compress(JSONL)),
        ("a.jsonl.zst", lambda: zstd(JSONL)),
        ("a.zip", lambda: zipped({"x/b.txt": TXT})),
        ("b.zip", lambda: zipped({"x/2.txt": TEXTS[2], "x/": "", "x/0.txt": TEXTS[0], "x/1.txt.gz":
                                  gzip.compress(TEXTS[1].encode())})),
        ("c.zip", lambda: zipped({"a.jsonl": JSONL, "README": b"\xff", "cats.txt": "no", "x.py": "no",
                                  "__MACOSX/a.txt": "no", ".b.txt": "no", "d/.git/a.txt": "no"})),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_every_kind_of_file(tmp_path, monkeypatch, name, make, block_bytes):
    """Oracle: the texts written. Each kind of file gives them back, however small the blocks it is read in."""
    monkeypatch.setattr(archives, "BLOCK_BYTES", block_bytes)
    (tmp_path / name).write_bytes(make())
    assert list(documents(tmp_path / name)) == TEXTS


def test_folder(tmp_path):
    """A folder is its files in sorted order, archives among them, by the rule of names."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("3")
    (tmp_path / "b" / "LICENSE.txt").write_text("no")
    (tmp_path / "a.zip").write_bytes(zipped({"2.txt": "2", "1.jsonl": '{"text": "1"}'}))
    (tmp_path / "c.jsonl").write_text('{"text": "4"}\n{"text": "5<|endoftext|>6"}\n')
    for name in ("README", "notes.md", ".hidden.txt", ".z.zip"):
        (tmp_path / name).write_bytes(b"\xff")
    assert list(documents(tmp_path)) == ["1", "2", "3", "4", "5", "6"]


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=8),
    block_bytes=st.integers(1, 40),
    limit=st.integers(4, 40),
)
def test_text_stream(tmp_path_factory, texts, block_bytes, limit):
    """Oracle: str.split of the whole file; with a limit, the pieces of each document joined, none over the limit."""
    path = tmp_path_factory.mktemp("stream") / "t.txt"
    whole = DELIMITER.join(texts)
    path.write_bytes(whole.encode())
    expected = [text for text in whole.removeprefix("\ufeff").split(DELIMITER) if text.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "BLOCK_BYTES", block_bytes)
        assert list(documents(path)) == expected
        pieces = list(documents(path, max_document_bytes=limit))
    squeeze = str.maketrans("", "", "".join({c for c in whole if c.isspace()}))  # pieces of white space are dropped
    assert "".join(pieces).translate(squeeze) == "".join(expected).translate(squeeze)
    assert all(len(piece.encode()) <= limit for piece in pieces)


@given(
    data=st.text(st.sampled_from("ab \n\u00e9\u4e2d\U0001f600"), min_size=1).map(str.encode), limit=st.integers(1, 60)
)
def test_cut_point(data, limit):
    """Cuts are between characters (where a character fits), make progress, and prefer newline, then space."""
    at = cut_point(data, limit)
    assert 1 <= at <= limit
    if limit >= 4:
        data[:at].decode()
    if b"\n" in data[limit // 2 : limit]:
        assert data[at - 1 : at] == b"\n"
    elif b" " in data[limit // 2 : limit]:
        assert data[at - 1 : at] == b" "


def test_huge_file_streams(tmp_path):
    """The first document of a long stream comes before the rest is read: reading stops with the reader."""
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(b"one<|endoftext|>" * 400_000)
    path.write_bytes(whole[: len(whole) // 2])  # truncated: the end would raise
    stream = documents(path)
    assert [next(stream) for _ in range(1000)] == ["one"] * 1000
    with pytest.raises(ValueError, match=r"a\.txt\.gz: truncated archive"):
        list(stream)


BAD = b"line one\nline \xff two"


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.txt", lambda: BAD, r"a\.txt: not utf-8 at byte 14 \(line 2, byte value 0xff\); .*encoding="),
        ("a.txt", lambda: b"x\n<|endoftext|>\n" + BAD, r"a\.txt: not utf-8 at byte 30 \(line 4, "),
        ("a.txt", lambda: b"\xef\xbb\xbf" + BAD, r"at byte 17 \(line 2"),
        ("a.txt", lambda: b"abc\xe4\xb8", r"at byte 3 \(line 1, byte value 0xe4"),
        ("a.txt.gz", lambda: gzip.compress(BAD), r"a\.txt\.gz: not utf-8 at byte 14"),
        ("a.zip", lambda: zipped({"d/x.txt": BAD}), r"a\.zip!d/x\.txt: not utf-8 at byte 14"),
        ("a.jsonl", lambda: b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl: not utf-8 at byte 24 \(line 2, "),
        ("a.jsonl", lambda: b'{"text": "a"}\n{"text": ', r"a\.jsonl: line 2: not JSON"),
        ("a.jsonl", lambda: b"[" * 10**5, r"a\.jsonl: line 1: not JSON"),
        ("a.jsonl", lambda: b'\n{"body": "a", "id": 1}', r"line 2: no field 'text'; there are: body, id"),
        ("a.jsonl", lambda: b'{"text": null}', r"line 1: field 'text' holds NoneType"),
        ("a.jsonl", lambda: b"[1]", r"line 1: an object .* found list"),
        ("a.jsonl", lambda: b'{"text": "\\ud83d"}', r"line 1: field 'text' is no valid Unicode"),
        ("a.txt.gz", lambda: gzip.compress(TXT)[:-9], r"a\.txt\.gz: truncated archive"),
        ("a.txt.gz", lambda: TXT, r"a\.txt\.gz: damaged archive"),
        ("a.txt.gz", lambda: gzip.compress(TXT)[:-5] + b"12345", r"a\.txt\.gz: damaged archive"),
        ("a.zst", lambda: zstd(TXT)[:-9], r"a\.zst: truncated archive"),
        ("a.zst", lambda: TXT, r"a\.zst: damaged archive"),
        ("a.zip", lambda: zipped({"x.txt": TXT})[:-30], r"a\.zip: damaged archive"),
        ("a.zip", lambda: zipped({"x.txt": b"a" * 99}).replace(b"KL\xa4", b"KL\xa5"), r"a\.zip!x\.txt: damaged"),
        ("a.zip", lambda: zipped({"x.md": "no"}), r"a\.zip: no text in it; files that end in \.txt, \.jsonl "),
        ("a.md", lambda: b"x", r"a\.md: unknown kind of file; files that end in"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, make, message):
    """Each kind of bad file is one line that names file, member, byte and line."""
    data = make()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        list(documents(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_source(tmp_path):
    """Nothing there, and a folder without text."""
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt: no such file or folder"):
        list(documents(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match="no text in it"):
        list(documents(tmp_path))


def test_other_encodings(tmp_path):
    """Oracle: Python's decoders. With several encodings each document takes the first that fits."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9<|endoftext|>caf\xc3\xa9")
    assert list(documents(tmp_path / "a.txt", encoding=("utf-8", "cp1252"))) == ["caf\u00e9"] * 2
    assert list(documents(tmp_path / "a.txt", encoding="latin-1")) == ["caf\u00e9", "caf\u00c3\u00a9"]
    for encoding, message in [("utf-16", "write ASCII as ASCII"), ("klingon", "no such encoding")]:
        with pytest.raises(ValueError, match=message):
            documents(tmp_path / "a.txt", encoding=encoding)
    with pytest.raises(ValueError, match="max_document_bytes=3"):
        documents(tmp_path / "a.txt", max_document_bytes=3)


def test_field(tmp_path):
    """The field of JSON lines is an argument."""
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    assert list(documents(tmp_path / "a.jsonl", field="body")) == ["x"]


def forbid(monkeypatch, name):
    real = builtins.__import__

    def hide(module, *args, **kwargs):
        if module == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *args, **kwargs)

    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", hide)


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [("hub:a/b", "datasets", r"hub:a/b: needs datasets: pip install 'purelm\[hub\]'"),
     ("a.zst", "zstandard", r"a\.zst: reading \.zst needs zstandard: pip install 'purelm\[run\]'")],
)  # fmt: skip
def test_missing_packages(tmp_path, monkeypatch, source, module, extra):
    """What is not installed is named together with the extra that brings it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.zst").write_bytes(b"x")
    forbid(monkeypatch, module)
    with pytest.raises(ModuleNotFoundError, match=extra):
        list(documents(source))


def fake_datasets(monkeypatch, records):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return records() if callable(records) else records

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub(monkeypatch):
    """Oracle: a stand-in for datasets. Name, config and split are passed on, and records are streamed."""
    calls = fake_datasets(monkeypatch, [{"text": "a"}, {"text": "b<|endoftext|>c"}, {"text": " "}])
    assert list(documents("hub:o/n:conf:test")) == ["a", "b", "c"]
    assert calls == [(("o/n", "conf"), {"split": "test", "streaming": True})]
    fake_datasets(monkeypatch, [{"text": "a"}, {"body": "b"}])
    with pytest.raises(ValueError, match="hub:o/n: record 1: no field 'text'; there are: body"):
        list(documents("hub:o/n"))


def test_hub_without_network(monkeypatch):
    """Whatever the back end raises, at opening or later, becomes one line."""

    def offline():
        raise ConnectionError("Couldn't reach 'o/n' on the Hub\nmore lines")

    def breaks():
        yield {"text": "a"}
        raise TimeoutError

    for records in (offline, breaks):
        fake_datasets(monkeypatch, records)
        message = r"hub:o/n: cannot be read \((Connection|Timeout)Error: .*network"
        with pytest.raises(ValueError, match=message) as caught:
            list(documents("hub:o/n"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("hub:o/n", ("o/n", None, "train")),
        ("hub:o/n:validation", ("o/n", None, "validation")),
        ("hub:o/n:train[:1%]", None),
        ("hub:o/n:en", ("o/n", "en", "train")),
        ("hub:o/n:en:extra", ("o/n", "en", "extra")),
        ("hub:n", None),
        ("hub:/n", None),
        ("hub:o/n:", None),
        ("hub:o/n:a:b:c", None),
    ],
)
def test_parse_hub(source, parsed):
    """Oracle: the form written in the docstring."""
    if parsed is None:
        with pytest.raises(ValueError, match="allowed is hub:owner/name"):
            parse_hub(source)
    else:
        assert parse_hub(source) == parsed


# --- prepare


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
