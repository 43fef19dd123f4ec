"""Processes and groups of them: what torchrun started, as arguments.

    with world.start() as w:            # torchrun ... -m program; one process without torchrun
        ... w.rank, w.size, w.device ...

The engine is torch.distributed: NCCL where there are GPUs, Gloo where there are none. No function of purelm.dist asks
for a global group behind your back: each takes a `group`, and None is the world.
"""

import ctypes
import gc
import os
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


@contextmanager
def start(device: str = "auto", timeout: float = 600.0) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end; alone, a world of one.

    device: "cuda", "cpu" or "auto"; with several GPUs each process takes the one of its LOCAL_RANK. timeout: seconds
    after which a collective that not all ranks have entered fails instead of waiting on; an error in here ends this
    process at once, and torchrun then ends the others. A group that exists already is used and left standing.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise ValueError(f"LOCAL_RANK is {local}, but there are {n} GPUs: start fewer processes")
    here = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    if dist.is_initialized() or "RANK" not in os.environ:
        yield World(rank_of(None), size_of(None), here)
        return
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    # After a restart the store still holds addresses of processes that are gone.
    store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
        device_id=here if cuda else None,
    )
    failed = False
    try:
        yield World(dist.get_rank(), dist.get_world_size(), here)
    except (Exception, KeyboardInterrupt):
        failed = True
        raise
    finally:
        _abandon() if failed else _leave()


def _leave() -> None:
    # What still holds the group (handles of messages in reference cycles, say) keeps its threads running. One that lets
    # go of its last message while the interpreter is going down takes the process with it: SIGABRT.
    gc.collect()
    dist.destroy_process_group()


def _abandon() -> None:
    """Leave without waiting for messages under way, which processes that are elsewhere may never enter.

    The wait would be until the timeout, and the error on its way out would be seen only then.
    """
    if dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
        return
    # Gloo cannot give a message up, and a group waits for its own when it goes: so these never go.
    for group in dist.distributed_c10d._world.pg_map:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
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
