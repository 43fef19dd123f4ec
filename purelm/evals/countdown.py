"""Countdown as a question set: JSON lines of {"numbers", "target"}, or {"nums", "target"} as in TinyZero's data."""

from pathlib import Path

from purelm.align.data.countdown import countdown_prompt, countdown_question
from purelm.align.graders import answer_tag, boxed, countdown
from purelm.data.json_lines import json_rows
from purelm.evals.task import Example, Graded

__all__ = ["grade", "load", "prompt"]


def load(path: Path) -> list[Example]:
    """Examples with the target as gold and the numbers as options; ValueError names file and line of a bad row."""
    found: list[Example] = []
    for where, row in json_rows(path):
        numbers, target = row.get("numbers", row.get("nums")), row.get("target")
        fields = f"its fields are {', '.join(row)}"
        if not isinstance(numbers, list) or not numbers or not all(type(x) is int and x >= 0 for x in numbers):
            raise ValueError(f"{where}: has no list of whole numbers 'numbers' or 'nums'; {fields}")
        if type(target) is not int:
            raise ValueError(f"{where}: has no whole number 'target'; {fields}")
        name, options = f"countdown-{len(found)}", tuple(map(str, numbers))
        found.append(Example(name, countdown_question(numbers, target), str(target), "", options))
    return found


def prompt(example: Example) -> str:
    """The problem and its rules."""
    return countdown_prompt(example.question)


def grade(response: str, example: Example) -> Graded:
    """By `graders.countdown`; the answer is what is in <answer>, else in the last box, None if it is no expression."""
    found = countdown(response, [int(x) for x in example.options], int(example.gold))
    text = answer_tag(response) if "<answer>" in response else response
    text = boxed(text) if text is not None and "\\boxed" in text else text
    return Graded(text.strip() if text is not None and found["format_reward"] else None, bool(found["reward"]))
