"""Bloom filters. Oracles: Python's sets; the binomial spread of false positives; a loop over sets of word tuples."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.curate.bloom import BloomDedup, add_, contains, empty, false_positives, union, unseen_
from purelm.curate.document import Document, Drop

HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=30)


def hashes(numbers):
    return np.array(numbers, np.uint64)


@given(HASHES, HASHES)
def test_no_member_is_forgotten(a, b):
    """What was added is there, in every order and in unions; an empty filter has nothing."""
    one, two = empty(60, 0.01), empty(60, 0.01)
    assert not contains(one, hashes(a)).any()
    add_(one, hashes(a))
    add_(two, hashes(b[::-1]))
    both = union(one, two)
    assert contains(one, hashes(a)).all() and contains(both, hashes(a + b)).all()
    add_(one, hashes(b))
    assert (one.bits == both.bits).all()


def test_false_positives_are_as_many_as_asked():
    """Of 100,000 new ones within 5 standard deviations of 1 %; the estimate of full bits too."""
    rng = np.random.default_rng(0)
    bloom = empty(50_000, 0.01)
    add_(bloom, rng.integers(0, 2**64, 50_000, dtype=np.uint64))
    found = float(contains(bloom, rng.integers(0, 2**64, 100_000, dtype=np.uint64)).mean())
    assert abs(found - 0.01) < 5 * math.sqrt(0.01 / 100_000) + 0.0005
    assert abs(false_positives(bloom) - 0.01) < 0.001
    assert len(bloom.bits) == pytest.approx(50_000 * 9.585 / 8, rel=0.01) and bloom.n_hashes == 7


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d\n", "e", "f\n"]), max_size=10).map(" ".join)


def runs(text, n):
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))] if words else []


@given(st.lists(WORDS, max_size=8), st.integers(1, 3), st.sampled_from([0.5, 0.8, 1.0]), st.booleans())
@settings(max_examples=80)
def test_documents_against_sets(texts, n, least, paragraphs):
    """Oracle: the same loop with a set of tuples of words; a filter with 2^-50 false positives is a set."""
    bloom, seen = empty(10_000, 2.0**-50), set()
    cfg = BloomDedup(n, least, paragraphs)

    def share(text):
        found = runs(text, n)
        return sum(run in seen for run in found) / len(found) if found else 0.0

    for i, text in enumerate(texts):
        got = unseen_(Document(str(i), text), bloom, cfg)
        if share(text) >= least:
            assert got == Drop("seen before", round(share(text), 4))
            continue
        lines = text.split("\n")
        kept = [line for line in lines if not paragraphs or share(line) < least]
        if len(kept) < len(lines) and not any(line.split() for line in kept):
            assert got == Drop("all paragraphs seen before", len(lines))
            continue
        assert got == Document(str(i), "\n".join(kept))
        for part in [*(kept if paragraphs else []), "\n".join(kept)]:
            seen.update(runs(part, n))


def test_a_copy_is_dropped_and_a_new_text_is_kept():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(1000)]
    texts = [" ".join(rng.choices(words, k=100)) for _ in range(20)]
    bloom = empty(100_000, 0.01)
    for i, text in enumerate(texts):
        assert unseen_(Document(str(i), text), bloom, BloomDedup()).text == text
    assert unseen_(Document("x", texts[3].upper() + "!"), bloom, BloomDedup()) == Drop("seen before", 1.0)


def test_wrong_numbers():
    for call, message in (
        (lambda: empty(0, 0.1), "n must be"),
        (lambda: empty(10, 1.0), "false_positive must be"),
        (lambda: empty(10**15, 1e-9), "take .* bytes"),
        (lambda: union(empty(10, 0.1), empty(1000, 0.1)), "of one size"),
        (lambda: BloomDedup(ngram=0), "ngram must be"),
        (lambda: BloomDedup(seen=0.0), "seen must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
