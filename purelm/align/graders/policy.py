"""What a grader says, what it may be told, and the bounds of what it reads."""

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["MAX_BITS", "MAX_DEPTH", "MAX_LENGTH", "MAX_STEPS", "MAX_TOKENS", "NO_POLICY", "Policy", "TooBig", "Verdict"]

MAX_LENGTH = 4096  # characters of an answer; a longer one is compared as text
MAX_TOKENS = 1500
MAX_DEPTH = 60  # of brackets and arguments inside one another; one of the text is two or three of these
MAX_STEPS = 20_000  # products and sums of two terms for one pair: a quarter of a second
MAX_BITS = 8192  # of an integer, about 2400 digits


class Verdict(NamedTuple):
    """Whether an answer is right, and why. What could not be decided is not equal: its reason starts "undecided"."""

    equal: bool
    reason: str


class TooBig(ArithmeticError):
    """A bound of this file was reached; the message names it."""


CHOICES = {
    "percent": ("either", "number"),
    "lists": ("set", "sequence"),
    "interval_relation": ("answer", "both"),
    "colon": ("ratio", "clock"),
    "units": ("optional", "required", "ignored"),
}


@dataclass(frozen=True)
class Policy:
    """What is a matter of taste, not of mathematics.

    percent: "either": 50% is equal to 0.5 and to 50; "number": it is 0.5 alone.
    float_tolerance: where one side is written with a decimal point, |answer - gold| may be this much of the larger one.
    lists: "set": 3,2,1 without brackets is {1,2,3}; "sequence": it is (3,2,1).
    interval_relation: "answer": (-oo,2) may answer x<2, but not the reverse (a relation may be copied from the
        question); "both": the reverse, too.
    column_vector: a matrix of one column is equal to the tuple of its entries.
    equation_solution: 2x+3=5 may answer x=1 (the equation may be copied from the question).
    assignment: x=5 is equal to 5.
    colon: "ratio": 2:4 is equal to 1:2 and to 1/2, but 3:05 is a time; "clock": parts are compared one by one.
    units: "optional": 10 cm is equal to 10 and to 0.1 m, but not to 10 m; "required": not to 10; "ignored": to all.

    >>> from purelm.align.graders import equal
    >>> equal("50%", "50").equal, equal("50%", "50", Policy(percent="number")).equal
    (True, False)
    """

    percent: str = "either"
    float_tolerance: float = 0.0
    lists: str = "set"
    interval_relation: str = "answer"
    column_vector: bool = True
    equation_solution: bool = False
    assignment: bool = True
    colon: str = "ratio"
    units: str = "optional"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Policy.{name} is {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        for name in ("column_vector", "equation_solution", "assignment"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Policy.{name} is {getattr(self, name)!r}: allowed are True and False")
        number = isinstance(self.float_tolerance, int | float) and not isinstance(self.float_tolerance, bool)
        if not number or not 0 <= self.float_tolerance < 1:
            raise ValueError(f"Policy.float_tolerance is {self.float_tolerance!r}: allowed are numbers from 0, below 1")


NO_POLICY = Policy()
