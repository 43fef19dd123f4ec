"""Hashes of lines, and lines left out."""

import numpy as np

from purelm.tokenizer.compiled.jit import loop, part


@part
def step(h, word, factor):
    """Eight bytes into a hash: a bijection of h for each word, and of the word for each h."""
    h = (h ^ word) * factor
    return h ^ (h >> np.uint64(32))


@part
def eight(data, i):
    """data[i : i + 8] as a number, the lowest byte first: one load, as LLVM sees."""
    return (
        np.uint64(data[i])
        | np.uint64(data[i + 1]) << np.uint64(8)
        | np.uint64(data[i + 2]) << np.uint64(16)
        | np.uint64(data[i + 3]) << np.uint64(24)
        | np.uint64(data[i + 4]) << np.uint64(32)
        | np.uint64(data[i + 5]) << np.uint64(40)
        | np.uint64(data[i + 6]) << np.uint64(48)
        | np.uint64(data[i + 7]) << np.uint64(56)
    )


@part
def zero_byte(x):
    """Its lowest bit that is set is the highest bit of the lowest byte of x that is 0; 0 if none is."""
    return (x - np.uint64(0x0101010101010101)) & ~x & np.uint64(0x8080808080808080)


@part
def line_end(data, start):
    """The place of the next newline, or the size."""
    i, size = start, data.size
    while i + 8 <= size:
        found = zero_byte(eight(data, i) ^ np.uint64(0x0A0A0A0A0A0A0A0A))
        if found:
            lowest = (found & (~found + np.uint64(1))) >> np.uint64(7)  # 2^(8 k), of the newline in byte k
            return i + np.int64((lowest * np.uint64(0x0001020304050607)) >> np.uint64(56))
        i += 8
    while i < size and data[i] != 10:
        i += 1
    return i


@part
def up_to(data, i, end):
    """data[i : end], fewer than eight bytes, as a number."""
    if i + 8 <= data.size:
        return eight(data, i) & ((np.uint64(1) << np.uint64(8 * (end - i))) - np.uint64(1))
    word = np.uint64(0)
    for j in range(i, end):
        word |= np.uint64(data[j]) << np.uint64(8 * (j - i))
    return word


@loop
def hash_lines(data, factors, rows, ends):
    """Fill columns 0 and 1 of rows, uint64 (lines, 2 or more), and ends, int64 (lines,): behind a newline, or the end.

    factors: (4,) two starts and two factors. Returns how many lines there are; both arrays must have room.
    """
    n = start = 0
    while start < data.size:
        end = line_end(data, start)
        a, b = factors[0], factors[1]
        i = start
        while i + 8 <= end:
            word = eight(data, i)
            a, b = step(a, word, factors[2]), step(b, word, factors[3])
            i += 8
        if i < end:
            word = up_to(data, i, end)
            a, b = step(a, word, factors[2]), step(b, word, factors[3])
        size = np.uint64(end - start)  # tells "a" from "a\0"
        rows[n, 0], rows[n, 1] = step(a, size, factors[2]), step(b, size, factors[3])
        start = min(end + 1, data.size)
        ends[n] = start
        n += 1
    return n


@loop
def kept_bytes(data, feeds, left_out, out):
    """Copy the lines but those whose numbers, ascending, are in left_out; returns how many bytes.

    feeds: the places of all newlines. What is kept is copied in long stretches.
    """
    m = start = 0
    for number in left_out:
        end = feeds[number - 1] + 1 if number else 0
        for j in range(end - start):
            out[m + j] = data[start + j]
        m += end - start
        start = feeds[number] + 1 if number < feeds.size else data.size
    for j in range(data.size - start):
        out[m + j] = data[start + j]
    return m + data.size - start
