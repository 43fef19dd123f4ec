"""What `experiments.evaluate` asks: question sets read from their files, with worked examples before each question."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from purelm import random
from purelm.data.json_lines import json_rows
from purelm.evals.open_ended import OPEN
from purelm.evals.shots import choose
from purelm.evals.tasks import TASKS, Example, Graded

__all__ = ["NO_SHOTS", "Asked", "Shot", "Shots", "digest", "read_set", "read_shots", "shots_of"]

Shot = tuple[Example, str]  # a worked example and its response


class Shots(NamedTuple):
    """Worked examples to choose from, in the order of choice."""

    pool: tuple[Example, ...]
    responses: Mapping[str, str]  # by the id of the example
    n: int  # before each question


NO_SHOTS = Shots((), {}, 0)


class Asked(NamedTuple):
    """A question set."""

    name: str
    examples: list[Example]
    prompt: Callable[[Example], str]
    grade: Callable[[str, Example], Graded] | None  # None: there is no known answer
    shots: Shots
    files: list[Path]  # all that were read


def read_set(name: str, data: Path, limit: int | None, n_shots: int, seed: int | None, given: Shots) -> Asked:
    """A set of `TASKS` or `OPEN` by its name, with n_shots worked examples of its own other split, or those given.

    seed: of the order in which worked examples are chosen; None: that of their files.
    """
    task = TASKS.get(name) or OPEN.get(name)
    if task is None:
        raise ValueError(f"tasks: {name}: not known; there are {', '.join((*TASKS, *OPEN))}")
    files = _files(data, task.files, f"tasks: {name}")
    examples = [example for file in files for example in task.load(file)][:limit]
    if not examples:
        raise ValueError(f"tasks: {name}: no question in {', '.join(map(str, files))}")
    shots = given
    if n_shots:
        own = TASKS.get(name)
        if own is None or own.response is None or not own.shot_files:
            raise ValueError(f"shots: {name} has no split of worked examples: give --shots-file")
        shot_files = _files(data, own.shot_files, f"shots: {name}")
        pool = [x for file in shot_files for x in own.load(file)]
        if seed is not None:
            pool = [pool[i] for i in random.permutation(random.key(seed), len(pool)).tolist()]
        shots = Shots(tuple(pool), {x.id: own.response(x) for x in pool}, n_shots)
        files += shot_files
        there = Counter(x.subject for x in pool)
        for x in examples:
            if there[x.subject] < n_shots:
                of = f" about {x.subject}" if x.subject else ""
                have = f"{there[x.subject]} worked examples{of}"
                raise ValueError(f"shots: {name} has {have} in {data}/{own.shot_files}, not {n_shots}")
    if name not in TASKS:
        return Asked(name, examples, lambda x: x.question, None, shots, files)
    for shot in given.pool:
        try:
            TASKS[name].prompt(shot)
        except ValueError as error:
            raise ValueError(f"{shot.id}: {name}: {error}") from None
    return Asked(name, examples, TASKS[name].prompt, TASKS[name].grade, shots, files)


def read_shots(path: Path) -> Shots:
    """Worked examples of a JSON-lines file, {"question", "response"} and for multiple choice {"options": [...]}."""
    pool, responses = [], {}
    for where, row in json_rows(path):
        texts = [row.get(name) for name in ("question", "response")]
        options = row.get("options", [])
        if not all(isinstance(text, str) for text in texts) or not isinstance(options, list):
            raise ValueError(f"{where}: needs the texts 'question' and 'response'; its fields are {', '.join(row)}")
        pool.append(Example(where, str(texts[0]), "", str(row.get("subject", "")), tuple(map(str, options))))
        responses[where] = str(texts[1])
    if not pool:
        raise ValueError(f"{path}: has no rows")
    return Shots(tuple(pool), responses, len(pool))


def shots_of(asked: Asked, example: Example) -> list[Shot]:
    """The worked examples before a question: never the question itself. Those without a subject fit every one."""
    # A subject that is not said is that of the question, in the prompt too.
    pool = (x if x.subject or not example.subject else x._replace(subject=example.subject) for x in asked.shots.pool)
    return [(x, asked.shots.responses[x.id]) for x in choose(pool, example, asked.shots.n)]


def digest(shots: list[Shot]) -> str:
    """A hash of worked examples; "" of none."""
    text = json.dumps([[x.question, x.subject, x.options, response] for x, response in shots])
    return hashlib.sha256(text.encode()).hexdigest()[:16] if shots else ""


def _files(data: Path, pattern: str, what: str) -> list[Path]:
    files = sorted(data.glob(pattern))
    if not files:
        raise ValueError(f"{what}: no file {pattern} in {data}")
    return files
