"""The merge loop of BPE training, compiled by numba: the same merges as `purelm.tokenizer.train.merges_python`.

Data. The distinct pieces lie one after the other in flat arrays; a position holds a token, and prev/next link the
positions of a piece that are still alive (a merge keeps the left position and kills the right one). A pair of tokens is
an entry of an open-addressing table keyed by (left << 32 | right), with its weighted count and a linked list of the
positions where it was ever seen. A max-heap holds one entry a pair; counts only ever fall after a pair was created
(a pair gains occurrences only while the newer of its two tokens is being created), so an entry whose count is stale is
corrected when it comes up ("lazy"). Occurrences are appended in text order, so that "aaaa" merges from the left; an
occurrence that no longer exists is told from its tokens.

This module imports numba: import it inside functions only.

Cost: O(total length of the distinct pieces * log) time, about 60 bytes a position.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numba import njit

# Positions and occurrences (at most 3 a position) are int32.
MAX_POSITIONS = (2**31 - 1) // 3


@njit(cache=True, nogil=True, inline="always")
def _slot_of(slots, left, right, a, b):
    """Index into slots of pair (a, b), or of the free slot where it belongs."""
    mask = slots.size - 1
    key = (np.uint64(a) << np.uint64(32)) | np.uint64(b)
    key *= np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio (Knuth, TAOCP 3, section 6.4)
    i = np.int64((key ^ (key >> np.uint64(32))) & np.uint64(mask))
    while slots[i] >= 0 and (left[slots[i]] != a or right[slots[i]] != b):
        i = (i + 1) & mask
    return i


@njit(cache=True, nogil=True)
def _compare_bytes(bytes_start, arena, s, t):
    """Sign of the lexicographic comparison of tokens s and t; a prefix is smaller."""
    i, i_end = bytes_start[s], bytes_start[s + 1]
    j, j_end = bytes_start[t], bytes_start[t + 1]
    while i < i_end and j < j_end:
        if arena[i] != arena[j]:
            return 1 if arena[i] > arena[j] else -1
        i += 1
        j += 1
    return (i < i_end) - (j < j_end)


@njit(cache=True, nogil=True)
def _before(count_x, x, count_y, y, left, right, bytes_start, arena, by_bytes):
    """Whether pair x is to be merged before pair y."""
    if count_x != count_y:
        return count_x > count_y
    if by_bytes:  # greater pair of byte strings first
        if left[x] != left[y]:
            return _compare_bytes(bytes_start, arena, left[x], left[y]) > 0
        return right[x] != right[y] and _compare_bytes(bytes_start, arena, right[x], right[y]) > 0
    if left[x] != left[y]:  # smaller pair of ids first
        return left[x] < left[y]
    return right[x] < right[y]


@njit(cache=True, nogil=True)
def _sift_up(i, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes):
    pair, count = heap_pair[i], heap_count[i]
    while i > 0:
        up = (i - 1) >> 1
        if not _before(
            count, pair, heap_count[up], heap_pair[up], left, right, bytes_start, arena, by_bytes
        ):
            break
        heap_pair[i], heap_count[i] = heap_pair[up], heap_count[up]
        i = up
    heap_pair[i], heap_count[i] = pair, count


@njit(cache=True, nogil=True)
def _sift_down(i, size, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes):
    pair, count = heap_pair[i], heap_count[i]
    while 2 * i + 1 < size:
        c = 2 * i + 1
        if c + 1 < size and _before(
            heap_count[c + 1],
            heap_pair[c + 1],
            heap_count[c],
            heap_pair[c],
            left,
            right,
            bytes_start,
            arena,
            by_bytes,
        ):
            c += 1
        if _before(count, pair, heap_count[c], heap_pair[c], left, right, bytes_start, arena, by_bytes):
            break
        heap_pair[i], heap_count[i] = heap_pair[c], heap_count[c]
        i = c
    heap_pair[i], heap_count[i] = pair, count


@njit(cache=True, nogil=True)
def _grown(array, size):
    bigger = np.empty(size, array.dtype)
    bigger[: array.size] = array
    return bigger


@njit(cache=True, nogil=True)
def _rehashed(size, n_pairs, left, right):
    slots = np.full(size, -1, np.int32)
    for pair in range(n_pairs):
        slots[_slot_of(slots, left, right, left[pair], right[pair])] = pair
    return slots


@njit(cache=True, nogil=True)
def _start(data, lengths, counts, byte_ids, bytes_start, arena, by_bytes):
    """Flat arrays, the table of byte pairs and the heap. bytes_start and arena have room for all tokens."""
    n = data.size
    token, prev, next_ = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
    weight = np.empty(n, np.int64)
    p = 0
    for piece in range(lengths.size):
        end = p + lengths[piece]
        for i in range(p, end):
            token[i] = byte_ids[data[i]]
            prev[i] = i - 1 if i > p else -1
            next_[i] = i + 1 if i + 1 < end else -1
            weight[i] = counts[piece]
        p = end
    index_of = np.full(256 * 256, -1, np.int32)  # ids below 256: a plain table for the first pass
    capacity = 1 << 16
    left, right = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
    count = np.zeros(capacity, np.int64)
    head, tail = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
    where, link = np.empty(n + 1, np.int32), np.empty(n + 1, np.int32)
    n_pairs, n_where = 0, 0
    for i in range(n):
        if next_[i] < 0:
            continue
        key = token[i] * 256 + token[i + 1]
        pair = index_of[key]
        where[n_where], link[n_where] = i, -1
        if pair < 0:
            pair = n_pairs
            index_of[key] = pair
            left[pair], right[pair] = token[i], token[i + 1]
            head[pair] = n_where
            n_pairs += 1
        else:
            link[tail[pair]] = n_where
        tail[pair] = n_where
        count[pair] += weight[i]
        n_where += 1
    slots = _rehashed(1 << 18, n_pairs, left, right)
    heap_pair, heap_count = np.arange(capacity).astype(np.int32), count.copy()
    for i in range(n_pairs // 2, -1, -1):
        _sift_down(i, n_pairs, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes)
    sizes = np.array([n_pairs, n_where, n_pairs, 256], np.int64)
    return (
        token, prev, next_, weight, slots, left, right, count, head, tail, where, link,
        heap_pair, heap_count, bytes_start, arena, sizes,
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _advance(
    token, prev, next_, weight, slots, left, right, count, head, tail, where, link,
    heap_pair, heap_count, bytes_start, arena, sizes, by_bytes, out_left, out_right,
):  # fmt: skip
    """At most out_left.size more merges, their ids written to out_left and out_right; (how many, new state)."""
    n_pairs, n_where, n_heap, n_tokens = sizes[0], sizes[1], sizes[2], sizes[3]
    done = 0
    while done < out_left.size and n_heap > 0:
        pair = heap_pair[0]
        if heap_count[0] != count[pair]:  # stale: put right, or drop a pair that is gone
            heap_count[0] = count[pair]
            if count[pair] == 0:
                n_heap -= 1
                heap_pair[0], heap_count[0] = heap_pair[n_heap], heap_count[n_heap]
            if n_heap > 0:
                _sift_down(0, n_heap, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes)
            continue
        n_heap -= 1
        heap_pair[0], heap_count[0] = heap_pair[n_heap], heap_count[n_heap]
        if n_heap > 0:
            _sift_down(0, n_heap, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes)
        a, b, new = left[pair], right[pair], n_tokens
        out_left[done], out_right[done] = a, b
        done += 1
        n_tokens += 1
        end = bytes_start[new]
        length = bytes_start[a + 1] - bytes_start[a] + bytes_start[b + 1] - bytes_start[b]
        if end + length > arena.size:
            arena = _grown(arena, 2 * arena.size + length)
        for token_id in (a, b):
            for i in range(bytes_start[token_id], bytes_start[token_id + 1]):
                arena[end] = arena[i]
                end += 1
        bytes_start[new + 1] = end
        first_new = n_pairs
        entry = head[pair]
        while entry >= 0:
            p = where[entry]
            entry = link[entry]
            q = next_[p]
            if token[p] != a or q < 0 or token[q] != b:
                continue  # merged away meanwhile; a dead position has token -1
            if n_pairs + 2 > left.size:
                size = 2 * left.size
                left, right, count = _grown(left, size), _grown(right, size), _grown(count, size)
                head, tail = _grown(head, size), _grown(tail, size)
                heap_pair, heap_count = _grown(heap_pair, size), _grown(heap_count, size)
                slots = _rehashed(4 * size, n_pairs, left, right)
            if n_where + 2 > where.size:
                size = where.size + where.size // 2 + 2
                where, link = _grown(where, size), _grown(link, size)
            w = weight[p]
            token[p], token[q] = new, -1
            before_p, after_q = prev[p], next_[q]
            next_[p] = after_q
            if before_p >= 0:
                x = token[before_p]
                count[slots[_slot_of(slots, left, right, x, a)]] -= w
                i = _slot_of(slots, left, right, x, new)
                if slots[i] < 0:
                    slots[i] = n_pairs
                    left[n_pairs], right[n_pairs], count[n_pairs] = x, new, 0
                    head[n_pairs] = n_where
                    n_pairs += 1
                else:
                    link[tail[slots[i]]] = n_where
                tail[slots[i]] = n_where
                count[slots[i]] += w
                where[n_where], link[n_where] = before_p, -1
                n_where += 1
            if after_q >= 0:
                prev[after_q] = p
                x = token[after_q]
                count[slots[_slot_of(slots, left, right, b, x)]] -= w
                i = _slot_of(slots, left, right, new, x)
                if slots[i] < 0:
                    slots[i] = n_pairs
                    left[n_pairs], right[n_pairs], count[n_pairs] = new, x, 0
                    head[n_pairs] = n_where
                    n_pairs += 1
                else:
                    link[tail[slots[i]]] = n_where
                tail[slots[i]] = n_where
                count[slots[i]] += w
                where[n_where], link[n_where] = p, -1
                n_where += 1
        count[pair] = 0  # for (a, a) the overlapping occurrences were counted too
        for new_pair in range(first_new, n_pairs):
            if count[new_pair] > 0:
                heap_pair[n_heap], heap_count[n_heap] = new_pair, count[new_pair]
                _sift_up(n_heap, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes)
                n_heap += 1
    sizes = np.array([n_pairs, n_where, n_heap, n_tokens], np.int64)
    return done, (
        token, prev, next_, weight, slots, left, right, count, head, tail, where, link,
        heap_pair, heap_count, bytes_start, arena, sizes,
    )  # fmt: skip


def merges(
    pieces: Sequence[bytes],
    counts: Sequence[int],
    n_merges: int,
    byte_ids: Sequence[int],
    tie_break: str,
    progress: Callable[[int, int], None] | None = None,
    per_call: int = 1000,
) -> list[tuple[int, int]]:
    """The first `n_merges` merges (fewer when no pair is left) as pairs of ids; merge i makes id 256 + i.

    pieces, counts: the distinct pre-tokens and how often each occurs. byte_ids[b] is the id of byte b.
    tie_break: "course" or "hf", see `purelm.tokenizer.train.train`. progress(merges done, n_merges).
    Raises ValueError for more than MAX_POSITIONS bytes of distinct pieces.
    """
    data = np.frombuffer(b"".join(pieces), np.uint8)
    if data.size > MAX_POSITIONS:
        raise ValueError(f"the distinct pre-tokens hold {data.size} bytes, more than {MAX_POSITIONS}")
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    byte_of = np.argsort(np.asarray(byte_ids, np.int64)).astype(np.uint8)
    bytes_start = np.zeros(256 + n_merges + 1, np.int64)
    bytes_start[:257] = np.arange(257)
    by_bytes = tie_break == "course"
    state = _start(
        data, lengths, np.asarray(counts, np.int64), np.asarray(byte_ids, np.int32), bytes_start, byte_of, by_bytes
    )
    out: list[tuple[int, int]] = []
    while len(out) < n_merges:
        left, right = np.empty((2, min(per_call, n_merges - len(out))), np.int32)
        done, state = _advance(*state, by_bytes, left, right)
        out += zip(left[:done].tolist(), right[:done].tolist(), strict=True)
        if progress is not None:
            progress(len(out), n_merges)
        if done < left.size:
            break
    return out
