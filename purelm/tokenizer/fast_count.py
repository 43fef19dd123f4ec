"""How often each piece occurs, compiled by numba: an open-addressing table that compares pieces, never only hashes.

A slot's key is the piece itself where it has at most 7 bytes (packed, the length in the top byte), so one comparison
of 64 bits decides; a longer piece has a 63-bit hash as its key (top bit set) and is compared with its bytes, which lie
in `arena`. A free slot has key 0. This module imports numba: import it inside functions only.
"""

from collections import Counter

import numpy as np
from numba import njit

_SHORT = 7  # bytes that fit in a key beside their length


@njit(cache=True, nogil=True)
def _rehashed(size, keys, starts, counts):
    """The same entries in tables of `size` slots (a power of 2)."""
    new_keys, new_starts = np.zeros(size, np.uint64), np.empty(size, np.int64)
    new_counts = np.empty(size, np.int64)
    mask = np.uint64(size - 1)
    for old in range(keys.size):
        key = keys[old]
        if key == 0:
            continue
        mixed = key * np.uint64(0x9E3779B97F4A7C15)
        slot = (mixed ^ (mixed >> np.uint64(32))) & mask
        while new_keys[slot] != 0:
            slot = (slot + np.uint64(1)) & mask
        new_keys[slot], new_starts[slot], new_counts[slot] = key, starts[old], counts[old]
    return new_keys, new_starts, new_counts


@njit(cache=True, nogil=True)
def _add(keys, starts, counts, arena, used, data, ends, start):
    """Count the pieces data[start:ends[0]], data[ends[0]:ends[1]], ...; returns the arrays, replaced where they grew.

    used: int64 (2,) entries and arena bytes in use, updated in place. A long piece lies in the arena as 8 bytes of
    length (little-endian) and its bytes.
    """
    mask = np.uint64(keys.size - 1)
    for i in range(ends.size):
        end = ends[i]
        length = end - start
        if length <= 7:
            key = np.uint64(length) << np.uint64(56)
            for j in range(length):
                key |= np.uint64(data[start + j]) << np.uint64(8 * j)
        else:
            key = np.uint64(0xCBF29CE484222325)  # FNV-1a
            for j in range(start, end):
                key = (key ^ np.uint64(data[j])) * np.uint64(0x100000001B3)
            key |= np.uint64(1) << np.uint64(63)
        mixed = key * np.uint64(0x9E3779B97F4A7C15)
        slot = (mixed ^ (mixed >> np.uint64(32))) & mask
        while True:
            found = keys[slot]
            if found == key:
                if length <= 7:
                    counts[slot] += 1
                    break
                at = starts[slot]
                same = True
                stored = np.int64(0)
                for j in range(8):
                    stored |= np.int64(arena[at + j]) << np.int64(8 * j)
                if stored == length:
                    for j in range(length):
                        if arena[at + 8 + j] != data[start + j]:
                            same = False
                            break
                else:
                    same = False
                if same:
                    counts[slot] += 1
                    break
            elif found == 0:
                keys[slot], counts[slot] = key, 1
                used[0] += 1
                if length > 7:
                    at = used[1]
                    if at + 8 + length > arena.size:
                        bigger = np.empty(2 * arena.size + 8 + length, np.uint8)
                        for j in range(at):  # slice assignments would have numba compile their error messages
                            bigger[j] = arena[j]
                        arena = bigger
                    starts[slot] = at
                    for j in range(8):
                        arena[at + j] = (length >> (8 * j)) & 255
                    for j in range(length):
                        arena[at + 8 + j] = data[start + j]
                    used[1] = at + 8 + length
                if 2 * used[0] > keys.size:
                    keys, starts, counts = _rehashed(2 * keys.size, keys, starts, counts)
                    mask = np.uint64(keys.size - 1)
                break
            slot = (slot + np.uint64(1)) & mask
        start = end
    return keys, starts, counts, arena


def empty_table() -> tuple:
    """A table without entries, for `add`."""
    size = 1 << 16
    return (
        np.zeros(size, np.uint64),
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty(1 << 16, np.uint8),
        np.zeros(2, np.int64),
    )


def add(table: tuple, data: np.ndarray, ends: np.ndarray, start: int = 0) -> tuple:
    """The table after counting the pieces of `data` (uint8) that begin at `start` and end at `ends` (int64).

    The table given is used up (its arrays are written to).
    """
    *arrays, used = table
    return (*_add(*arrays, used, data, ends, start), used)


def counter(table: tuple) -> Counter[bytes]:
    """The entries of a table: piece -> how often it was added."""
    keys, starts, counts, arena, _ = table
    occupied = np.flatnonzero(keys)
    heap = arena.tobytes()
    out: Counter[bytes] = Counter()
    columns = (keys[occupied].tolist(), starts[occupied].tolist(), counts[occupied].tolist())
    for key, at, count in zip(*columns, strict=True):
        length = key >> 56
        if length <= _SHORT:
            piece = (key & (1 << 56) - 1).to_bytes(_SHORT, "little")[:length]
        else:
            length = int.from_bytes(heap[at : at + 8], "little")
            piece = heap[at + 8 : at + 8 + length]
        out[piece] = count
    return out
