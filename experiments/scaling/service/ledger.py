"""What the owner of a key sees and does: budget, experiments, final submission. Functions of an open transaction.

A budget is never stored but summed over the rows of runs, each of which counts once whatever befell it: with all of its
seconds while it is queued or running, and clip(used, 1, seconds) when it has ended. A final run does not count.
"""

import datetime as dt
import json
import sqlite3
from typing import Any

from experiments.scaling.service.keys import Key
from experiments.scaling.service.schemas import (
    BudgetSummary,
    Completed,
    Experiment,
    ExperimentStatus,
    Failed,
    FinalSubmission,
    Queued,
    Running,
    SubmitResponse,
    Timeout,
    TrainingConfig,
    Unexpected,
    config_digest,
)

__all__ = [
    "Duplicate",
    "InsufficientBudget",
    "Locked",
    "Missing",
    "Refused",
    "budget",
    "experiment",
    "experiments",
    "final_run",
    "final_submission",
    "note",
    "set_final_submission",
    "start_final_run",
    "submit",
]

Connection = sqlite3.Connection


class Refused(Exception):
    """A request that the state of things does not allow."""


class InsufficientBudget(Refused):
    def __init__(self, summary: BudgetSummary, known: int | None):
        super().__init__("insufficient budget")
        self.summary = summary
        self.known = known  # the experiment, if this configuration was submitted before


class Duplicate(Refused):
    def __init__(self, id_: int):
        super().__init__("experiment already exists for this training config")
        self.id = id_


class Missing(Refused):
    def __init__(self) -> None:
        super().__init__("not found")


class Locked(Refused):
    pass


def note(db: Connection, now: float, run: int | None, kind: str, detail: str = "") -> None:
    """A line of the log, in the transaction of what it tells."""
    db.execute("INSERT INTO events (at, run, kind, detail) VALUES (?, ?, ?, ?)", (now, run, kind, detail))


def budget(db: Connection, key: Key) -> BudgetSummary:
    """Total, used and remaining seconds; used is sum(seconds) of open runs + sum(clip(used, 1, seconds)) of ended."""
    (used,) = db.execute(
        "SELECT TOTAL(CASE WHEN state IN ('queued', 'running') THEN seconds ELSE MIN(MAX(used, 1.0), seconds) END) "
        "FROM runs WHERE key = ? AND kind = 'experiment'",
        (key.id,),
    ).fetchone()
    return BudgetSummary(
        used_seconds=used, remaining_seconds=max(0.0, key.budget - used), total_budget_seconds=key.budget
    )


def submit(db: Connection, key: Key, cfg: TrainingConfig, now: float) -> SubmitResponse:
    """Queue an experiment. InsufficientBudget first, then Duplicate, as the course has it."""
    before = budget(db, key)
    digest = config_digest(cfg)
    row = db.execute(
        "SELECT id FROM runs WHERE key = ? AND kind = 'experiment' AND digest = ?", (key.id, digest)
    ).fetchone()
    if cfg.max_runtime_seconds > before.remaining_seconds:
        raise InsufficientBudget(before, None if row is None else row["id"])
    if row is not None:
        raise Duplicate(row["id"])
    id_ = _queue(db, key, "experiment", cfg, digest, cfg.max_runtime_seconds, now)
    return SubmitResponse(experiment_id=id_, budget_summary=budget(db, key))


def _queue(
    db: Connection, key: Key, kind: str, cfg: TrainingConfig, digest: str, seconds: float, now: float
) -> int:
    row = db.execute(
        "INSERT INTO runs (key, kind, config, digest, seconds, state, queued_at) VALUES (?, ?, ?, ?, ?, 'queued', ?) "
        "RETURNING id",
        (key.id, kind, cfg.model_dump_json(), digest, seconds, now),
    ).fetchone()
    note(db, now, row["id"], "queued", kind)
    return row["id"]


def experiments(db: Connection, key: Key) -> list[Experiment]:
    """All of a key's, in the order of submission, whatever the clock said."""
    rows = db.execute("SELECT * FROM runs WHERE key = ? AND kind = 'experiment' ORDER BY id", (key.id,))
    return [_experiment(row) for row in rows]


