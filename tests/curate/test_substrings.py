"""Substrings that repeat. Oracle: comparison of all pairs of windows, by slices of the documents themselves."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from purelm.curate import substrings
from purelm.curate.substrings import (
    LEAST,
    repeated_spans,
    repeated_spans_of_files,
    repeated_token_spans,
    repeats,
    without_repeats,
    without_spans,
)
from purelm.tokenizer.engine import has_numba

ENGINES = ["python", *(["numba"] if has_numba() else [])]
KEEP = st.sampled_from(["first", "none"])


@st.composite
def corpora(draw):
    """Documents of few letters, with copies of parts of earlier ones."""
    parts = draw(st.lists(st.binary(max_size=25).map(lambda b: bytes(97 + x % 3 for x in b)), min_size=1, max_size=6))
    found = []
    for part in parts:
        if found and draw(st.booleans()):
            source = draw(st.sampled_from(found))
            a = draw(st.integers(0, len(source)))
            part = part[:5] + source[a : a + draw(st.integers(0, 20))] + part[5:]
        found.append(part)
    return found


def plain(documents, n, keep):
    """For each document the items that are cut, by the definition."""
    windows = [(d, p) for d, data in enumerate(documents) for p in range(len(data) - n + 1)]
    cut = [set() for _ in documents]
    for d, p in windows:
        content = documents[d][p : p + n]
        equal = [(e, q) for e, q in windows if documents[e][q : q + n] == content]
        (e, q), (f, r) = equal[0], equal[-1]
        if (e < d or q + n <= p) if keep == "first" else (e < f or q + n <= r):
            cut[d] |= {*range(p, p + n)}
    return cut


def items_in(spans):
    """The items, after a look at the form: ascending, apart, none empty."""
    edges = spans.reshape(-1).tolist()
    assert spans.dtype == np.int64 and edges == sorted(set(edges))
    return {i for start, end in spans.tolist() for i in range(start, end)}


@pytest.mark.parametrize("engine", ENGINES)
@given(corpora(), st.integers(2, 9), KEEP)
@example([b"a" * 40, b"", b"b" + b"a" * 12], 9, "none")
@example([b"abcabcabcabcabc"], 4, "first")
@settings(max_examples=150, deadline=None)
def test_bytes(engine, documents, n, keep):
    found = repeated_spans(documents, n, keep=keep, engine=engine)
    assert [items_in(spans) for spans in found] == plain(documents, n, keep)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@given(corpora(), st.integers(2, 9), KEEP)
@settings(max_examples=30, deadline=None)
def test_tokens(engine, dtype, documents, n, keep):
    high = np.iinfo(dtype).max - 97 - 3  # up to the last number of the type
    tokens = [(np.frombuffer(data, np.uint8).astype(np.int64) + high).astype(dtype) for data in documents]
    found = repeated_token_spans(tokens, n, keep=keep, engine=engine)
    assert [items_in(spans) for spans in found] == plain(documents, n, keep)


@pytest.mark.skipif(not has_numba(), reason="numba is missing")
@pytest.mark.parametrize("piece", [1, 7])
@given(documents=corpora(), n=st.integers(2, 9), keep=KEEP)
@settings(max_examples=40, deadline=None)
def test_in_files_by_pieces(tmp_path_factory, piece, documents, n, keep):
    """Room for sixteen rows; ranges of one window, and of seven."""
    folder = tmp_path_factory.mktemp("substrings")
    paths = [folder / f"{i}.txt" for i in range(len(documents))]
    for path, data in zip(paths, documents, strict=True):
        path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(substrings, "PIECE", piece)
        patch.setattr(substrings, "AT_ONCE", 10)
        found = repeated_spans_of_files(paths, folder / "work", n_bytes=n, keep=keep, memory=LEAST)
    assert [items_in(spans) for spans in found] == plain(documents, n, keep)
    assert not (folder / "work").exists()
    assert [path.read_bytes() for path in paths] == documents


@pytest.mark.skipif(not has_numba(), reason="numba is missing")
def test_hashes_that_collide(monkeypatch):
    """With base 1 windows of the same letters have one hash, with base 0 those of one last letter: another is taken."""
    rng = np.random.default_rng(0)
    documents = [bytes(rng.integers(97, 99, 30).astype(np.uint8)) for _ in range(8)]
    wanted = {keep: plain(documents, 6, keep) for keep in ("first", "none")}
    asked = []

    def base(attempt):
        asked.append(attempt)
        return np.uint64([0, 1, 12345678901][attempt])

    monkeypatch.setattr(substrings, "_base", base)
    for keep, cut in wanted.items():
        assert [items_in(spans) for spans in repeated_spans(documents, 6, keep=keep)] == cut
    assert asked == [0, 1, 2, 0, 1, 2]
    monkeypatch.setattr(substrings, "_base", lambda attempt: np.uint64(0))
    with pytest.raises(RuntimeError, match="windows of 6 items have one hash"):
        repeated_spans(documents, 6)


@given(st.lists(st.text("aé語🙂", max_size=12), max_size=5), st.integers(2, 12), KEEP)
@settings(deadline=None)
def test_characters_stay_whole(texts, n, keep):
    """Oracle: of the bytes that are cut without regard to characters, those whose whole character is in one span."""
    data = [text.encode() for text in texts]
    items = np.frombuffer(b"".join(data), np.uint8)
    starts = np.cumsum([0, *map(len, data)])
    raw = [items_in(spans) for spans in repeats(items, starts, n, keep=keep, engine="python")]
    wanted = []
    for text, cut in zip(texts, raw, strict=True):
        left, place = "", 0
        for character in text:
            size = len(character.encode())
            if not {*range(place, place + size)} <= cut:
                left += character
            place += size
        wanted.append(left)
    assert without_repeats(texts, n, keep=keep) == wanted


@pytest.mark.parametrize("engine", ENGINES)
def test_a_copy_within_other_text(engine):
    """By hand: of 300 equal bytes all are cut from the second document; 199 are too few."""
    rng = np.random.default_rng(1)
    a, b, c = (rng.bytes(1000).hex().encode() for _ in range(3))
    documents = [a, b[:100] + a[500:800] + b[100:], c[:100] + a[900:1099] + c[100:]]
    found = repeated_spans(documents, engine=engine)
    assert [spans.tolist() for spans in found] == [[], [[100, 400]], []]
    assert without_spans(documents[1], found[1]) == b
    found = repeated_spans(documents, keep="none", engine=engine)
    assert [spans.tolist() for spans in found] == [[[500, 800]], [[100, 400]], []]


def test_nothing():
    assert repeated_spans([]) == [] and repeated_token_spans([]) == [] and without_repeats([]) == []
    assert [spans.tolist() for spans in repeated_spans([b"", b"ab"], 2)] == [[], []]


def test_what_is_refused(tmp_path):
    items = np.zeros(9, np.uint8)
    for wrong, message in [
        ({"n": 1}, "n=1"),
        ({"keep": "last"}, "keep='last'"),
        ({"engine": "c"}, "engine='c'"),
        ({"memory": LEAST - 1}, "memory="),
        ({"items_N": items.astype(np.int64)}, "got int64"),
        ({"items_N": items[:, None]}, r"\(9, 1\)"),
        *(({"starts": np.array(x, np.int64)}, "starts must ascend") for x in ([], [0], [1, 9], [0, 5, 4, 9], [0, 8])),
    ]:
        with pytest.raises(ValueError, match=message):
            repeats(**({"items_N": items, "starts": np.array([0, 9]), "n": 3} | wrong))
    with pytest.raises(ValueError, match="no such file"):
        repeated_spans_of_files([tmp_path / "none"], tmp_path / "work")
    with pytest.raises(ValueError, match="must be uint16"):
        repeated_token_spans([items.astype(np.uint16), items])
    assert not list(tmp_path.iterdir())
