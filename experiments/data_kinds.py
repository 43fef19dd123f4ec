"""Sources of `prepare_sft`: which kind of examples a file holds, its rows, and the questions of test sets."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from purelm.align.data import Row, alpaca, asked, chat, gsm8k, pairs, read, without_calculator
from purelm.align.data import openr1 as numina
from purelm.align.data.countdown import Game, countdown, countdown_row
from purelm.align.graders import gsm8k_gold
from purelm.data.tables import parquet_files, table_rows
from purelm.evals.tasks import TASKS

Kind = Literal["auto", "alpaca", "chat", "pairs", "gsm8k", "openr1"]
KINDS = (
    "alpaca (instruction, output), chat (messages or conversations), pairs (prompt, response), gsm8k (question, answer "
    "with ####), openr1 (problem, generations)"
)
COUNTDOWN = "countdown:"


def kind_of(source: str, kind: Kind) -> str:
    """The kind of a source: as given, else by its name or the fields of its first row; ValueError if it is none."""
    if source.startswith(COUNTDOWN):
        return "countdown"
    if kind != "auto":
        return kind
    where, first = next(table_rows(source), ("", None))
    if first is None:
        raise ValueError(f"{source}: has no rows")
    if "generations" in first:
        return "openr1"
    if "messages" in first or "conversations" in first:
        return "chat"
    if "prompt" in first:
        return "pairs"
    if "instruction" in first:
        return "alpaca"
    if "question" in first and gsm8k_gold(str(first.get("answer"))) is not None:
        return "gsm8k"
    raise ValueError(f"{where}: has the fields {', '.join(first) or 'none'}; kinds are {KINDS}: give --kind")


def rows_from(
    source: str, kind: str, *, every_turn: bool, calculator: bool, game: Game, seed: int,
    bad: Callable[[str], None] | None,
) -> Iterator[Row]:  # fmt: skip
    """The rows of a source."""
    if kind == "countdown":
        first, last = countdown_range(source)
        for number, problem in enumerate(islice(countdown(game, seed), first, last), first):
            yield {**countdown_row(problem), "source": f"countdown, seed {seed}, problem {number}"}
        return
    converters: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
        "alpaca": alpaca,
        "chat": partial(chat, every_turn=every_turn),
        "pairs": pairs,
        "gsm8k": partial(gsm8k, solution=str if calculator else without_calculator),
        "openr1": numina.openr1,
    }
    yield from read(source, converters[kind], bad)


def countdown_range(source: str) -> tuple[int, int]:
    """(first, last) of "countdown:LAST" or "countdown:FIRST:LAST"; last is not included."""
    parts = source.removeprefix(COUNTDOWN).split(":")
    if not 1 <= len(parts) <= 2 or not all(x.isascii() and x.isdigit() and len(x) < 10 for x in parts):
        raise ValueError(f"{source}: allowed is countdown:N or countdown:FIRST:LAST")
    first, last = int(parts[0]) if len(parts) == 2 else 0, int(parts[-1])
    if first >= last:
        raise ValueError(f"{source}: has no problem: FIRST must be less than LAST")
    return first, last


def question_files(path: Path) -> list[Path]:
    """The file, or those of a folder that have the names of test sets of `evals.tasks`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    found = sorted({file for task in TASKS.values() for file in path.glob(task.files)})
    if not found:
        raise ValueError(f"{path}: no file of a test set in it: {', '.join(t.files for t in TASKS.values())}")
    return found


def questions_in(path: Path) -> list[tuple[str, str]]:
    """(id, question) of a test set: a file of `evals.tasks`, or any of a kind above."""
    for task in TASKS.values():
        if path.match(task.files) or (path.suffix == ".csv" and task.files.endswith(".csv")):
            return [(example.id, example.question) for example in task.load(path)]
    kind = kind_of(str(path), "auto")
    rows = rows_from(str(path), kind, every_turn=False, calculator=True, game=Game(), seed=0, bad=None)
    return [(row["source"], text) for row in rows for text in asked(row)]


def identity(source: str) -> dict[str, Any]:
    """What a source is: its name, and of local files a SHA-256 of their bytes and, of JSON lines, how many lines."""
    if source.startswith(("hub:", COUNTDOWN)):
        return {"name": source}
    path = Path(source)
    files = parquet_files(path) or [path]
    digest, n_bytes, n_lines = hashlib.sha256(), 0, 0
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
                n_bytes += len(block)
                n_lines += block.count(b"\n")
    lines = {"lines": n_lines} if source.endswith(".jsonl") else {}
    return {"name": source, "sha256": digest.hexdigest(), "bytes": n_bytes, **lines}
