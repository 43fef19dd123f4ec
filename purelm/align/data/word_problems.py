"""Arithmetic word problems of one or two steps in everyday English, without end for all practical sizes, from a seed.

    train, heldout = split(WordProblems(numbers=(2, 20)), seed=0, n_train=4000, n_heldout=200)
    # {"prompt": "Ravi has 12 shells, and Ines gives him 5 more. How many ...?", "response": "17", ...}

A problem is a template (`word_templates`) and its numbers; people and things follow from these and the seed. The
candidates of a template are numbered 0 .. N - 1 (mixed radix: one digit for each drawn number), and a seed shuffles
these numbers by a bijection. Those with a step that is not whole, is below 1 or above `most` are passed over. So no two
problems of a seed have the same template and numbers, and training and held-out sets are disjoint, whatever their
sizes, without a comparison.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from purelm.align.data.cleaning import Row
from purelm.align.data.tasks import Span, shuffled
from purelm.align.data.word_templates import KINDS, NAMES, TEMPLATES, Template
from purelm.caches import memo

__all__ = ["WordProblems", "rows", "split", "value"]

HIGHEST = 1000  # of a number that is drawn; more would leave few candidates with a small product
MOST = 10**6  # of what is computed
TRIES = 100_000  # candidates without a new problem, before the ranges are said to have no more


class WordProblems(NamedTuple):
    """Ranges, both ends included."""

    n_steps: Span = (1, 2)
    """operations of an answer"""
    numbers: Span = (2, 100)
    """that are drawn; a dividend or a sum of money may be larger"""
    most: int = 1000
    """of any number in the text, of each step and of the answer"""


def rows(task: WordProblems, seed: int, first: int, last: int) -> list[Row]:
    """Problems first .. last - 1 of a seed: lengths (steps) in turn, and the templates of a length in turn.

    A row has prompt, response, task, length and source. ValueError where a template has not as many problems: widen the
    ranges.
    """
    _check(task)
    if not 0 <= first <= last:
        raise ValueError(f"rows: {first} to {last}: needs 0 <= first <= last")
    lengths = range(task.n_steps[0], task.n_steps[1] + 1)
    groups = {n: [_problems(task, seed, x) for x in TEMPLATES if _steps(x.expression) == n] for n in lengths}
    found: list[Row] = []
    for k in range(last):
        length, turn = lengths[k % len(lengths)], k // len(lengths)
        row = next(groups[length][turn % len(groups[length])])
        if k >= first:
            found.append({**row, "task": "words", "length": length, "source": f"words, seed {seed}, problem {k}"})
    return found


def split(task: WordProblems, seed: int, *, n_train: int, n_heldout: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): the problems after the first n_heldout, and those.

    The held-out rows are the same for every n_train.
    """
    for name, n in (("n_train", n_train), ("n_heldout", n_heldout)):
        if n < 0:
            raise ValueError(f"{name} must be at least 0, got {n}")
    found = rows(task, seed, 0, n_heldout + n_train)
    return found[n_heldout:], found[:n_heldout]


def value(expression: str, numbers: dict[str, int], most: int) -> int | None:
    """What an expression of + - * / % is; None if a step is not whole, is below 1 or above `most`.

    A remainder is one of something larger than its divisor.

    >>> value("(a - b) / c", {"a": 20, "b": 2, "c": 6}, 100), value("a / b", {"a": 7, "b": 2}, 100)
    (3, None)
    """
    return _value(_parsed(expression), numbers, most)


def _value(node: ast.expr, numbers: dict[str, int], most: int) -> int | None:
    if isinstance(node, ast.Name):
        return numbers[node.id]
    assert isinstance(node, ast.BinOp)
    a, b = _value(node.left, numbers, most), _value(node.right, numbers, most)
    if a is None or b is None:
        return None
    match node.op:
        case ast.Add():
            step = a + b
        case ast.Sub():
            step = a - b
        case ast.Mult():
            step = a * b
        case ast.Div():
            step = 0 if a % b else a // b
        case _:
            step = a % b if a > b else 0
    return step if 1 <= step <= most else None


@memo(None)
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _steps(expression: str) -> int:
    return sum(isinstance(x, ast.BinOp) for x in ast.walk(_parsed(expression)))


def _problems(task: WordProblems, seed: int, template: Template) -> Iterator[Row]:
    """All problems of a template, in the order of the seed."""
    made = dict(template.made)
    letters = sorted(
        {*re.findall(r"\{([a-z])\}", template.text), *re.findall("[a-z]", " ".join(made.values()))} - {*made}
    )
    low, radix = task.numbers[0], task.numbers[1] - task.numbers[0] + 1
    n, last = radix ** len(letters), -1
    for k in range(n):
        if k - last > TRIES:
            break
        number, numbers = shuffled(k, n, seed, template.text), {}
        for letter in letters:
            number, digit = divmod(number, radix)
            numbers[letter] = low + digit
        for letter, expression in template.made:
            said = value(expression, numbers, task.most)
            if said is None or said < 2:
                break
            numbers[letter] = said
        else:
            if (answer := value(template.expression, numbers, task.most)) is not None:
                last = k
                yield {"prompt": _text(template, numbers, seed), "response": str(answer)}
    raise ValueError(f"numbers {task.numbers[0]} to {task.numbers[1]}, most {task.most}: no more problems like "
                     f"{template.text!r}: widen the ranges, or ask for fewer")  # fmt: skip


def _text(template: Template, numbers: dict[str, int], seed: int) -> str:
    """The template with its numbers, and words that are drawn by a hash of seed, template and numbers."""
    name = f"{seed}/{template.text}/{sorted(numbers.items())}"

    def two(kind: str, n: int) -> tuple[int, int]:
        bits = int.from_bytes(hashlib.blake2b(f"{name}/{kind}".encode(), digest_size=16).digest(), "little")
        i = bits % n
        return i, (i + 1 + bits // n % (n - 1)) % n

    i, j = two("name", len(NAMES))
    fields = {"A": NAMES[i][0], "B": NAMES[j][0], **NAMES[i][1], **{x: str(y) for x, y in numbers.items()}}
    for (one, many), words in KINDS.items():
        for index, end in zip(two(one, len(words)), ("", "2"), strict=True):
            fields[one + end], fields[many + end] = words[index]
    return template.text.format_map(fields)


def _check(task: WordProblems) -> None:
    low, high = task.n_steps
    if not 1 <= low <= high <= 2:
        raise ValueError(f"n_steps {low} to {high}: needs 1 <= low <= high <= 2")
    low, high = task.numbers
    if not 2 <= low < high <= HIGHEST:
        raise ValueError(f"numbers {low} to {high}: needs 2 <= low < high <= {HIGHEST:,}")
    if not high <= task.most <= MOST:
        raise ValueError(f"most must be from {high} (the highest of numbers) to {MOST:,}, got {task.most}")
