"""Log-probabilities of the reference, computed once and kept in the run's folder.

The file is keyed by what they depend on. With another key they are computed again and the file is replaced; a file that
is damaged is an error, since what damaged it may have damaged more.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from purelm.dist.world import World
from purelm.files import sync

__all__ = ["cached"]


def cached(path: Path, key: str, compute: Callable[[], dict[str, Tensor]], world: World) -> dict[str, Tensor]:
    """The tensors of the file if it is of this key; else those of `compute`, which all processes call, and are kept.

    The first process reads and writes. ValueError, on all processes, for a file that is damaged.
    """
    found: list[Any] = [None, ""]
    if world.rank == 0:
        try:
            found[0] = read(path, key)
        except ValueError as error:
            found[1] = str(error)
    if world.size > 1:
        dist.broadcast_object_list(found, src=0)
    if found[1]:
        raise ValueError(found[1])
    if found[0] is not None:
        return found[0]
    tensors = compute()
    if world.rank == 0:
        write(path, key, tensors)
    return tensors


def read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors; None where there is no file, or one of another key; ValueError where it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None
    if about.get("sha256") != _digest(about.get("key", ""), tensors):
        raise _damaged(path, "its contents are not those of its checksum")
    return tensors if about["key"] == key else None


def write(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """The file, in place of one that was there; a kill at any instant leaves that one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    save_file(tensors, new, {"key": key, "sha256": _digest(key, tensors)})
    sync(new)
    os.replace(new, path)


def _digest(key: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(key.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: is damaged ({reason}); remove it to have the reference computed again")
