"""The processes that a training program runs on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from experiments.console import pick_device
from purelm.dist import world

__all__ = ["joined"]


@contextmanager
def joined(device: str, timeout: float) -> Iterator[world.World]:
    """The world of `purelm.dist.world.start`; alone, on the device of `pick_device`, which may be cuda:1.

    ValueError for a device that does not exist, before any other process is waited for.
    """
    pick_device(device)
    with world.start(device, timeout) as here:
        if here.size == 1:
            own = pick_device(device)  # where world.start gives the first GPU
            if own.type == "cuda" and own.index is not None:
                torch.cuda.set_device(own)
            here = here._replace(device=own)
        yield here
