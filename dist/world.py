"""Processes and groups of them: join what torchrun started, and ask a group for ranks and sizes.

    with world.start() as w:            # torchrun ... -m program; one process without torchrun
        ... w.rank, w.size, w.device ...

The engine is torch.distributed: NCCL where there are GPUs, Gloo where there are none. Every function of purelm.dist
takes a `group`; None is all processes.
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
import torch.distributed.nn.functional  # before any group exists: its default arguments would keep one alive
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
    """This process's rank and device, and the number of processes."""

    rank: int
    size: int
    device: torch.device


class PeerError(SystemExit, RuntimeError):
    """Another process did not come, or is gone. A program that does not catch it prints one line and exits with 1.

    torch and Gloo would print a traceback of their own on every other process, and bury the message of the one that
    failed.
    """


@contextmanager
def start(device: str = "auto", timeout: float = 600.0) -> Iterator[World]:
    """Join the processes that torchrun started, and leave at the end; without torchrun, a world of one process.

    device: "cuda", "cpu" or "auto"; with several GPUs each process takes number LOCAL_RANK. timeout: seconds after
    which a collective that some rank has not entered fails. An exception in the body ends this process at once, and
    torchrun then ends the others. A process group that exists already is used, and not destroyed at the end.
    PeerError if the port is taken, if not all processes come, and if one is lost later.
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
    except RuntimeError as error:  # the base of all errors of torch.distributed
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
        f"{who}: not all of the {size} processes joined at {address}:{port} within {timeout:.0f} s; were all "
        f"started, with one MASTER_ADDR, MASTER_PORT and WORLD_SIZE? ({_line(error)})"
    )


def _is_of_a_peer(error: RuntimeError) -> bool:
    """Whether another process caused the error. Gloo's are plain RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def _where_lost(error: RuntimeError) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in f.filename]
    at = f" in {frames[-1].name} ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return (
        f"rank {dist.get_rank()} of {dist.get_world_size()}: another process is gone, or did not join a collective"
        f"{at}: its own output says why ({_line(error)})"
    )


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].strip() if text else type(error).__name__


def _leave() -> None:
    # Handles of collectives that are left in reference cycles keep the group and its threads alive, and a thread that
    # frees the last handle during the interpreter's shutdown aborts the process (SIGABRT).
    gc.collect()
    dist.destroy_process_group()


def _abandon(error: BaseException) -> None:
    """Leave without waiting for collectives under way, which other processes may never enter.

    To wait would take until the timeout, and hide the error until then.
    """
    if dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
        return
    # Gloo cannot abort a collective, and a group that is freed waits for its own. So the groups are leaked. The error
    # is leaked too, since its frames hold handles of collectives: a thread of Gloo that frees the last one during the
    # interpreter's shutdown aborts the process (`_leave`).
    for kept in (*dist.distributed_c10d._world.pg_map, error):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    dist.destroy_process_group()


def size_of(group: Group) -> int:
    """Number of processes in the group; 1 if torch.distributed was not started. ValueError if this one is no member."""
    return _of_member(dist.get_world_size(group)) if dist.is_initialized() else 1


def rank_of(group: Group) -> int:
    """This process's rank in the group, 0 if torch.distributed was not started. ValueError if it is no member."""
    return _of_member(dist.get_rank(group)) if dist.is_initialized() else 0


def _of_member(number: int) -> int:
    if number < 0:
        raise ValueError("this process is not a member of the group")
    return number


def device_of(group: Group) -> torch.device:
    """The device for small messages to the group: the current GPU for NCCL, else the CPU."""
    if dist.is_initialized() and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# torch 2.13 renamed two functions and warns of the old names, the only ones that 2.11 has.


def all_gather_single(out: Tensor, x: Tensor, group: Group = None, async_op: bool = False) -> Any:
    """torch.distributed's: x of all ranks, concatenated, into out."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    return getattr(dist, name)(out, x, group=group, async_op=async_op)


def reduce_scatter_single(out: Tensor, x: Tensor, group: Group = None, async_op: bool = False) -> Any:
    """torch.distributed's: this rank's share of the sum of x over ranks, into out."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    return getattr(dist, name)(out, x, group=group, async_op=async_op)
