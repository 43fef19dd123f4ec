"""Whether a run can fit into memory and disk at all: estimated by arithmetic, before anything is allocated.

The estimate is a lower bound, so that no run is refused that could work: parameters, gradients, optimizer state, and
of the activations only the inputs of the blocks, which every training step must keep.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from purelm import accounting
from purelm.models.config import Config

CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def available(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on the device; None where that is not known.

    On a CPU: the smaller of the available memory that the system reports and of what the process's cgroup has left.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [*_meminfo(), *_cgroup()]
    return min(found) if found else None


def _meminfo() -> Iterator[int]:
    if MEMINFO.is_file():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _cgroup() -> Iterator[int]:
    """Bytes left in the process's cgroups (v2, then v1): the limit less what is used and cannot be reclaimed."""
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            cache = dict(line.split() for line in (CGROUPS / stat).read_text().splitlines())
            droppable = int(cache.get("inactive_file", 0))
            yield int((CGROUPS / limit).read_text()) - int((CGROUPS / used).read_text()) + droppable
        except (OSError, ValueError):  # no such group, or "max"
            continue


def least_bytes(
    cfg: Config, batch_size: int, *, moments: int = 2, element: int = 4, param_share: float = 1, state_share: float = 1
) -> float:
    """A lower bound of the bytes that a training step needs.

    Args:
        batch_size: sequences in one forward pass (of a microbatch).
        moments: numbers of optimizer state for each parameter. element: bytes of one number of an activation.
        param_share, state_share: fraction of the parameters, and of the optimizer state, that one process holds.

    >>> cfg = Config(vocab_size=100, context_length=8, d_model=16, n_layers=2, n_heads=2, d_ff=64)
    >>> n = 2 * 100 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 64) + 5 * 16
    >>> least_bytes(cfg, 3) == 16 * n + 2 * 3 * 8 * 16 * 4
    True
    """
    n = accounting.n_params(cfg)
    inputs = cfg.n_layers * batch_size * cfg.context_length * cfg.d_model * element
    return n * 8 * param_share + n * 4 * moments * state_share + inputs


def check_fits(
    cfg: Config,
    batch_size: int,
    device: torch.device,
    *,
    moments: int = 2,
    element: int = 4,
    param_share: float = 1,
    state_share: float = 1,
    processes: int = 1,
) -> None:
    """Raise a ValueError that names the sizes if a step cannot fit into the device's memory.

    processes: how many share that memory.
    """
    have = available(device)
    need = least_bytes(
        cfg, batch_size, moments=moments, element=element, param_share=param_share, state_share=state_share
    )
    if have is not None and need * processes > have:
        sizes = ", ".join(
            f"{name} {getattr(cfg, name):,}"
            for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads")
        )
        raise ValueError(
            f"model with {sizes}, batch of {batch_size:,} sequences: training needs {gib(need * processes)} or more, "
            f"{device} has {gib(have)} left: make the model or the batch smaller"
        )


def check_disk(n_bytes: float, folder: Path, what: str) -> None:
    """Raise a ValueError if the disk of the folder, or of its nearest existing parent, has less than n_bytes left."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    left = shutil.disk_usage(there).free
    if n_bytes > left:
        raise ValueError(f"{what} needs {gib(n_bytes)} or so on disk, {folder} has {gib(left)} left")


def gib(n_bytes: float) -> str:
    """
    >>> gib(3 * 2**29)
    '1.5 GiB'
    """
    return f"{n_bytes / 2**30:,.3g} GiB"


def on_this_host() -> int:
    """Number of processes that torchrun started on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
