"""Tasks by processes of this machine, by Slurm or by Ray: the same function of a task, results in any order.

    with closing(Pool(work)) as pool:                       # work(task, tell) -> Result
        results = list(run_local(pool, tasks, 4, tell))

A back end decides nothing about what is computed: tasks are independent, each leaves its own output.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from experiments.curate.config import Slurm
from experiments.curate.plan import Task
from experiments.curate.work import Result

__all__ = ["Pool", "run_here", "run_local", "run_ray", "run_slurm", "slurm_executor", "started_ray"]

Work = Callable[[Task, Callable[[int, int], None]], Result]
Tell = Callable[[int, int], None]


def run_here(work: Work, tasks: Sequence[Task], tell: Tell) -> Iterator[Result]:
    """In this process. After a fatal result no task is begun."""
    for task in tasks:
        result = work(task, tell)
        yield result
        if result.is_fatal:
            return


def run_local(pool: "Pool", tasks: Sequence[Task], workers: int, tell: Tell) -> Iterator[Result]:
    """By `workers` processes of the pool.

    A process that dies is named with its task, and another takes its place. After a fatal result no task is begun.
    """
    waiting = list(reversed(tasks))
    for _ in range(min(workers, len(tasks))):
        pool.start(waiting.pop())
    while pool.running:
        for result in pool.step(tell):
            yield result
            if result.is_fatal:
                waiting.clear()
        while waiting and len(pool.running) < workers:
            pool.start(waiting.pop())


class Pool:
    """Spawned processes with a pipe each, which serve until `close`; they end when this process does, in whatever way.

    `running` are those with a task.
    """

    def __init__(self, work: Work):
        self.work, self.context = work, get_context("spawn")
        self.running: dict[Connection, tuple[Any, Task]] = {}
        self.idle: list[tuple[Connection, Any]] = []

    def start(self, task: Task) -> None:
        """Give a task to a process that has none, or to a new one."""
        if self.idle:
            pipe, process = self.idle.pop()
        else:
            pipe, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs, self.work), daemon=True)
            process.start()
            theirs.close()
        self.running[pipe] = process, task
        try:
            pipe.send(task)
        except OSError:  # it died at once: its end of the pipe says so in `step`
            pass

    def step(self, tell: Tell) -> Iterator[Result]:
        """What the processes have to say, when one of them has."""
        for pipe in wait(list(self.running)):
            pipe = cast(Connection, pipe)
            process, task = self.running[pipe]
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                process.join()
                del self.running[pipe]
                yield Result(task.name, f"its worker, process {process.pid}, {_end_of(process.exitcode)}")
                continue
            if isinstance(message, Result):
                del self.running[pipe]
                self.idle.append((pipe, process))
                yield message
            else:
                tell(*message)

    def close(self) -> None:
        """End all processes."""
        processes = [process for _, process in self.idle] + [process for process, _ in self.running.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _end_of(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        more = ": perhaps no memory was left" if name == "SIGKILL" else ""
        return f"was ended by {name}{more}"
    return f"ended with status {exitcode}"


def _serve(pipe: Connection, work: Work) -> None:
    """A worker's life: tasks from the pipe, until that is closed or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(work(task, lambda documents, n_bytes: pipe.send((documents, n_bytes))))


def slurm_executor(cfg: Slurm, workers: int, logs: Path) -> Any:
    """submitit's, which submits arrays with sbatch; ModuleNotFoundError naming the extra where it is missing."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise ValueError("backend slurm needs submitit: pip install 'purelm[slurm]'") from None
    executor = submitit.AutoExecutor(folder=logs, cluster="slurm")
    more = {"slurm_partition": cfg.partition} if cfg.partition else {}
    executor.update_parameters(
        name="curate", timeout_min=cfg.minutes, mem_gb=cfg.gigabytes, cpus_per_task=1,
        slurm_array_parallelism=workers, **more,
    )  # fmt: skip
    return executor


def run_slurm(work: Work, tasks: Sequence[Task], executor: Any, most_jobs: int, tell: Tell) -> Iterator[Result]:
    """By an array of at most `most_jobs` jobs, each with every most_jobs-th task.

    executor: has submitit's map_array(function, items) -> jobs with .result() and .job_id.
    """
    groups = [tuple(tasks[i::most_jobs]) for i in range(min(most_jobs, len(tasks)))]
    jobs = executor.map_array(_Group(work), groups)
    for job, group in zip(jobs, groups, strict=True):
        try:
            results, told = job.result()
        except Exception as error:
            what = f"job {job.job_id}: {_last_line(error)}"
            results, told = [Result(task.name, what) for task in group], (0, 0)
        tell(*told)
        yield from results


class _Group:
    """Tasks one after the other, up to one with a fatal result; a value that can be sent.

    It gives the results, and how many documents and bytes were done.
    """

    def __init__(self, work: Work):
        self.work = work

    def __call__(self, tasks: Sequence[Task]) -> tuple[list[Result], tuple[int, int]]:
        told: list[tuple[int, int]] = [(0, 0)]
        results = list(run_here(self.work, tasks, lambda *more: told.append(more)))
        documents, n_bytes = (sum(x) for x in zip(*told, strict=True))
        return results, (documents, n_bytes)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


@contextmanager
def started_ray(address: str | None) -> Iterator[Any]:
    """The module, connected until the block ends, or as it was; ValueError naming the extra where it is missing."""
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError("backend ray needs ray: pip install 'purelm[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    ray.init(address=address, log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def run_ray(work: Work, tasks: Sequence[Task], workers: int, ray: Any, tell: Tell) -> Iterator[Result]:
    """By Ray's workers, at most `workers` tasks at a time. ray: the module, after ray.init."""
    group = _Group(work)
    remote = ray.remote(num_cpus=1, max_retries=0)(lambda task: group([task]))
    waiting = list(reversed(tasks))
    running: dict[Any, Task] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            task = waiting.pop()
            running[remote.remote(task)] = task
        (done,), _ = ray.wait(list(running), num_returns=1)
        task = running.pop(done)
        try:
            (result,), told = ray.get(done)
        except Exception as error:
            result, told = Result(task.name, _last_line(error)), (0, 0)
        tell(*told)
        yield result
        if result.is_fatal:
            waiting.clear()
