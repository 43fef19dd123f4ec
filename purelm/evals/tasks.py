"""Question sets with a known answer: read from their files, put into a prompt, and graded.

    task = TASKS["gsm8k"]
    examples = task.load(Path("gsm8k-test.jsonl"))
    prompt = task.prompt(examples[0])
    verdict = task.grade(response, examples[0])     # Graded(answer="72", right=True)

Word problems (GSM8K, SVAMP, ASDiv, MAWPS) have a number as answer: the last one in the response. MMLU has a letter.
Worked examples before the question: `purelm.evals.shots`. Sets without a known answer: `purelm.evals.open_ended`.
"""

import csv
from pathlib import Path
from typing import Any

from purelm.align.data.examples import without_calculator
from purelm.align.graders import equal, gsm8k_gold, last_number, mmlu_letter
from purelm.data.json_lines import json_rows
from purelm.evals import countdown
from purelm.evals.task import Example, Graded, Task

__all__ = ["TASKS", "Example", "Graded", "Task", "csv_rows"]


def csv_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file, quoted new lines and all; ValueError names the file if it is no CSV in UTF-8."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.reader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not CSV in UTF-8 ({error})") from None


def _field(row: dict[str, Any], where: str, name: str) -> Any:
    if name not in row:
        raise ValueError(f"{where}: lacks {name!r}; its fields are {', '.join(row)}")
    return row[name]


def _number(x: Any) -> str:
    """145.0 as "145": the text of a number without a needless fraction."""
    return str(int(x)) if isinstance(x, float) and x.is_integer() else str(x)


def _gsm8k(path: Path) -> list[Example]:
    found: list[Example] = []
    for where, row in json_rows(path):
        answer = str(_field(row, where, "answer"))
        gold = gsm8k_gold(answer)
        if gold is None:
            raise ValueError(f"{where}: its answer has no '#### number'")
        solution = without_calculator(answer.rpartition("####")[0]).strip()
        question = str(_field(row, where, "question")).strip()
        found.append(Example(f"gsm8k-{len(found)}", question, gold, solution=solution))
    return found


def _svamp(path: Path) -> list[Example]:
    found: list[Example] = []
    for where, row in json_rows(path):
        body, question = (str(_field(row, where, name)).strip() for name in ("Body", "Question"))
        body = body if body.endswith((".", "?", "!")) else f"{body}."
        found.append(Example(f"svamp-{len(found)}", f"{body} {question}", _number(_field(row, where, "Answer"))))
    return found


def _asdiv(path: Path) -> list[Example]:
    """Problems whose answer begins with a number; the few others ("Tom", "1/3; 2/3") are left out."""
    found: list[Example] = []
    for i, (where, row) in enumerate(json_rows(path)):
        gold = str(_field(row, where, "answer")).split(" (")[0].strip()
        try:
            float(gold)
        except ValueError:
            continue
        question = f"{str(_field(row, where, 'body')).strip()} {str(_field(row, where, 'question')).strip()}"
        found.append(Example(f"asdiv-{i}", question, gold))
    return found


def _mawps(path: Path) -> list[Example]:
    found: list[Example] = []
    for where, row in json_rows(path):
        gold = _number(_field(row, where, "target"))
        found.append(Example(f"mawps-{len(found)}", str(_field(row, where, "input")).strip(), gold))
    return found


def _mmlu(path: Path) -> list[Example]:
    """A CSV file of one subject, named SUBJECT_SPLIT.csv: question, four options, letter; no header."""
    name = path.stem.rsplit("_", 1)[0]
    found: list[Example] = []
    for number, row in enumerate(csv_rows(path), 1):
        if len(row) != 6 or row[5].strip() not in ("A", "B", "C", "D"):
            raise ValueError(f"{path}, row {number}: needs a question, four options and A, B, C or D; got {row}")
        options = tuple(x.strip() for x in row[1:5])
        found.append(
            Example(f"mmlu-{name}-{number - 1}", row[0].strip(), row[5].strip(), name.replace("_", " "), options)
        )
    return found


def _word_problem(example: Example) -> str:
    return f"{example.question}\nAnswer:"


def _multiple_choice(example: Example) -> str:
    if len(example.options) != 4:
        raise ValueError(f"a multiple choice question has 4 options, got {len(example.options)}")
    lines = [f"{letter}. {text}" for letter, text in zip("ABCD", example.options, strict=True)]
    return "\n".join(
        [
            f"Answer this multiple choice question about {example.subject}. "
            'Say "The correct answer is X", with the letter of the right option for X.',
            "",
            f"Question: {example.question}",
            *lines,
            "Answer:",
        ]
    )


def _worked_number(example: Example) -> str:
    return f"{example.solution} The answer is {example.gold}.".strip()


def _worked_letter(example: Example) -> str:
    return f"The correct answer is {example.gold}."


def _by_number(response: str, example: Example) -> Graded:
    answer = last_number(response)
    return Graded(answer, answer is not None and equal(answer, example.gold).equal)


def _by_letter(response: str, example: Example) -> Graded:
    answer = mmlu_letter(response, example.options)
    return Graded(answer, answer == example.gold)


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        _gsm8k, _word_problem, _by_number, "**/gsm8k-test.jsonl", _worked_number, "**/gsm8k-train.jsonl"
    ),
    "svamp": Task(_svamp, _word_problem, _by_number, "**/svamp.test.jsonl", _worked_number, "**/svamp.train.jsonl"),
    "asdiv": Task(_asdiv, _word_problem, _by_number, "**/asdiv.test.jsonl", _worked_number, "**/asdiv.train.jsonl"),
    "mawps": Task(_mawps, _word_problem, _by_number, "**/mawps.test.jsonl", _worked_number, "**/mawps.train.jsonl"),
    "mmlu": Task(_mmlu, _multiple_choice, _by_letter, "**/mmlu/*_test.csv", _worked_letter, "**/mmlu/*_dev.csv"),
    "countdown": Task(countdown.load, countdown.prompt, countdown.grade, "**/countdown*test.jsonl"),
}
