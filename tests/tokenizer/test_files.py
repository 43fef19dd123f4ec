"""encode_file and encode_documents. Oracle: `encode` of the whole text by the Python reference."""

import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.data.tokens import open_tokens
from purelm.tokenizer import blocks, encode, encode_iterable, files, fingerprint, make, train
from purelm.tokenizer.counting import count_pieces
from purelm.tokenizer.cuts import next_cut
from purelm.tokenizer.engine import PAYS_FROM
from purelm.tokenizer.files import encode_block, encode_documents, encode_file

EOT = "<|endoftext|>"
ENGINES = ["python", "numba"]


def tokenizer(special_tokens=(EOT,), pattern: str = "gpt2"):
    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b" ", b" "), (b"\n", b"\n"), (b"a", b"n"), (b"an", b"d")]
    vocab = {i: bytes([i]) for i in range(256)} | {256 + i: a + b for i, (a, b) in enumerate(merges)}
    return make(vocab, merges, special_tokens, pattern)


@pytest.fixture(params=ENGINES)
def engine(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)


def text_of(shared_data) -> str:
    text = (shared_data / "text" / "tinystories-2MiB.txt").read_text()[:60_000]
    return text + "\r\n caf\u00e9 \u4e2d\u6587\u3000x\u2028 y  " + EOT + EOT + "\ufeff end"


@pytest.mark.parametrize("n_workers", [1, 3])
def test_encode_file_equals_encode_of_the_whole_text(tmp_path, shared_data, engine, n_workers):
    bpe, text = tokenizer(), text_of(shared_data)
    (tmp_path / "text.txt").write_bytes(text.encode())
    calls = []
    found = encode_file(
        bpe,
        tmp_path / "text.txt",
        tmp_path / "out.bin",
        n_workers=n_workers,
        engine=engine,
        progress=lambda *call: calls.append(call),
    )
    expected = encode(bpe, text, engine="python")
    assert np.array_equal(found.tokens, expected) and found.tokens.dtype == expected.dtype
    assert (found.n_tokens, found.vocab_size) == (len(expected), 264)
    assert found.tokenizer_sha256 == fingerprint(bpe)
    assert found.n_bytes == len(text.replace(EOT, "").encode())  # special tokens are no text
    size = len(text.encode())
    assert calls[-1] == (size, size) and len(calls) > 20 and calls == sorted(calls)
    again = open_tokens(tmp_path / "out.bin")
    assert np.array_equal(again.tokens, expected) and again.n_bytes == found.n_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.json", "text.txt"]


@pytest.mark.parametrize("pattern", ["cl100k", "o200k", r"\w+|\W+"])
def test_other_patterns_and_specials(tmp_path, shared_data, pattern):
    """Also a pattern that only special tokens may be cut at, and specials that overlap or hold spaces."""
    bpe = tokenizer((EOT, "a girl", " was a", EOT + EOT), pattern)
    text = text_of(shared_data)
    (tmp_path / "text.txt").write_bytes(text.encode())
    found = encode_file(bpe, tmp_path / "text.txt", tmp_path / "out.bin", n_workers=1, engine="auto")
    assert np.array_equal(found.tokens, encode(bpe, text, engine="python"))
    assert found.n_bytes == len(re.sub(f"({re.escape(EOT)})+|a girl| was a", "", text).encode())


def test_engines_chosen(tmp_path, monkeypatch):
    """auto: a small input is encoded by Python, a large one (the threshold lowered) by the compiled engine."""
    pytest.importorskip("numba")
    chosen = []

    def note(task, block):
        chosen.append(task.engine)
        return encode_block(task, block)

    monkeypatch.setattr(files, "encode_block", note)
    bpe, other, path = tokenizer(), tokenizer(pattern=r"\w+|\W+"), tmp_path / "a.txt"
    path.write_text("the end")
    for low, made, engine in [(8, bpe, "python"), (7, bpe, "numba"), (7, other, "python")]:
        monkeypatch.setitem(PAYS_FROM, "encode", low)
        encode_file(made, path, tmp_path / "out.bin", n_workers=1)
        encode_documents(made, ["the", " end"], tmp_path / "out.bin", n_workers=1)
        assert chosen[-2:] == [engine, engine]


