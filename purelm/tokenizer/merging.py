"""The merge loop of BPE training in plain Python: what small inputs take, and the reference of the compiled one.

Learning BPE (Sennrich et al. 2016, algorithm 1): as long as merges are wanted, the pair of neighbouring tokens that
occurs most often becomes a token. Done incrementally: a merge visits only the places where its pair occurs and
corrects the counts of the pairs beside them.

No two merges make the same bytes, so a vocabulary has one id for each: what happens inside a stretch of bytes that ends
up as one token depends on these bytes alone, for a merge across its edge would have kept it from being one.
"""

import heapq
from collections.abc import Callable, Sequence

# 255 - b, so that the greater byte string sorts first in a min-heap.
_INVERTED = bytes(255 - value for value in range(256))


def merges(
    pieces: Sequence[bytes],
    counts: Sequence[int],
    n_merges: int,
    byte_ids: Sequence[int],
    tie_break: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, int]]:
    """The first `n_merges` merges (fewer when no pair is left) as pairs of ids; merge i makes id 256 + i.

    pieces, counts: the distinct pre-tokens and how often each occurs. byte_ids[b] is the id of byte b.
    tie_break: "course" or "hf", see `purelm.tokenizer.train.train`. progress(merges done, n_merges).

    >>> merges([b"low", b"lower"], [5, 2], 2, range(256), "course") == [(ord("o"), ord("w")), (ord("l"), 256)]
    True
    """
    # One position a byte of each piece. A merge keeps its left position; the right one dies (token -1). Position -1,
    # the end of a piece, is the spare last entry of the lists.
    token: list[int] = []
    weight: list[int] = []
    previous: list[int] = []
    following: list[int] = []
    for piece, count in zip(pieces, counts, strict=True):
        if not piece:
            continue
        start, end = len(token), len(token) + len(piece)
        token += [byte_ids[value] for value in piece]
        weight += [count] * len(piece)
        previous += [-1, *range(start, end - 1)]
        following += [*range(start + 1, end), -1]

    pair_counts: dict[tuple[int, int], int] = {}
    places: dict[tuple[int, int], list[int]] = {}  # in text order, so that "aaaa" merges from the left
    for position, after in enumerate(following):
        if after >= 0:
            pair = token[position], token[after]
            pair_counts[pair] = pair_counts.get(pair, 0) + weight[position]
            places.setdefault(pair, []).append(position)

    token_bytes = [b""] * 256
    for value in range(256):
        token_bytes[byte_ids[value]] = bytes([value])
    by_bytes = tie_break == "course"
    # Sort key of a token: its id, or its bytes so that the greater sorts first. The sign after the last byte is above
    # all others: where one string begins another, the longer is the greater.
    keys: list = [_descending(value) for value in token_bytes] if by_bytes else list(range(256))
    heap = [(-count, keys[pair[0]], keys[pair[1]], pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    out: list[tuple[int, int]] = []
    while heap and len(out) < n_merges:
        negative_count, key_left, key_right, pair = heapq.heappop(heap)
        count = pair_counts.get(pair, 0)
        if -negative_count != count:  # stale: counts only fall after a pair was created
            if count:
                heapq.heappush(heap, (-count, key_left, key_right, pair))
            continue
        left, right = pair
        new = 256 + len(out)
        out.append(pair)
        token_bytes.append(token_bytes[left] + token_bytes[right])
        keys.append(_descending(token_bytes[new]) if by_bytes else new)
        created: dict[tuple[int, int], int] = {}
        for position in places.pop(pair):
            after = following[position]
            if token[position] != left or after < 0 or token[after] != right:
                continue  # another merge took it meanwhile
            times = weight[position]
            token[position] = new
            token[after] = -1
            before, beyond = previous[position], following[after]
            following[position] = beyond
            if before >= 0:
                neighbour = token[before]
                _fall(pair_counts, created, (neighbour, left), times)
                fresh = neighbour, new
                created[fresh] = created.get(fresh, 0) + times
                places.setdefault(fresh, []).append(before)
            if beyond >= 0:
                previous[beyond] = position
                neighbour = token[beyond]
                _fall(pair_counts, created, (right, neighbour), times)
                fresh = new, neighbour
                created[fresh] = created.get(fresh, 0) + times
                places.setdefault(fresh, []).append(position)
        del pair_counts[pair]
        for fresh, count in created.items():
            if count:
                pair_counts[fresh] = count
                heapq.heappush(heap, (-count, keys[fresh[0]], keys[fresh[1]], fresh))
        if progress is not None and len(out) % 100 == 0:
            progress(len(out), n_merges)
    if progress is not None:
        progress(len(out), n_merges)
    return out


def _fall(pair_counts: dict, created: dict, pair: tuple[int, int], times: int) -> None:
    """Take `times` occurrences of `pair` away; a pair that this very merge created is not yet in pair_counts."""
    if pair in created:
        created[pair] -= times
    else:
        pair_counts[pair] -= times


def _descending(value: bytes) -> str:
    return value.translate(_INVERTED).decode("latin-1") + "\u0100"
