"""encode_iterable. Oracle: `encode` of the joined text; memory is measured in a fresh process."""

import itertools
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.testing import strategies as plm
from purelm.tokenizer import encode, encode_iterable, make, streams
from purelm.tokenizer.engine import PAYS_FROM

SPECIALS = ("<|endoftext|>", "<a b>", "<a b><a b>", " x")
PARTS = [
    "a", "b", "the", " the", "  ", " ", "\n", ". ", "1", "'s", "\u00e9", "\u3000", "\U0001f600", *SPECIALS, "<a ", "b>",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PARTS) | st.characters(codec="utf-8"), max_size=60).map("".join)


def tokenizer(pattern: str = "gpt2", special_tokens=SPECIALS):
    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b" ", b" "), (b"a", b" "), (b"a", b"b"), (b".", b"\n")]
    vocab = {i: bytes([i]) for i in range(256)} | {256 + i: a + b for i, (a, b) in enumerate(merges)}
    return make(vocab, merges, special_tokens, pattern)


BPES = {pattern: tokenizer(pattern) for pattern in ("gpt2", "cl100k", "o200k", r"[a-z ]+|[^a-z ]+")}


def split_at(text: str, cuts) -> list[str]:
    ends = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("pattern", BPES)
@settings(max_examples=100)
@given(text=TEXT | plm.texts(SPECIALS), cuts=st.lists(st.integers(0, 10_000), max_size=30))
def test_equals_encode_for_every_way_of_cutting_the_text(pattern, block, text, cuts):
    bpe = BPES[pattern]
    old, streams.BLOCK_CHARS = streams.BLOCK_CHARS, block
    try:
        found = list(encode_iterable(bpe, split_at(text, cuts)))
    finally:
        streams.BLOCK_CHARS = old
    assert found == encode(bpe, text, engine="python").tolist()


@pytest.mark.parametrize("engine", ["python", "numba", "auto"])
def test_equals_encode_on_real_text(monkeypatch, shared_data, engine):
    """Line by line, whole, and in odd pieces; "auto" changes the engine on the way; more pieces than kept."""
    if engine == "numba":
        pytest.importorskip("numba")
    monkeypatch.setitem(PAYS_FROM, "encode", 100_000)
    monkeypatch.setattr(streams, "_KEPT", 1000)
    text = (shared_data / "text" / "tinyshakespeare.txt").read_text()[:150_000]
    text += (shared_data / "text" / "tinystories-2MiB.txt").read_text()[:50_000]
    bpe = BPES["gpt2"]
    expected = encode(bpe, text, engine="python").tolist()
    rng = random.Random(0)
    cuts = [rng.randrange(len(text)) for _ in range(300)]
    for texts in ([text], text.splitlines(keepends=True), split_at(text, cuts)):
        assert list(encode_iterable(bpe, texts, engine=engine)) == expected


def test_is_lazy():
    """The first ids come when little was read, of an endless stream; nothing is read before it is asked for."""
    n_read = 0

    def texts():
        nonlocal n_read
        while True:
            n_read += 1
            yield "some words and "

    ids = encode_iterable(BPES["gpt2"], texts())
    assert n_read == 0
    first = [next(ids) for _ in range(1000)]
    assert n_read < 1000
    assert first == encode(BPES["gpt2"], "some words and " * 1000, engine="python")[:1000].tolist()


def test_no_safe_cut_is_exact_up_to_the_bound():
    bpe = BPES["gpt2"]
    text = "ab" * 10_000
    assert list(encode_iterable(bpe, [text[i : i + 3] for i in range(0, len(text), 3)])) == encode(bpe, text).tolist()
    for texts in ([text], list(text)):
        with pytest.raises(ValueError, match="without a place where a cut is safe, more than max_held=15000"):
            list(encode_iterable(bpe, texts, max_held=15_000))
    own = tokenizer(r"\S+|\s+", special_tokens=("<s>",))  # not a known pattern: held from one special to the next
    with pytest.raises(ValueError, match="max_held=15000"):
        list(encode_iterable(own, ["a b "] * 10_000, max_held=15_000))
    assert len(list(encode_iterable(own, ["a b <s>"] * 10_000, max_held=15_000))) == 50_000


def test_long_stream_without_a_cut_takes_linear_time():
    """2 MB letter by letter: looking for a cut anew at each letter would take minutes."""
    start = time.process_time()
    ids = encode_iterable(BPES["gpt2"], iter("\u4e2d" * 300_000 + "a b"))
    assert sum(1 for _ in ids) == 3 * 300_000 + 3
    assert time.process_time() - start < 20  # 1 s where this was written


def test_bad_input():
    bpe = BPES["gpt2"]
    with pytest.raises(ValueError, match="texts is one str"):
        encode_iterable(bpe, "text")
    with pytest.raises(ValueError, match="engine is 'x'"):
        encode_iterable(bpe, ["text"], engine="x")
    with pytest.raises(ValueError, match="text 1 is bytes"):
        list(encode_iterable(bpe, ["a", b"b"]))
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D800, at character 10002 of the stream"):
        list(encode_iterable(bpe, ["a "] * 5000 + ["b \ud800"]))
    assert list(encode_iterable(bpe, [])) == [] == list(encode_iterable(bpe, ["", ""]))


MEMORY = r"""
import itertools, resource, sys, tracemalloc
from purelm.tokenizer import encode_iterable, train
import psutil
path, mode = sys.argv[1:]
with open(path, encoding="utf-8", newline="") as file:
    bpe = train([file.read(1_000_000)], 4000, ["<|endoftext|>"])
warm = list(encode_iterable(bpe, ["warm up " * 10]))
with open(path, encoding="utf-8", newline="") as file:
    if mode == "traced":
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        n = sum(1 for _ in encode_iterable(bpe, itertools.islice(file, 30_000)))  # tracing is slow
        print(n, tracemalloc.get_traced_memory()[1] - before)
    else:
        before = psutil.Process().memory_info().rss
        resource.setrlimit(resource.RLIMIT_AS, (before + 1_000_000, -1))
        n = sum(1 for _ in encode_iterable(bpe, file))
        print(n, psutil.Process().memory_info().rss - before)
"""


@pytest.fixture(scope="module")
def five_megabytes(tmp_path_factory):
    """5 MB of words of a growing vocabulary (Zipf), by lines."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 10))) for _ in range(30_000)]
    lines = []
    size = 0
    while size < 5_000_000:
        lines.append(" ".join(words[min(int(rng.paretovariate(0.7)), 29_999)] for _ in range(12)) + ".\n")
        size += len(lines[-1])
    path = tmp_path_factory.mktemp("stream") / "5M.txt"
    path.write_text("".join(lines))
    return path


def run_memory(path, mode: str) -> tuple[int, int]:
    out = subprocess.run([sys.executable, "-c", MEMORY, str(path), mode], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    n_ids, n_bytes = map(int, out.stdout.split())
    return n_ids, n_bytes


def test_memory_of_a_stream_is_constant(five_megabytes):
    """At most 1 MB over the start on a long file read by lines, by Python's own account of every allocation."""
    n_ids, peak = run_memory(five_megabytes, "traced")
    assert n_ids > 200_000
    assert peak < 1_000_000


def test_address_space_of_a_stream_is_limited(five_megabytes):
    """The same with the address space limited to what was resident at the start and 1 MB, as the course tests it."""
    pytest.importorskip("psutil")
    n_ids, growth = run_memory(five_megabytes, "limit")
    assert n_ids > 500_000
    assert growth < 1_000_000
