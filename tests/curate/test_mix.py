"""Mixtures. Oracles: the formula; the conditions of water-filling; a bijection; the mean of a uniform place."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm import random
from purelm.curate.mix import amounts, element, tempered

SOURCES = st.lists(
    st.tuples(
        st.floats(0, 10) | st.sampled_from([0.0, 1.0, 1e-9]), st.integers(0, 50),
        st.sampled_from([0, 0.5, 1, 3.7, math.inf]),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=5).filter(any), st.floats(0.2, 10))
def test_tempered(sizes, T):
    found = tempered(sizes, T)
    assert math.isclose(sum(found), 1.0)
    assert tempered(sizes, math.inf) == pytest.approx([(n > 0) / sum(map(bool, sizes)) for n in sizes])
    for n, p in zip(sizes, found, strict=True):
        assert p == pytest.approx((n / max(sizes)) ** (1 / T) / sum((m / max(sizes)) ** (1 / T) for m in sizes))


@given(SOURCES, st.integers(0, 300))
def test_amounts(sources, budget):
    """They add up, keep to the caps, and are within one of a common level times the weight, or full."""
    weights, sizes, epochs = map(list, zip(*sources, strict=True))
    caps = []
    for w, n, e in sources:
        caps.append(0 if not w or not n else budget if e == math.inf else min(budget, math.floor(Fraction(e) * n)))
    if sum(caps) < budget:
        with pytest.raises(ValueError, match=f"at most {sum(caps):,} within"):
            amounts(weights, sizes, budget, epochs)
        return
    found = amounts(weights, sizes, budget, epochs)
    assert sum(found) == budget and all(0 <= x <= cap for x, cap in zip(found, caps, strict=True))
    live = [(x, Fraction(w), cap) for x, w, cap in zip(found, weights, caps, strict=True) if cap]
    low = max([(x - 1) / w for x, w, _ in live], default=0)  # a level that gives more than x - 1 to each, and
    high = min([(x + 1) / w for x, w, cap in live if x < cap], default=math.inf)  # less than x + 1 to what is not full
    assert low < high


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (([1, 1, 1], [100, 100, 100], 10), [4, 3, 3]),
        (([3, 1], [100, 100], 40, 1.0), [30, 10]),
        (([3, 1, 1], [10, 100, 100], 40, 1.0), [10, 15, 15]),
        (([8, 4, 1], [10, 10, 100], 60, [1, 2, 1]), [10, 20, 30]),
        (([0.0, 1.0], [10, 10], 25), [0, 25]),
    ],
)
def test_by_hand(given, wanted):
    assert amounts(*given) == wanted


@given(st.integers(1, 60), st.integers(0, 3))
def test_an_epoch_has_each_once(n, seed):
    key = random.key(seed)
    drawn = [element(key, n, i) for i in range(2 * n)]
    for epoch in (0, 1):
        assert sorted(which for e, which in drawn if e == epoch) == [*range(n)]


def test_orders_differ_and_are_uniform():
    """By epoch and by key; the mean of the first of 400 keys is within 4 standard errors of the middle."""
    n = 5000  # above the length for which the whole order is drawn
    orders = [[element(random.key(s), n, e * n + i)[1] for i in range(20)] for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    first = [element(random.key(seed), n, n)[1] for seed in range(400)]
    assert abs(sum(first) / 400 - (n - 1) / 2) < 4 * n / math.sqrt(12 * 400)


def test_numbers_of_numpy():
    """As Python's."""
    sizes, weights, epochs = np.array([3, 9], np.int32), np.array([1, 2], np.float32), np.float32(1.5)
    assert amounts(weights, sizes, 7, epochs) == amounts([1, 2], [3, 9], 7, 1.5) == [2, 5]
    assert amounts(sizes, sizes, 7) == amounts([3, 9], [3, 9], 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tempered([0, 0]), "at least one must be above 0"),
        (lambda: tempered([1, -1]), r"sizes\[1\]=-1"),
        (lambda: tempered([1], 0.0), "temperature=0.0"),
        (lambda: tempered([1], math.nan), "temperature=nan"),
        (lambda: amounts([math.nan], [1], 1), r"weights\[0\]=nan"),
        (lambda: amounts([math.inf], [1], 1), r"weights\[0\]=inf"),
        (lambda: amounts([1], [1], 1, -1.0), r"most_epochs\[0\]=-1.0"),
        (lambda: amounts([1], [1, 2], 1), "have 1, 2 and 2 entries"),
        (lambda: amounts([1], [10], 31, 3), "give at most 30"),
        (lambda: amounts([1], [10], -1), "budget=-1"),
        (lambda: element(random.key(0), 0, 0), "n=0"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