def experiment(db: Connection, key: Key, id_: int) -> Experiment:
    """One; Missing where it is another key's, too."""
    row = None
    if 0 < id_ < 2**63:
        row = db.execute(
            "SELECT * FROM runs WHERE id = ? AND key = ? AND kind = 'experiment'", (id_, key.id)
        ).fetchone()
    if row is None:
        raise Missing
    return _experiment(row)


def _experiment(row: sqlite3.Row) -> Experiment:
    cfg = TrainingConfig.model_validate_json(row["config"])
    return Experiment(experiment_id=row["id"], training_config=cfg, status=status(row))


def status(row: sqlite3.Row) -> ExperimentStatus:
    """The course's status of a row of runs."""
    queued_at = _time(row["queued_at"])
    if row["state"] == "queued":
        return Queued(queued_at=queued_at)
    common: dict[str, Any] = {
        "queued_at": queued_at, "dispatched_at": _time(row["dispatched_at"]), "run_id": row["run_id"]
    }  # fmt: skip
    losses = json.loads(row["val_losses"])
    if row["state"] == "running":
        return Running(**common, val_losses=losses)
    common["used_runtime_seconds"] = row["used"]
    ended_at = _time(row["ended_at"])
    if row["state"] == "completed":
        return Completed(**common, val_losses=losses, completed_at=ended_at)
    late = row["state"] == "timeout"
    reason = Timeout(partial_val_losses=losses) if late else Unexpected(failure=row["failure"] or "")
    return Failed(**common, reason=reason, failed_at=ended_at)


def final_submission(db: Connection, key: Key) -> FinalSubmission | None:
    """The last one."""
    row = db.execute("SELECT * FROM finals WHERE key = ?", (key.id,)).fetchone()
    if row is None:
        return None
    cfg = TrainingConfig.model_validate_json(row["config"])
    return FinalSubmission(
        training_config=cfg, predicted_final_loss=row["predicted"], submitted_at=_time(row["submitted_at"])
    )


def set_final_submission(
    db: Connection, key: Key, cfg: TrainingConfig, predicted: float, now: float
) -> FinalSubmission:
    """Replace it; Locked once its run was asked for."""
    if _final_row(db, key) is not None:
        raise Locked("the final submission is locked: its run was asked for")
    db.execute(
        "INSERT INTO finals VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
        "config = excluded.config, predicted = excluded.predicted, submitted_at = excluded.submitted_at",
        (key.id, cfg.model_dump_json(), predicted, now),
    )
    note(db, now, None, "final submission", f"key {key.id}, predicted {predicted!r}, {config_digest(cfg)}")
    return FinalSubmission(training_config=cfg, predicted_final_loss=predicted, submitted_at=_time(now))


def start_final_run(db: Connection, key: Key, seconds: float, now: float) -> None:
    """Queue the final submission with so many seconds, outside of the budget, and lock it."""
    if _final_row(db, key) is not None:
        raise Locked("the final run was asked for already")
    final = final_submission(db, key)
    if final is None:
        raise Missing
    cfg = final.training_config
    _queue(db, key, "final", cfg, config_digest(cfg), seconds, now)


def final_run(db: Connection, key: Key) -> dict[str, Any] | None:
    """What became of it: status as of an experiment, predicted, measured, and measured - predicted."""
    row, final = _final_row(db, key), final_submission(db, key)
    if row is None or final is None:
        return None
    found = status(row)
    measured = found.val_losses[-1] if isinstance(found, Completed) and found.val_losses else None
    predicted = final.predicted_final_loss
    return {
        "training_config": final.training_config.model_dump(mode="json"),
        "max_runtime_seconds": row["seconds"],
        "status": found.model_dump(mode="json"),
        "predicted_final_loss": predicted,
        "measured_final_loss": measured,
        "error": None if measured is None else measured - predicted,
    }


def _final_row(db: Connection, key: Key) -> sqlite3.Row | None:
    return db.execute("SELECT * FROM runs WHERE key = ? AND kind = 'final'", (key.id,)).fetchone()


def _time(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)
