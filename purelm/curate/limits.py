"""Checks of arguments: thresholds of the rules, None (the rule is off) or a number within a range; texts, not one."""

from math import inf, isfinite
from typing import Any

from purelm.data.checks import check_int

__all__ = ["check_counts", "check_fractions", "check_several", "check_words"]


def check_counts(config: Any, *names: str, low: int = 0, high: int | None = None) -> None:
    """ValueError unless each field is None or an int within low..high."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            check_int(f"{type(config).__name__}: {name}", value, low, high)


def check_fractions(config: Any, *names: str, high: float = 1.0) -> None:
    """ValueError unless each field is None or a finite number within 0..high."""
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if value is not None and not (number and 0 <= value <= high):
            allowed = "a number from 0" + ("" if high == inf else f" to {high:g}")
            raise ValueError(f"{type(config).__name__}: {name}={value!r}; allowed: {allowed}, or None for no such rule")


def check_words(config: Any, *names: str) -> None:
    """ValueError unless each field is a tuple of strings that are not empty."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, tuple) or not all(isinstance(word, str) and word for word in value):
            raise ValueError(f"{type(config).__name__}: {name}={value!r}; allowed: a tuple of strings, none empty")


def check_several(name: str, values: Any) -> None:
    """ValueError for one text in the place of several, whose characters would be taken for them."""
    if isinstance(values, str | bytes):
        kind = type(values).__name__
        raise ValueError(f"{name}={values[:40]!r}: allowed: several in a list or the like, got one {kind}")
