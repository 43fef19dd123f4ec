"""Grammars: one derivation a text, probabilities that sum to 1, entropy equal to enumeration; bad ones are refused."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm import random
from purelm.data.grammar import Variable, _Reader, derive, entropy, every_text, parse, render
from purelm.data.grammar_build import build

CHILD = Variable(({"": "girl", "he": "she", "He": "She"}, {"": "boy", "he": "he", "He": "He"}), (2, 1))
NAME = Variable(tuple({"": n} for n in ("Ann", "Bob", "Eve", "Dan")), (), "child", ((3, 0, 1, 0), (0, 2, 0, 5)))
FRIEND = Variable(
    NAME.values, (), "name", tuple(tuple(0 if i == j else 1 + i for i in range(4)) for j in range(4))
)
THING = Variable(({"": "owl", "a": "an owl"}, {"": "ball", "a": "a ball"}, {"": "hat", "a": "a hat"}), (5, 2, 1))
SMALL = {
    "variables": {"child": CHILD, "name": NAME, "friend": FRIEND, "thing": THING},
    "picks": {
        "start": [(3, "[open] [toy][meets]"), (1, "[open] [meets] The end.")],
        "open": [(2, "There was a [kind] {child}, {name}."), (1, "There was one [kind] {child} called {name}.")],
        "kind": [(4, "good"), (2, "bad"), (1, "gray")],
        "toy": [(1, "{child.He} had {thing.a}, a [kind] {thing}. "), (2, "{child.He} saw {thing.a}. ")],
        "meets": [(1, "{name} met {friend}."), (2, "{friend} met {name} and {child.he} was [kind]."), (1, "A day!")],
    },
    "start": "start",
}


def small():
    return build(**SMALL)


def test_probabilities_sum_to_one_and_texts_are_distinct():
    """Oracle: enumeration of all derivations."""
    texts = list(every_text(small()))
    assert len(texts) > 500
    assert abs(math.fsum(math.exp(log_p) for _, log_p in texts) - 1) < 1e-12
    assert len({text for text, _ in texts}) == len(texts)
    ordered = sorted(text for text, _ in texts)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))  # one says where it ends


def test_entropy_is_that_of_the_enumeration():
    """Oracle: -sum p log p and sum p bytes over all texts; fp64 sums of some thousand terms, so 1e-12."""
    texts = list(every_text(small()))
    closed = entropy(small())
    assert math.isclose(
        closed.nats_per_document, -math.fsum(math.exp(lp) * lp for _, lp in texts), rel_tol=1e-12
    )
    n_bytes = math.fsum(math.exp(lp) * len(text.encode()) for text, lp in texts)
    assert math.isclose(closed.bytes_per_document, n_bytes, rel_tol=1e-12)
    assert closed.bits_per_byte == closed.nats_per_document / math.log(2) / closed.bytes_per_document


def test_parse_is_the_enumerated_derivation():
    """Oracle: the enumeration's log-probability of every text; the reader finds one derivation of each."""
    grammar = small()
    for text, log_p in every_text(grammar):
        assert len(_Reader(grammar, text).derivations()) == 1
        assert math.isclose(sum(choice.log_prob for choice in parse(grammar, text)), log_p, rel_tol=1e-12)


@given(seed=st.integers(0, 10**6))
def test_parse_returns_the_choices_made(seed):
    """Oracle: the choices that rendering recorded."""
    grammar = small()
    draws = random.bits(random.key(seed), (grammar.max_choices,)).tolist()
    text, choices = derive(grammar, draws)
    assert text == render(grammar, draws)
    assert parse(grammar, text) == choices and len(choices) <= grammar.max_choices


