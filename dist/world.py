"""Processes and groups of them: what torchrun started, as arguments.

    with world.start() as w:            # torchrun ... -m program; one process without torchrun
        ... w.rank, w.size, w.device ...

The engine is torch.distributed: NCCL where there are GPUs, Gloo where there are none. No function of purelm.dist asks
for a global group behind your back: each takes a `group`, and None is the world.
"""

import ctypes
import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any group exists, which its default arguments would hold for ever
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

__all__ = [
    "Group",
    "PeerError",
    "World",
    "all_gather_single",
    "device_of",
    "rank_of",
    "reduce_scatter_single",
    "size_of",
    "start",
]

Group = dist.ProcessGroup | None  # None: all processes


class World(NamedTuple):
    """This process among all."""

    rank: int
    size: int
    device: torch.device


class PeerError(SystemExit, RuntimeError):
    """Another process is not there, or no longer. A program that lets it pass prints one line, and ends with status 1.

    What torch and Gloo print in its place is a page of their own frames on each survivor, under which the message of
    the process that failed is not found.
    """


@contextmanager
def start(device: str = "auto", timeout: float = 600.0) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end; alone, a world of one.

    device: "cuda", "cpu" or "auto"; with several GPUs each process takes the one of its LOCAL_RANK. timeout: seconds
    after which a collective that not all ranks have entered fails instead of waiting on; an error in here ends this
    process at once, and torchrun then ends the others. A group that exists already is used and left standing.
    PeerError, in one line, where the port is taken, where not all processes come, and where one is lost later on.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device not in ("auto", "cpu", "cuda", f"cuda:{local}"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda", which is GPU {local} by LOCAL_RANK, got {device!r}')
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if cuda and local >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise ValueError(f"LOCAL_RANK is {local}, but there are {n} GPUs: start fewer processes")
    here = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    if dist.is_initialized() or "RANK" not in os.environ:
        yield World(rank_of(None), size_of(None), here)
        return
    try:
        _join(here, timeout)
    except RuntimeError as error:  # all that torch.distributed raises
        raise PeerError(_why_not_joined(error, timeout)) from None
    failed: BaseException | None = None
    try:
        yield World(dist.get_rank(), dist.get_world_size(), here)
    except (Exception, KeyboardInterrupt) as error:
        failed = error
        if isinstance(error, RuntimeError) and _is_of_a_peer(error):
            raise PeerError(_where_lost(error)) from None
        raise
    finally:
        _leave() if failed is None else _abandon(failed)


def _join(here: torch.device, timeout: float) -> None:
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    # After a restart the store still holds addresses of processes that are gone.
    store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "nccl" if here.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
        device_id=here if here.type == "cuda" else None,
    )


def _why_not_joined(error: RuntimeError, timeout: float) -> str:
    rank, size, address, port = (
        os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    who = f"rank {rank} of {size}"
    if "EADDRINUSE" in str(error):
        return f"{who}: port {port} is in use, by another run perhaps: give another one (torchrun --master-port)"
    return (
        f"{who}: not all of the {size} processes came together at {address}:{port} within {timeout:.0f} s; were all "
        f"started, with one MASTER_ADDR, MASTER_PORT and WORLD_SIZE? ({_line(error)})"
    )


def _is_of_a_peer(error: RuntimeError) -> bool:
    """Gloo's errors are plain RuntimeErrors, which name its source files."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def _where_lost(error: RuntimeError) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in f.filename]
    at = f" in {frames[-1].name} ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return (
        f"rank {dist.get_rank()} of {dist.get_world_size()}: another process is gone, or did not come to a message"
        f"{at}: what it printed says why ({_line(error)})"
    )


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].strip() if text else type(error).__name__


def _leave() -> None:
    # What still holds the group (handles of messages in reference cycles, say) keeps its threads running. One that lets
    # go of its last message while the interpreter is going down takes the process with it: SIGABRT.
    gc.collect()
    dist.destroy_process_group()


def _abandon(error: BaseException) -> None:
    """Leave without waiting for messages under way, which processes that are elsewhere may never enter.

    The wait would be until the timeout, and the error on its way out would be seen only then.
    """
    if dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
        return
    # Gloo cannot give a message up, and a group waits for its own when it goes: so these never go. Nor does the error,
    # whose frames hold the messages: a thread of Gloo's that lets go of one as the last, while the interpreter is going
    # down, takes the process with it (`_leave`).
    for kept in (*dist.distributed_c10d._world.pg_map, error):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    dist.destroy_process_group()


def size_of(group: Group) -> int:
    """Processes of the group; 1 where torch.distributed was not started. ValueError for one that is not a member."""
    return _of_member(dist.get_world_size(group)) if dist.is_initialized() else 1


def rank_of(group: Group) -> int:
    """This process's number in the group; ValueError for one that is not a member."""
    return _of_member(dist.get_rank(group)) if dist.is_initialized() else 0


def _of_member(number: int) -> int:
    if number < 0:
        raise ValueError("this process is not a member of the group")
    return number


def device_of(group: Group) -> torch.device:
    """Where the group's messages of a few bytes are put: the current GPU for NCCL, else the CPU."""
    if dist.is_initialized() and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# torch 2.13 renamed two functions, and warns of the old names; 2.11 has only those.


def all_gather_single(out: Tensor, x: Tensor, group: Group = None, async_op: bool = False) -> Any:
    """torch.distributed's: x of all ranks, one after another, into out."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    return getattr(dist, name)(out, x, group=group, async_op=async_op)


def reduce_scatter_single(out: Tensor, x: Tensor, group: Group = None, async_op: bool = False) -> Any:
    """torch.distributed's: this rank's share of the sum of x over ranks, into out."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    return getattr(dist, name)(out, x, group=group, async_op=async_op)
