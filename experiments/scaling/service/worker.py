"""A worker: a process that takes one run after another, carries it out, and says so.

    python -m experiments.scaling.service.worker MODULE < plan      # as supervisor.py starts it

It imports MODULE, the back end's, and reads a pickled `Plan` from its input, which may come much later and then stays
open: when it closes, the supervisor is gone and the worker leaves, as on SIGTERM: its run is preempted and waits to be
taken up again.
"""

import contextlib
import importlib
import math
import os
import pickle
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from experiments.scaling.service import dispatch
from experiments.scaling.service.alive import Alive, only_one
from experiments.scaling.service.backend import Backend, Broken, Control, Done, Late, Outcome, Stopped
from experiments.scaling.service.room import Teller, await_room, is_full
from experiments.scaling.service.schemas import Rules
from experiments.scaling.service.store import Store, open_store

__all__ = ["Plan", "carry_out", "work"]

T = TypeVar("T")

POLL = 0.05  # seconds from one look at an empty queue to the next
PATIENCE = 60.0  # seconds that a run has to stop in once the supervisor is gone
PAUSE = 30.0  # seconds after a run for which the disk had no room

say = Teller()


class Plan(NamedTuple):
    """What a worker is told: it goes through a pipe, so `make` is a function of a module, `settings` a dataclass."""

    folder: Path
    make: Callable[[Any], Backend]
    settings: Any
    rules: Rules
    worker: str = "worker"  # its name, for once
    slot: str = "0"  # its place, for which it waits while the worker of an earlier server is leaving it
    runs: int | None = None  # after so many the process ends, and another takes its place


class _NotFinite(Exception):
    pass


class _GaveUp(Exception):
    """Asked to leave while the database takes nothing."""


def work(plan: Plan, leave: threading.Event) -> None:
    """Have the slot to oneself, and take runs until `leave` is set, `plan.runs` are done, or one has raised.

    What a run that raised leaves behind in a process is not known. Nothing is begun while the disk is full.
    """
    if not await_room(plan.folder, leave, say):
        return
    with only_one(plan.folder / "slots" / plan.slot, leave) as mine:
        if mine:
            _take(plan, leave)


def _take(plan: Plan, leave: threading.Event) -> None:
    # Only a run's last word must outlast a loss of power, after which its claim and its progress mean nothing.
    store = open_store(plan.folder, durable=False, check=False)
    last = open_store(plan.folder, check=False)
    backend = plan.make(plan.settings)
    n, clean = 0, True
    alive: Alive | None = None
    try:
        while clean and not leave.is_set() and (plan.runs is None or n < plan.runs):
            if not await_room(plan.folder, leave, say):
                break
            alive = alive or Alive(plan.folder, plan.worker)
            job = _next(store, alive.run_id, leave)
            if job is None:
                leave.wait(POLL)
                continue
            clean = carry_out(store, last, backend, job, plan, leave)
            n += 1
            alive.end()
            alive = None
    except _GaveUp as error:
        say(f"worker {os.getpid()}: {error}: leaving, though its run could not be put aside; it will be taken up again")
    finally:
        if alive is not None:
            alive.end()
        store.close()
        last.close()


def _next(store: Store, run_id: str, leave: threading.Event) -> dispatch.Job | None:
    with store.read() as db:  # which disturbs nobody, where claim() holds the lock
        if not dispatch.waits(db):
            return None
    return _insist(store, lambda db: dispatch.claim(db, run_id, time.time()), leave)


def carry_out(
    store: Store, last: Store, backend: Backend, job: dispatch.Job, plan: Plan, leave: threading.Event
) -> bool:
    """One run, from claim to its last word, which is for `last`; False if it raised.

    One for which the disk has no room waits again, and has failed after some times, as if its process had been lost.
    """
    folder = plan.folder / "runs" / str(job.id)
    disowned = threading.Event()
    used = 0.0

    def report(change: Callable[[sqlite3.Connection], bool]) -> None:
        if not _insist(store, change, leave):
            disowned.set()

    def started(seconds: float) -> None:
        nonlocal used
        used = seconds
        report(lambda db: dispatch.started(db, job, seconds, time.time()))

    def evaluated(losses: Sequence[float], seconds: float) -> None:
        nonlocal used
        used = seconds
        _check_finite(losses)
        report(lambda db: dispatch.evaluated(db, job, losses, seconds))

    def stop() -> bool:
        return leave.is_set() or disowned.is_set()

    outcome: Outcome
    clean = True
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        outcome = backend.run(job.cfg, plan.rules, Control(folder, job.seed, started, evaluated, stop))
        if isinstance(outcome, Done | Late):
            _check_finite(outcome.val_losses)
    except _NotFinite as error:
        outcome = Broken(used, str(error))
    except _GaveUp:
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # the log may be on the same disk
            traceback.print_exc()
        if is_full(error):
            full = "the disk had no room for it", f"{type(error).__name__}: {error}"
            _insist(last, lambda db: dispatch.lost(db, job, time.time(), why=full), leave)
            leave.wait(PAUSE)
            return False
        outcome, clean = Broken(used, f"{type(error).__name__}: {error}"), False
    if isinstance(outcome, Stopped) and not stop():
        outcome, clean = Broken(outcome.seconds, "the back end stopped unasked"), False
    if not disowned.is_set():
        _insist(last, lambda db: dispatch.ended(db, job, outcome, time.time()), leave)
    return clean


def _check_finite(losses: Sequence[float]) -> None:
    for i, x in enumerate(losses):
        if not math.isfinite(x):
            before = f"; the one before was {losses[i - 1]:.4f}" if i else ""
            raise _NotFinite(f"diverged: validation loss {i + 1} is {x}{before}")


def _insist(store: Store, change: Callable[[sqlite3.Connection], T], leave: threading.Event) -> T:
    """Make a change, and try again while the database is busy or the disk is full.

    Once asked to leave, it gives up after a few times, by _GaveUp: the run then counts as lost, and is taken up again.
    """
    wait, more = 0.1, 5
    while True:
        try:
            with store.write() as db:
                return change(db)
        except sqlite3.OperationalError as error:
            say(f"worker {os.getpid()}: {error}: trying again")
            more -= leave.is_set()
            if more < 0:
                raise _GaveUp(str(error)) from None
        time.sleep(wait)
        wait = min(2 * wait, 5.0)


def _main() -> None:
    leave = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leave.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's, which then ends its workers
    for name in sys.argv[1:]:
        importlib.import_module(name)
    try:
        plan = pickle.load(sys.stdin.buffer)
    except EOFError:  # the supervisor was gone before this one's turn came
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        leave.set()
        time.sleep(PATIENCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    work(plan, leave)


if __name__ == "__main__":
    _main()
