"""One check for arguments that are counts: an int (Python's or numpy's, not a bool) within limits."""

import operator
from typing import Any

__all__ = ["check_int"]


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int; ValueError that names the argument, what was given and what is allowed.

    >>> check_int("batch_size", 8, 1)
    8
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        allowed = f"{low:,} or more" if high is None else f"{low:,} to {high:,}"
        raise ValueError(f"{name}={value!r}: allowed is {allowed} (an int)")
    return number
