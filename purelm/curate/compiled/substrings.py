"""Least hashes of runs in each window, hashes of windows, and their comparison; rolling, in one pass each.

Legend: N items of data (bytes or tokens), n in a window, k in the runs that are hashed within it, w = n - k + 1 runs of
a window. A piece is a range of windows, by where they begin, that lies in one document.
"""

import numpy as np

from purelm.tokenizer.compiled.jit import loop, part

B = np.uint64(0x9E3779B97F4A7C15)  # odd: the golden ratio
P = np.uint64((1 << 61) - 1)  # a prime: no strings are known that collide for all bases, as there are mod 2^64


@part
def value(item):
    """A number for an item, whose high bits depend on it."""
    x = (np.uint64(item) + np.uint64(1)) * np.uint64(0xD1342543DE82EF95)
    return x ^ (x >> np.uint64(32))


@part
def mixed(x):
    """Bits of a rolling hash, whose low ones depend on few, spread; a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(31))


@part
def times(a, b):
    """a b mod P, for a, b < P, up to one P too many."""
    low31, low30 = np.uint64((1 << 31) - 1), np.uint64((1 << 30) - 1)
    ah, al = a >> np.uint64(31), a & low31
    bh, bl = b >> np.uint64(31), b & low31
    middle = al * bh + ah * bl
    found = (ah * bh << np.uint64(1)) + (middle >> np.uint64(30)) + ((middle & low30) << np.uint64(31)) + al * bl
    return (found & P) + (found >> np.uint64(61))


@part
def reduced(x):
    """x mod P, for x < 2^63."""
    x = (x & P) + (x >> np.uint64(61))
    return x - P if x >= P else x


@part
def runs(data, start, end, k, hashes):
    """Fill hashes[: end - start] with those of the runs of k items that begin in start..end-1."""
    power = np.uint64(1)
    for _ in range(k):
        power *= B
    h = np.uint64(0)
    for i in range(start, start + k):
        h = h * B + value(data[i])
    hashes[0] = mixed(h)
    for i in range(start + 1, end):
        h = h * B + value(data[i + k - 1]) - value(data[i - 1]) * power
        hashes[i - start] = mixed(h)


@part
def least_place(hashes, start, end):
    """Of the least of hashes[start:end], the last of equal ones."""
    at = start
    for i in range(start + 1, end):
        if hashes[i] <= hashes[at]:
            at = i
    return at


@loop
def least_runs(data, starts, ends, n, k, hashes, found):
    """Fill `found` with the least hash of the runs in each window of the pieces, once for each place; how many.

    The place stays while it lies in the window and none less comes, so that a stretch of equal items has few of them.
    hashes: room for the longest piece and w more. found: room for all windows.
    """
    w, m = n - k + 1, 0
    for piece in range(starts.size):
        size = ends[piece] - starts[piece]
        runs(data, starts[piece], ends[piece] + w - 1, k, hashes)
        at = -1
        for p in range(size):
            last = p + w - 1
            if at < p:
                at = least_place(hashes, p, last + 1)
            elif hashes[last] < hashes[at]:
                at = last
            else:
                continue
            found[m] = hashes[at]
            m += 1
    return m


@loop
def windows(data, starts, ends, n, k, hashes, repeated, base, rows):
    """Fill rows, uint64 (windows, 2), with (hash, place) of the windows whose least hash is in `repeated`; how many.

    repeated: sorted. hash: sum of (item + 1) base^(n - 1 - i) mod P over the window.
    """
    w, m = n - k + 1, 0
    power = np.uint64(1)
    for _ in range(n):
        power = reduced(times(power, base))
    for piece in range(starts.size):
        first, size = starts[piece], ends[piece] - starts[piece]
        runs(data, first, ends[piece] + w - 1, k, hashes)
        at, is_wanted, is_known, h = -1, False, False, np.uint64(0)
        for p in range(size):
            last = p + w - 1
            changed = True
            if at < p:
                at = least_place(hashes, p, last + 1)
            elif hashes[last] < hashes[at]:
                at = last
            else:
                changed = False
            if changed:
                low, high = 0, repeated.size
                while low < high:
                    middle = (low + high) // 2
                    if repeated[middle] < hashes[at]:
                        low = middle + 1
                    else:
                        high = middle
                is_wanted = low < repeated.size and repeated[low] == hashes[at]
            if is_wanted:
                if is_known:
                    gone = reduced(times(reduced(np.uint64(data[first + p - 1]) + np.uint64(1)), power))
                    h = reduced(times(h, base) + np.uint64(data[first + p + n - 1]) + np.uint64(1) + (P - gone))
                else:
                    h = np.uint64(0)
                    for i in range(first + p, first + p + n):
                        h = reduced(times(h, base) + np.uint64(data[i]) + np.uint64(1))
                rows[m, 0], rows[m, 1] = h, first + p
                m += 1
            is_known = is_wanted
    return m


@loop
def first_difference(data, places, others, n):
    """The first i for which the windows at places[i] and others[i] differ, or -1; both are read once for each stretch.

    A pair that follows on the one before, a place further each, is compared in its last item alone.
    """
    for i in range(places.size):
        a, b = places[i], others[i]
        begin = 0
        if i and places[i - 1] == a - 1 and others[i - 1] == b - 1:
            begin = n - 1
        for j in range(begin, n):
            if data[a + j] != data[b + j]:
                return i
    return -1
