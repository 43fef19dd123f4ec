"""Countdown as a question set. Oracles: the generator's own solutions; answers by hand."""

import json
from itertools import islice

import pytest

from purelm.align.data.countdown import Game, countdown, countdown_row
from purelm.evals.tasks import TASKS, Example


def test_generated_problems_are_examples(tmp_path):
    """The prompt is the one to train on, and the solution is graded right."""
    rows = [countdown_row(x) for x in islice(countdown(Game(), 3), 20)]
    path = tmp_path / "countdown-test.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = TASKS["countdown"]
    assert path in tmp_path.glob(task.files)
    for row, example in zip(rows, task.load(path), strict=True):
        assert task.prompt(example) == row["prompt"] and example.question == row["question"]
        graded = task.grade(f"Let me see.\n{row['response']}", example)
        assert graded.right and f"<answer>{graded.answer}</answer>" == row["response"]


EXAMPLE = Example("countdown-0", "", "24", "", ("1", "4", "7", "8"))


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("<answer> (8 - 4) * (7 - 1) </answer>", "(8 - 4) * (7 - 1)", True),
        ("so \\boxed{(8-4)*(7-1)}", "(8-4)*(7-1)", True),
        ("(8 - 4) * (7 - 1) = 24", "(8 - 4) * (7 - 1) = 24", True),
        ("<answer>8 * 3</answer>", "8 * 3", False),
        ("<answer>8 + 4 + 7 + 1</answer>", "8 + 4 + 7 + 1", False),
        ("I do not know.", None, False),
        ("<answer>24", None, False),
    ],
)
def test_grade(response, answer, right):
    assert TASKS["countdown"].grade(response, EXAMPLE) == (answer, right)


def test_names_of_tinyzero_and_bad_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"nums": [1, 2], "target": 3}')
    (example,) = TASKS["countdown"].load(path)
    assert (example.gold, example.options) == ("3", ("1", "2"))
    for row, message in (
        ({"nums": [1.5], "target": 3}, "has no list of whole numbers 'numbers' or 'nums'; its fields are nums, target"),
        ({"numbers": [1]}, "has no whole number 'target'; its fields are numbers"),
    ):
        path.write_text("\n" + json.dumps(row))
        with pytest.raises(ValueError, match=f"x.jsonl, line 2: {message}"):
            TASKS["countdown"].load(path)
