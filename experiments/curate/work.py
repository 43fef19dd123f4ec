"""One task of a run, by any back end: a function of the task alone, whose output appears whole or not at all."""

import errno
import json
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.curate.config import Filter
from experiments.curate.duplicates import find_duplicates
from experiments.curate.files import publishing
from experiments.curate.plan import Task, mark, place
from experiments.curate.shard import Tell, filter_input
from experiments.curate.shuffle import gather, scatter
from experiments.curate.steps import contents, steps_of, warm
from experiments.curate.tokens import load_tokenizer, tokenize
from purelm import track
from purelm.caches import memo
from purelm.curate.document import Step

__all__ = ["Result", "attempt", "do", "nothing", "timing_place"]

FULL = (errno.ENOSPC, errno.EDQUOT)


class Result(NamedTuple):
    """What became of a task."""

    name: str
    error: str | None = None
    is_fatal: bool = False  # other tasks would fail in the same way: no more are begun


def nothing(documents: int, n_bytes: int) -> None:
    """Progress that nobody looks at."""


def attempt(task: Task, tell: Tell = nothing) -> Result:
    """The task done, or why it is not; its output folder is then as it was."""
    try:
        do(task, tell)
    except OSError as error:
        full = error.errno in FULL
        what = f"{error}; free some space and start again: what is done stays" if full else str(error)
        return Result(task.name, f"{type(error).__name__}: {what}", full)
    except Exception as error:
        return Result(task.name, f"{type(error).__name__}: {error}")
    return Result(task.name)


def do(task: Task, tell: Tell) -> None:
    """The task's folder, and its times beside: they differ from run to run, so they lie in a folder of their own."""
    steps = _steps(task.cfg.filter, json.dumps(task.made_from["settings"])) if task.stage == "filter" else {}
    seconds, cpu = time.perf_counter(), time.process_time()
    done = [0, 0]

    def told(documents: int, n_bytes: int) -> None:
        done[0], done[1] = done[0] + documents, done[1] + n_bytes
        tell(documents, n_bytes)

    folder = place(task.cfg, task.stage, task.number)
    with publishing(folder) as out:
        STAGES[task.stage](task, steps, out, told)
        mark(out, task.made_from)
    track.write_json(timing_place(task), {
        "seconds": time.perf_counter() - seconds, "cpu_seconds": time.process_time() - cpu,
        "documents": done[0], "bytes": done[1], "stored_bytes": sum(x.size for x in task.inputs),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process": os.getpid(),
    })  # fmt: skip


def timing_place(task: Task) -> Path:
    """The file with the times of a task."""
    return task.cfg.output / "timing" / f"{task.stage}-{task.number:05d}.json"


@memo(1)
def _steps(cfg: Filter, settings: str) -> Mapping[str, Step]:
    """settings: of the stage, as JSON. They hold hashes of the lists and models, which must still be the same."""
    made_from = json.loads(settings)
    for name, found in contents(cfg).items():
        if made_from.get(name) != found:
            raise ValueError(f"{name} has changed since the run began")
    steps = steps_of(cfg)
    warm(steps)
    return steps


def _filter(task: Task, steps: Mapping[str, Step], out: Path, tell: Tell) -> None:
    filter_input(task.cfg, task.inputs[0].path, out, steps, tell)


def _duplicates(task: Task, steps: Mapping[str, Step], out: Path, tell: Tell) -> None:
    find_duplicates(task.cfg, [place(task.cfg, "filter", i) for i in range(task.n_inputs)], out, tell)


def _scatter(task: Task, steps: Mapping[str, Step], out: Path, tell: Tell) -> None:
    shard, duplicates = place(task.cfg, "filter", task.number), place(task.cfg, "duplicates", 0)
    scatter(task.cfg, task.number, task.n_outputs, shard, duplicates, out, tell)


def _text(task: Task, steps: Mapping[str, Step], out: Path, tell: Tell) -> None:
    gather(task.cfg, task.number, [place(task.cfg, "scatter", i) for i in range(task.n_inputs)], out, tell)


def _tokens(task: Task, steps: Mapping[str, Step], out: Path, tell: Tell) -> None:
    assert task.cfg.final.tokenizer is not None
    text = place(task.cfg, "text", task.number) / f"documents.jsonl.{task.cfg.compression}"
    tokenize(load_tokenizer(task.cfg.final.tokenizer), text, out, tell)


STAGES: dict[str, Callable[[Task, Mapping[str, Step], Path, Tell], Any]] = {
    "filter": _filter, "duplicates": _duplicates, "scatter": _scatter, "text": _text, "tokens": _tokens,
}  # fmt: skip
