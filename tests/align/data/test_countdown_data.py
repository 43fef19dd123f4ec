"""Countdown's problems. Oracles: the grader, which reads each solution; Python's fractions; a list of a few."""

import ast
from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.data.countdown import Game, countdown, countdown_row
from purelm.align.graders import check_countdown
from purelm.align.graders import countdown as reward

GAMES = st.sampled_from([
    Game(),
    Game((2, 2), (1, 9), (1, 100), "*-"),
    Game((2, 5), (50, 70), (-20, 20), "+-"),
    Game((6, 6), (1, 99), (10, 500), "+-*/"),
    Game((2, 3), (1, 20), (1, 10), "/+"),
    Game((3, 4), (1, 12), (-100, 1000), "*"),
])  # fmt: skip


def value(text):
    """By Python's own parser, in fractions."""

    def of(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        a, b = of(node.left), of(node.right)
        return {ast.Add: lambda: a + b, ast.Sub: lambda: a - b, ast.Mult: lambda: a * b, ast.Div: lambda: a / b}[
            type(node.op)
        ]()

    return of(ast.parse(text, mode="eval").body)


@given(GAMES, st.integers(0, 2**62))
def test_solved_distinct_and_in_range(game, seed):
    problems = list(islice(countdown(game, seed), 12))
    for x in problems:
        assert game.n_numbers[0] <= len(x.numbers) <= game.n_numbers[1]
        assert all(game.numbers[0] <= n <= game.numbers[1] for n in x.numbers)
        assert game.target[0] <= x.target <= game.target[1]
        assert check_countdown(x.solution, x.numbers, x.target).equal and value(x.solution) == x.target
        assert {sign for sign in x.solution if sign in "+-*/"} <= {*game.operations}
        row = countdown_row(x)
        assert reward(row["response"], row["numbers"], row["target"])["reward"] == 1
        assert f"Target: {x.target}." in row["prompt"] and row["prompt"].startswith(row["question"])
    assert len({(tuple(sorted(x.numbers)), x.target) for x in problems}) == 12


@given(st.integers(0, 1000), st.integers(1, 30))
def test_a_problem_does_not_depend_on_how_many_there_are(seed, n):
    """Whatever is taken before or after; other seeds have others."""
    whole = list(islice(countdown(Game(), seed), 30))
    assert list(islice(countdown(Game(), seed), n)) == whole[:n]
    assert list(islice(countdown(Game(), seed), n - 1, n)) == whole[n - 1 : n]
    assert list(islice(countdown(Game(), seed + 1), 30)) != whole


def test_all_lengths_and_operations_occur():
    """Of 3,000 problems: both counts of numbers, each operation, and a tenth of all targets or more."""
    problems = list(islice(countdown(Game(), 0), 3000))
    assert 0.45 < sum(len(x.numbers) == 3 for x in problems) / 3000 < 0.55
    for sign in "+-*/":
        assert sum(sign in x.solution for x in problems) > 100, sign
    assert len({x.target for x in problems}) == 100


def test_the_same_bits_in_every_version():
    """PCG64's raw stream and its seeding are fixed by NumPy (NEP 19). Made by this very line."""
    assert [tuple(x) for x in islice(countdown(Game(), 0), 2)] == [
        ((49, 96, 68, 10), 87, "(49 + 96) + (10 - 68)"),
        ((85, 14, 85, 46), 59, "(14 + 46) - (85 / 85)"),
    ]


def test_few_problems_come_to_an_end():
    """Oracle: all sums of two of 1, 2 and 3, by hand."""
    game = Game((2, 2), (1, 3), (2, 6), "+")
    found = []
    with pytest.raises(ValueError, match="countdown: 6 problems, and 1000 tries give no other"):
        for problem in countdown(game, 0):
            found.append(problem)
    assert sorted((*sorted(x.numbers), x.target) for x in found) == [
        (1, 1, 2), (1, 2, 3), (1, 3, 4), (2, 2, 4), (2, 3, 5), (3, 3, 6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("game", "seed", "message"),
    [
        (Game(n_numbers=(1, 3)), 0, "n_numbers 1 to 3: needs 2 <= low <= high <= 12"),
        (Game(numbers=(9, 3)), 0, "numbers 9 to 3: needs 1 <= low"),
        (Game(target=(5, 4)), 0, "target 5 to 4"),
        (Game(operations=""), 0, "operations '': allowed are some of"),
        (Game(operations="+^"), 0, "operations '\\+\\^'"),
        (Game(), -1, "seed must be 0 or more, got -1"),
    ],
)
def test_what_is_refused_at_once(game, seed, message):
    with pytest.raises(ValueError, match=message):
        countdown(game, seed)
