"""Texts and bytes that the strategies draw. Oracles: the lists of pieces, bytes.decode, counts over many draws."""

import pytest

from purelm.testing import strategies as plm
from purelm.testing.strategies.text import ONES
from tests.testing.drawing import draws, simplest

LISTED = [piece for pieces in plm.PIECES.values() for piece in pieces]


def test_texts_have_every_piece():
    """Each listed piece, runs, characters that are not listed, special tokens and their parts."""
    special = ["<|endoftext|>", "<a b>"]
    found = draws(plm.texts(special), 3000)
    whole = "\n\n".join(found)
    assert not [p for p in LISTED if p not in whole]
    others = {*whole} - {*ONES} - {*"".join(special)}
    assert {len(c.encode()) for c in others} == {1, 2, 3, 4}, "UTF-8 holds them, in every length"
    for part in [*special, "endoftext|>", "<|endoftext", "<a ", " b>"]:
        assert whole.count(part) > 50, part
    runs = " ".join(draws(plm.texts(kinds="runs"), 3000))
    assert not [one for one in ONES if one * 15 not in runs]
    assert "" in found and any(text.startswith("\ufeff") for text in found) and max(map(len, found)) > 200


@pytest.mark.parametrize("kind", plm.PIECES)
def test_texts_shrink(kind):
    """To one piece; within a kind to the first that fails, where what holds it stands behind it."""
    first = plm.PIECES[kind][0]
    assert simplest(plm.texts(kinds=kind), lambda text: first in text) == first
    assert simplest(plm.texts(), lambda text: first in text) in {*LISTED, first * 2}


def test_options_of_texts():
    for kind, pieces in plm.PIECES.items():
        assert {c for text in draws(plm.texts(kinds=kind), 100) for c in text} == {*"".join(pieces)}, kind
    assert not any("<|endoftext|>" in text for text in draws(plm.texts(()), 1000))
    assert {*draws(plm.texts(["ab"], kinds="special", max_pieces=1), 200)} == {"", "ab", "a", "b"}
    assert {*draws(plm.texts(["x"], kinds=["special"], max_pieces=1), 50)} == {"", "x"}
    density = sum(text.count("<s>") for text in draws(plm.texts(["<s>"], kinds=("special", "letters")))) / 1000
    assert density > 0.8, "about 5 pieces a text, of which a quarter is a special token"
    assert max(len(text) for text in draws(plm.texts(kinds="runs", max_run=3, max_pieces=2), 300)) == 6
    assert simplest(plm.texts()) == ""


def test_byte_strings():
    """Oracle: bytes.decode."""
    found = draws(plm.byte_strings())
    assert not [p for p in plm.BYTE_PIECES if not any(p in data for data in found)]
    assert {value for data in draws(plm.byte_strings(), 3000) for value in data} == {*range(256)}

    def is_text(data):
        return data.decode("utf-8", "ignore").encode() == data

    assert sum(not is_text(data) for data in found) > 800 and any(data and is_text(data) for data in found)
    assert len(simplest(plm.byte_strings(), lambda data: not is_text(data))) < 4
