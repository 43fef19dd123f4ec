"""Documents from every kind of source, and one clear error for each kind of bad input."""

import builtins
import gzip
import io
import json
import os
import struct
import sys
import tracemalloc
import types
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.data import archives, sources
from purelm.data import corpora as corpora_module
from purelm.data.corpora import DELIMITER, documents, limited, open_prepared, prepare
from purelm.data.sources import cut_point, parse_hub

TEXTS = ["One day,\nthere was a cat.\n", "\u00e9t\u00e9 \u4e2d\u6587 \U0001f600", " spaces are kept \n"]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))


SKIPPED = struct.pack("<II", 0x184D2A50, 5) + b"hello"  # a skippable frame (RFC 8878, 3.1.2)


def zstd(data, window_log=None):
    zstandard = pytest.importorskip("zstandard")
    if window_log is None:
        return zstandard.ZstdCompressor().compress(data)
    options = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=options).compressobj()
    return stream.compress(data) + stream.flush()


def zipped(members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
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
        ("d.zst", lambda: SKIPPED + zstd(TXT[:30]) + SKIPPED + zstd(TXT[30:]) + SKIPPED),
        ("e.txt.zst", lambda: zstd(TXT, window_log=27)),
        ("f.txt.gz", lambda: gzip.compress(TXT[:30]) + gzip.compress(TXT[30:]) + bytes(512)),  # padded, as on tapes
        ("bz2.zip", lambda: zipped({"x.txt": TXT}, zipfile.ZIP_BZIP2)),
        ("lzma.zip", lambda: zipped({"x.txt": TXT}, zipfile.ZIP_LZMA)),
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
        ("a.zst", lambda: zstd(TXT) + SKIPPED[:6], r"a\.zst: truncated archive"),
        ("a.zst", lambda: zstd(TXT, window_log=28), r"a\.zst: was compressed with a window above 128 MiB .*--long=31"),
        ("a.zip", lambda: marked(8, 9), r"a\.zip!x\.txt: is compressed with deflate64, which is not read here"),
        ("a.zip", lambda: marked(8, 77), "is compressed with method 77"),
        ("a.zip", lambda: marked(6, 1), r"a\.zip!x\.txt: is encrypted"),
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


def marked(offset, value):
    """A zip whose one member has another value in a field of both of its headers (APPNOTE.TXT, 4.3.7 and 4.3.12)."""
    data = bytearray(zipped({"x.txt": TXT}))
    data[offset : offset + 2] = struct.pack("<H", value)
    central = data.index(b"PK\x01\x02") + 2
    data[central + offset : central + offset + 2] = struct.pack("<H", value)
    return bytes(data)


def test_two_members_of_one_name(tmp_path):
    """Oracle: both were written; by name the second would be read twice."""
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.txt", "one")
        archive.writestr("x.txt", "two")
    assert list(documents(tmp_path / "a.zip")) == ["one", "two"]


def test_what_is_no_file_is_refused(tmp_path):
    """A pipe, a device and a link to nothing, named outright or among the texts of a folder; not under other names."""
    os.mkfifo(tmp_path / "a.txt")
    os.symlink("/dev/zero", tmp_path / "b.txt")
    os.symlink("nothing", tmp_path / "c.txt")
    for name, message in [("a.txt", "a pipe"), ("b.txt", "a device"), ("c.txt", "a link to nothing")]:
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}: (is )?{message}"):
            list(documents(tmp_path / name))
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}: (is )?{message}"):
            list(documents(tmp_path))
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "d.txt").write_text("text")
    assert list(documents(tmp_path)) == ["text"]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_bombs_take_bounded_memory(tmp_path, kind):
    """Oracle: tracemalloc and the limit. 64 MiB of one letter from some KB; what max_bytes cuts off is not unpacked."""
    data = b"a" * (1 << 26)
    (tmp_path / f"a.txt.{kind}").write_bytes(gzip.compress(data) if kind == "gz" else zstd(data))
    del data
    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "ZSTD_FEED_BYTES", 64)  # at 2048, all of this file at once
        prepared = prepare(tmp_path / f"a.txt.{kind}", tmp_path / "out", max_bytes=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert prepared.n_bytes == 1000 and peak < 1 << 24
    assert len(next(documents(tmp_path / f"a.txt.{kind}"))) == sources.MOST_DOCUMENT_BYTES


def test_a_line_has_a_limit(tmp_path, monkeypatch):
    """JSON lines cannot be cut: one beyond all measure is refused, before it is gathered."""
    monkeypatch.setattr(sources, "MOST_LINE_BYTES", 1000)
    monkeypatch.setattr(archives, "BLOCK_BYTES", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 900}) + "\n" + json.dumps({"text": "x" * 2000}))
    stream = documents(tmp_path / "a.jsonl")
    assert len(next(stream)) == 900
    with pytest.raises(ValueError, match=r"a\.jsonl: a line is longer than"):
        next(stream)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": ""}, "source=''"),
        ({"source": 5}, "source=5"),
        ({"field": 5}, "field=5"),
        ({"encoding": ()}, r"encoding=\(\)"),
        ({"encoding": 5}, "encoding=5"),
        ({"encoding": (5,)}, "encoding="),
        ({"encoding": "a\0b"}, "no such encoding"),
        ({"max_document_bytes": 1e6}, "max_document_bytes=1000000.0"),
    ],
)
def test_wrong_kinds_of_arguments(tmp_path, arguments, message):
    """Named at the call, before anything is read."""
    with pytest.raises(ValueError, match=message):
        documents(**{"source": tmp_path, **arguments})