@pytest.mark.parametrize("ids", [(0, 1), (0, 258), (258, 259), (1, 130)])
def test_bytes_of_special_tokens_do_not_count_as_text(tmp_path, ids):
    """Wherever the special tokens' ids lie: before, behind or among the others."""
    free = (i for i in range(300) if i not in ids)
    bpe = make({next(free): bytes([value]) for value in range(256)}, (), dict(zip(("<a>", "<bb>"), ids, strict=True)))
    texts = ["x<a>y\u00e9", "<bb><a>", "z"]
    (tmp_path / "a.txt").write_text("".join(texts))
    assert encode_file(bpe, tmp_path / "a.txt", tmp_path / "out.bin").n_bytes == 5
    for eot in ("<a>", "<bb>", None):
        found = encode_documents(bpe, texts, tmp_path / "out.bin", eot=eot)
        assert (found.n_bytes, found.n_tokens) == (5, 8 + (3 if eot else 0))


def test_several_files(tmp_path, engine):
    bpe = tokenizer()
    texts = ["the end", "and the", "", " the"]
    paths = []
    for i, text in enumerate(texts):
        paths.append(tmp_path / f"{i}.txt")
        paths[-1].write_text(text)
    found = encode_file(bpe, paths, tmp_path / "out.bin", between=EOT, engine=engine)
    assert np.array_equal(found.tokens, encode(bpe, EOT.join(texts)))
    assert found.n_bytes == len("".join(texts))
    found = encode_file(bpe, paths, tmp_path / "out.bin", engine=engine)
    assert found.tokens.tolist() == [i for text in texts for i in encode(bpe, text).tolist()]


DOCUMENTS = st.lists(
    st.lists(st.sampled_from(["a", "the", " ", "\n", "<|endof", "text|>", EOT, "<|", "\u00e9", "and and", "aa", "b"]))
    .map("".join)
)  # fmt: skip


@given(documents=DOCUMENTS, special_tokens=st.sampled_from([(EOT,), (EOT, EOT + "a"), (EOT, "b<|"), ("aa", EOT)]))
def test_encode_documents_on_any_documents(tmp_path_factory, documents, special_tokens):
    """Specials that overlap the delimiter keep documents apart all the same."""
    bpe = tokenizer(special_tokens)
    out = tmp_path_factory.mktemp("documents") / "out.bin"
    for eot in {EOT, special_tokens[0]}:
        end = [next(i for i, token in bpe.vocab.items() if token == eot.encode())]
        expected = [i for text in documents for i in encode(bpe, text, engine="python").tolist() + end]
        assert encode_documents(bpe, documents, out, eot=eot, engine="python").tokens[:].tolist() == expected


def test_encode_documents(tmp_path, shared_data, engine):
    bpe = tokenizer()
    documents = text_of(shared_data).split(EOT)
    expected = encode(bpe, EOT.join([*documents, ""]), engine="python")
    n_bytes = sum(len(text.encode()) for text in documents)
    for n_workers in (1, 2):
        out = tmp_path / "out.bin"
        found = encode_documents(bpe, iter(documents), out, engine=engine, n_workers=n_workers)
        assert np.array_equal(found.tokens, expected) and found.n_bytes == n_bytes
    found = encode_documents(bpe, documents, tmp_path / "out.bin", eot=None, engine=engine)
    assert found.tokens[:].tolist() == [i for text in documents for i in encode(bpe, text).tolist()]
    assert found.n_bytes == n_bytes
    assert encode_documents(bpe, [], tmp_path / "out.bin").n_tokens == 0


