"""Predictions that are written down before the run, and what came of them: JSON lines that only grow, and their page.

    register(file, Forecast(...))         # before
    settle(file, name, measured, ...)     # after; once
    render(rows)                          # the Markdown table

A forecast has one name, and neither it nor its outcome can be written twice.
"""

import datetime as dt
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from purelm import track
from purelm.files import sync

__all__ = ["Forecast", "read_rows", "register", "render", "renew_page", "settle"]


class Forecast(NamedTuple):
    """What is foretold of one run."""

    name: str
    device: str
    budget_seconds: float  # of all experiments before it
    final_seconds: float  # of the run
    parameters: int
    tokens: int
    loss: float  # nats a token
    low: float
    high: float
    coverage: float
    runs: int  # that the law was fitted to
    largest_flops: float  # among them
    flops: float  # of the run


def register(file: Path, forecast: Forecast, now: dt.datetime | None = None) -> None:
    """Append it. ValueError if the name is taken."""
    with _alone(file):
        if any(row["name"] == forecast.name for row in read_rows(file)):
            raise ValueError(f"{file}: {forecast.name!r} has been forecast already; forecasts are not changed")
        _append(file, {"kind": "forecast", **forecast._asdict()}, now)


def settle(file: Path, name: str, measured: float, seconds: float, now: dt.datetime | None = None) -> bool:
    """Append the outcome; whether the interval held. ValueError without a forecast, and for a second outcome."""
    with _alone(file):
        rows = {(row["kind"], row["name"]): row for row in read_rows(file)}
        forecast = rows.get(("forecast", name))
        if forecast is None:
            raise ValueError(f"{file}: nothing was forecast under the name {name!r}")
        if ("outcome", name) in rows:
            raise ValueError(f"{file}: {name!r} has an outcome already")
        held = forecast["low"] <= measured <= forecast["high"]
        _append(file, {"kind": "outcome", "name": name, "measured": measured, "seconds": seconds, "held": held}, now)
    return held


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Forecasts and outcomes, in their order; none without a file. ValueError for a file of something else."""
    rows = track.read_rows(file)
    for i, row in enumerate(rows, 1):
        if row.get("kind") not in ("forecast", "outcome") or not isinstance(row.get("name"), str):
            raise ValueError(f"{file}: line {i} is neither a forecast nor an outcome: give another file")
    return rows


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Have the folder's lock, so that of two studies neither writes over the other's row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _append(file: Path, row: Mapping[str, Any], now: dt.datetime | None) -> None:
    at = (now or dt.datetime.now(dt.UTC)).replace(microsecond=0).isoformat()
    track.drop_rows(file, lambda row: False)  # but for a last line that a kill cut short
    track.jsonl_sink(file)({**row, "at": at})
    sync(file)  # a row is there before anything is asked for that rests on it
    track.write_text(file.with_suffix(".md"), render(read_rows(file)))


def renew_page(file: Path) -> None:
    """Write the page again, where a kill or a full disk came between a row and it."""
    page = file.with_suffix(".md")
    with _alone(file):
        text = render(read_rows(file))
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            track.write_text(page, text)


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown page."""
    outcomes = {row["name"]: row for row in rows if row["kind"] == "outcome"}
    lines = [
        "# Forecasts",
        "",
        "Each was written down before its run, by `experiments.scaling.study`; rows are added, never changed. Losses",
        "are in nats a token; x is how many times the FLOPs of the largest run that was fitted the final run has. N is",
        "without token embeddings.",
        "",
        "| registered | study | device | runs | N | D | x | predicted | interval | measured | error | held |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        if row["kind"] != "forecast":
            continue
        out = outcomes.get(row["name"])
        share = f"{100 * row['coverage']:.0f} %: {row['low']:.4f} to {row['high']:.4f}"
        end = ["", "", ""]
        if out is not None:
            error = out["measured"] / row["loss"] - 1
            end = [f"{out['measured']:.4f}", f"{100 * error:+.2f} %", "yes" if out["held"] else "no"]
        cells = [
            row["at"], row["name"], row["device"], str(row["runs"]), f"{row['parameters']:,}", f"{row['tokens']:,}",
            f"{row['flops'] / row['largest_flops']:.1f}", f"{row['loss']:.4f}", share, *end,
        ]  # fmt: skip
        lines.append("| " + " | ".join(x.replace("|", "/") for x in cells) + " |")
    return "\n".join(lines) + "\n"
