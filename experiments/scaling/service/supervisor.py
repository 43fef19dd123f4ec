"""The supervisor: one worker process for each slot, replaced when it ends, killed when its run is over its time.

    supervisor = Supervisor(store, plan, slots)
    supervisor.start(); ...; supervisor.stop()

It also finds the runs whose process is gone, after a kill -9 of the server or the machine too, and queues them again.
"""

import contextlib
import os
import pickle
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from experiments.scaling.service import dispatch
from experiments.scaling.service.alive import lives, remove_dead
from experiments.scaling.service.backend import hard_limit
from experiments.scaling.service.room import Teller
from experiments.scaling.service.store import Store
from experiments.scaling.service.worker import Plan

__all__ = ["Supervisor"]

TICK = 0.2  # seconds
SETUP = 1800.0  # seconds that a run may take to load and compile
GRACE = 30.0  # seconds that workers have to stop in
QUICK = 5.0  # a worker that ended sooner is not replaced at once
LONGEST_WAIT = 30.0
LARGEST_LOG = 2**20  # bytes, at which a worker's log is begun anew; the last one is kept beside


class Supervisor:
    """Worker processes, and a thread that looks after them every `TICK` seconds.

    slots: for each, what its worker's environment has beside this process's, such as CUDA_VISIBLE_DEVICES.
    ahead: a slot's next worker is started while the present one has its runs, and has imported everything when its turn
    comes: seconds of a CPU and the memory of another process, in place of seconds in which a GPU waits.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        slots: Sequence[Mapping[str, str]],
        *,
        setup: float = SETUP,
        most_lost: int = dispatch.MOST_LOST,
        ahead: bool = False,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ):
        if plan.make.__module__ == "__main__":
            raise ValueError("make must be a function of a module that workers can import, not of __main__")
        self._store, self._plan = store, plan
        self._setup, self._most_lost, self._say = setup, most_lost, Teller(say)
        self._slots = [_Slot(i, env, plan, ahead) for i, env in enumerate(slots)]
        self._seen: dict[str, tuple[float, float | None]] = {}  # run_id -> when it, and its clock, were first seen
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """Start the workers, and look after them and what an earlier server left."""
        remove_dead(self._plan.folder)
        for slot in self._slots:
            slot.begin()
        self._thread.start()

    def stop(self, grace: float = GRACE) -> None:
        """Have all workers stop: runs are preempted, and killed if they take longer than `grace` seconds."""
        self._leave.set()
        if self._thread.is_alive():
            self._thread.join()
        for slot in self._slots:
            slot.ask()
        until = time.monotonic() + grace
        for slot in self._slots:
            slot.wait(until)
            slot.kill()
            slot.drop()
        try:
            self._release()
        except (sqlite3.OperationalError, OSError) as error:
            self._say(f"supervisor: {error}: the runs that are left are taken up at the next start")

    def pids(self) -> list[int]:
        """Of the workers."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]

    def _watch(self) -> None:
        while not self._leave.wait(TICK):
            try:
                self.tick()
                self._store.checkpoint()
            except Exception as error:  # busy, or a full disk: the next look may do better, and without any none would
                self._say(f"supervisor: {type(error).__name__}: {error}")

    def tick(self) -> None:
        """Replace workers that ended, end runs that are over their time, queue runs whose process is gone."""
        for slot in self._slots:
            try:
                if ended := slot.renew():
                    self._say(ended)
            except OSError as error:  # such as a log that cannot be opened: the other slots are looked after
                self._say(f"slot {slot.number}: no worker can be started: {error}")
        for run in self._release():
            if self._over(run):
                self._end(run)

    def _release(self) -> list[dispatch.Under]:
        """Queue the runs whose process is gone; those whose process lives."""
        with self._store.read() as db:
            runs = dispatch.under_way(db)
        alive: list[dispatch.Under] = []
        gone: list[dispatch.Under] = []
        for run in runs:
            (alive if lives(self._plan.folder, run.run_id) else gone).append(run)
        if gone:
            with self._store.write() as db:
                for run in gone:
                    dispatch.lost(db, run, time.time(), self._most_lost)
            remove_dead(self._plan.folder)
        self._seen = {run.run_id: self._seen.get(run.run_id, (time.monotonic(), None)) for run in alive}
        return alive

    def _over(self, run: dispatch.Under) -> bool:
        """Whether a run has had more than its time, by the clock of this process since it was first seen."""
        now = time.monotonic()
        first, clock = self._seen[run.run_id]
        if run.clock is None:
            return now - first > self._setup
        if clock is None:
            clock = now
            self._seen[run.run_id] = first, clock
        return now - clock > hard_limit(run.seconds) - run.clock

    def _end(self, run: dispatch.Under) -> None:
        """Kill the process of a run, and only then write: two processes must not have it at once."""
        slot = next((slot for slot in self._slots if slot.has(run.run_id)), None)
        if slot is None:
            return  # a worker of an earlier server, which leaves by itself
        slot.kill()
        with self._store.write() as db:
            if run.clock is None:
                self._say(f"run {run.id}: not ready after {self._setup:g} s, killed")
                dispatch.lost(db, run, time.time(), self._most_lost)
            else:
                dispatch.overtime(db, run, time.time())


