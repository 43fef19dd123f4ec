"""What a question set is: examples, a prompt of each, and a grade of a response."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["Example", "Graded", "Task"]


class Example(NamedTuple):
    """One question."""

    id: str  # unique in its set
    question: str
    gold: str  # a number, or a letter
    subject: str = ""
    options: tuple[str, ...] = ()
    solution: str = ""  # the way to the answer, where the set has it


class Graded(NamedTuple):
    """What a response answers, None where nothing could be read, and whether that is right."""

    answer: str | None
    right: bool


class Task(NamedTuple):
    """A question set."""

    load: Callable[[Path], list[Example]]  # ValueError names file and line of a bad row
    prompt: Callable[[Example], str]
    grade: Callable[[str, Example], Graded]
    files: str  # pattern of its files in a folder of data
    response: Callable[[Example], str] | None = None  # as worked examples answer
    shot_files: str = ""  # pattern of the split that worked examples are from, read by `load`; "" if there is none
