"""The table of purelm/align/README.md: what went wrong in trainers, with the right value and the wrong one.

    python -m tests.align.conformance        # prints the table

A row's numbers are computed where the table is made and where it is tested: `test_conformance` compares both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Value = float | int | bool | str | list[int] | None


@dataclass(frozen=True)
class Case:
    """One input, three answers."""

    here: Value  # what purelm gives
    right: Value  # by hand, or by a formula that is not purelm's
    there: Value  # what the mistake gives
    tol: float = 1e-9  # of `here` against `right`; fp32 where it is more


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    threads: str
    wrong: str  # what goes wrong there
    given: str  # the input
    by: str  # what gives the right value here
    case: Callable[[], Case]
    printed_there: str | None = None  # where the wrong value depends on random weights


def same(a: Value, b: Value, tol: float) -> bool:
    """Equal; of floats within tol, relative above 1. nan is equal to nan."""
    if isinstance(a, float) or isinstance(b, float):
        x, y = float(a), float(b)  # type: ignore[arg-type]
        return (math.isnan(x) and math.isnan(y)) or x == y or abs(x - y) <= tol * max(1.0, abs(y))
    return a == b


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| thread | what goes wrong | input | right, and here | there | by |", "|---|---|---|---|---|---|"]
    for row in rows:
        case = row.case()
        there = row.printed_there or _text(case.there)
        lines.append(f"| {row.threads} | {row.wrong} | {row.given} | {_text(case.right)} | {there} | `{row.by}` |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def all_rows() -> list[Row]:
    """Every row, in the table's order."""
    from tests.align import conformance_losses, conformance_rollouts  # they import this module

    return [*conformance_losses.ROWS, *conformance_rollouts.ROWS]


if __name__ == "__main__":
    print(table(all_rows()))
