"""Sets of instructions without a known answer: read, and written with a model's outputs for the tools that judge them.

    task = OPEN["alpaca_eval"]
    examples = task.load(Path("alpaca_eval.jsonl"))
    text = task.text(examples, outputs, "my-model")         # of the file that the judging tools take

AlpacaEval: `alpaca_eval --model_outputs FILE` takes a JSON array of {instruction, output, generator, dataset}
(github.com/tatsu-lab/alpaca_eval). SimpleSafetyTests: the course's judge (CS336, assignment 5) takes JSON lines of
{prompts_final, output}. `purelm.evals.judges` judges either.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from purelm.data.json_lines import json_rows
from purelm.evals.tasks import Example, csv_rows

__all__ = ["OPEN", "OpenTask"]


class OpenTask(NamedTuple):
    """A set of instructions. An Example's subject is the part of the set that it is from; it has no gold answer."""

    load: Callable[[Path], list[Example]]  # ValueError names file and line of a bad row
    files: str  # pattern of its files in a folder of data
    text: Callable[[Sequence[Example], Sequence[str], str], str]  # examples, their outputs, the model's name
    suffix: str  # of a file of that text


def _alpaca_eval(path: Path) -> list[Example]:
    found: list[Example] = []
    for where, row in json_rows(path):
        values = [row.get(name) for name in ("instruction", "dataset")]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{where}: needs the texts 'instruction' and 'dataset'; its fields are {', '.join(row)}")
        found.append(Example(f"alpaca_eval-{len(found)}", str(values[0]), "", str(values[1])))
    return found


def _simple_safety_tests(path: Path) -> list[Example]:
    header, *rows = csv_rows(path) or [[]]
    if "prompts_final" not in header:
        raise ValueError(f"{path}: its header needs 'prompts_final'; it has {', '.join(header)}")
    found: list[Example] = []
    for number, cells in enumerate(rows, 2):
        row = dict(zip(header, cells, strict=False))
        if not row.get("prompts_final", "").strip():
            raise ValueError(f"{path}, row {number}: 'prompts_final' is empty")
        name = f"simple_safety_tests-{len(found)}"
        found.append(Example(name, row["prompts_final"], "", row.get("harm_area", "")))
    return found


def _array(examples: Sequence[Example], outputs: Sequence[str], generator: str) -> str:
    rows = [
        {"instruction": x.question, "output": output, "generator": generator, "dataset": x.subject}
        for x, output in zip(examples, outputs, strict=True)
    ]
    return json.dumps(rows, indent=1) + "\n"


def _lines(examples: Sequence[Example], outputs: Sequence[str], generator: str) -> str:
    rows = [{"prompts_final": x.question, "output": y} for x, y in zip(examples, outputs, strict=True)]
    return "".join(json.dumps(row) + "\n" for row in rows)


OPEN: dict[str, OpenTask] = {
    "alpaca_eval": OpenTask(_alpaca_eval, "**/alpaca_eval.jsonl", _array, ".json"),
    "simple_safety_tests": OpenTask(_simple_safety_tests, "**/simple_safety_tests.csv", _lines, ".jsonl"),
}
