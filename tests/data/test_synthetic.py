"""The story source: exact probabilities, entropy against Monte Carlo, purity in (seed, index), readable shape."""

import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm import random
from purelm.data import grammar as grammars
from purelm.data import stories
from purelm.data.grammar import Variable, derive, every_text
from purelm.data.grammar_build import build
from purelm.data.synthetic import entropy, floor_bits_per_byte, log_prob, parse, sample, story_grammar


@given(seed=st.integers(0, 10**9))
def test_parse_returns_the_choices_made(seed):
    """Oracle: the choices recorded while rendering; their logs sum to log_prob."""
    grammar = story_grammar()
    draws = random.bits(random.key(seed), (grammar.max_choices,)).tolist()
    text, choices = derive(grammar, draws)
    assert parse(text) == choices
    assert log_prob(text) == math.fsum(choice.log_prob for choice in choices)


def test_entropy_against_monte_carlo():
    """Oracle: the mean of -log p and of bytes over 1,000 stories, within 4 standard errors each."""
    documents = list(sample(1, 1000))
    closed = entropy()
    nats = [-log_prob(text) for text in documents]
    for values, mean in (
        (nats, closed.nats_per_document),
        ([len(text.encode()) for text in documents], closed.bytes_per_document),
    ):
        found = math.fsum(values) / len(values)
        error = math.sqrt(math.fsum((v - found) ** 2 for v in values)) / len(values)
        assert abs(found - mean) < 4 * error
    floor = floor_bits_per_byte(documents)
    assert floor == pytest.approx(sum(nats) / math.log(2) / sum(map(len, documents)), rel=1e-12)
    assert abs(floor / closed.bits_per_byte - 1) < 0.01


def cut(n_values, n_words, n_sentences):
    """The story grammar with the first few values of variables and alternatives of picks."""
    variables = {}
    for name, variable in story_grammar().variables.items():
        values, weights = variable.values[:n_values], variable.weights[:n_values]
        table = [row[:n_values] for row in variable.table[:n_values]]
        variables[name] = Variable(values, weights, variable.parent, table)
    kept = {name: n_words if name in stories.WORDS else n_sentences for name in stories.PICKS}
    return variables, {name: alternatives[: kept[name]] for name, alternatives in stories.PICKS.items()}


@pytest.mark.parametrize(
    ("start", "n_values", "n_words", "n_sentences"),
    [
        ("opening", 2, 4, 6),
        ("lost_toy", 2, 1, 2),
        ("animal_friend", 3, 1, 1),
        ("quarrel", 4, 1, 1),
        ("learning", 3, 1, 1),
        ("surprise", 3, 1, 1),
        ("story", 2, 1, 1),
    ],
)
def test_cuts_of_the_grammar_by_enumeration(start, n_values, n_words, n_sentences):
    """Oracle: enumeration of cuts of the real grammar: distinct texts, probabilities of sum 1, the closed entropy."""
    grammar = build(*cut(n_values, n_words, n_sentences), start)
    texts = list(every_text(grammar))
    assert 10 < len(texts) < 200_000
    assert len({text for text, _ in texts}) == len(texts)
    assert math.isclose(math.fsum(math.exp(lp) for _, lp in texts), 1, rel_tol=1e-9)
    closed = grammars.entropy(grammar)
    assert math.isclose(closed.nats_per_document, -math.fsum(math.exp(lp) * lp for _, lp in texts), rel_tol=1e-9)
    n_bytes = math.fsum(math.exp(lp) * len(text) for text, lp in texts)
    assert math.isclose(closed.bytes_per_document, n_bytes, rel_tol=1e-9)


def test_document_depends_on_seed_and_index_only():
    """Oracle: the long run. Any part of the corpus is the same however it is asked for; seeds differ."""
    whole = list(sample(5, 600))
    assert list(sample(5, 100, start=450)) == whole[450:550]
    assert next(sample(5, start=511)) == whole[511] and next(sample(random.key(5), 1, start=256)) == whole[256]
    assert list(sample(5, 0)) == [] and list(sample(5, 0, start=256)) == []
    assert list(itertools.islice(sample(5), 600)) == whole
    assert len(set(whole) | set(sample(6, 600))) == 1200
    with pytest.raises(ValueError, match="start=-1"):
        sample(5, 1, start=-1)


def test_golden_document():
    """The corpus of a seed is part of results. `next(sample(0))` regenerates it; a change is a change of the data."""
    assert next(sample(0)) == GOLDEN


def test_other_texts_are_refused():
    """A text that differs anywhere from a story is not one, and the message says from where on."""
    story = next(sample(0))
    for wrong in ("", story[:-1], story + " ", story[1:], story.replace("\n", " ", 1), story.replace(" ", "  ", 1)):
        with pytest.raises(ValueError, match="not of this grammar from character"):
            log_prob(wrong)
    at = story.index("\n") + 5
    with pytest.raises(ValueError, match=rf"from character ({'|'.join(str(at - i) for i in range(12))}) on"):
        log_prob(story[:at] + "#" + story[at:])
    with pytest.raises(ValueError, match="documents: empty"):
        floor_bits_per_byte([])


def test_shape_of_the_corpus():
    """Stated facts: ASCII, three paragraphs, 400 to 1,100 bytes, a floor near 0.3 bits per byte, names that recur."""
    closed = entropy()
    assert 0.30 < closed.bits_per_byte < 0.31 and 600 < closed.bytes_per_document < 700
    for text in sample(2, 500):
        assert text.isascii() and text.count("\n") == 2 and "  " not in text and text[-1] in ".!\""
        assert 350 < len(text) < 1200
        (hero,) = [choice.chosen for choice in parse(text) if choice.name == "hero"]
        assert text.count(stories.NAMES[hero]) >= 2
        # The first sentence names the child's sex; even numbers in the list are girls.
        assert (" girl " in text.split(".")[0]) == (hero % 2 == 0)


def test_articles():
    """No "a" before a vowel and no "an" before a consonant, in any of 2,000 stories."""
    for text in sample(3, 2000):
        words = text.replace("\"", "").split()
        for article, word in itertools.pairwise(words):
            if article in ("a", "an", "A", "An"):
                assert (article.lower() == "an") == (word[0].lower() in "aeiou"), (article, word)


def test_light_import():
    """Importing the data modules brings in none of what is optional."""
    code = (
        "import sys, purelm.data, purelm.data.synthetic\n"
        "heavy = {'numba', 'matplotlib', 'datasets', 'zstandard', 'pandas', 'tiktoken', 'rich', 'tyro'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


GOLDEN = (
    "Once upon a time, there was a kind, curious boy named Oscar. He wanted to throw a ball. But he "
    "was very afraid of missing it.\n"
    "One lovely day, his uncle found him on the field. He saw four spotted crows, three cows and a "
    "round door. He felt so hopeful, but the ball went the wrong way. His nose and arms hurt, and he"
    " felt shaken and lonely. \"You have to think,\" he laughed in a warm voice. So Oscar tried again "
    "and did not think of missing it. And then he threw the ball right into the basket!\n"
    "\"I did it!\" Oscar murmured proudly and hummed and whistled. Oscar felt really excited and made "
    "beans and pancakes. Oscar and his uncle twirled, ran and grinned until the wind stopped."
)
