"""The work of a run as tasks, where each leaves its output, and how it is known to be done.

A task is (stage, number). Its output is the folder OUT/stages/STAGE/NUMBER, which appears whole; done.json in it says
from what it was made: the settings of its stage, the inputs (name, size and time of change), and a hash of the same of
the stages before it. So it does not depend on how many workers there are, nor on which of them did it.
"""

import hashlib
import json
import re
import shutil
from glob import glob
from os.path import samestat
from pathlib import Path
from typing import Any, NamedTuple

from experiments.curate.config import Curate
from experiments.curate.files import read_json, write_json
from purelm.curate.read import records
from purelm.data.tables import parquet_files

__all__ = ["FORMAT", "Input", "Task", "check_done", "find_inputs", "mark", "place"]

FORMAT = 2  # of the files in OUT/stages: raised where they change
DONE = "done.json"


class Input(NamedTuple):
    """A file of the crawl, or a folder of tables."""

    path: str
    size: int  # bytes
    modified: int  # nanoseconds since 1970: of a file that was written over, which may be as large as before


class Task(NamedTuple):
    """All that a worker needs to know."""

    cfg: Curate
    stage: str
    number: int
    made_from: dict[str, Any]  # the content of done.json
    inputs: tuple[Input, ...] = ()  # filter: its own one
    n_inputs: int = 0
    n_outputs: int = 0  # final shards, once they are known

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.stage} {self.inputs[0].path}" if self.inputs else f"{self.stage} {self.number:05d}"


def place(cfg: Curate, stage: str, number: int) -> Path:
    """The folder of a task's output."""
    return cfg.output / "stages" / stage / f"{number:05d}"


def find_inputs(patterns: tuple[str, ...], output: Path) -> tuple[Input, ...]:
    """The files that the patterns match, sorted by name; ValueError where one matches none or cannot be an input."""
    found: dict[str, Input] = {}
    for pattern in patterns:
        paths = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))
        if not paths:
            raise ValueError(f"input {pattern!r}: no such file")
        for path in paths:
            records(path)  # refuses a name that no reader knows
            parts = [file.stat() for file in (parquet_files(Path(path)) if Path(path).is_dir() else [Path(path)])]
            found[path] = Input(path, sum(x.st_size for x in parts), max(x.st_mtime_ns for x in parts))
    seen: dict[tuple[int, int], str] = {}
    inside = output.resolve()
    for path in sorted(found):
        here = Path(path)
        if inside == here.resolve() or inside in here.resolve().parents or here.resolve() in inside.parents:
            raise ValueError(f"output {output}: holds the input {path}, or lies in it; write elsewhere")
        status = here.stat()
        other = seen.setdefault((status.st_dev, status.st_ino), path)
        if other != path:
            assert samestat(status, Path(other).stat())
            raise ValueError(f"input {path}: is the same file as {other}")
    return tuple(found[path] for path in sorted(found))


def digest(value: Any) -> str:
    """A hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def mark(folder: Path, made_from: dict[str, Any]) -> None:
    """Leave done.json in a folder that is about to be published."""
    write_json(folder / DONE, made_from)


def check_done(tasks: list[Task], redo: bool) -> list[Task]:
    """The tasks that are still to do.

    ValueError where an output is there that was made from something else, which it names; with redo, the output is to
    be made again, and outputs with numbers that no task has are removed.
    """
    cfg, stage = tasks[0].cfg, tasks[0].stage
    numbers = {task.number for task in tasks}
    folder = cfg.output / "stages" / stage
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if re.fullmatch(r"\d{5,}", path.name) and int(path.name) not in numbers:
            if not redo:
                raise ValueError(
                    f"{path}: is of a run with more parts than this one; give all inputs, another output, or --redo"
                )
            shutil.rmtree(path)
    todo = []
    for task in tasks:
        path = place(cfg, stage, task.number) / DONE
        if not path.exists():
            todo.append(task)
            continue
        there = read_json(path)
        if there != json.loads(json.dumps(task.made_from)):
            if not redo:
                raise ValueError(f"{path.parent}: {_difference(there, task.made_from)}; give another output, or --redo")
            todo.append(task)
    return todo


def _difference(there: Any, now: dict[str, Any]) -> str:
    now = json.loads(json.dumps(now))
    for part in ("settings", "input"):
        before = there.get(part) if isinstance(there, dict) else None
        if before != now.get(part):
            if isinstance(before, dict) and isinstance(now.get(part), dict):
                after = now[part]
                name = next(x for x in (*before, *after) if before.get(x, ...) != after.get(x, ...))
                return f"was made with {name} {before.get(name)!r}, now it is {after.get(name)!r}"
            return f"was made from {before}, now it is {now.get(part)}"
    return "was made from other outputs of the stages before it, or by another version of this program"
