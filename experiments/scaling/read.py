"""Runs from JSON and CSV files."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from purelm.scaling.laws import FLOPS
from purelm.scaling.runs import Runs, check

__all__ = ["read_runs"]

# What a column may be called, the first that is there; by what it is.
NAMES = {
    "parameters": ("parameters", "n_params", "N", "params", "Model Size", "model_size"),
    "tokens": ("tokens", "n_tokens", "D", "training_tokens"),
    "flops": ("compute_budget", "flops", "C", "Training FLOP", "training_flops"),
    "loss": ("final_loss", "loss", "val_loss", "L"),
}


def read_runs(path: Path) -> Runs:
    """Runs of a .json list, a .jsonl file or a .csv file with parameters, loss, and tokens or FLOPs (C = 6 N D).

    ValueError with the row's number for what is missing or no number; a row without a loss (a run that failed) is one.
    """
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path}: has no runs")
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