def test_documents_are_read_a_little_ahead(tmp_path, monkeypatch):
    """Memory: reading keeps within some blocks of what is written."""
    monkeypatch.setitem(PAYS_FROM, "encode", 1000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    n_read, lead = 0, []

    def documents():
        nonlocal n_read
        for _ in range(3000):
            n_read += 1
            yield "the end of it"

    def progress(done, _):
        lead.append(n_read - done // 13)

    encode_documents(tokenizer(), documents(), tmp_path / "out.bin", n_workers=1, progress=progress)
    assert n_read == 3000 and max(lead) < 400


def test_empty_file(tmp_path, engine):
    (tmp_path / "empty.txt").write_bytes(b"")
    found = encode_file(tokenizer(), tmp_path / "empty.txt", tmp_path / "out.bin", engine=engine)
    assert (found.n_tokens, found.n_bytes) == (0, 0)


def test_bad_input(tmp_path, engine):
    bpe = tokenizer()
    good, bad, out = tmp_path / "good.txt", tmp_path / "bad.txt", tmp_path / "out.bin"
    good.write_text("the end")
    data = b"the end\nand the\n" * 2000
    bad.write_bytes(data[:9000] + b"\xff" + data[9001:])
    encode_file(bpe, good, out, engine=engine)
    before = out.read_bytes(), (tmp_path / "out.json").read_bytes()
    line = 1 + data[:9000].count(b"\n")
    for n_workers in (1, 2):
        with pytest.raises(ValueError, match=rf"bad\.txt: not UTF-8 at byte 9000, line {line}: b'\\xff"):
            encode_file(bpe, [good, bad], out, engine=engine, n_workers=n_workers)
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        encode_file(bpe, tmp_path / "absent.txt", out, engine=engine)
    with pytest.raises(ValueError, match="document 3 holds a lone surrogate at character 1"):
        encode_documents(bpe, ["a", "b", "c", "d\ud800"], out, engine=engine)
    with pytest.raises(ValueError, match="document 1 is bytes"):
        encode_documents(bpe, ["a", b"b"], out, engine=engine)  # type: ignore[list-item]
    # What was there before is untouched, and nothing lies about.
    assert (out.read_bytes(), (tmp_path / "out.json").read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "good.txt", "out.bin", "out.json"]


def test_bad_arguments(tmp_path):
    bpe = tokenizer()
    path = tmp_path / "a.txt"
    path.write_text("a")
    with pytest.raises(ValueError, match=r"a token file is named NAME\.bin"):
        encode_file(bpe, path, tmp_path / "out.txt")
    with pytest.raises(ValueError, match="between is '<s>', no special token"):
        encode_file(bpe, [path, path], tmp_path / "out.bin", between="<s>")
    with pytest.raises(ValueError, match="eot is '<s>', no special token"):
        encode_documents(bpe, ["a"], tmp_path / "out.bin", eot="<s>")
    with pytest.raises(ValueError, match="engine is 'x'"):
        encode_file(bpe, path, tmp_path / "out.bin", engine="x")
    with pytest.raises(ValueError, match="n_workers is 0"):
        encode_file(bpe, path, tmp_path / "out.bin", n_workers=0)
    with pytest.raises(ValueError, match="documents is one str"):
        encode_documents(bpe, "text", tmp_path / "out.bin")
    pytest.importorskip("numba")
    with pytest.raises(ValueError, match="no compiled splitter"):
        encode_file(tokenizer(pattern=r"\w+|\W+"), path, tmp_path / "out.bin", engine="numba")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt"]


KILLED = """
import os, signal, sys
from purelm.tokenizer import blocks, encode_file, make
blocks.BLOCK_BYTES = 1000
bpe = make({i: bytes([i]) for i in range(256)})
def progress(done, total):
    if done > total // 2:
        os.kill(os.getpid(), int(sys.argv[3]))
encode_file(bpe, sys.argv[1], sys.argv[2], engine="python", progress=progress)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_leaves_no_half_file(tmp_path, number):
    """Killed half-way: without an earlier file there is none under the name, with one it is still the old one."""
    path, out = tmp_path / "a.txt", tmp_path / "out.bin"
    path.write_text("word " * 5000)
    for earlier in (False, True):
        if earlier:
            encode_file(tokenizer(), path, out)
            before = out.read_bytes()
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(out), str(int(number))], capture_output=True, text=True
        )
        assert done.returncode in (-number, 1), done.stderr
        assert out.exists() == (tmp_path / "out.json").exists() == earlier
        if earlier:
            assert out.read_bytes() == before == open_tokens(out).tokens.tobytes()


def test_two_threads_overlap(tmp_path, monkeypatch):
    """Two workers are at work at once, each waiting for the other in its first chunk; the loops release the lock."""
    pytest.importorskip("numba")
    path, both = tmp_path / "a.txt", threading.Barrier(2)
    path.write_text("the and an " * 1000)
    chunks = []

    def meet(task, block):
        chunks.append(block)
        if len(chunks) <= 2:
            both.wait(60)  # one worker alone would break it
        return encode_block(task, block)

    monkeypatch.setattr(files, "encode_block", meet)
    tokens = encode_file(tokenizer(), path, tmp_path / "out.bin", n_workers=2, engine="numba")
    assert tokens[:].tolist() == encode(tokenizer(), path.read_text()).tolist() and len(chunks) > 2

    from purelm.tokenizer.compiled.memo import encode_some
    from purelm.tokenizer.compiled.splitting import split_some

    assert encode_some.targetoptions["nogil"] and split_some.targetoptions["nogil"]


def test_inputs_that_are_no_files_or_are_the_output(tmp_path):
    """A pipe would be waited for, an output of the input's name would replace it: refused, nothing changed."""
    bpe = make({value: bytes([value]) for value in range(256)}, [], ["<|endoftext|>"])
    (tmp_path / "a.bin").write_text("text")
    (tmp_path / "a.json").write_text("text")
    os.symlink("a.bin", tmp_path / "b.bin")
    for name, out in [("a.bin", "a.bin"), ("a.json", "a.bin"), ("a.bin", "b.bin"), ("b.bin", "a.bin")]:
        with pytest.raises(ValueError, match="is an input, and the output"):
            encode_file(bpe, (path for path in [tmp_path / name]), tmp_path / out)
    os.mkfifo(tmp_path / "pipe.txt")
    for function in (lambda path: encode_file(bpe, path, tmp_path / "x.bin"), lambda path: train(path, 300)):
        with pytest.raises(ValueError, match=r"pipe\.txt: is a folder, a pipe or a device"):
            function(tmp_path / "pipe.txt")
    assert (tmp_path / "a.bin").read_text() == (tmp_path / "a.json").read_text() == "text"
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.json", "b.bin", "pipe.txt"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bpe, out: encode_documents(bpe, "text", out), "documents is one str"),
        (lambda bpe, out: encode_documents(bpe, b"text", out), "documents is one bytes"),
        (lambda bpe, out: encode_documents(bpe, 5, out), "documents is one int"),
        (lambda bpe, out: encode_documents(bpe, ["a"], out, n_workers=True), "n_workers is True"),
        (lambda bpe, out: encode_documents(bpe, ["a"], out, n_workers=10**9), "at most 1024"),
        (lambda bpe, out: encode_iterable(bpe, b"text"), "texts is one bytes"),
        (lambda bpe, out: encode_iterable(bpe, ["text"], max_held=0), "max_held is 0"),
        (lambda bpe, out: train(5, 300), "source is int; give a path or an iterable"),
        (lambda bpe, out: train(b"text", 300), "source is bytes"),
        (lambda bpe, out: train(["text"], 300, "<x>"), "special_tokens is str '<x>'"),
        (lambda bpe, out: train(["text"], 10**12), "vocab_size is 1000000000000: .* at most 16777216"),
        (lambda bpe, out: train(["text"], True), "vocab_size is True"),
        (lambda bpe, out: train(["text"], 300, {"<x>": 5000}), "special_tokens is a mapping"),
        (lambda bpe, out: count_pieces(["text"], "gpt2", "<x>"), "special_tokens is the string '<x>'"),
        (lambda bpe, out: next_cut(b"text", 1, "gpt2", "<x>"), "special_tokens is the string '<x>'"),
    ],
)
def test_wrong_kinds_of_arguments(tmp_path, call, message):
    """A string where a list is meant, numbers out of range: one line at the call, and nothing written."""
    bpe = make({value: bytes([value]) for value in range(256)}, [], ["<|endoftext|>"])
    with pytest.raises(ValueError, match=message):
        call(bpe, tmp_path / "out.bin")
    assert not list(tmp_path.iterdir())


def test_generators_are_as_good_as_lists(tmp_path):
    """Oracle: the same call with lists."""
    ids = []
    for kind in (list, iter):
        bpe = train(kind(["low lower<x>low"] * 9), 260, kind(["<x>"]))
        tokens = encode_documents(bpe, kind(["low<x>", "lower"]), tmp_path / "a.bin", eot="<x>")
        ids.append((bpe.merges, tokens[:].tolist(), list(encode_iterable(bpe, kind(["lo", "w"])))))
    assert ids[0] == ids[1]
