"""FineWeb's rules. Oracles: the published sentences over lists of lines; by hand."""

from dataclasses import replace

import pytest
from hypothesis import given

from purelm.curate import fineweb as module
from purelm.curate.document import Drop
from purelm.curate.fineweb import FINEWEB, PAPER, Quality, quality
from purelm.curate.words import scan
from tests.curate.test_words import slow_totals
from tests.curate.web_texts import ENGINES, any_text, page

RULES = ("least_punctuated", "most_short_lines", "most_duplicate_characters", "most_newlines")
OFF = Quality(**dict.fromkeys(RULES))


def shares(text):
    lines = [x.strip() for x in text.split("\n") if x.strip()]
    again = [x for i, x in enumerate(lines) if x in lines[:i]]
    return (
        slow_totals(text).punctuated / len(lines),
        sum(len(x) <= 30 for x in lines) / len(lines),
        sum(map(len, again)) / len(text.replace("\n", "")),
        text.count("\n") / len(text.split()),
    )


@pytest.mark.parametrize("engine", ENGINES)
@given(text=page | any_text)
def test_each_rule_and_all_together(engine, text):
    found = quality(scan(text, engine))
    if not text.split():
        assert found == Drop("empty", 0)
        return
    measured = dict(zip(RULES, shares(text), strict=True))
    dropped = []
    for name, share in measured.items():
        most = getattr(FINEWEB, name)
        alone = quality(scan(text, engine), replace(OFF, **{name: most}))
        past = share < most if name.startswith("least") else share > most
        assert (isinstance(alone, Drop) and alone.value) == (past and share)
        dropped += [alone] * past
    assert found in dropped if dropped else found.text == text


def test_by_hand():
    line = "A line of more than thirty characters"
    assert quality(scan("\n".join([line + "."] * 99))).reason == "duplicate line characters"
    lines = [f"{line} {i}" for i in range(100)]
    assert quality(scan("\n".join([*(x + "\u3002" for x in lines[:12]), *lines[12:]]))).__class__ is not Drop
    assert quality(scan("\n".join([*(x + "!" for x in lines[:11]), *lines[11:]]))) == Drop(
        "lines without punctuation", 0.11
    )
    short = [f"{i} has thirty characters in it."[:30].ljust(30, ".") for i in range(10, 78)]
    assert quality(scan("\n".join([*short, *(x + "." for x in lines[:32])]))) == Drop("short lines", 0.68)
    assert quality(scan("\n".join(x + "." for x in lines[:2]) + "\n" * 5)) == Drop("newlines", 6 / 16)
    twice = "\n".join(x + "." for x in [*lines[:20], lines[0]])
    assert quality(scan(twice)).reason == "duplicate line characters" and quality(scan(twice), PAPER).text == twice


def test_limits(monkeypatch):
    monkeypatch.setattr(module, "MOST_LINES", 1)
    assert quality(scan("a.\nb.\nc.")) == Drop("too many lines", 2)
    with pytest.raises(ValueError, match="short_line=None"):
        Quality(short_line=None)
    with pytest.raises(ValueError, match="short_line=-1"):
        Quality(short_line=-1)
    with pytest.raises(ValueError, match="most_short_lines=67; allowed: a number from 0 to 1"):
        Quality(most_short_lines=67)