class _Slot:
    """A place for one worker."""

    def __init__(self, number: int, env: Mapping[str, str], plan: Plan, ahead: bool):
        self.number, self.env, self.plan, self.ahead = number, env, plan, ahead
        self.next: subprocess.Popen | None = None  # waits to be told the plan
        self.process: subprocess.Popen | None = None
        self.name = ""  # of the worker; its attempts' run_ids begin with it
        self.began = 0.0
        self.wait_for = 0.0  # seconds after `began` before the next one

    def begin(self) -> None:
        """Start a worker, or give the one that was started ahead its turn."""
        if self.next is not None and _ended(self.next):
            self.drop()
        self.process, self.next = self.next or self._started(), None
        self.name = f"{self.number}.{secrets.token_hex(4)}"
        assert self.process.stdin is not None
        try:
            pickle.dump(self.plan._replace(worker=self.name, slot=str(self.number)), self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended; renew() says so
            pass
        self.began = time.monotonic()
        if self.ahead:
            self.next = self._started()

    def _started(self) -> subprocess.Popen:
        """A process in a session of its own, so that a signal to the group reaches what it started, and no more."""
        path = self.plan.folder / "logs" / f"slot-{self.number}.log"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.exists() and path.stat().st_size > LARGEST_LOG:
            path.replace(path.with_suffix(".log.1"))
        with open(path, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "experiments.scaling.service.worker", self.plan.make.__module__],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, **self.env},
                start_new_session=True,
            )  # fmt: skip

    def renew(self) -> str | None:
        """Start another worker in place of one that ended; a line about how it ended."""
        if self.process is None:
            if time.monotonic() - self.began >= self.wait_for:
                self.begin()
            return None
        if not self.ended():
            return None
        status = self.kill()
        quick = status != 0 and time.monotonic() - self.began < QUICK
        self.wait_for = min(max(1.0, 2 * self.wait_for), LONGEST_WAIT) if quick else 0.0
        if not quick:
            self.begin()
        if status == 0:
            return None
        return f"slot {self.number}: its worker ended with status {status}; see logs/slot-{self.number}.log"

    def has(self, run_id: str) -> bool:
        """Whether an attempt is of this slot's worker."""
        return self.process is not None and run_id.startswith(f"{self.name}-")

    def drop(self) -> None:
        """End the worker that was started ahead, if there is one; it has no run."""
        if self.next is not None:
            _gone(self.next)
            self.next = None

    def ask(self) -> None:
        """SIGTERM."""
        if self.process is not None and not self.ended():
            self.process.send_signal(signal.SIGTERM)

    def wait(self, until: float) -> None:
        """Until the worker has ended, or that time of time.monotonic()."""
        while self.process is not None and not self.ended() and time.monotonic() < until:
            time.sleep(0.02)

    def ended(self) -> bool:
        """Whether the worker has ended."""
        assert self.process is not None
        return _ended(self.process)

    def kill(self) -> int | None:
        """End the worker and what it started, and wait until it is gone; its exit status."""
        if self.process is None:
            return None
        status = _gone(self.process)
        self.process = None
        return status


def _ended(process: subprocess.Popen) -> bool:
    """Whether it has ended. It is not reaped, so that its number stays the number of its group."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return process.returncode is not None or os.waitid(os.P_PID, process.pid, flags) is not None


def _gone(process: subprocess.Popen) -> int:
    """End a process and what it started, and wait until it is gone; its exit status."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return status
