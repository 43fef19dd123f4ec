"""The encoding loop in machine code: split, look the piece up in a memo, merge it where it is new.

A slot of the memo is four u64: the first 8 bytes of the piece and the next 8 (zeros after its end), its length |
number of ids << 8, and its ids (two of 32 bits, or the place of all of them in `memo_ids`). For pieces of 17 to 64
bytes the first two are a hash and the place of the bytes in `memo_bytes`. Always the bytes of the piece are compared,
never a hash alone.
"""

import numpy as np

from purelm.tokenizer.compiled.jit import loop, part
from purelm.tokenizer.compiled.merging import merge_long, merge_short, mix
from purelm.tokenizer.compiled.splitting import split_some

SHORT = 16  # pieces that fit into a slot, bytes
LONGEST = 64  # longer pieces are merged by the heap and not kept, bytes
DONE, GROW, SCRATCH = 0, 1, 2


@part
def _tail_mask(count):
    """A u64 that keeps the first `count` bytes of 8 in memory (little-endian), 1 <= count <= 8."""
    return np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * count)


@part
def _hash_words(words, i, length):
    """A hash of the `length` > 8 bytes at i."""
    h = np.uint64(length)
    k = i
    while k + 8 < i + length:
        h = mix(words[k], h)
        k += 8
    return mix(words[k] & _tail_mask(i + length - k), h)


@part
def _hash_bytes(data, start, end):
    h = np.uint64(0xCBF29CE484222325)
    for k in range(start, end):  # FNV-1a
        h = (h ^ np.uint64(data[k])) * np.uint64(0x100000001B3)
    return h ^ (h >> np.uint64(32))


@loop
def fill_whole(whole, whole_bytes, ends, token_ids):
    """Insert the tokens whole_bytes[ends[k - 1]:ends[k]] into the empty table: hash, place, length << 32 | id + 1."""
    mask = np.uint64(len(whole) - 1)
    start = 0
    for t in range(len(ends)):
        h = _hash_bytes(whole_bytes, start, ends[t])
        slot = h & mask
        while whole[slot, 2] != 0:
            slot = (slot + np.uint64(1)) & mask
        whole[slot, 0] = h
        whole[slot, 1] = np.uint64(start)
        whole[slot, 2] = np.uint64(ends[t] - start) << np.uint64(32) | np.uint64(token_ids[t] + 1)
        start = ends[t]


@loop
def find_whole(data, start, end, whole, whole_bytes):
    """The id of the token data[start:end], or -1."""
    mask = np.uint64(len(whole) - 1)
    h = _hash_bytes(data, start, end)
    slot = h & mask
    while whole[slot, 2] != 0:
        if whole[slot, 0] == h and np.int64(whole[slot, 2] >> np.uint64(32)) == end - start:
            at = np.int64(whole[slot, 1])
            k = 0
            while k < end - start and whole_bytes[at + k] == data[start + k]:
                k += 1
            if k == end - start:
                return np.int64(whole[slot, 2] & np.uint64(0xFFFFFFFF)) - 1
        slot = (slot + np.uint64(1)) & mask
    return -1


@loop
def rehash(old, new):
    """Insert every slot of `old` into the larger empty table `new`."""
    mask = np.uint64(len(new) - 1)
    for k in range(len(old)):
        info = old[k, 2]
        if info != 0:
            length = info & np.uint64(0xFF)
            second = old[k, 1] if length <= SHORT else np.uint64(0)
            slot = mix(old[k, 0], second + length) & mask
            while new[slot, 2] != 0:
                slot = (slot + np.uint64(1)) & mask
            for c in range(4):
                new[slot, c] = old[k, c]


