"""What went wrong in trainers, row by row. Oracles: values by hand; the mistake, written out, gives another."""

from pathlib import Path

import pytest

from tests.align.conformance import all_rows, same, table

ROWS = all_rows()
README = Path(__file__).parents[2] / "purelm/align/README.md"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.case.__name__)
def test_here_is_right_and_the_mistake_is_seen(row):
    case = row.case()
    assert same(case.here, case.right, case.tol), case
    assert not same(case.there, case.right, 1e-2), case
    if row.printed_there:
        assert row.printed_there == "above 0.01" and case.there > 0.01


def test_the_readme_has_this_table():
    """Not another one: `python -m tests.align.conformance` prints it."""
    assert table(ROWS) in README.read_text()


def test_threads_and_cases_are_named_once():
    for what in ([row.threads for row in ROWS], [row.case.__name__ for row in ROWS]):
        assert len(set(what)) == len(what)


def test_same():
    """By hand: nan is nan, inf is no number, numbers are relative above 1."""
    nan, inf = float("nan"), float("inf")
    assert same(nan, nan, 0) and same(inf, inf, 0) and same(1e6, 1e6 + 1, 1e-5) and same([1], [1], 0)
    assert not (
        same(nan, 1.0, 1) or same(inf, 1.0, 1) or same(0.1, 0.2, 0.05) or same("a", "b", 1) or same(True, False, 0)
    )
