r"""The compiled loops of the tokenizer (numba): splitting, merging, encoding. Import this module lazily.

Splitting: `piece_end(data, i, n, table, family, digits)` is the end of the piece that starts at byte i of a text that
ends at n. Each `_*_end` is one published regular expression written out by hand over UTF-8; comments quote its
branches in order. Backtracking is resolved on paper, so every matcher is linear. `table` is `classes.class_table()`.
Bytes that are not UTF-8 are never read past n, and count as one character of class "other" each.

All in one file, because numba's cache on disk notices a change of the file that a function is in, and of no other.
"""

import numpy as np
from numba import njit
from numba.core.options import DefaultOptions

from purelm.tokenizer.classes import LETTER, LOWER, NEWLINE, NUMBER, SPACE, UPPER

_SOLID = LETTER | NUMBER | SPACE  # a character with none of these is [^\s\p{L}\p{N}]
_NOT_PREFIX = LETTER | NUMBER | NEWLINE  # a character with none of these is [^\r\n\p{L}\p{N}]
# _nrt=False: no counting of references to the arrays that one function hands another. Nothing here makes or keeps an
# array, and the atomic counting costs five times as much as the work itself. It is no public option of numba: should
# one come without it, the code is as right and slower. forceinline: LLVM inlines the matchers.
_UNCOUNTED = {"_nrt": False} if hasattr(DefaultOptions, "_nrt") else {}
_PART = {**_UNCOUNTED, "forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_LOOP = {**_UNCOUNTED, "nogil": True}


def _loop(function):
    """Compile for calls from Python, without the GIL; kept on disk where numba finds a folder that it may write to."""
    try:
        return njit(cache=True, **_LOOP)(function)
    except RuntimeError:  # a read-only installation and home: compiled anew in each process
        return njit(**_LOOP)(function)


_NONE = np.uint64(0xFFFFFFFFFFFFFFFF)  # no merge


@_loop
def _wide(data, i, n, table):
    """As `_char` beyond ASCII, packed: property bits | length << 8."""
    b = np.int64(data[i])
    if b < 0xE0:
        if b >= 0xC2 and i + 1 < n:
            return np.int64(table[(b & 0x1F) << 6 | (data[i + 1] & 0x3F)]) | 2 << 8
    elif b < 0xF0:
        if i + 2 < n:
            code = (b & 0xF) << 12 | np.int64(data[i + 1] & 0x3F) << 6 | (data[i + 2] & 0x3F)
            return np.int64(table[code]) | 3 << 8
    elif b < 0xF5 and i + 3 < n:
        code = (b & 7) << 18 | np.int64(data[i + 1] & 0x3F) << 12
        code |= np.int64(data[i + 2] & 0x3F) << 6 | (data[i + 3] & 0x3F)
        if code < 0x110000:
            return np.int64(table[code]) | 4 << 8
    return np.int64(1) << 8


@njit(**_PART)
def _char(data, i, n, table):
    """(property bits, end) of the character that starts at byte i < n."""
    b = data[i]
    if b < 0x80:
        return np.int64(table[b]), i + 1
    packed = _wide(data, i, n, table)
    return packed & 0xFF, i + (packed >> 8)


@njit(**_PART)
def _run(data, i, n, table, mask):
    """The end of the run of characters that have a bit of `mask`."""
    while i < n:
        b = data[i]
        if b < 0x80:
            if table[b] & mask == 0:
                return i
            i += 1
        else:
            bits, after = _char(data, i, n, table)
            if bits & mask == 0:
                return i
            i = after
    return n


@njit(**_PART)
def _run_without(data, i, n, table, mask):
    """The end of the run of characters that have no bit of `mask`."""
    while i < n:
        bits, after = _char(data, i, n, table)
        if bits & mask != 0:
            return i
        i = after
    return n


@njit(**_PART)
def _digits(data, i, n, table, most):
    r"""\p{N}{1,most} from a number at i; most 0 is no limit."""
    if most == 0:
        return _run(data, i, n, table, NUMBER)
    count = 0
    while i < n and count < most:
        bits, after = _char(data, i, n, table)
        if bits & NUMBER == 0:
            return i
        i = after
        count += 1
    return i


@njit(**_PART)
def _white_space(data, i, n, table, at_end_whole, newline):
    r"""The piece of white space at i. \s++$ (at_end_whole), \s*[\r\n]+ (newline), \s+(?!\S), \s+ in this order."""
    last = i  # where the run's last character starts
    newline_end = 0  # where its last newline ends
    j = i
    while j < n:
        bits, after = _char(data, j, n, table)
        if bits & SPACE == 0:
            break
        if bits & NEWLINE:
            newline_end = after
        last = j
        j = after
    if j == n and at_end_whole:
        return n
    if newline and newline_end:
        return newline_end
    if j < n and last > i:
        return last
    return j


@njit(**_PART)
def _contraction(data, i, n, any_case):
    """The end of 's 't 'd 'm 'll 've 're at i, where an apostrophe stands, or 0."""
    if i + 1 >= n:
        return 0
    a = data[i + 1]
    b = data[i + 2] if i + 2 < n else np.uint8(0)
    if any_case:
        if a == 0xC5 and b == 0xBF:  # U+017F, the long s: the one character beyond ASCII that folds to one of these
            return i + 3
        a |= np.uint8(0x20)  # of all bytes only the two cases of a letter become that letter
        b |= np.uint8(0x20)
    if a == 0x73 or a == 0x74 or a == 0x64 or a == 0x6D:  # s t d m
        return i + 2
    if (a == 0x6C and b == 0x6C) or (b == 0x65 and (a == 0x76 or a == 0x72)):  # ll, ve, re
        return i + 3
    return 0


@njit(**_PART)
def _gpt2_end(data, i, n, table, digits):
    j = i
    b = data[i]
    if b == 0x27:  # '(?:[sdmt]|ll|ve|re)
        end = _contraction(data, i, n, False)
        if end:
            return end
    elif b == 0x20 and i + 1 < n:  # the optional space of the next three
        j = i + 1
    bits, after = _char(data, j, n, table)
    if bits & LETTER:  # ?\p{L}++
        return _run(data, after, n, table, LETTER)
    if bits & SPACE == 0:
        if bits & NUMBER:  # ?\p{N}++
            return _digits(data, j, n, table, digits)
        return _run_without(data, after, n, table, _SOLID)  # ?[^\s\p{L}\p{N}]++
    return _white_space(data, i, n, table, True, False)  # \s++$|\s+(?!\S)|\s


@njit(**_PART)
def _other_or_space(data, i, n, table, slash, at_end_whole):
    r""" ?[^\s\p{L}\p{N}]++[\r\n]*+ (with slash [\r\n/]*), then the white-space branches."""
    j = i
    if data[i] == 0x20 and i + 1 < n:
        j = i + 1
    bits, after = _char(data, j, n, table)
    if bits & _SOLID == 0:
        j = _run_without(data, after, n, table, _SOLID)
        while j < n and (data[j] == 0x0A or data[j] == 0x0D or (slash and data[j] == 0x2F)):
            j += 1
        return j
    return _white_space(data, i, n, table, at_end_whole, True)


@njit(**_PART)
def _cl100k_end(data, i, n, table, digits, at_end_whole):
    if data[i] == 0x27:  # '(?i:[sdmt]|ll|ve|re)
        end = _contraction(data, i, n, True)
        if end:
            return end
    bits, after = _char(data, i, n, table)
    if bits & LETTER:  # [^\r\n\p{L}\p{N}]?+\p{L}++
        return _run(data, after, n, table, LETTER)
    if bits & NUMBER:  # \p{N}{1,3}+
        return _digits(data, i, n, table, digits)
    if bits & NEWLINE == 0 and after < n:
        end = _run(data, after, n, table, LETTER)
        if end > after:
            return end
    return _other_or_space(data, i, n, table, False, at_end_whole)


@njit(**_PART)
def _cased_word(data, i, n, table):
    r"""The end of [Lu Lt Lm Lo M]*[Ll Lm Lo M]+ at i, or 0; with backtracking of the first class into the second."""
    j = i
    both_end = 0  # the end of the last character of the first run that is in both classes
    while j < n:
        bits, after = _char(data, j, n, table)
        if bits & UPPER == 0:
            break
        if bits & LOWER:
            both_end = after
        j = after
    end = _run(data, j, n, table, LOWER)
    # When nothing small follows, the first class gives back characters until one can be the second's only one.
    return end if end > j else both_end


@njit(**_PART)
def _o200k_end(data, i, n, table, digits):
    bits, after = _char(data, i, n, table)
    if bits & NUMBER:  # \p{N}{1,3}
        return _digits(data, i, n, table, digits)
    prefix = bits & _NOT_PREFIX == 0
    start = after if prefix else i
    end = 0
    if start < n:  # [^\r\n\p{L}\p{N}]?[Lu Lt Lm Lo M]*[Ll Lm Lo M]+
        end = _cased_word(data, start, n, table)
    if end == 0 and prefix and bits & LOWER:  # the same without the prefix, which a mark need not be
        end = _cased_word(data, i, n, table)
    if end == 0 and start < n:  # [^\r\n\p{L}\p{N}]?[Lu Lt Lm Lo M]+[Ll Lm Lo M]*, where no small letter follows
        upper = _run(data, start, n, table, UPPER)
        if upper > start:
            end = upper
    if end:  # (?i:'s|'t|'re|'ve|'m|'ll|'d)?
        if end < n and data[end] == 0x27:
            tail = _contraction(data, end, n, True)
            if tail:
                return tail
        return end
    return _other_or_space(data, i, n, table, True, False)


@njit(**_PART)
def piece_end(data, i, n, table, family, digits):
    """The end of the piece that starts at byte i of the text data[:n], i < n, under a pattern of `patterns.family`."""
    if family == 0:
        return _gpt2_end(data, i, n, table, digits)
    if family == 3:
        return _o200k_end(data, i, n, table, digits)
    return _cl100k_end(data, i, n, table, digits, family == 1)


@_loop
def split_some(data, i, n, table, family, digits, ends):
    """Write the ends of the pieces of data[i:n] into `ends` until it is full or the text is done; their number."""
    count = 0
    while i < n and count < len(ends):
        i = piece_end(data, i, n, table, family, digits)
        ends[count] = i
        count += 1
    return count


# ---- Merging. A merge is a u64, rank << 32 | id of the result, so that the smallest is the first to apply. ----


@njit(**_PART)
def _mix(a, b):
    """A hash of two u64 whose low bits are good: multiply and fold, by the constants of MurmurHash3's finaliser."""
    h = (a ^ (b * np.uint64(0xFF51AFD7ED558CCD))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(32))


@njit(**_PART)
def _merge_of(left, right, pairs):
    """The merge of two neighbouring ids, or _NONE. pairs: (slots, 2) of (left << 32 | right) + 1, merge; 0 is empty."""
    key = (np.uint64(left) << np.uint64(32) | np.uint64(right)) + np.uint64(1)
    mask = np.uint64(len(pairs) - 1)
    slot = _mix(key, key) & mask
    while True:
        found = pairs[slot, 0]
        if found == key:
            return pairs[slot, 1]
        if found == 0:
            return _NONE
        slot = (slot + np.uint64(1)) & mask


@_loop
def fill_pairs(pairs, left, right, merges):
    """Insert all merges, of different pairs, into the empty table `pairs`."""
    mask = np.uint64(len(pairs) - 1)
    for k in range(len(left)):
        key = (np.uint64(left[k]) << np.uint64(32) | np.uint64(right[k])) + np.uint64(1)
        slot = _mix(key, key) & mask
        while pairs[slot, 0] != 0:
            slot = (slot + np.uint64(1)) & mask
        pairs[slot, 0] = key
        pairs[slot, 1] = merges[k]


@_loop
def merge_short(data, start, end, byte_ids, pairs, places, values):
    """Merge data[start:end] in places[0] by scanning for the first merge; the number of ids. Quadratic: short only."""
    n = end - start
    for k in range(n):
        places[0, k] = byte_ids[data[start + k]]
    for k in range(n - 1):
        values[k] = _merge_of(places[0, k], places[0, k + 1], pairs)
    while n > 1:
        best = values[0]
        at = 0
        for k in range(1, n - 1):
            if values[k] < best:
                best = values[k]
                at = k
        if best == _NONE:
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


@njit(**_PART)
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


@njit(**_PART)
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


@_loop
def merge_long(data, start, end, byte_ids, pairs, out, n_out, places, values, heap):
    """Merge data[start:end] into out[n_out:] by a heap of (rank, place); the new n_out. O(n log n).

    Scratch for n = end - start places: places (3, n) int64, values (n,) and heap (3 n,) uint64.
    """
    n = end - start
    # places: its id, the next and the previous living place (n and -1 beyond the ends). values: the merge of a place
    # with the next one, _NONE also where a place is dead. heap: rank << 32 | place; each merge adds two at most.
    high = np.uint64(0xFFFFFFFF00000000)
    low = np.uint64(0xFFFFFFFF)
    size = 0
    for k in range(n):
        places[IDS, k] = byte_ids[data[start + k]]
        places[AFTER, k] = k + 1
        places[BEFORE, k] = k - 1
    for k in range(n - 1):
        values[k] = _merge_of(places[IDS, k], places[IDS, k + 1], pairs)
        if values[k] != _NONE:
            heap[size] = (values[k] & high) | np.uint64(k)
            size += 1
    values[n - 1] = _NONE
    for k in range(size // 2 - 1, -1, -1):
        _sift_down(heap, size, k)
    while size > 0:
        top = heap[0]
        size -= 1
        heap[0] = heap[size]
        _sift_down(heap, size, 0)
        at = np.int64(top & low)
        value = values[at]
        if value == _NONE or (value & high) != (top & high):
            continue  # the pair that this entry spoke of is gone
        dead = places[AFTER, at]
        right = places[AFTER, dead]
        left = places[BEFORE, at]
        places[IDS, at] = value & low
        values[dead] = _NONE
        places[AFTER, at] = right
        values[at] = _NONE
        if right < n:
            places[BEFORE, right] = at
            values[at] = _merge_of(places[IDS, at], places[IDS, right], pairs)
            if values[at] != _NONE:
                _push(heap, size, (values[at] & high) | np.uint64(at))
                size += 1
        if left >= 0:
            values[left] = _merge_of(places[IDS, left], places[IDS, at], pairs)
            if values[left] != _NONE:
                _push(heap, size, (values[left] & high) | np.uint64(left))
                size += 1
    k = 0
    while k < n:
        out[n_out] = places[IDS, k]
        n_out += 1
        k = places[AFTER, k]
    return n_out


# ---- The memo from pieces to ids, and the loop that uses it. ----
# A slot is four u64: the first 8 bytes of the piece and the next 8 (zeros after its end), its length | number of ids
# << 8, and its ids (two of 32 bits, or the place of all of them in `memo_ids`). For pieces of 17 to 64 bytes the first
# two are a hash and the place of the bytes in `memo_bytes`. Always the piece is compared, never a hash alone.

SHORT = 16  # pieces that fit into a slot, bytes
LONGEST = 64  # longer pieces are merged by the heap and not kept, bytes
DONE, GROW, SCRATCH = 0, 1, 2


@njit(**_PART)
def _tail_mask(count):
    """A u64 that keeps the first `count` bytes of 8 in memory (little-endian), 1 <= count <= 8."""
    return _NONE >> np.uint64(64 - 8 * count)


@njit(**_PART)
def _hash_words(words, i, length):
    """A hash of the `length` > 8 bytes at i."""
    h = np.uint64(length)
    k = i
    while k + 8 < i + length:
        h = _mix(words[k], h)
        k += 8
    return _mix(words[k] & _tail_mask(i + length - k), h)


@njit(**_PART)
def _hash_bytes(data, start, end):
    h = np.uint64(0xCBF29CE484222325)
    for k in range(start, end):  # FNV-1a
        h = (h ^ np.uint64(data[k])) * np.uint64(0x100000001B3)
    return h ^ (h >> np.uint64(32))


@_loop
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


@_loop
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


@_loop
def rehash(old, new):
    """Insert every slot of `old` into the larger empty table `new`."""
    mask = np.uint64(len(new) - 1)
    for k in range(len(old)):
        info = old[k, 2]
        if info != 0:
            length = info & np.uint64(0xFF)
            second = old[k, 1] if length <= SHORT else np.uint64(0)
            slot = _mix(old[k, 0], second + length) & mask
            while new[slot, 2] != 0:
                slot = (slot + np.uint64(1)) & mask
            for c in range(4):
                new[slot, c] = old[k, c]


@_loop
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
                slot = _mix(first, second + np.uint64(length)) & mask
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
