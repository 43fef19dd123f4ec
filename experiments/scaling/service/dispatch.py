"""What workers and their supervisor do to runs. Functions of an open transaction.

An attempt has a run_id of its own. Whatever is written of it later holds only while the run is that attempt's: the
report of a worker that was given up changes nothing, and its function returns False.
"""

import json
import math
import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

from experiments.scaling.service.backend import Broken, Done, Late, Outcome, Stopped
from experiments.scaling.service.ledger import note
from experiments.scaling.service.schemas import TrainingConfig

__all__ = [
    "MOST_LOST",
    "Job",
    "Under",
    "claim",
    "ended",
    "evaluated",
    "lost",
    "overtime",
    "started",
    "under_way",
    "waits",
]

Connection = sqlite3.Connection

MOST_LOST = 5  # attempts whose process ended without a word, before the run has failed
LOST = "its process was lost", "killed, out of memory, or the machine went down"
LONGEST = 500  # characters of a failure

# Runs of a key that was removed wait for ever.
WAITING = "FROM runs JOIN keys ON keys.id = runs.key WHERE runs.state = 'queued' AND keys.removed_at IS NULL"
MINE = "WHERE id = ? AND run_id = ? AND state = 'running'"


class Job(NamedTuple):
    id: int
    run_id: str
    cfg: TrainingConfig  # max_runtime_seconds is what the run may use, which for a final run is not the client's
    seed: int


class Under(NamedTuple):
    """A run under way."""

    id: int
    run_id: str
    seconds: float  # the most it may use
    clock: float | None  # seconds of earlier attempts; None: the clock does not run yet
    used: float


def waits(db: Connection) -> bool:
    """Whether there is a run to claim: a look that takes no lock."""
    return db.execute(f"SELECT 1 {WAITING} LIMIT 1").fetchone() is not None


def claim(db: Connection, run_id: str, now: float) -> Job | None:
    """The next run by fair share: of the key with the fewest runs under way, then the one that has waited longest.

    By their numbers, which no clock that is set back disturbs.
    """
    row = db.execute(
        "WITH busy AS (SELECT key, COUNT(*) AS n FROM runs WHERE state = 'running' GROUP BY key) "
        f"SELECT runs.*, keys.seed {WAITING} "
        "ORDER BY COALESCE((SELECT n FROM busy WHERE busy.key = runs.key), 0), runs.id LIMIT 1"
    ).fetchone()
    if row is None:
        return None
    db.execute(
        "UPDATE runs SET state = 'running', run_id = ?, dispatched_at = ?, clock = NULL WHERE id = ?",
        (run_id, now, row["id"]),
    )
    note(db, now, row["id"], "claimed", run_id)
    cfg = TrainingConfig.model_validate_json(row["config"])
    # Not validated again: the seconds of a final run may be more than a client may ask for.
    return Job(row["id"], run_id, cfg.model_copy(update={"max_runtime_seconds": row["seconds"]}), row["seed"])


def started(db: Connection, job: Job, seconds: float, now: float) -> bool:
    """The clock runs, from so many seconds of earlier attempts."""
    _check_seconds(seconds)
    mine = _changed(db, f"UPDATE runs SET clock = ? {MINE}", (seconds, job.id, job.run_id))
    if mine:
        note(db, now, job.id, "started", f"from {seconds:.6g} s")
    return mine


def evaluated(db: Connection, job: Job, losses: Sequence[float], seconds: float) -> bool:
    """All losses so far, and the seconds used."""
    _check_seconds(seconds)
    return _changed(
        db, f"UPDATE runs SET val_losses = ?, used = ? {MINE}", (_losses(losses), seconds, job.id, job.run_id)
    )


def ended(db: Connection, job: Job, outcome: Outcome, now: float) -> bool:
    """The attempt's last word; after Stopped the run waits again, in its old place."""
    _check_seconds(outcome.seconds)
    at, kind, detail = (job.id, job.run_id), "", ""
    match outcome:
        case Done(seconds, losses) | Late(seconds, losses):
            kind = "completed" if isinstance(outcome, Done) else "timeout"
            mine = _changed(
                db,
                f"UPDATE runs SET state = ?, ended_at = ?, used = ?, val_losses = ? {MINE}",
                (kind, now, seconds, _losses(losses), *at),
            )
        case Broken(seconds, failure):
            kind, detail = "failed", one_line(failure)
            mine = _changed(
                db,
                f"UPDATE runs SET state = 'failed', ended_at = ?, used = ?, failure = ? {MINE}",
                (now, seconds, detail, *at),
            )
        case Stopped(seconds):
            kind = "preempted"
            mine = _changed(db, f"UPDATE runs SET state = 'queued', clock = NULL, used = ? {MINE}", (seconds, *at))
    note(db, now, job.id, kind if mine else "refused", detail if mine else f"{kind} of {job.run_id}")
    return mine


def under_way(db: Connection) -> list[Under]:
    """Runs that a worker has."""
    rows = db.execute("SELECT id, run_id, seconds, clock, used FROM runs WHERE state = 'running' ORDER BY id")
    return [Under(*row) for row in rows]


def lost(db: Connection, run: Under | Job, now: float, most: int = MOST_LOST, why: tuple[str, str] = LOST) -> bool:
    """This attempt came to nothing: the run waits again, or has failed if that happened `most` times.

    why: in short, and in detail.
    """
    row = db.execute(f"SELECT lost FROM runs {MINE}", (run.id, run.run_id)).fetchone()
    if row is None:
        return False
    n = row["lost"] + 1
    if n < most:
        db.execute("UPDATE runs SET state = 'queued', clock = NULL, lost = ? WHERE id = ?", (n, run.id))
        note(db, now, run.id, "lost", f"{run.run_id}, time {n} of {most}: {why[0]}")
        return True
    failure = one_line(f"{why[0]}, time {n} of {most} ({why[1]})")
    db.execute(
        "UPDATE runs SET state = 'failed', ended_at = ?, lost = ?, failure = ? WHERE id = ?", (now, n, failure, run.id)
    )
    note(db, now, run.id, "failed", failure)
    return True


def overtime(db: Connection, run: Under, now: float) -> bool:
    """The process of this attempt was killed for its time: all of it is used, the losses so far stay."""
    mine = _changed(
        db,
        f"UPDATE runs SET state = 'timeout', ended_at = ?, used = MAX(used, seconds) {MINE}",
        (now, run.id, run.run_id),
    )
    if mine:
        note(db, now, run.id, "timeout", "killed")
    return mine


def one_line(text: str) -> str:
    """The first `LONGEST` characters without line breaks."""
    return " ".join(text.split())[:LONGEST] or "no reason was given"


def _losses(losses: Sequence[float]) -> str:
    values = [float(x) for x in losses]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"losses must be finite, got {values}")
    return json.dumps(values)


def _check_seconds(seconds: float) -> None:
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"seconds must be finite and at least 0, got {seconds}")


def _changed(db: Connection, sql: str, values: tuple) -> bool:
    return db.execute(sql, values).rowcount == 1
