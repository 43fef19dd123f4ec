"""Countdown: numbers and a target that an expression of all of them reaches. Problems without end, from a seed.

    problems = list(islice(countdown(Game(), seed=0), 1000))

Problem i of a seed is the same however many are taken. Each comes with a solution, for it is made from one: numbers
are drawn, combined in a random order by random operations in exact fractions, and kept if the value may be a target.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from purelm.align.data.cleaning import Row

__all__ = ["Game", "Problem", "countdown", "countdown_prompt", "countdown_question", "countdown_row"]

MOST_NUMBERS = 12  # so that a solution has fewer characters and brackets than the grader reads
DRAWS = 100  # within a candidate, before it is given up
TRIES = 1000  # candidates without a new problem, before the ranges are said to have no more


class Game(NamedTuple):
    """Ranges, both ends included. As TinyZero plays it: 3 or 4 numbers of two digits at most, a target up to 100."""

    n_numbers: tuple[int, int] = (3, 4)
    numbers: tuple[int, int] = (1, 99)
    target: tuple[int, int] = (1, 100)
    operations: str = "+-*/"


class Problem(NamedTuple):
    """One problem. No two of a seed have the same numbers, in any order, and the same target."""

    numbers: tuple[int, ...]
    target: int
    solution: str  # uses each number once


def countdown(game: Game, seed: int) -> Iterator[Problem]:
    """Problems without end; ValueError if the ranges are wrong, or, in time, that there are no more within them.

    What is drawn for candidate j are the raw bits of NumPy's PCG64 of (seed, j), which no version changes; a candidate
    that is there already, or makes none, is passed over.
    """
    _check(game, seed)
    return _problems(game, seed)


def _problems(game: Game, seed: int) -> Iterator[Problem]:
    seen: set[tuple[tuple[int, ...], int]] = set()
    candidate = last = 0
    while candidate - last < TRIES:
        found = _candidate(game, seed, candidate)
        candidate += 1
        if found is None:
            continue
        name = (tuple(sorted(found.numbers)), found.target)
        if name not in seen:
            seen.add(name)
            last = candidate
            yield found
    raise ValueError(f"countdown: {len(seen)} problems, and {TRIES} tries give no other: widen the ranges")


def _candidate(game: Game, seed: int, number: int) -> Problem | None:
    bits = np.random.PCG64([seed, number])

    def below(n: int) -> int:
        return int(bits.random_raw()) % n  # even, but for n / 2^64

    def between(low: int, high: int) -> int:
        return low + below(high - low + 1)

    size = between(*game.n_numbers)
    for _ in range(DRAWS):
        numbers = tuple(between(*game.numbers) for _ in range(size))
        if (found := _combined(game, numbers, below)) is not None:
            return found
    return None


def _combined(game: Game, numbers: tuple[int, ...], below: Callable[[int], int]) -> Problem | None:
    """The problem that the numbers in a random order and random operations make; None if its value is no target."""
    parts = [(Fraction(x), str(x)) for x in numbers]
    while len(parts) > 1:
        a, text_a = parts.pop(below(len(parts)))
        b, text_b = parts.pop(below(len(parts)))
        sign = game.operations[below(len(game.operations))]
        if sign == "/" and not b:
            return None
        value = a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b
        parts.append((value, f"({text_a} {sign} {text_b})"))
    value, text = parts[0]
    if value.denominator != 1 or not game.target[0] <= value <= game.target[1]:
        return None
    return Problem(numbers, int(value), text[1:-1] if text.startswith("(") else text)


def _check(game: Game, seed: int) -> None:
    for name, (low, high), least, most in (
        ("n_numbers", game.n_numbers, 2, MOST_NUMBERS),
        ("numbers", game.numbers, 1, 10**6),
        ("target", game.target, -(10**9), 10**9),
    ):
        if not least <= low <= high <= most:
            raise ValueError(f"countdown: {name} {low} to {high}: needs {least:,} <= low <= high <= {most:,}")
    if not game.operations or not set(game.operations) <= set("+-*/"):
        raise ValueError(f"countdown: operations {game.operations!r}: allowed are some of + - * /")
    if seed < 0:
        raise ValueError(f"countdown: seed must be 0 or more, got {seed}")


def countdown_row(problem: Problem) -> Row:
    """The problem as a row: prompt, response (the solution in <answer>), question, numbers, target."""
    question = countdown_question(problem.numbers, problem.target)
    return {
        "prompt": countdown_prompt(question), "response": f"<answer>{problem.solution}</answer>",
        "question": question, "numbers": list(problem.numbers), "target": problem.target,
    }  # fmt: skip


def countdown_question(numbers: Sequence[int], target: int) -> str:
    """The bare problem."""
    return f"Numbers: {', '.join(map(str, numbers))}. Target: {target}."


def countdown_prompt(question: str) -> str:
    """The problem with its rules, and the form in which `graders.countdown` reads an answer."""
    return (
        f"{question}\nReach the target by an expression of the numbers with +, -, *, / and brackets. Use each number "
        "exactly once. Put the expression between <answer> and </answer>."
    )
