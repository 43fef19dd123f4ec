"""Many draws of a strategy, and its simplest one."""

import collections

from hypothesis import HealthCheck, Phase, find, given, settings


def draws(strategy, n=1000):
    """n draws, the same ones in every run."""
    found = []

    @settings(
        max_examples=n, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def note(x):
        found.append(x)

    note()
    return found


def simplest(strategy, condition=lambda x: True):
    return find(strategy, condition, settings=settings(derandomize=True, database=None, max_examples=5000))


def count(strategy, features, n=1000):
    """How many of n draws have each feature."""
    return collections.Counter(name for x in draws(strategy, n) for name in set(features(x)))
