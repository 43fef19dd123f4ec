"""C4's rules. Oracles: the paper's rules one line and one rule at a time, over str's methods; by hand."""

from dataclasses import replace

import pytest
from hypothesis import given

from purelm.curate import c4 as module
from purelm.curate.c4 import C4, FINEWEB, Lines, LongLines, clean, long_lines
from purelm.curate.document import Drop
from purelm.curate.words import scan
from tests.curate.test_words import slow_row
from tests.curate.web_texts import ENGINES, any_text, page

SENTENCE = "Some five words are here."
PAGE = "\n".join([SENTENCE] * 5)


def kept(text, **rules):
    """The lines that are left, without a rule for documents unless it is given; or the Drop."""
    found = clean(scan(text, "python"), replace(C4, **{"least_sentences": None, **rules}))
    return found if isinstance(found, Drop) else found.text.split("\n") if found.text else []


def slow(text, config):
    """The rules in the order of the code, each on a line."""
    sentences, lines = 0, []
    for line in text.split("\n"):
        line = line.strip()
        lower = line.lower()
        if not line or len(line.split()) < 3 or any(len(word) > 1000 for word in line.split()):
            continue
        if config.terminal_punctuation and (line[-1] not in ".?!\"'" or line[-3:] == "..."):
            continue
        if "lorem ipsum" in lower:
            return Drop("lorem ipsum")
        if "javascript" in lower:
            continue
        if "{" in line:
            return Drop("curly bracket")
        if any(phrase in lower for phrase in config.policies):
            continue
        sentences += slow_row(line)[5]
        lines.append(line)
    return "\n".join(lines) if sentences >= config.least_sentences else Drop("too few sentences", sentences)


@pytest.mark.parametrize("config", [C4, FINEWEB, replace(C4, least_sentences=1)])
@given(text=page | any_text)
def test_all_rules(config, text):
    """Marks of citations apart, which go first."""
    text = text.replace("[", "(")
    for engine in ENGINES:
        found = clean(scan(text, engine), config)
        assert (found if isinstance(found, Drop) else found.text) == slow(text, config)
        if not isinstance(found, Drop):
            assert found.totals == scan(found.text, "python").totals


@given(page)
def test_a_second_pass_changes_nothing(text):
    text = text.replace("[[", "")  # what is left of marks within marks can be a mark
    once = clean(scan(text, "python"), replace(C4, least_sentences=1))
    if not isinstance(once, Drop):
        twice = clean(once, replace(C4, least_sentences=1))
        assert twice is once


def test_lines():
    assert kept("A line without an end\nOne with an end.\nTo be continued...\n He said 'so it is' \nSo?") == [
        "One with an end.",
        "He said 'so it is'",
    ]
    assert kept("Two words.\nThree words, yes.\nA line", terminal_punctuation=False) == ["Three words, yes."]
    assert kept("Two words.", least_line_words=None) == ["Two words."]
    word = "x" * 1000
    assert kept(f"a {word} fits.\na {word}x does not.") == [f"a {word} fits."]
    assert kept(f"a {word}x does not.", most_word_length=None) == [f"a {word}x does not."]
    assert kept("Please turn on JavaScript now.\nRead our Privacy Policy here.\nAll is well.") == ["All is well."]
    assert kept("Please turn on JavaScript now.", javascript=False) == ["Please turn on JavaScript now."]
    assert kept("Read our Privacy Policy here.", policies=()) == ["Read our Privacy Policy here."]


def test_documents():
    assert clean(scan(PAGE)).text == PAGE
    assert clean(scan(PAGE[:-1])) == Drop("too few sentences", 4)
    assert kept("A Lorem ipsum dolor.") == Drop("lorem ipsum")
    assert kept("A brace { in code.") == Drop("curly bracket")
    assert kept("lorem ipsum {\nBut this line stays.") == ["But this line stays."]  # the line is gone before
    assert kept("Some javascript has { in it.\nBut this line stays.") == ["But this line stays."]
    assert kept("A lorem ipsum { here.", lorem_ipsum=False, curly_brackets=False) == ["A lorem ipsum { here."]
    assert kept("There is a Darn word.", bad_words=("damn", "darn")) == Drop("bad word", "darn")
    assert kept("There is darning to do.", bad_words=("darn",)) == ["There is darning to do."]


def test_citations():
    assert kept("Known facts[1][23] are here.[citation needed]") == ["Known facts are here."]
    assert kept("History of it[edit] now. [] [a]", terminal_punctuation=False) == ["History of it now.  [a]"]
    assert kept("Known facts[1] are here.", citations=False) == ["Known facts[1] are here."]


def test_long_lines():
    text = "\n".join(["x" * 200] * 2 + [" " + "x" * 199 + " "])
    assert long_lines(scan(text)) == Drop("too few long lines", 2)
    assert long_lines(scan(text), LongLines(least_characters=199)).text == text
    with pytest.raises(ValueError, match="least_lines=-1"):
        LongLines(least_lines=-1)


def test_too_many_lines(monkeypatch):
    monkeypatch.setattr(module, "MOST_LINES", 3)
    assert clean(scan(PAGE)) == Drop("too many lines", 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"least_sentences": -5}, "least_sentences=-5"),
        ({"most_word_length": 1e3}, "most_word_length=1000.0"),
        ({"policies": ("Privacy",)}, "policies has 'Privacy'; give it in lower case"),
        ({"bad_words": "darn"}, "bad_words='darn'"),
    ],
)
def test_ranges(wrong, message):
    with pytest.raises(ValueError, match=message):
        Lines(**wrong)
