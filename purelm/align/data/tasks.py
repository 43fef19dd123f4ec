"""Generated tasks for models from scratch: sorting, arithmetic modulo m, addition. Difficulty is in the ranges.

    train, heldout = split(Sort(n_numbers=(5, 5)), seed=0, n_train=4000, n_heldout=200)
    # {"prompt": "6 6 0 4 8 ->", "response": "0 4 6 6 8", ...}

The problems of one length are numbered 0 .. N - 1 (mixed radix: one digit for each number and operation), and a seed
shuffles these numbers by a bijection: the k-th problem is a pure function of (task, seed, k), no two are equal, and any
two ranges of k are disjoint. So are held-out and training sets, whatever their sizes, without a comparison. Other
orders are other problems: 1 + 2 and 2 + 1 may be on both sides.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from purelm.align.data.cleaning import Row

__all__ = ["Addition", "Modular", "Sort", "Style", "Task", "n_problems", "problem_row", "rows", "shuffled", "split"]

Style = Literal["spaced", "compact", "worded"]
Span = tuple[int, int]  # both ends included

MOST_PARTS = 32  # numbers of a problem
MOST = 10**9  # of a number
ROUNDS = 6  # of the Feistel network; 4 suffice for a strong pseudo-random permutation (Luby and Rackoff 1988)


class Sort(NamedTuple):
    """Numbers are put in order, the smallest first."""

    n_numbers: Span = (5, 5)
    numbers: Span = (0, 9)


class Modular(NamedTuple):
    """a o b mod m, or a chain of n operations on residues, computed from the left: ((a o b) o c) mod m."""

    modulus: int = 97
    n_operations: Span = (1, 1)
    operations: str = "+-*"


class Addition(NamedTuple):
    """The sum of some numbers."""

    n_numbers: Span = (2, 2)
    numbers: Span = (0, 99)


Task = Sort | Modular | Addition


def n_problems(task: Task) -> dict[int, int]:
    """{length: number of problems}; a length is that of the ranges n_numbers or n_operations.

    >>> n_problems(Modular(5, (1, 2), "+-"))
    {1: 50, 2: 500}
    """
    _check(task)
    low, high = _lengths(task)
    return {length: math.prod(_radices(task, length)) for length in range(low, high + 1)}


def rows(task: Task, seed: int, first: int, last: int, style: Style = "spaced") -> list[Row]:
    """Problems first .. last - 1 of a seed, of all lengths in turn.

    A row has prompt, response, task, length and source. ValueError where a length has not as many problems: widen the
    ranges, or leave this length out.
    """
    counts = n_problems(task)
    if style not in get_args(Style):
        raise ValueError(f"style: {style!r}: allowed is {', '.join(get_args(Style))}")
    if isinstance(task, Sort) and style == "compact" and task.numbers[1] > 9:
        raise ValueError(f"style: compact has no space between numbers: they may go up to 9, not {task.numbers[1]}")
    if not 0 <= first <= last:
        raise ValueError(f"rows: {first} to {last}: needs 0 <= first <= last")
    lengths = list(counts)
    for i, length in enumerate(lengths):
        wanted = (last - i + len(lengths) - 1) // len(lengths)
        if wanted > counts[length]:
            raise ValueError(f"{last:,} problems are wanted, {wanted:,} of length {length}, of which there are only "
                             f"{counts[length]:,}: widen the ranges, or leave this length out")  # fmt: skip
    name, found = type(task).__name__.lower(), []
    for k in range(first, last):
        length = lengths[k % len(lengths)]
        number = shuffled(k // len(lengths), counts[length], seed, str(length))
        row = problem_row(task, length, number, style)
        found.append({**row, "task": name, "length": length, "source": f"{name}, seed {seed}, problem {k}"})
    return found


def split(
    task: Task, seed: int, *, n_train: int, n_heldout: int, style: Style = "spaced"
) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): the problems after the first n_heldout, and those.

    The held-out rows are the same for every n_train.
    """
    for name, n in (("n_train", n_train), ("n_heldout", n_heldout)):
        if n < 0:
            raise ValueError(f"{name} must be at least 0, got {n}")
    found = rows(task, seed, 0, n_heldout + n_train, style)
    return found[n_heldout:], found[:n_heldout]


