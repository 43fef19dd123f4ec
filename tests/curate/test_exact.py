"""Exact duplicates. Oracles: comparison of the texts themselves; collections.Counter."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.curate.exact import count_lines, digest, first_of, merged_counts, unique_lines
from purelm.curate.external import digests
from purelm.curate.minhash import MinHash
from purelm.curate.near_duplicates import near_duplicates

TEXTS = st.lists(st.text("ab\n\r é\ud800", max_size=8), max_size=10)


@given(TEXTS)
def test_first_of(texts):
    assert first_of(texts) == [texts.index(text) for text in texts]


@given(TEXTS, st.integers(0, 10))
def test_lines(texts, cut):
    """Counts add up over parts; what is left of all texts are exactly the lines that stand there once."""
    counts = count_lines(texts)
    assert merged_counts([count_lines(texts[:cut]), count_lines(texts[cut:])]) == counts
    plain = Counter(line for text in texts for line in text.split("\n"))
    assert {digest(line): n for line, n in plain.items()} == counts
    for text in texts:
        assert unique_lines(text, counts) == "\n".join(line for line in text.split("\n") if plain[line] == 1)


def test_a_line_that_was_not_counted():
    with pytest.raises(KeyError):
        unique_lines("b", count_lines(["a"]))


@pytest.mark.parametrize("f", [first_of, count_lines, digests, lambda text: near_duplicates(text, MinHash())])
def test_one_text_is_not_several(f):
    """Its characters would be the texts."""
    with pytest.raises(ValueError, match=r"texts='one':.*got one str"):
        f("one")
