"""The merge loop of BPE training in machine code: the same merges as `purelm.tokenizer.training.learn_merges`.

Data. The distinct pieces lie one after the other in `rows`. A row is a position that holds a token; its links lead to
the neighbouring positions of the piece that are still alive (a merge keeps the left position and kills the right one).
A pair of tokens is an entry of an open-addressing table keyed by (left << 32 | right). It has a weighted count and a
slice of `where`: the positions at which it was ever seen, in text order, so that "aaaa" merges from the left. Whether
an occurrence is still there shows in the tokens at its position.

A pair gains occurrences only during the merge that creates the newer of its two tokens. So its slice is written once,
and its count only falls afterwards: a max-heap has one entry a pair, which is corrected when it comes up with an old
count.

Most time goes into random reads. With slices of `where` instead of linked lists these do not wait for each other, and
the processor overlaps them: twice as fast on 24 MB of English.

Memory: about 40 bytes a byte of the distinct pieces.
"""

from collections.abc import Callable, Sequence

import numpy as np

from purelm.tokenizer.compiled.jit import loop, part

# Positions and occurrences (at most 3 a position) are int32.
MAX_POSITIONS = (2**31 - 1) // 3

# Columns of `rows`, one row a position: token id (-1 where dead), previous and next live position of the piece (-1 at
# its ends), and the piece's number. One row is a fraction of a cache line: these random reads are most of the time.
TOKEN, PREV, NEXT, PIECE = 0, 1, 2, 3


@part
def _slot_of(slots, left, right, a, b):
    """Index into slots of pair (a, b), or of the free slot where it belongs."""
    mask = slots.size - 1
    key = (np.uint64(a) << np.uint64(32)) | np.uint64(b)
    key *= np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio (Knuth, TAOCP 3, section 6.4)
    i = np.int64((key ^ (key >> np.uint64(32))) & np.uint64(mask))
    while slots[i] >= 0 and (left[slots[i]] != a or right[slots[i]] != b):
        i = (i + 1) & mask
    return i


@part
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


@part
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


@part
def _sift_up(i, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes):
    pair, count = heap_pair[i], heap_count[i]
    while i > 0:
        up = (i - 1) >> 1
        if not _before(count, pair, heap_count[up], heap_pair[up], left, right, bytes_start, arena, by_bytes):
            break
        heap_pair[i], heap_count[i] = heap_pair[up], heap_count[up]
        i = up
    heap_pair[i], heap_count[i] = pair, count


@part
def _sift_down(i, size, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes):
    pair, count = heap_pair[i], heap_count[i]
    while 2 * i + 1 < size:
        c, d = 2 * i + 1, 2 * i + 2
        if d < size and _before(
            heap_count[d], heap_pair[d], heap_count[c], heap_pair[c], left, right, bytes_start, arena, by_bytes
        ):
            c = d
        if _before(count, pair, heap_count[c], heap_pair[c], left, right, bytes_start, arena, by_bytes):
            break
        heap_pair[i], heap_count[i] = heap_pair[c], heap_count[c]
        i = c
    heap_pair[i], heap_count[i] = pair, count


@loop(makes_arrays=True)
def _grown(array, size):
    bigger = np.empty(size, array.dtype)
    for i in range(array.size):  # a slice assignment would have numba compile its error message: 4 s
        bigger[i] = array[i]
    return bigger


@loop(makes_arrays=True)
def _rehashed(size, n_pairs, left, right):
    slots = np.full(size, -1, np.int32)
    for pair in range(n_pairs):
        slots[_slot_of(slots, left, right, left[pair], right[pair])] = pair
    return slots


