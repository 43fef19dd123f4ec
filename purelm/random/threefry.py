"""Threefry-2x32-20 in torch integer operations, and how a draw walks over its counters.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3 and table 3.
32-bit words are held in int32 tensors: two's complement addition and left shifts wrap as unsigned ones do, and a
right shift becomes a logical one by masking. Element i of a draw uses the 64-bit counter i (high word, low word).
"""

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # table 3: R_(0..7) of Threefry-2x32
PARITY = 0x1BD11BDA  # low word of the key schedule's constant C240 (section 3.3)

# Counters in one pass. On a CPU the few buffers of 128 KiB stay in the second-level cache, and 2**15 is the most
# that torch runs on one thread (starting threads for 120 short operations costs more than it gains). On a GPU a pass
# must be long enough to hide its launches.
CHUNK_CPU = 2**15
CHUNK_GPU = 2**24


def threefry2x32(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The block (x0, x1) enciphered under the key (k0, k1); all int32, broadcast together."""
    keys = (k0, k1, k0 ^ k1 ^ PARITY)
    x0 = x0 + k0
    x1 = x1 + k1
    one_round = _round_compiled if torch.compiler.is_compiling() else _round
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            x0, x1 = one_round(x0, x1, r)
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + (keys[(i + 2) % 3] + (i + 1))
    return x0, x1


def _round(x0: Tensor, x1: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """x0 + x1, and x1 rotated left by r, xor that; in place on tensors that threefry2x32 made."""
    x0 += x1
    low = x1 >> (32 - r)
    low &= (1 << r) - 1
    x1 = x1 << r
    x1 |= low
    x1 ^= x0
    return x0, x1


def _round_compiled(x0: Tensor, x1: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The same for inductor, which would write the words' expressions out again wherever they are used: 30000
    operations instead of 130, and six times as long to compile. as_strided, which changes nothing, makes it name
    the words instead; the loop that it generates is still one.
    """
    x0 = x0 + x1
    x1 = ((x1 << r) | ((x1 >> (32 - r)) & ((1 << r) - 1))) ^ x0
    return torch.as_strided(x0, x0.shape, x0.stride()), torch.as_strided(x1, x1.shape, x1.stride())


def encipher(key: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The two words (int32) for each 64-bit counter of `index` (int64)."""
    words = key.to(torch.int32)
    return threefry2x32(words[0], words[1], (index >> 32).to(torch.int32), index.to(torch.int32))


def unsigned(word: Tensor) -> Tensor:
    """An int32 word as the int64 tensor of its unsigned value."""
    return word.to(torch.int64) & WORD


def as_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes as a tuple; ValueError for a number in place of a sequence, and for what is no size."""
    if torch.compiler.is_compiling():
        return tuple(shape)
    try:
        sizes = tuple(shape)
        fits = all(isinstance(n, torch.SymInt) or operator.index(n) >= 0 for n in sizes)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"shape is {shape!r:.80}; a sequence of integers of at least 0 is needed, as (3,)")
    return sizes


def draw(
    key: Tensor,
    shape: Sequence[int],
    index: int | Tensor,
    finish: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """finish(word0, word1) for every element of a tensor of `shape`, in passes that fit the cache.

    `index` is the counter of the first element (int or 0-d tensor), or of every element (int64 tensor of `shape`).
    """
    shape = as_shape(shape)
    n = math.prod(shape)
    if isinstance(index, Tensor) and index.ndim > 0:
        if index.shape != shape:
            raise ValueError(f"index has shape {tuple(index.shape)}, the draw has {shape}")
        flat = index.reshape(-1)

        def counters(start: int, stop: int) -> Tensor:
            return flat[start:stop]
    else:
        first = index
        if isinstance(first, int) and first < 0:
            raise ValueError(f"index is {first}; the linear index of the first element cannot be negative")

        def counters(start: int, stop: int) -> Tensor:
            return torch.arange(start, stop, device=key.device) + first

    chunk = CHUNK_CPU if key.device.type == "cpu" else CHUNK_GPU
    # Compiled, the whole draw is one fused loop without intermediates; fake devices have nothing to save.
    if torch.compiler.is_compiling() or key.device.type == "meta" or n <= chunk:
        return finish(*encipher(key, counters(0, n))).to(dtype).reshape(shape)
    out = key.new_empty((n,), dtype=dtype)  # from the key, so that it has the key's batch under vmap
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        out[start:stop] = finish(*encipher(key, counters(start, stop)))
    return out.reshape(shape)