def problem_row(task: Task, length: int, number: int, style: Style = "spaced") -> Row:
    """Problem `number` of one length, in the order of numbers: {"prompt", "response"}.

    >>> problem_row(Sort(), 5, 66048)
    {'prompt': '6 6 0 4 8 ->', 'response': '0 4 6 6 8'}
    """
    parts = []
    for radix in reversed(_radices(task, length)):
        number, digit = divmod(number, radix)
        parts.append(digit)
    parts.reverse()
    if number:
        raise ValueError(f"number: {length} is the length of fewer problems")
    if isinstance(task, Sort):
        return _sorting([task.numbers[0] + x for x in parts], style)
    if isinstance(task, Addition):
        numbers = [task.numbers[0] + x for x in parts]
        return _asked(" + ".join(map(str, numbers)), sum(numbers), style)
    return _modular(task, parts, style)


def _sorting(numbers: Sequence[int], style: Style) -> Row:
    given, right = (list(map(str, x)) for x in (numbers, sorted(numbers)))
    if style == "compact":
        return {"prompt": "".join(given) + ">", "response": "".join(right)}
    prompt = f"{' '.join(given)} ->" if style == "spaced" else f"Sort these numbers: {', '.join(given)}. Answer:"
    return {"prompt": prompt, "response": " ".join(right)}


def _modular(task: Modular, parts: Sequence[int], style: Style) -> Row:
    """parts: the first number, then an operation and a number in turn."""
    value, text = parts[0], str(parts[0])
    for i in range(1, len(parts), 2):
        sign, x = task.operations[parts[i]], parts[i + 1]
        text = f"{f'({text})' if i > 1 else text} {sign} {x}"
        value = value + x if sign == "+" else value - x if sign == "-" else value * x
    word = "%" if style == "compact" else "modulo" if style == "worded" else "mod"
    return _asked(f"({text}) {word} {task.modulus}", value % task.modulus, style)


def _asked(question: str, answer: int, style: Style) -> Row:
    if style == "worded":
        return {"prompt": f"What is {question}? Answer:", "response": str(answer)}
    prompt = f"{question} ="
    return {"prompt": prompt.replace(" ", "") if style == "compact" else prompt, "response": str(answer)}


def shuffled(k: int, n: int, seed: int, name: str = "") -> int:
    """Where a bijection of 0 .. n - 1, chosen by (seed, name), takes k: no table, whatever n.

    A Feistel network on the least even number of bits that holds n - 1, applied until the value is below n (cycle
    walking; Black and Rogaway 2002). Its rounds are BLAKE2b of (seed, name, round, half).
    """
    if not 0 <= k < n:
        raise ValueError(f"shuffled: k must be in 0 .. {n - 1}, got {k}")
    bits = max((max(n - 1, 1).bit_length() + 1) // 2, 1)
    mask = (1 << bits) - 1
    while True:
        left, right = k >> bits, k & mask
        for r in range(ROUNDS):
            digest = hashlib.blake2b(f"{seed}/{name}/{r}/{right}".encode(), digest_size=64).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        k = left << bits | right
        if k < n:
            return k


def _lengths(task: Task) -> Span:
    return task.n_operations if isinstance(task, Modular) else task.n_numbers


def _radices(task: Task, length: int) -> list[int]:
    """How many values each part of a problem has."""
    if isinstance(task, Modular):
        return [task.modulus, *(len(task.operations), task.modulus) * length]
    return [task.numbers[1] - task.numbers[0] + 1] * length


def _check(task: Task) -> None:
    name, (low, high) = ("n_operations" if isinstance(task, Modular) else "n_numbers"), _lengths(task)
    least = 1 if isinstance(task, Modular) else 2
    if not least <= low <= high <= MOST_PARTS:
        raise ValueError(f"{name} {low} to {high}: needs {least} <= low <= high <= {MOST_PARTS}")
    if isinstance(task, Modular):
        if not 2 <= task.modulus <= MOST:
            raise ValueError(f"modulus must be from 2 to {MOST:,}, got {task.modulus}")
        given = task.operations
        if not given or not set(given) <= set("+-*") or len(set(given)) < len(given):
            raise ValueError(f"operations {given!r}: allowed are some of + - *, each once")
    elif not 0 <= task.numbers[0] < task.numbers[1] <= MOST:
        raise ValueError(f"numbers {task.numbers[0]} to {task.numbers[1]}: needs 0 <= low < high <= {MOST:,}")