def test_sampled_frequencies():
    """Oracle: the enumerated probabilities, by chi squared over the 60 most likely texts and the rest.

    60 degrees of freedom: 120 is passed once in 100,000 times by the right law. Variables with parents included.
    """
    grammar, n = small(), 20_000
    expected = {text: math.exp(log_p) for text, log_p in every_text(grammar)}
    rows = random.bits(random.key(0), (n, grammar.max_choices)).tolist()
    counts = Counter(render(grammar, row) for row in rows)
    assert set(counts) <= set(expected)
    top = sorted(expected, key=expected.get)[-60:]
    rest = 1 - sum(expected[text] for text in top)
    pairs = [(counts[text], n * expected[text]) for text in top]
    pairs.append((n - sum(counts[text] for text in top), n * rest))
    assert sum((got - want) ** 2 / want for got, want in pairs) < 120


def test_draws_at_the_ends_of_their_range():
    """The smallest and the largest draw choose the first and the last value of positive weight."""
    picks = {"start": [(1, "{name}{friend}")]}
    name = Variable(NAME.values[:3], (1, 1, 1))
    friend = Variable(NAME.values[:3], (), "name", ((0, 1, 1), (1, 0, 1), (1, 1, 0)))
    grammar = build({"name": name, "friend": friend}, picks, "start")
    assert render(grammar, [0, 0, 0]) == "AnnBob"
    assert render(grammar, [0, 2**32 - 1, 2**32 - 1]) == "EveBob"
    assert render(grammar, [0, 0, 2**32 - 1]) == "AnnEve"


@pytest.mark.parametrize(
    ("picks", "variables", "message"),
    [
        ({"s": [(1, "[x]")]}, {}, r"pick s: \[x\] is unknown"),
        ({"s": [(1, "{x}")]}, {}, r"pick s: \{x\} is unknown"),
        ({"s": [(1, "{x.z}")]}, {"x": CHILD}, "pick s: x has no form 'z'"),
        ({"s": [(1, "a[s]"), (1, "b")]}, {}, "pick s is inside itself: s > s"),
        ({"s": [(1, "a[b}")]}, {}, "a bracket without its partner"),
        ({"s": [(0, "a"), (1, "b")]}, {}, "pick s: .*weights must be positive"),
        ({"s": []}, {}, "pick s: at least one alternative"),
        ({"s": [(1, "a"), (1, "a")]}, {}, "could not tell 'a' from 'a'"),
        ({"s": [(1, "[w]c"), (1, "[w]cd")], "w": [(1, "x"), (1, "y")]}, {}, r"could not tell '\[w\]c' from '\[w\]cd'"),
        ({"s": [(1, "[w]"), (1, "xz")], "w": [(1, "x"), (1, "y")]}, {}, "could not tell"),
        ({"s": [(1, ""), (1, "x")]}, {}, "could not tell '' from 'x'"),
        ({"s": [(1, "{x}.")]}, {"x": Variable(({"": "bee"}, {"": "beetle"}), (1, 1))}, "'bee' is the beginning of"),
        ({"s": [(1, "{x}."), (1, "boy!")]}, {"x": CHILD}, None),
        ({"s": [(1, "{x}."), (1, "boy.")]}, {"x": CHILD}, "could not tell"),
        ({"s": [(1, "{x}: {x.he}"), (1, "{x}: {x.He}")]}, {"x": CHILD}, None),
        # First mentions on both sides may have different values: "she" of the girl, "she" of another's plain form.
        ({"s": [(1, "{x}!"), (1, "{x.he}!")]},
         {"x": Variable(({"": "a", "he": "b"}, {"": "b", "he": "c"}), (1, 1))}, "could not tell"),
        # What is alike before it says nothing about x.
        ({"s": [(1, "[w]{x}!"), (1, "[w]{x.he}!")], "w": [(1, "-")]},
         {"x": Variable(({"": "a", "he": "b"}, {"": "b", "he": "c"}), (1, 1))}, "could not tell"),
        # The same, but x is known before the pick: then the forms of one value are compared, and differ.
        ({"s": [(1, "{x}: [t]")], "t": [(1, "{x}!"), (1, "{x.he}!")]},
         {"x": Variable(({"": "a", "he": "b"}, {"": "b", "he": "c"}), (1, 1))}, None),
        # A child's value is never its parent's here, so they cannot be mixed up; as independents they could.
        ({"s": [(1, "{child}{name}{friend}: [t]")], "t": [(1, "{name}"), (1, "{friend}")]},
         {"child": CHILD, "name": NAME, "friend": FRIEND}, None),
        ({"s": [(1, "{child}{name}{friend}: [t]")], "t": [(1, "{friend}"), (1, "{name}")]},
         {"child": CHILD, "name": NAME, "friend": FRIEND}, None),
        ({"s": [(1, "{x}{y}: [t]")], "t": [(1, "{x}"), (1, "{y}")]},
         {"x": CHILD, "y": CHILD}, "could not tell"),
        ({"s": [(1, "[t] {x}")], "t": [(1, "a {x}"), (1, "b")]}, {"x": CHILD}, "drawn by some alternatives"),
        ({"s": [(1, "{name} {child}")]}, {"child": CHILD, "name": NAME}, "mentioned before its parent child"),
        ({"s": [(1, "a")], "x": [(1, "a")]}, {"x": CHILD}, "name of a pick and of a variable"),
        ({"s": [(1, "a")]}, {"x": CHILD._replace(weights=(1,))}, "variable x: weights must be 1 rows of 2"),
        ({"s": [(1, "a")]}, {"x": CHILD._replace(weights=(1, 0))}, "variable x: weights must be positive"),
        ({"s": [(1, "a")]}, {"x": CHILD._replace(parent="y")}, "variable x: parent 'y' is unknown"),
        ({"s": [(1, "a")]}, {"child": CHILD, "x": NAME._replace(table=NAME.table[:1])}, "weights must be 2 rows of 4"),
    ],
)  # fmt: skip
def test_build(picks, variables, message):
    """Each condition of the uniqueness argument is checked, and not more than is needed.

    Oracle for the accepted ones: the enumeration has no text twice.
    """
    if message is None:
        grammar = build(variables, picks, "s")
        texts = [text for text, _ in every_text(grammar)]
        assert len(set(texts)) == len(texts)
        assert all(len(_Reader(grammar, text).derivations()) == 1 for text in texts)
    else:
        with pytest.raises(ValueError, match=message):
            build(variables, picks, "s")