@loop(makes_arrays=True)
def _start(data, lengths, byte_ids, weight, bytes_start, arena, by_bytes):
    """The flat rows, the table of byte pairs and the heap. bytes_start has room for all tokens."""
    n = data.size
    rows = np.empty((n, 4), np.int32)
    p = 0
    for piece in range(lengths.size):
        end = p + lengths[piece]
        for i in range(p, end):
            rows[i, TOKEN] = byte_ids[data[i]]
            rows[i, PREV] = i - 1 if i > p else -1
            rows[i, NEXT] = i + 1 if i + 1 < end else -1
            rows[i, PIECE] = piece
        p = end
    index_of = np.full(256 * 256, -1, np.int32)  # ids below 256: a plain table for the first pass
    capacity = 1 << 16
    left, right = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
    count = np.zeros(capacity, np.int64)
    first, last = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
    n_pairs = 0
    for i in range(n):
        if rows[i, NEXT] >= 0:
            key = rows[i, TOKEN] * 256 + rows[i + 1, TOKEN]
            pair = index_of[key]
            if pair < 0:
                pair = n_pairs
                index_of[key] = pair
                left[pair], right[pair] = rows[i, TOKEN], rows[i + 1, TOKEN]
                last[pair] = 0
                n_pairs += 1
            count[pair] += weight[rows[i, PIECE]]
            last[pair] += 1
    n_where = 0
    for pair in range(n_pairs):
        first[pair] = n_where
        n_where += last[pair]
        last[pair] = first[pair]
    where = np.empty(n_where + 1, np.int32)
    for i in range(n):
        if rows[i, NEXT] >= 0:
            pair = index_of[rows[i, TOKEN] * 256 + rows[i + 1, TOKEN]]
            where[last[pair]] = i
            last[pair] += 1
    slots = _rehashed(1 << 18, n_pairs, left, right)
    heap_pair, heap_count = np.arange(capacity).astype(np.int32), count.copy()
    for i in range(n_pairs // 2, -1, -1):
        _sift_down(i, n_pairs, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes)
    sizes = np.array([n_pairs, n_where, n_pairs, 256], np.int64)
    return (
        rows, weight, slots, left, right, count, first, last, where,
        heap_pair, heap_count, bytes_start, arena, sizes,
    )  # fmt: skip


@loop(makes_arrays=True)
def _advance(
    rows, weight, slots, left, right, count, first, last, where,
    heap_pair, heap_count, bytes_start, arena, sizes, by_bytes, out_left, out_right,
):  # fmt: skip
    """At most out_left.size more merges, their ids written to out_left and out_right; (how many, new state)."""
    n_pairs, n_where, n_heap, n_tokens = sizes[0], sizes[1], sizes[2], sizes[3]
    # To save most look-ups, for a token x beside the pair (a, b) of the merge in hand: the merge's new id (another id
    # there means that the row is of an earlier merge), the index of the pair that goes, (x, a) or (b, x), and of the
    # pair that comes, (x, new) or (new, x).
    left_of = np.zeros((n_tokens + out_left.size, 3), np.int32)
    right_of = np.zeros((n_tokens + out_left.size, 3), np.int32)
    made = np.empty((1 << 12, 2), np.int32)  # (new pair, position) of the merge in hand
    done = 0
    while done < out_left.size and n_heap > 0:
        pair = heap_pair[0]
        is_old = heap_count[0] != count[pair]
        heap_count[0] = count[pair]
        if not is_old or count[pair] == 0:  # this merge's pair, or one that is gone
            n_heap -= 1
            heap_pair[0], heap_count[0] = heap_pair[n_heap], heap_count[n_heap]
        if n_heap > 0:
            _sift_down(0, n_heap, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes)
        if is_old:
            continue
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
        n_made = 0
        for entry in range(first[pair], last[pair]):
            p = where[entry]
            q = rows[p, NEXT]
            if rows[p, TOKEN] != a or q < 0 or rows[q, TOKEN] != b:
                continue  # an earlier merge changed one of the two; a dead position has token -1
            if n_pairs + 2 > left.size:
                size = 2 * left.size
                left, right, count = _grown(left, size), _grown(right, size), _grown(count, size)
                first, last = _grown(first, size), _grown(last, size)
                heap_pair, heap_count = _grown(heap_pair, size), _grown(heap_count, size)
                slots = _rehashed(4 * size, n_pairs, left, right)
            if n_made + 2 > len(made):
                bigger = np.empty((2 * len(made), 2), np.int32)
                for i in range(n_made):
                    bigger[i, 0], bigger[i, 1] = made[i, 0], made[i, 1]
                made = bigger
            w = weight[rows[p, PIECE]]
            rows[p, TOKEN], rows[q, TOKEN] = new, -1
            before_p, after_q = rows[p, PREV], rows[q, NEXT]
            rows[p, NEXT] = after_q
            if before_p >= 0:
                x = rows[before_p, TOKEN]
                if left_of[x, 0] != new:  # x stands before this pair for the first time
                    left_of[x, 0] = new
                    left_of[x, 1] = slots[_slot_of(slots, left, right, x, a)]
                    left_of[x, 2] = n_pairs
                    slots[_slot_of(slots, left, right, x, new)] = n_pairs
                    left[n_pairs], right[n_pairs], count[n_pairs] = x, new, 0
                    last[n_pairs] = 0
                    n_pairs += 1
                count[left_of[x, 1]] -= w
                count[left_of[x, 2]] += w
                last[left_of[x, 2]] += 1
                made[n_made, 0], made[n_made, 1] = left_of[x, 2], before_p
                n_made += 1
            if after_q >= 0:
                rows[after_q, PREV] = p
                x = rows[after_q, TOKEN]
                if right_of[x, 0] != new:
                    right_of[x, 0] = new
                    right_of[x, 1] = slots[_slot_of(slots, left, right, b, x)]
                    right_of[x, 2] = n_pairs
                    slots[_slot_of(slots, left, right, new, x)] = n_pairs
                    left[n_pairs], right[n_pairs], count[n_pairs] = new, x, 0
                    last[n_pairs] = 0
                    n_pairs += 1
                count[right_of[x, 1]] -= w
                count[right_of[x, 2]] += w
                last[right_of[x, 2]] += 1
                made[n_made, 0], made[n_made, 1] = right_of[x, 2], p
                n_made += 1
        if n_where + n_made > where.size:
            where = _grown(where, n_where + n_made + where.size // 2)
        for new_pair in range(first_new, n_pairs):
            first[new_pair] = n_where
            n_where += last[new_pair]
            last[new_pair] = first[new_pair]
        for i in range(n_made):  # in the order in which they were made, so in text order for each pair
            where[last[made[i, 0]]] = made[i, 1]
            last[made[i, 0]] += 1
        for new_pair in range(first_new, n_pairs):
            if count[new_pair] > 0:
                heap_pair[n_heap], heap_count[n_heap] = new_pair, count[new_pair]
                _sift_up(n_heap, heap_pair, heap_count, left, right, bytes_start, arena, by_bytes)
                n_heap += 1
    sizes = np.array([n_pairs, n_where, n_heap, n_tokens], np.int64)
    return done, (
        rows, weight, slots, left, right, count, first, last, where,
        heap_pair, heap_count, bytes_start, arena, sizes,
    )  # fmt: skip


def learn_merges(
    pieces: Sequence[bytes],
    counts: Sequence[int],
    n_merges: int,
    byte_ids: Sequence[int],
    tie_break: str,
    progress: Callable[[int, int], None] | None = None,
    per_call: int = 1000,
) -> list[tuple[int, int]]:
    """As `purelm.tokenizer.training.learn_merges`; ValueError for more than MAX_POSITIONS bytes of distinct pieces.

    per_call: how many merges one call of the loop makes; `progress` is called after each.
    """
    data = np.frombuffer(b"".join(pieces), np.uint8)
    if data.size > MAX_POSITIONS:
        raise ValueError(f"the distinct pre-tokens hold {data.size} bytes, more than {MAX_POSITIONS}")
    n_merges = min(n_merges, data.size)  # each merge takes one position at least
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    byte_of = np.argsort(np.asarray(byte_ids, np.int64)).astype(np.uint8)
    bytes_start = np.zeros(256 + n_merges + 1, np.int64)
    bytes_start[:257] = np.arange(257)
    by_bytes = tie_break == "course"
    weight = np.asarray(counts, np.int64)
    state = _start(data, lengths, np.asarray(byte_ids, np.int32), weight, bytes_start, byte_of, by_bytes)
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
