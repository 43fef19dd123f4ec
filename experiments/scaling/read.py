"""Runs from JSON and CSV files, and from what the training service answers to GET /experiments."""

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.scaling.count import Counting, count
from purelm.scaling.laws import FLOPS
from purelm.scaling.runs import Runs, check

__all__ = ["Read", "read", "read_runs"]


class Read(NamedTuple):
    """What a file has."""

    runs: Runs
    left_out: dict[str, int]  # experiments of the service without a final loss, by why: "timeout", "running", ...
    counting: str | None  # what N is, where the file or its reader says so


# What a column may be called, the first that is there; by what it is.
NAMES = {
    "parameters": ("parameters", "n_params", "N", "params", "Model Size", "model_size"),
    "tokens": ("tokens", "n_tokens", "D", "training_tokens"),
    "flops": ("compute_budget", "flops", "C", "Training FLOP", "training_flops"),
    "loss": ("final_loss", "loss", "val_loss", "L"),
}


def read_runs(path: Path, counting: Counting = "all") -> Runs:
    """The runs of `read`."""
    return read(path, counting).runs


def read(path: Path, counting: Counting = "all") -> Read:
    """Runs of a .json list, a .jsonl file or a .csv file with parameters, loss, and tokens or FLOPs (C = 6 N D).

    ValueError with the row's number for what is missing or no number; a row without a loss (a run that failed) is one.
    The answer of the service to GET /experiments is such a list too: N is counted by `counting`, D is
    total_train_tokens, the loss is the last of val_losses. Experiments that did not complete are left out and counted.
    """
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path}: has no runs")
    if all("training_config" in row and "status" in row for row in rows):
        return _of_service(path, rows, counting)
    return Read(_of_rows(path, rows), {}, _counted(path, rows))


def _counted(path: Path, rows: list[dict[str, Any]]) -> str | None:
    """What the rows say of N; ValueError where they differ."""
    said = {str(row["counting"]) for row in rows if row.get("counting")}
    if len(said) > 1:
        raise ValueError(f"{path}: its runs count parameters differently, {', '.join(sorted(said))}: one law has one N")
    return next(iter(said), None)


def _of_service(path: Path, rows: list[dict[str, Any]], counting: Counting) -> Read:
    try:
        from pydantic import ValidationError
    except ImportError:
        raise ValueError(f"{path}: an answer of the training service is checked by pydantic, which is not installed: "
                         "pip install 'purelm[service]'") from None  # fmt: skip

    from experiments.scaling.service.schemas import Completed, Experiment, Failed

    found: list[tuple[float, float, float]] = []
    left_out: Counter[str] = Counter()
    for i, row in enumerate(rows):
        try:
            experiment = Experiment.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path}: experiment {i + 1}: {where}: {first['msg']}") from None
        cfg, status = experiment.training_config, experiment.status
        if isinstance(status, Completed) and status.val_losses:
            n = count(cfg.architecture_config, counting)
            found.append((float(n), float(cfg.total_train_tokens), status.val_losses[-1]))
        else:
            left_out[status.reason.reason if isinstance(status, Failed) else status.status_type] += 1
    if not found:
        raise ValueError(f"{path}: none of {len(rows)} experiments has completed")
    try:
        return Read(check(Runs(*np.array(found, np.float64).T)), dict(left_out), counting)
    except ValueError as error:
        raise ValueError(f"{path}: {error} (numbered from 0, of those that completed)") from None


def _of_rows(path: Path, rows: list[dict[str, Any]]) -> Runs:
    found: dict[str, list[float]] = {"parameters": [], "tokens": [], "loss": []}
    for i, row in enumerate(rows):
        where = f"{path}: run {i + 1}"
        n, y = (_number(row, name, where) for name in ("parameters", "loss"))
        if n is None or y is None:
            missing = "parameters" if n is None else "loss"
            raise ValueError(f"{where}: has no {missing}; it may be called {', '.join(NAMES[missing])}")
        d, c = _number(row, "tokens", where), _number(row, "flops", where)
        if d is None and c is None:
            raise ValueError(f"{where}: has neither tokens nor FLOPs; they may be called {', '.join(NAMES['tokens'])} "
                             f"and {', '.join(NAMES['flops'])}")  # fmt: skip
        if d is None:
            assert c is not None
            d = c / (FLOPS * n) if n else np.nan
        for name, x in (("parameters", n), ("tokens", d), ("loss", y)):
            found[name].append(x)
    try:
        return check(Runs(*(np.array(x) for x in found.values())))
    except ValueError as error:
        raise ValueError(f"{path}: {error} (numbered from 0)") from None


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is no text in UTF-8") from None
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    try:
        rows = [json.loads(x) for x in text.splitlines() if x.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: must be a list of objects, one a run")
    return rows


def _number(row: dict[str, Any], what: str, where: str) -> float | None:
    name = next((x for x in NAMES[what] if row.get(x) not in (None, "")), None)
    if name is None:
        return None
    value = row[name]
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {name} is {value!r}, and must be a number") from None
