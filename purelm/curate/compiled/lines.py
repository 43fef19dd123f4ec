"""Hashes of lines, and lines left out, in one pass over bytes each."""

import numpy as np

from purelm.tokenizer.compiled.jit import loop, part


@part
def step(h, byte, factor):
    """One byte into a hash: a bijection of h for each byte, and of the byte for each h."""
    h = (h ^ np.uint64(byte)) * factor
    return h ^ (h >> np.uint64(32))


@loop
def hash_lines(data, factors, rows, ends):
    """Fill rows, uint64 (lines, 2), and ends, int64 (lines,): each the place behind a line's newline or of the end.

    factors: (4,) two starts and two factors. Returns how many lines there are; both arrays must have room.
    """
    a, b = factors[0], factors[1]
    n = start = 0
    for i in range(data.size):
        byte = data[i]
        if byte == 10:
            rows[n, 0], rows[n, 1], ends[n] = a, b, i + 1
            n += 1
            a, b, start = factors[0], factors[1], i + 1
        else:
            a, b = step(a, byte, factors[2]), step(b, byte, factors[3])
    if start < data.size:
        rows[n, 0], rows[n, 1], ends[n] = a, b, data.size
        n += 1
    return n


@loop
def kept_bytes(data, ends, keep, out):
    """Copy the lines that are kept; returns how many bytes they have."""
    n = start = 0
    for i in range(ends.size):
        if keep[i]:
            for j in range(start, ends[i]):
                out[n] = data[j]
                n += 1
        start = ends[i]
    return n