words = st.sampled_from(["a", "b", "ab", "ba", "", "c"])
templates = st.lists(st.one_of(words, st.sampled_from(["[p]", "[q]", "{x}", "{x.f}", "{y}"])), max_size=4).map("".join)


@given(
    s=st.lists(templates, min_size=1, max_size=3), p=st.lists(templates, min_size=1, max_size=2),
    q=st.lists(words, min_size=1, max_size=3), x=st.lists(st.tuples(words, words), min_size=1, max_size=2),
    y=st.lists(words, min_size=1, max_size=2),
)  # fmt: skip
def test_what_build_accepts_is_unambiguous(s, p, q, x, y):
    """Oracle: enumeration. Of random small grammars none that build accepts has a text twice, or one inside another."""
    variables = {
        "x": Variable([{"": a, "f": b} for a, b in x], [1.0] * len(x)),
        "y": Variable([{"": a} for a in y], [1.0] * len(y)),
    }
    picks = {"s": [(1, t) for t in s], "p": [(1, t.replace("[p]", "")) for t in p], "q": [(1, t) for t in q]}
    try:
        grammar = build(variables, picks, "s")
    except ValueError:
        return
    texts = sorted(text for text, _ in every_text(grammar))
    assert not any(b.startswith(a) for a, b in itertools.pairwise(texts))
    assert math.isclose(
        entropy(grammar).nats_per_document,
        -math.fsum(math.exp(lp) * lp for _, lp in every_text(grammar)),
        rel_tol=1e-12, abs_tol=1e-12,
    )  # fmt: skip
