"""Arguments that name one choice, several, or a strategy over them."""

from collections.abc import Collection, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

__all__ = ["chosen", "one_or_strategy"]


def chosen(name: str, given: Any, allowed: Collection[Any]) -> tuple[Any, ...]:
    """The choices given, one or a sequence, as a tuple; ValueError that names the argument unless all are allowed."""
    some = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if not some or any(x not in allowed for x in some):
        shown = ", ".join(map(str, allowed))
        raise ValueError(f"{name} must be one or some of {shown}; got {given!r}")
    return some


def one_or_strategy(given: Any) -> SearchStrategy[Any]:
    """The strategy given, or the one that always draws the value given."""
    return given if isinstance(given, SearchStrategy) else st.just(given)
