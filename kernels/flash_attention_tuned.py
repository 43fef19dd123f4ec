"""Tile sizes of flash attention: the measured ones of flash_attention_table.py, or safe ones where it has none.

The table is part of the library, so a first call need not tune.
"""

import warnings
from functools import cache
from typing import NamedTuple

import torch

from purelm.caches import memo
from purelm.kernels.flash_attention_table import TABLE

__all__ = ["LENGTHS", "PASSES", "Blocks", "choose", "fallback"]

PASSES = ("forward", "backward_q", "backward_kv")
LENGTHS = (1024, 4096)  # that were measured: short sequences need more and smaller programs


class Blocks(NamedTuple):
    """The tile sizes and launch options of a pass."""

    m: int  # queries of a tile
    n: int  # keys of a tile
    n_warps: int
    n_stages: int  # tiles in flight: the one in use, and those loaded ahead


def choose(
    which: str, D: int, E: int, dtype: torch.dtype, causal: bool, length: int, device: torch.device
) -> Blocks:
    """Tiles for one of PASSES.

    D and E: head dims padded to a power of two; causal: whether keys to the right are hidden; length: of the axis along
    which a program loops.
    """
    if device.type != "cuda":  # the interpreter
        return Blocks(16, 16, 4, 1)
    width, size = max(D, E), dtype.itemsize
    arch = architecture(device)
    short, long = LENGTHS
    found = TABLE.get((arch, which, width, size, causal, long))
    if length <= 2 * short:
        found = TABLE.get((arch, which, width, size, causal, short), found)
    if found is None:
        _say_once(arch, width, size)
        return fallback(which, width, size)
    return Blocks(*found)


def fallback(which: str, width: int, size: int) -> Blocks:
    """Tiles that fit the shared memory of any GPU from Ampere on."""
    if width * size <= 128:
        return Blocks(64, 64, 4, 2)
    if width * size <= 256:
        return Blocks(64, 64, 4, 2) if which == "forward" else Blocks(32, 64, 4, 2)
    return Blocks(32, 32, 4, 1) if width * size <= 512 else Blocks(16, 16, 4, 1)


@memo(None)
def architecture(device: torch.device) -> str:
    """The name of a compute capability: "sm90" for 9.0 (Hopper)."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@cache  # and not memo: once in a process
def _say_once(arch: str, width: int, size: int) -> None:
    warnings.warn(
        f"flash_attention: tiles for {arch}, head dim {width}, {8 * size} bits were never measured: safe ones are "
        "used. `python -m experiments.tune_kernels` measures them",
        stacklevel=4,
    )
