"""Many draws of a strategy, which of the things expected are drawn, and the simplest draw."""

from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis import strategies as st


def draws(strategy, n=1000, number=0):
    """n draws, the same ones in every run with this number.

    Ten at a time, because hypothesis's own work for an example takes most of the time.
    """
    found = []
    each = min(n, 10)

    @seed(number)
    @settings(
        max_examples=-(-n // each), database=None, deadline=None, derandomize=False, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(strategy, min_size=each, max_size=each))
    def note(some):
        found.extend(some)

    note()
    assert len(found) >= n, "too few different draws"
    return found[:n]


def reached(strategy, features, expected, n=20_000):
    """All features that were seen when all expected ones had been; AssertionError with the missing after n draws."""
    seen, missing = set(), set(expected)
    for number in range(n // 200):
        for x in draws(strategy, 200, number):
            seen.update(features(x))
        missing -= seen
        if not missing:
            return seen
    raise AssertionError(f"never drawn in {n} draws: {sorted(map(repr, missing))}")


def simplest(strategy, condition=lambda x: True):
    """What a failing example shrinks to, the test failing where the condition holds."""
    return find(strategy, condition, settings=settings(derandomize=True, database=None, max_examples=5000))
