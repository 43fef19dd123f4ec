"""RefinedWeb's corrections. Oracles: the rules one line at a time over str's methods; by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.curate import refinedweb as module
from purelm.curate.document import Drop
from purelm.curate.refinedweb import REFINEDWEB, Corrections, clean
from purelm.curate.words import scan
from tests.curate.web_texts import ENGINES, any_text, page

LINES = replace(REFINEDWEB, most_removed=None)
phrases = st.sampled_from(
    ["sign-in", "Sign-In ", "items in cart", "items ", "in cart", " read more...", "3 likes", "UP", "a b"]
)
cuttable = st.lists(st.lists(phrases, max_size=6).map("".join), max_size=5).map("\n".join)


def kept(text, config=LINES):
    found = clean(scan(text, "python"), config)
    return found if isinstance(found, Drop) else found.text.split("\n")


@pytest.mark.parametrize("engine", ENGINES)
@given(text=page | any_text)
def test_lines(engine, text):
    """Without phrases to cut and counters, which are below."""
    found = clean(scan(text, engine), replace(LINES, counters=False, cut_up_to=None))
    lines = []
    for piece in text.split("\n"):
        line = piece.strip()
        upper, digits = sum(map(str.isupper, line)), sum(map(str.isdigit, line))
        if not line or (2 * upper <= len(line) and digits < len(line) and len(line.split()) >= 2):
            lines.append(piece)
    assert found.text == "\n".join(lines).strip()


@given(page | cuttable)
def test_a_second_pass_changes_nothing(text):
    once = clean(scan(text, "python"), LINES)
    assert clean(once, LINES) is once
    assert not isinstance(clean(once, REFINEDWEB), Drop)


def test_counters():
    text = "3 likes\n* 1,234 comments *\n12.5k Views\n3 likes for you\nlikes 3\nwe have 3 likes"
    assert kept(text) == text.split("\n")[3:]
    assert kept(text, replace(LINES, counters=False)) == text.split("\n")


def test_cuts():
    assert kept("Sign-in to go on\nThe news of today Read more...\nThere are 3 items in cart now") == [
        "to go on",
        "The news of today",
        "There are 3 now",
    ]
    assert kept("sign-in\nread more...\nHe will sign-in again") == ["He will sign-in again"]
    assert kept("items items in cart in cart of ours") == ["of ours"]  # a cut can make another
    long = "sign-in one two three four five six seven eight nine ten"
    assert kept(long) == [long] and kept(long[:-4]) == [long[8:-4]]
    assert kept(long[:-4], replace(LINES, cut_up_to=None)) == [long[:-4]]


def test_documents():
    words = "nineteen of twenty words are kept " * 3 + "as this is"  # 21 words
    assert kept(f"{words}\nONE", REFINEDWEB) == [words]
    assert kept(f"{words}\nONE TWO", REFINEDWEB) == Drop("words removed", 2 / 23)
    assert kept(f"{words}\n\n1\n\n{words}", REFINEDWEB) == [words, "", "", words]
    assert kept("", REFINEDWEB) == [""]


def test_limits(monkeypatch):
    monkeypatch.setattr(module, "MOST_LINES", 1)
    assert clean(scan("a b\nb c\nc d")) == Drop("too many lines", 2)
    with pytest.raises(ValueError, match="most_upper=50"):
        Corrections(most_upper=50)
    with pytest.raises(ValueError, match="cut_up_to=-1"):
        Corrections(cut_up_to=-1)
