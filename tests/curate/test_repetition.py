"""Repetition. Oracles: the definitions by brute force over lists of words and lines; engines against each other."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.curate import repetition as module
from purelm.curate.document import Drop
from purelm.curate.repetition import GOPHER, Repetition, duplicates, repeats, repetition
from purelm.curate.words import scan
from tests.curate.web_texts import ENGINES, any_text, few, page

OFF = Repetition(None, None, None, None, (), ())


def slow_top(words, n):
    """Compares every n-gram with every other."""
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    times = [sum(words[i : i + n] == words[j : j + n] for j in range(len(grams))) for i in range(len(grams))]
    return max(times) * len(grams[times.index(max(times))]) if grams else 0


def slow_duplicate(words, n):
    """Compares an n-gram with those where the search has been."""
    been, total, i = [], 0, 0
    while i + n <= len(words):
        if any(words[j : j + n] == words[i : i + n] for j in been):
            total += sum(map(len, words[i : i + n]))
            i += n
        else:
            been.append(i)
            i += 1
    return total


@pytest.mark.parametrize("engine", ENGINES)
@given(words=few(2) | few(3) | few(4, 40))
def test_ngrams(engine, words):
    found = repeats(scan(" ".join(words), engine), 12)
    assert found.top == (0, *(slow_top(words, n) for n in range(1, 13)))
    assert found.duplicate == (0, *(slow_duplicate(words, n) for n in range(1, 13)))


@given(any_text | page, st.integers(1, 11))
def test_engines_agree(text, most):
    assert repeats(scan(text, "numba"), most) == repeats(scan(text, "python"), most)


@pytest.mark.parametrize("engine", ENGINES)
def test_long_texts(engine):
    """Tables of many slots; a word of a megabyte; the de Bruijn sequence has each 3-gram of its letters once."""
    words = [str(i * i % 9973) for i in range(30_000)]
    found = repeats(scan(" ".join(words), engine))
    counts = Counter(pairwise(words))
    (one, two), times = counts.most_common(1)[0]
    assert found.top[2] == times * (len(one) + len(two) + 1)
    long = "\U0001f600" * 10**6
    assert repeats(scan(f"{long} {long} a", engine), 2).duplicate == (0, 10**6, 0)
    sequence = "a a a b a b b b a a".split()
    assert repeats(scan(" ".join(sequence), engine), 3).duplicate[3] == 0
    assert repeats(scan(" ".join(sequence), engine), 3).top[3] == 5


@given(st.lists(st.text("ab", max_size=2)))
def test_duplicates(pieces):
    again = [piece for i, piece in enumerate(pieces) if piece in pieces[:i]]
    assert duplicates(pieces) == (len(again), len("".join(again)))


def value(text, **rule):
    """What a rule measures where it allows nothing; 0 where it keeps."""
    found = repetition(scan(text, "python"), replace(OFF, **rule))
    return found.value if isinstance(found, Drop) else 0


def test_by_hand():
    text = "a cat\nis\n\n a cat \nis\n \nis"
    assert value(text, lines=0) == 3 / 5
    assert value(text, line_characters=0) == (5 + 2 + 2) / len(text)
    assert value("a\nb\n\n\nc\n \na\nb", paragraphs=0) == 1 / 3
    assert value("a\nb\n\n\nc\n \na\nb", paragraph_characters=0) == 3 / 13
    assert value("x yy x yy", top_ngrams=((2, 0),)) == 8 / 9
    assert value("x yy x yy", duplicate_ngrams=((2, 0),)) == 3 / 9
    assert value("x yy x yy", duplicate_ngrams=((3, 0),)) == 0


@pytest.mark.parametrize("rule", ["lines", "line_characters", "paragraphs", "paragraph_characters"])
def test_at_the_threshold_is_kept(rule):
    text = "aaaa\n\naaaa"
    share = 0.5 if rule in ("lines", "paragraphs") else 0.4
    assert value(text, **{rule: share}) == 0 and value(text, **{rule: share - 1e-9}) == share


def test_ngrams_at_the_threshold_are_kept():
    for name, share in (("top_ngrams", 8 / 9), ("duplicate_ngrams", 3 / 9)):
        assert value("x yy x yy", **{name: ((2, share),)}) == 0
        assert value("x yy x yy", **{name: ((2, share - 1e-9),)}) == share


RULES = [
    *({name: getattr(GOPHER, name)} for name in ("lines", "paragraphs", "line_characters", "paragraph_characters")),
    *({"top_ngrams": (rule,)} for rule in GOPHER.top_ngrams),
    *({"duplicate_ngrams": (rule,)} for rule in GOPHER.duplicate_ngrams),
]


@given(page)
def test_rules_are_independent(text):
    """Dropped by all if by one, with a share past the threshold of some rule."""
    found = repetition(scan(text, "python"))
    alone = [(rule, value(text, **rule)) for rule in RULES]
    assert isinstance(found, Drop) == any(share for _, share in alone)
    for rule, share in alone:
        (most,) = rule.values()
        assert share == 0 or share > (most[0][1] if isinstance(most, tuple) else most)
    if isinstance(found, Drop):
        assert found.value in [share for _, share in alone]


@given(page.filter(str.strip))
def test_repeating_a_text_does_not_lower_shares(text):
    twice = f"{text}\n\n{text}"
    assert value(twice, lines=0) >= max(value(text, lines=0), 0.5)
    assert value(twice, paragraphs=0) >= max(value(text, paragraphs=0), 0.5)
    for n in range(1, 8):
        one, two = (repeats(scan(x, "python"), n).duplicate[n] for x in (text, twice))
        assert two >= one


def test_limits(monkeypatch):
    monkeypatch.setattr(module, "MOST_WORDS", 3)
    monkeypatch.setattr(module, "MOST_LINES", 2)
    assert repetition(scan("a b c d", "python")) == Drop("too many words", 4)
    assert repetition(scan("a\n\n\nb", "python")) == Drop("too many lines", 3)
    assert repetition(scan("a\n\n\nb", "python"), OFF).text == "a\n\n\nb"
    with pytest.raises(ValueError, match="words of the text=4: allowed is 0 to 3"):
        repeats(scan("a b c d", "python"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lines": 1.5}, "lines=1.5; allowed: a number from 0 to 1"),
        ({"paragraph_characters": float("nan")}, "paragraph_characters=nan"),
        ({"lines": True}, "lines=True"),
        ({"top_ngrams": ((0, 0.5),)}, "n of top_ngrams=0"),
        ({"duplicate_ngrams": ((5, -0.1),)}, "duplicate_ngrams has -0.1 for n = 5"),
    ],
)
def test_ranges(wrong, message):
    with pytest.raises(ValueError, match=message):
        Repetition(**wrong)
