"""Rows of numbers sorted by their most significant bits first, in place."""

import numpy as np

from purelm.tokenizer.compiled.jit import loop, part

SMALL = 24  # rows that are sorted by insertion


@part
def is_less(rows, i, j, column):
    """Whether row i comes before row j, by the columns from `column` on."""
    for c in range(column, rows.shape[1]):
        if rows[i, c] != rows[j, c]:
            return rows[i, c] < rows[j, c]
    return False


@part
def insertion(rows, start, end, column):
    """Sort rows[start:end], with a swap a step."""
    for i in range(start + 1, end):
        j = i
        while j > start and is_less(rows, j, j - 1, column):
            for c in range(column, rows.shape[1]):
                x = rows[j, c]
                rows[j, c] = rows[j - 1, c]
                rows[j - 1, c] = x
            j -= 1


@part
def shift_of(x):
    """How far the eight bits that begin with the highest of x are from the lowest."""
    n = 0
    while x >> np.uint64(n) > np.uint64(255):
        n += 1
    return np.uint64(n)


@loop
def sort_rows(rows, other, ends, stack):
    """Sort rows, uint64 (N, C), by all columns. other: as large. ends: int64 (256,). stack: int64 (256 * 9 * C, 3).

    A part of the rows, with equal bits before, is dealt out by the next eight bits in which any of them differ: at most
    nine times for a column, each with up to 256 parts on the stack.
    """
    C = rows.shape[1]
    stack[0, 0], stack[0, 1], stack[0, 2] = 0, rows.shape[0], 0
    top = 1
    while top:
        top -= 1
        start, end, column = stack[top, 0], stack[top, 1], stack[top, 2]
        if end - start <= SMALL:
            insertion(rows, start, end, column)
            continue
        differ = np.uint64(0)
        for i in range(start + 1, end):
            differ |= rows[i, column] ^ rows[start, column]
        if differ == 0:
            if column + 1 < C:
                stack[top, 2] = column + 1
                top += 1
            continue
        shift = shift_of(differ)
        ends[:] = 0
        for i in range(start, end):
            ends[(rows[i, column] >> shift) & np.uint64(255)] += 1
        place = start
        for digit in range(256):
            size = ends[digit]
            ends[digit] = place  # becomes the end while rows are dealt out
            if size > 1:
                stack[top, 0], stack[top, 1], stack[top, 2] = place, place + size, column
                top += 1
            place += size
        for i in range(start, end):
            digit = (rows[i, column] >> shift) & np.uint64(255)
            for c in range(column, C):
                other[ends[digit], c] = rows[i, c]
            ends[digit] += 1
        for i in range(start, end):
            for c in range(column, C):
                rows[i, c] = other[i, c]
