"""Texts and bytes that the strategies draw. Oracles: the lists of pieces, bytes.decode, counts over many draws."""

import pytest

from purelm.testing import strategies as plm
from purelm.testing.strategies.text import ONES
from tests.testing.drawing import draws, reached, simplest

LISTED = [piece for pieces in plm.PIECES.values() for piece in pieces]


def test_texts_have_every_piece():
    """Each listed piece, special tokens and their parts, characters of each length in UTF-8 that are not listed."""
    special = ["<|endoftext|>", "<a b>"]
    parts = [*special, "endoftext|>", "<|endoftext", "<a ", " b>"]

    def features(text):
        yield from (piece for piece in (*LISTED, *parts) if piece in text)
        yield from (f"other of {len(c.encode())} bytes" for c in {*text} - {*ONES, *"".join(special)})
        yield "none" if not text else "many" if len(text) > 100 else "some"
        if text.startswith("\ufeff"):
            yield "byte order mark first"

    others = {f"other of {n} bytes" for n in (1, 2, 3, 4)}
    expected = {*LISTED, *parts, *others, "none", "many", "byte order mark first"}
    assert reached(plm.texts(special), features, expected) == expected | {"some"}


def test_runs_of_every_character():
    def features(text):
        yield from (one for one in {*text} if one * 8 in text)

    assert reached(plm.texts(kinds="runs"), features, ONES) == {*ONES}


@pytest.mark.parametrize("kind", plm.PIECES)
def test_texts_shrink(kind):
    """To one piece; within a kind to the first that fails, where what holds it stands behind it."""
    first = plm.PIECES[kind][0]
    assert simplest(plm.texts(kinds=kind), lambda text: first in text) == first
    assert simplest(plm.texts(), lambda text: first in text) in {*LISTED, first * 2}


def test_options_of_texts():
    for kind, pieces in plm.PIECES.items():
        assert reached(plm.texts(kinds=kind), set, {*"".join(pieces)}) == {*"".join(pieces)}, kind
    assert not any("<|endoftext|>" in text for text in draws(plm.texts(()), 1000))
    assert {*draws(plm.texts(["ab"], kinds="special", max_pieces=1), 200)} == {"", "ab", "a", "b"}
    assert {*draws(plm.texts(["x"], kinds=["special"], max_pieces=1), 50)} == {"", "x"}
    density = sum(text.count("<s>") for text in draws(plm.texts(["<s>"], kinds=("special", "letters")))) / 1000
    assert density > 0.6, "about 5 pieces a text, of which a quarter is a special token"
    assert max(len(text) for text in draws(plm.texts(kinds="runs", max_run=3, max_pieces=2), 300)) == 6
    assert simplest(plm.texts()) == ""


def test_byte_strings():
    """Oracle: bytes.decode."""

    def is_text(data):
        return data.decode("utf-8", "ignore").encode() == data

    def features(data):
        yield from (piece for piece in plm.BYTE_PIECES if piece in data)
        yield from data  # its bytes, as numbers
        yield "text" if data and is_text(data) else "none" if not data else "no text"

    reached(plm.byte_strings(), features, {*plm.BYTE_PIECES, *range(256), "text", "none", "no text"})
    assert sum(not is_text(data) for data in draws(plm.byte_strings())) > 500
    assert len(simplest(plm.byte_strings(), lambda data: not is_text(data))) < 4
