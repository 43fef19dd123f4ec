"""Countdown: an expression of given numbers that has a given value."""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from purelm.align.graders.extract import answer_tag, boxed
from purelm.align.graders.policy import Verdict
from purelm.align.graders.rewards import rewards

__all__ = ["check_countdown", "countdown"]

MAX_LENGTH = 512  # characters of an expression
MAX_DEPTH = 32
MAX_DIGITS = 12
SIGNS = {
    "\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-", "\\times": "*",
    "\\cdot": "*", "\\div": "/", "\\left": "", "\\right": "", "[": "(", "]": ")", "$": "",
}  # fmt: skip
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()=])")


class _Wrong(ValueError):
    """Not an expression of the game."""


class _Reader:
    """sum := product ((+|-) product)*, product := unary ((*|/) unary)*, unary := [-] (number | ( sum ))"""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = [*tokens, ""]
        self.i = 0
        self.depth = 0
        self.used: list[int] = []

    def take(self, *texts: str) -> str:
        found = self.tokens[self.i] if self.tokens[self.i] in texts else ""
        self.i += bool(found)
        return found

    def sum(self) -> Fraction:
        value = self.product()
        while sign := self.take("+", "-"):
            value += self.product() if sign == "+" else -self.product()
        return value

    def product(self) -> Fraction:
        value = self.unary()
        while sign := self.take("*", "/"):
            other = self.unary()
            if sign == "/" and not other:
                raise _Wrong("division by zero")
            value = value * other if sign == "*" else value / other
        return value

    def unary(self) -> Fraction:
        minus = self.take("-")
        token = self.tokens[self.i]
        if token.isdigit():
            self.i += 1
            if len(token) > MAX_DIGITS:
                raise _Wrong(f"a number of more than {MAX_DIGITS} digits")
            self.used.append(int(token))
            value = Fraction(int(token))
        elif self.take("("):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise _Wrong(f"more than {MAX_DEPTH} brackets")
            value = self.sum()
            if not self.take(")"):
                raise _Wrong(f"{self.tokens[self.i]!r} where ) is expected")
            self.depth -= 1
        else:
            raise _Wrong(f"{token!r} where a number is expected")
        return -value if minus else value


def _read(text: str, tail: bool) -> tuple[Fraction, list[int], Fraction | None]:
    """(value, numbers used, value after =)"""
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise _Wrong(f"more than {MAX_LENGTH} characters")
    for sign, plain in SIGNS.items():
        text = text.replace(sign, plain)
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _Wrong(f"{text[position : position + 10]!r} is no part of an expression")
        tokens.append(match[1])
        position = match.end()
    reader = _Reader(tokens)
    value, after = reader.sum(), None
    used = list(reader.used)
    if tail and reader.take("="):
        after = reader.sum()
    if reader.tokens[reader.i]:
        raise _Wrong(f"{reader.tokens[reader.i]!r} after an expression")
    return value, used, after


def check_countdown(
    expression: str, numbers: Sequence[int], target: int, use_all: bool = True, equation_tail: bool = True
) -> Verdict:
    """Whether an expression of + - * / and brackets over the numbers, each used once, has the value `target`, exactly.

    use_all: all numbers must be used; else at most each once. equation_tail: "= 24" may follow, and must be right.
    Signs may be those of Unicode and LaTeX. Nothing is evaluated by Python; ** is no sign.

    >>> check_countdown("(8 - 4) * (7 - 1) = 24", [1, 4, 7, 8], 24)
    Verdict(equal=True, reason='right')
    >>> check_countdown("8 * 3", [1, 4, 7, 8], 24).reason
    'uses [3, 8], not each of [1, 4, 7, 8] once'
    """
    try:
        value, used, after = _read(expression, equation_tail)
    except _Wrong as error:
        return Verdict(False, f"not read: {error}")
    return _judge(value, used, after, numbers, target, use_all)


def _judge(
    value: Fraction, used: list[int], after: Fraction | None, numbers: Sequence[int], target: int, use_all: bool
) -> Verdict:
    mine, given = Counter(used), Counter(numbers)
    if mine != given if use_all else mine - given:
        each = "each of" if use_all else "some of"
        return Verdict(False, f"uses {sorted(used)}, not {each} {sorted(numbers)} once")
    if value != target:
        return Verdict(False, f"is {value}, not {target}")
    if after is not None and after != target:
        return Verdict(False, f"says = {after}, not {target}")
    return Verdict(True, "right")


def countdown(
    response: str, numbers: Sequence[int], target: int, use_all: bool = True, equation_tail: bool = True
) -> dict[str, float]:
    r"""Reward of a response to Countdown, as {format_reward, answer_reward, reward}; the rules: `check_countdown`.

    The expression is what the last <answer>...</answer> holds, at the end of the response, or the response if it has no
    <answer>; of that the last \boxed{...}, if there is one. format_reward is 1 if it is an expression.

    Other than TinyZero's countdown.py: no eval; exact fractions (there, within 1e-5); line breaks, signs of Unicode and
    a tail "= 24" are allowed; no prompt is looked for. Its score is 0.1 format_reward + 0.9 answer_reward.

    >>> countdown("</think> <answer>(8 - 4) * (7 - 1)</answer>", [1, 4, 7, 8], 24)["reward"]
    1.0
    """
    text = answer_tag(response) if "<answer>" in response else response
    if text is not None and "\\boxed" in text:
        text = boxed(text)
    try:
        read = _read(text or "", equation_tail)
    except _Wrong:
        return rewards(False, False)
    return rewards(True, _judge(*read, numbers, target, use_all).equal)
