"""Merging one piece in machine code: by scanning where it is short, by a heap where it is long.

A merge is a u64, rank << 32 | id of the result, so that the smallest is the first to apply.
"""

import numpy as np

from purelm.tokenizer.compiled.jit import loop, part

NO_MERGE = np.uint64(0xFFFFFFFFFFFFFFFF)


@part
def mix(a, b):
    """A hash of two u64 whose low bits are good: multiply and fold, by the constants of MurmurHash3's finaliser."""
    h = (a ^ (b * np.uint64(0xFF51AFD7ED558CCD))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(32))


@part
def _merge_of(left, right, pairs):
    """The merge of two ids, or NO_MERGE. pairs: (slots, 2) of (left << 32 | right) + 1 (0 where empty) and merge."""
    key = (np.uint64(left) << np.uint64(32) | np.uint64(right)) + np.uint64(1)
    mask = np.uint64(len(pairs) - 1)
    slot = mix(key, key) & mask
    while True:
        found = pairs[slot, 0]
        if found == key:
            return pairs[slot, 1]
        if found == 0:
            return NO_MERGE
        slot = (slot + np.uint64(1)) & mask


@loop
def fill_pairs(pairs, left, right, merges):
    """Insert all merges, of different pairs, into the empty table `pairs`."""
    mask = np.uint64(len(pairs) - 1)
    for k in range(len(left)):
        key = (np.uint64(left[k]) << np.uint64(32) | np.uint64(right[k])) + np.uint64(1)
        slot = mix(key, key) & mask
        while pairs[slot, 0] != 0:
            slot = (slot + np.uint64(1)) & mask
        pairs[slot, 0] = key
        pairs[slot, 1] = merges[k]


@loop
def merge_short(data, start, end, byte_ids, pairs, places, values):
    """Merge data[start:end] in places[0] by scanning for the first merge; the number of ids. Quadratic: short only."""
    n = 0
    for k in range(start, end):
        byte_id = byte_ids[data[k]]
        if byte_id >= 0:  # a byte without a token is dropped
            places[0, n] = byte_id
            n += 1
    for k in range(n - 1):
        values[k] = _merge_of(places[0, k], places[0, k + 1], pairs)
    while n > 1:
        best = values[0]
        at = 0
        for k in range(1, n - 1):
            if values[k] < best:
                best = values[k]
                at = k
        if best == NO_MERGE:
            break
        places[0, at] = best & np.uint64(0xFFFFFFFF)
        n -= 1
        for k in range(at + 1, n):
            places[0, k] = places[0, k + 1]
        for k in range(at, n - 1):
            values[k] = values[k + 1]
        if at < n - 1:
            values[at] = _merge_of(places[0, at], places[0, at + 1], pairs)
        if at > 0:
            values[at - 1] = _merge_of(places[0, at - 1], places[0, at], pairs)
    return n


@part
def _sift_down(heap, size, k):
    item = heap[k]
    while True:
        child = 2 * k + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[k] = heap[child]
        k = child
    heap[k] = item


@part
def _push(heap, size, item):
    k = size
    while k > 0:
        parent = (k - 1) >> 1
        if heap[parent] <= item:
            break
        heap[k] = heap[parent]
        k = parent
    heap[k] = item


IDS, AFTER, BEFORE = 0, 1, 2


@loop
def merge_long(data, start, end, byte_ids, pairs, out, n_out, places, values, heap):
    """Merge data[start:end] into out[n_out:] by a heap of (rank, place); the new n_out. O(n log n).

    Scratch for n <= end - start places: places (3, n) int64, values (n,) and heap (3 n,) uint64.
    """
    n = 0
    # places: the id of each, the next and the previous place in use (n and -1 beyond the ends). values: the merge of a
    # place with the next one, NO_MERGE for a place out of use. heap: rank << 32 | place; each merge adds at most two.
    high = np.uint64(0xFFFFFFFF00000000)
    low = np.uint64(0xFFFFFFFF)
    size = 0
    for k in range(start, end):
        byte_id = byte_ids[data[k]]
        if byte_id >= 0:  # a byte without a token is dropped
            places[IDS, n] = byte_id
            places[AFTER, n] = n + 1
            places[BEFORE, n] = n - 1
            n += 1
    if n == 0:
        return n_out
    for k in range(n - 1):
        values[k] = _merge_of(places[IDS, k], places[IDS, k + 1], pairs)
        if values[k] != NO_MERGE:
            heap[size] = (values[k] & high) | np.uint64(k)
            size += 1
    values[n - 1] = NO_MERGE
    for k in range(size // 2 - 1, -1, -1):
        _sift_down(heap, size, k)
    while size > 0:
        top = heap[0]
        size -= 1
        heap[0] = heap[size]
        _sift_down(heap, size, 0)
        at = np.int64(top & low)
        value = values[at]
        if value == NO_MERGE or (value & high) != (top & high):
            continue  # the pair of this entry is gone
        dead = places[AFTER, at]
        right = places[AFTER, dead]
        left = places[BEFORE, at]
        places[IDS, at] = value & low
        values[dead] = NO_MERGE
        places[AFTER, at] = right
        values[at] = NO_MERGE
        if right < n:
            places[BEFORE, right] = at
            values[at] = _merge_of(places[IDS, at], places[IDS, right], pairs)
            if values[at] != NO_MERGE:
                _push(heap, size, (values[at] & high) | np.uint64(at))
                size += 1
        if left >= 0:
            values[left] = _merge_of(places[IDS, left], places[IDS, at], pairs)
            if values[left] != NO_MERGE:
                _push(heap, size, (values[left] & high) | np.uint64(left))
                size += 1
    k = 0
    while k < n:
        out[n_out] = places[IDS, k]
        n_out += 1
        k = places[AFTER, k]
    return n_out