def test_the_source_is_never_written_over(tmp_path):
    """The source under another name, or a folder that the result would lie in: refused, every byte as before."""
    (tmp_path / "train.txt").write_text("some words\n" * 50)
    os.link(tmp_path / "train.txt", tmp_path / "other.txt")
    for source in ("train.txt", "other.txt", "."):
        with pytest.raises(ValueError, match="write elsewhere"):
            prepare(tmp_path / source, tmp_path)
    with pytest.raises(ValueError, match="would become a part of it"):
        prepare(tmp_path, tmp_path / "below" / "it")
    assert sorted(os.listdir(tmp_path)) == ["other.txt", "train.txt"]
    assert (tmp_path / "train.txt").read_text() == "some words\n" * 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_path": "/etc/passwd"}, "train_path is '/etc/passwd', not the name of a file beside it"),
        ({"heldout_path": "../heldout.txt"}, "heldout_path is"),
        ({"heldout_path": ".."}, "heldout_path is"),
        ({"train_path": 5}, "train_path is 5"),
        ({"n_train_bytes": "5"}, "n_train_bytes is '5'"),
        ({"n_train_bytes": True}, "n_train_bytes is True"),
        ({"n_train_bytes": -5}, "n_train_bytes is -5"),
        ({"rule": "other"}, "rule is 'other'"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_manifests_are_looked_at(tmp_path, change, message):
    """Fields that are mistyped, paths that lead elsewhere: one line that names the manifest."""
    prepare(["some words\n" * 9], tmp_path)
    path = tmp_path / "prepared.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"prepared\.json: damaged: .*{message}"):
        open_prepared(tmp_path)


def test_leftovers_of_a_killed_prepare_go(tmp_path):
    """With the next one; files of other names stay."""
    for name in ("train.txt.0123abcd", "heldout.txt.0123abcd", "prepared.json.0123abcd", "train.txt.old"):
        (tmp_path / name).write_text("half")
    prepare(["some words\n" * 9], tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["heldout.txt", "prepared.json", "train.txt", "train.txt.old"]


def test_few_large_documents_of_a_stream_lose_their_ends(tmp_path, monkeypatch):
    """Oracle: the parts joined. A text without delimiters, cut into large documents, always has a held-out part."""
    monkeypatch.setattr(corpora_module, "HEAD_BYTES", 2000)
    monkeypatch.setattr(corpora_module, "LARGE_BYTES", 100)
    texts = [f"text {i} " * 20 for i in range(30)]
    for source in (texts, texts[:1] * 30):
        prepared = prepare(iter(source), tmp_path)
        parts = [(tmp_path / name).read_text().split(DELIMITER) for name in ("train.txt", "heldout.txt")]
        assert prepared.rule == "tails"
        assert [a + b for a, b in zip(*parts, strict=True)] == source
    assert prepare(iter(texts), tmp_path, heldout_fraction=0.3).rule == "documents"


def test_limited():
    """Oracle: the bytes; the text that crosses the limit is cut behind its last space, and no more are read."""

    def texts():
        yield "one two three"
        yield "four five six"
        raise AssertionError

    assert list(limited(texts(), 23)) == ["one two three", "four five "]
    assert list(limited(["a", "b"], None)) == ["a", "b"]
    with pytest.raises(ValueError, match="max_bytes=0"):
        list(limited([], 0))
    with pytest.raises(ValueError, match="document 1 is int; a str"):
        list(limited(["a", 5], 10))


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
     ("a.zst", "zstandard", r"a\.zst: reading \.zst needs zstandard: pip install 'purelm\[zstd\]'")],
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
