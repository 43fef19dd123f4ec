"""Functions run on several processes at once, over Gloo: started once for a test session, torch imported once.

    results = run(function, *args)             # function(*args) on each of two ranks; a list of what they returned
    results = run(function, *args, gpus=True)  # over NCCL, each with a GPU of its own if there are so many
    done = program("experiments.pretrain", "--steps", 4)   # a program on two ranks, of these processes
    done = under_torchrun("experiments.pretrain", "--steps", 4)       # or of their own

function is a module-level function of a test file (it is sent by name). An exception on any rank is raised here with
that rank's traceback. What hangs is killed after TIMEOUT, and so is a pool in which a rank died.
"""

import atexit
import multiprocessing
import os
import queue
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from tests.programs import run_here

ROOT = Path(__file__).resolve().parents[2]
# A script outside of the project finds it, too.
PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}
# Seconds after which something hangs: the one limit, for a machine that is 10 times slower and has others to serve.
# Nothing may take as long, and nothing waits for it that is not stuck.
TIMEOUT = 600.0

# What torch.distributed calls them: 2.13 renamed both.
ALL_GATHER = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = (
    "reduce_scatter_single" if hasattr(torch.distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
)

_pools: dict[tuple[int, bool], "_Pool"] = {}


class RankError(Exception):
    """What failed, on which ranks."""

    def __init__(self, errors: dict[int, tuple[str, str]]):
        self.errors = {rank: message for rank, (message, _) in errors.items()}
        super().__init__("\n".join(f"rank {rank}: {trace}" for rank, (_, trace) in errors.items()))


def take_gpu(rank: int, size: int) -> int:
    """The GPU of a rank, as LOCAL_RANK too; ranks share GPUs where there are fewer: slower, the same messages.

    NCCL refuses ranks of one host that share a GPU, so each gets a host's name of its own; they talk through sockets.
    """
    count = torch.cuda.device_count()
    if count < size:
        os.environ.update(NCCL_HOSTID=f"host-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    os.environ["LOCAL_RANK"] = str(rank % count)
    return rank % count


def _work(rank: int, size: int, port: int, gpus: bool, tasks: Any, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    if not gpus:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    if gpus:
        device = torch.device("cuda", take_gpu(rank, size))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, True, function(*args)))
        except BaseException as error:
            results.put((rank, False, (f"{type(error).__name__}: {error}", traceback.format_exc())))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class _Pool:
    def __init__(self, size: int, gpus: bool):
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.size, self.gpus = size, gpus
        self.tasks = [context.Queue() for _ in range(size)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_work, args=(r, size, port, gpus, self.tasks[r], self.results), daemon=True)
            for r in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for tasks in self.tasks:
            tasks.put((function, args))
        found: dict[int, Any] = {}
        errors: dict[int, tuple[str, str]] = {}
        waited = 0.0
        while len(found) + len(errors) < self.size:
            try:
                rank, good, value = self.results.get(timeout=1.0)
            except queue.Empty:
                waited += 1.0
                dead = [r for r, p in enumerate(self.processes) if not p.is_alive()]
                if dead or waited > TIMEOUT:
                    self.stop()
                    raise RuntimeError(f"ranks {dead} died" if dead else f"no answer in {TIMEOUT} s") from None
                continue
            (found if good else errors)[rank] = value
        if errors:
            if len(errors) < self.size or any("imed out" in message for message, _ in errors.values()):
                self.stop()  # ranks are no longer at the same place
            raise RankError(errors)
        return [found[r] for r in range(self.size)]

    def stop(self) -> None:
        _pools.pop((self.size, self.gpus), None)
        for process in self.processes:
            process.kill()


def run(function: Callable[..., Any], *args: Any, size: int = 2, gpus: bool = False) -> list[Any]:
    """What function(*args) returns on each of `size` ranks; RankError if any raised."""
    key = size, gpus
    if key not in _pools:
        _pools[key] = _Pool(size, gpus)
    return _pools[key].run(function, args)


def launcher(n_ranks: int, *flags: str) -> list[str]:
    """What stands before a module's name: torchrun with these flags, or without it for one rank, which is quicker."""
    return [sys.executable, "-m"] if n_ranks == 1 else [*_torchrun(n_ranks), *flags, "-m", "--"]


def script_launcher(n_ranks: int) -> list[str]:
    """What stands before a file's name."""
    return [*_torchrun(n_ranks), "--"]


def _torchrun(n_ranks: int) -> list[str]:
    port = f"--master-port={free_port()}"
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n_ranks}", port]


def program(module: str, *args: Any, n_ranks: int = 2) -> subprocess.CompletedProcess:
    """The module run as a program on so many ranks: what all of them print, and the highest exit status."""
    ranks = [run_here(module, *args)] if n_ranks == 1 else run(run_here, module, *args, size=n_ranks)
    out, err = ("".join(getattr(done, name) for done in ranks) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([module, *args], max(done.returncode for done in ranks), out, err)


def under_torchrun(module: str, *args: Any, n_ranks: int = 2) -> subprocess.CompletedProcess:
    """The module run as a program from the root of the project, on so many ranks of one thread, each a new process."""
    return subprocess.run(
        [*launcher(n_ranks), module, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=ENVIRONMENT,
    )


@atexit.register
def _stop_all() -> None:
    for pool in list(_pools.values()):
        pool.stop()
