"""Programs as processes, some at a time; what is finished is not run again."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from experiments.console import say
from experiments.lock import held

__all__ = ["Job", "run_all"]

POLL = 0.1  # seconds
STOPS = 120.0  # seconds in which a process that was asked to stop has saved


class Job(NamedTuple):
    """One process."""

    name: str
    args: tuple[str, ...]  # of the Python interpreter
    finished: Path  # a file that is there when the work is done
    log: Path  # what it prints
    checkpoints: Path | None = None  # in a run's folder; where these are, the work goes on from them with --resume

    def is_held(self) -> bool:
        """Whether a process is at it, as one that a killed study has left."""
        return self.checkpoints is not None and held(self.checkpoints.parent)

    def is_done(self, status: int | None) -> bool:
        """Whether all is there; what has no checkpoints appears whole, whoever made it."""
        return self.finished.exists() and (not status or self.checkpoints is None)


def run_all(jobs: Sequence[Job], at_a_time: int, update: Callable[[int], None]) -> dict[str, str]:
    """{name: what it said at last} of the jobs that failed. update(number of jobs that have ended).

    Each process has one thread of PyTorch on the CPU, unless OMP_NUM_THREADS says otherwise. When this one is
    interrupted, those that run are asked to stop, and have time to save. Those that a killed one has left are waited
    for, and what they leave unfinished is taken up.
    """
    waiting = [job for job in jobs if job.is_held() or not job.finished.exists()]
    for job in waiting:
        if job.is_held():
            say(f"{job.name}: another process is at it, and is waited for")
    failed: dict[str, str] = {}
    running: list[tuple[Job, subprocess.Popen, IO[str]]] = []
    try:
        while waiting or running:
            update(len(jobs) - len(waiting) - len(running))
            for job in [job for job in waiting if not job.is_held()]:
                if job.finished.exists():  # by the process that was waited for
                    waiting.remove(job)
                elif len(running) < at_a_time:
                    waiting.remove(job)
                    running.append(_started(job))
            time.sleep(POLL)
            for entry in [x for x in running if x[1].poll() is not None]:
                running.remove(entry)
                job, process, log = entry
                log.close()
                if job.is_done(process.returncode):
                    continue
                if job.is_held():  # by one that was there first, though not yet when this one began
                    waiting.append(job)
                else:
                    failed[job.name] = _last_line(job.log) or f"exit status {process.returncode}"
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, log in running:
            try:
                process.wait(STOPS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()
    update(len(jobs))
    return failed


def _started(job: Job) -> tuple[Job, subprocess.Popen, IO[str]]:
    resumes = job.checkpoints is not None and any(job.checkpoints.glob("step-*/manifest.json"))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    log = open(job.log, "w", encoding="utf-8")
    # A session of its own: Ctrl-C in a terminal reaches this process alone, which asks the others once.
    process = subprocess.Popen(
        [sys.executable, *job.args, *(["--resume"] if resumes else [])], stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": "1", **os.environ}, start_new_session=True,
    )  # fmt: skip
    return job, process, log


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else ""
