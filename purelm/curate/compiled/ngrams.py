"""Repeated n-grams of words in machine code: exact, by numbers of n-grams and never by hashes alone.

A word gets a number by its bytes. The n-gram at a place gets one by the pair of the (n - 1)-grams at that place and the
next, and only if both of those occur twice or more: any other occurs once (ONCE). So few n-grams of common text are
looked up at all.
"""

import numpy as np

from purelm.curate.characters import SPACE
from purelm.curate.compiled.scanning import decode
from purelm.tokenizer.compiled.jit import loop, part

ONCE = -1


@part
def slot_of(key, mask):
    """Where the search for a key begins."""
    mixed = key * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((mixed ^ (mixed >> np.uint64(32))) & mask)


@part
def mark_once(grams, m, counts, n_ids):
    """Numbers that occur once become ONCE. Returns whether any is left."""
    any_left = False
    for j in range(n_ids):
        any_left |= counts[j] > 1
    for i in range(m):
        if grams[i] >= 0 and counts[grams[i]] == 1:
            grams[i] = ONCE
    return any_left


@loop
def number_words(data, classes, keys, values, grams, starts, ends, sums, counts):
    """Number the words of UTF-8 data in order of appearance: grams (m,); sums (m + 1,): characters before a word.

    keys (zeros) and values: the table, a power of 2 of slots, at least 2 m. starts, ends: of the first word of each
    number, bytes. counts: how often it occurs. Returns how many there are.
    """
    mask = np.uint64(keys.size - 1)
    n_ids = m = 0
    i, n = 0, data.size
    sums[0] = 0
    while i < n:
        code, step = decode(data, i)
        if classes[code] & SPACE:
            i += step
            continue
        start, length = i, 0
        key = np.uint64(0xCBF29CE484222325)
        while i < n:
            code, step = decode(data, i)
            if classes[code] & SPACE:
                break
            key = (key ^ np.uint64(code)) * np.uint64(0x100000001B3)  # FNV-1a, over code points
            length += 1
            i += step
        key |= np.uint64(1)  # 0 is a free slot
        slot = slot_of(key, mask)
        while keys[slot] != 0:
            if keys[slot] == key:
                found = values[slot]
                same = ends[found] - starts[found] == i - start
                j = 0
                while same and j < i - start:
                    same = data[starts[found] + j] == data[start + j]
                    j += 1
                if same:
                    break
            slot = (slot + 1) & np.int64(mask)
        if keys[slot] == 0:
            keys[slot], values[slot] = key, n_ids
            starts[n_ids], ends[n_ids], counts[n_ids] = start, i, 0
            n_ids += 1
        counts[values[slot]] += 1
        grams[m] = values[slot]
        sums[m + 1] = sums[m] + length
        m += 1
    return n_ids


@loop
def repeated(keys, values, grams, sums, counts, firsts, n_ids, top, duplicate):
    """Fill top and duplicate, int64 (most + 1,), for n = 1..most; see `repetition.Repeats`. grams are written over."""
    m = grams.size
    for n in range(1, min(top.size - 1, m) + 1):
        places = m - n + 1
        if n > 1:
            n_candidates = 0
            for i in range(places):
                n_candidates += grams[i] >= 0 and grams[i + 1] >= 0
            size = 16
            while size < 2 * n_candidates:
                size *= 2
            mask = np.uint64(size - 1)
            for j in range(size):
                keys[j] = 0
            n_ids = 0
            for i in range(places):
                if grams[i] < 0 or grams[i + 1] < 0:
                    grams[i] = ONCE
                    continue
                key = (np.uint64(grams[i] + 1) << np.uint64(32)) | np.uint64(grams[i + 1])
                slot = slot_of(key, mask)
                while keys[slot] != 0 and keys[slot] != key:
                    slot = (slot + 1) & np.int64(mask)
                if keys[slot] == 0:
                    keys[slot], values[slot] = key, n_ids
                    counts[n_ids], firsts[n_ids] = 0, i
                    n_ids += 1
                counts[values[slot]] += 1
                grams[i] = values[slot]
        else:
            done = 0  # numbers are in order of appearance
            for i in range(m):
                if grams[i] == done:
                    firsts[done] = i
                    done += 1
        best, at = 1, 0  # without repetition, the first n-gram of all
        for j in range(n_ids):
            if counts[j] > best:
                best, at = counts[j], firsts[j]
        top[n] = best * (sums[at + n] - sums[at] + n - 1)
        if not mark_once(grams, places, counts, n_ids):
            for larger in range(n + 1, min(top.size - 1, m) + 1):
                top[larger] = sums[larger] + larger - 1
            return
        for j in range(n_ids):
            firsts[j] = 0  # from here on: whether it was seen
        i = 0
        while i < places:
            found = grams[i]
            if found >= 0 and firsts[found]:
                duplicate[n] += sums[i + n] - sums[i]
                i += n
            else:
                if found >= 0:
                    firsts[found] = 1
                i += 1