@loop
def encode_some(
    data, words, spans, progress, ends, table, family, digits, byte_ids, pairs, whole, whole_bytes,
    slots, memo_bytes, memo_ids, places, values, heap, out,
):  # fmt: skip
    """Encode spans of `data` into `out` until all is done (DONE), the memo full (GROW) or a piece too long (SCRATCH).

    spans: (k, 3) of start, end, id of the special token that follows or -1. progress: span, byte, ids out, entries,
    bytes and ids of the memo, bytes of the piece that wants more scratch; a next call goes on from there. words: the
    u64 at each byte of data, which goes on for 16 zero bytes. places, values, heap: scratch, see merge_long.
    """
    span, i, n_out = progress[0], progress[1], progress[2]
    n_entries, n_memo_bytes, n_memo_ids = progress[3], progress[4], progress[5]
    mask = np.uint64(len(slots) - 1)
    room_bytes, room_ids = len(memo_bytes) - LONGEST, len(memo_ids) - LONGEST
    status = DONE
    while span < len(spans) and status == DONE:
        stop = spans[span, 1]
        while i < stop and status == DONE:
            n_pieces = split_some(data, i, stop, table, family, digits, ends)
            for p in range(n_pieces):
                end = ends[p]
                length = end - i
                if length <= 8:
                    first = words[i] & _tail_mask(length)
                    second = np.uint64(0)
                elif length <= SHORT:
                    first = words[i]
                    second = words[i + 8] & _tail_mask(length - 8)
                elif length <= LONGEST:
                    first = _hash_words(words, i, length)
                    second = np.uint64(0)
                else:
                    if length > len(values):
                        progress[6] = length
                        status = SCRATCH
                        break
                    found = find_whole(data, i, end, whole, whole_bytes) if len(whole) else -1
                    if found >= 0:
                        out[n_out] = found
                        n_out += 1
                    else:
                        n_out = merge_long(data, i, end, byte_ids, pairs, out, n_out, places, values, heap)
                    i = end
                    continue
                slot = mix(first, second + np.uint64(length)) & mask
                while True:
                    info = slots[slot, 2]
                    if info == 0:
                        break
                    if info & np.uint64(0xFF) == np.uint64(length) and slots[slot, 0] == first:
                        if length <= SHORT:
                            if slots[slot, 1] == second:
                                break
                        else:
                            at = np.int64(slots[slot, 1])
                            k = 0
                            while k < length and memo_bytes[at + k] == data[i + k]:
                                k += 1
                            if k == length:
                                break
                    slot = (slot + np.uint64(1)) & mask
                if info == 0:
                    if 2 * n_entries >= len(slots) or n_memo_bytes > room_bytes or n_memo_ids > room_ids:
                        status = GROW
                        break
                    n_ids = 0
                    if len(whole):
                        found = find_whole(data, i, end, whole, whole_bytes)
                        if found >= 0:
                            places[0, 0] = found
                            n_ids = 1
                    if n_ids == 0:
                        n_ids = merge_short(data, i, end, byte_ids, pairs, places, values)
                    if length > SHORT:
                        second = np.uint64(n_memo_bytes)
                        for k in range(length):
                            memo_bytes[n_memo_bytes + k] = data[i + k]
                        n_memo_bytes += length
                    if n_ids <= 2:
                        packed = np.uint64(places[0, 0])
                        if n_ids == 2:
                            packed |= np.uint64(places[0, 1]) << np.uint64(32)
                    else:
                        packed = np.uint64(n_memo_ids)
                        for k in range(n_ids):
                            memo_ids[n_memo_ids + k] = places[0, k]
                        n_memo_ids += n_ids
                    info = np.uint64(length) | np.uint64(n_ids) << np.uint64(8)
                    slots[slot, 0] = first
                    slots[slot, 1] = second
                    slots[slot, 2] = info
                    slots[slot, 3] = packed
                    n_entries += 1
                n_found = np.int64(info >> np.uint64(8))
                packed = slots[slot, 3]
                if n_found <= 2:
                    out[n_out] = packed & np.uint64(0xFFFFFFFF)
                    out[n_out + 1] = packed >> np.uint64(32)
                else:
                    at = np.int64(packed)
                    for k in range(n_found):
                        out[n_out + k] = memo_ids[at + k]
                n_out += n_found
                i = end
        if status == DONE:
            if spans[span, 2] >= 0:
                out[n_out] = spans[span, 2]
                n_out += 1
            span += 1
            if span < len(spans):
                i = spans[span, 0]
    progress[0], progress[1], progress[2] = span, i, n_out
    progress[3], progress[4], progress[5] = n_entries, n_memo_bytes, n_memo_ids
    return status
