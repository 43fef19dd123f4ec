"""The shared pass. Oracles: str's own methods over the whole text; by hand; engines against each other."""

import re
import tracemalloc
import unicodedata

import numpy as np
import pytest
import regex
from hypothesis import given

from purelm.curate import words
from purelm.curate.characters import SENTENCE, SPACE, character_table
from purelm.curate.document import Document, Drop
from purelm.curate.repetition import repetition
from purelm.curate.rules import judged
from purelm.curate.words import Totals, changed, lines, scan
from tests.curate.web_texts import ENGINES, any_text, page

ENDS = re.compile(r"[.!?][\"')\]}\u2019\u201d\u00bb]*\Z")


def counts(word):
    return any(unicodedata.category(c)[0] not in "PSC" for c in word)


def slow_totals(text):
    found = text.split()
    rows = [x.strip() for x in text.split("\n") if x.strip()]
    return Totals(
        characters=len(text),
        words=len(found),
        counted=sum(map(counts, found)),
        counted_characters=sum(len(w) for w in found if counts(w)),
        lettered=sum(any(c.isalpha() for c in w) for w in found),
        hashes=text.count("#"),
        ellipses=text.count("...") + text.count("\u2026"),
        newlines=text.count("\n"),
        lines=len(rows),
        bullets=sum(x[0] in "-\u2022" for x in rows),
        ellipsis_lines=sum(x[-1] == "\u2026" or x[-3:] == "..." for x in rows),
        punctuated=sum(regex.search(r"\p{Sentence_Terminal}\Z", x) is not None for x in rows),
    )


def slow_row(line):
    found = line.split()
    ends = [re.search(ENDS, w) is not None for w in found]
    return [
        len(line),
        len(found),
        max(map(len, found)),
        sum(c.isupper() for c in line),
        sum(c.isdigit() for c in line),
        sum(ends) + (not ends[-1]),
    ]


@pytest.mark.parametrize("engine", ENGINES)
@given(text=any_text | page)
def test_totals_and_rows(engine, text):
    found = scan(text, engine)
    assert found.totals == slow_totals(text)
    assert lines(found) == [x.strip() for x in text.split("\n") if x.strip()]
    assert found.rows.tolist() == [slow_row(x) for x in lines(found)]


@pytest.mark.parametrize("engine", ENGINES)
def test_by_hand(engine):
    found = scan("\n - One # (2) two...\n\n\u00a1HOLA! \u201cYes.\u201d ... ok \r\n\U0001f600", engine)
    assert found.totals == Totals(
        characters=46, words=10, counted=6, counted_characters=26, lettered=5, hashes=1, ellipses=2, newlines=4,
        lines=3, bullets=1, ellipsis_lines=1, punctuated=1,
    )  # fmt: skip
    assert found.rows.tolist() == [[18, 5, 6, 1, 1, 1], [20, 4, 6, 5, 0, 4], [1, 1, 1, 0, 0, 1]]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing(engine):
    for text in ("", " ", "\n", "\x00"):
        found = scan(text, engine)
        assert found.totals == slow_totals(text) and len(found.rows) == (text == "\x00")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_lines_have_rows(engine, monkeypatch):
    monkeypatch.setattr(words, "MOST_LINES", 3)
    found = scan("a\nbb\n\nccc\ndddd\n", engine)
    assert found.rows[:, words.CHARACTERS].tolist() == [1, 2, 3] and found.totals.lines == 4
    with pytest.raises(ValueError, match="text of 5 lines; allowed: 3"):
        lines(found)


def test_a_hundred_megabytes_in_a_line():
    """Memory beside the text and its UTF-8 stays under 10 MB, and for what repetition looks at too."""
    text = "ab. " * 25_000_000
    tracemalloc.start()
    found = scan(text, "numba")
    assert found.rows.tolist() == [[10**8 - 1, 25_000_000, 3, 0, 0, 25_000_000]]
    assert repetition(found) == Drop("too many words", 25_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 210_000_000 + 10_000_000
    assert judged(Document("1", "\n" * 10**7 + "a"), engine="numba") == Drop("gopher: too few words", 1)


@given(page, page)
def test_changed(a, b):
    for engine in ENGINES:
        one, other = changed(scan(a, engine), b), scan(b, engine)
        assert one.totals == other.totals and np.array_equal(one.rows, other.rows)


def test_space_is_what_split_cuts_at():
    table = character_table()
    assert all(bool(bits & SPACE) == (not chr(code).split()) for code, bits in enumerate(table))
    assert [chr(code) for code in np.flatnonzero(table & SENTENCE)] == ["!", ".", "?"]


def test_engines():
    with pytest.raises(ValueError, match="engine='rust'"):
        scan("a", "rust")


@pytest.mark.parametrize("engine", ENGINES)
def test_dots(engine):
    """Three dots in a row at the end, and nothing else: not three in all, nor of two words."""
    for text, ends in {
        "a...": 1,
        "...a.": 0,
        "a.b.c.": 0,
        ". . .": 0,
        ".. .": 0,
        "a... ": 1,
        "....": 1,
        "... .": 0,
    }.items():
        found = scan(text, engine).totals
        assert (found.ellipsis_lines, found.ellipses) == (ends, text.count("...")), text
