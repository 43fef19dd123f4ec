"""Merging one piece, in plain Python: ids of its bytes, then the first merge in rank order until none applies.

`merges` is `tables.pair_merges`: (left id, right id) -> rank << 32 | id of the result.
"""

from heapq import heapify, heappop, heappush
from itertools import pairwise, repeat

_NONE = 1 << 64  # above every merge
_ID = (1 << 32) - 1

SHORT = 128  # up to this many bytes scanning for the smallest merge is faster than queues


def merge(ids: list[int], merges: dict[tuple[int, int], int]) -> list[int]:
    """The ids that remain after all merges of `ids`, which is used up; linear or nearly so in its length."""
    return _merge_short(ids, merges) if len(ids) <= SHORT else _merge_long(ids, merges)


def _merge_short(ids: list[int], merges: dict[tuple[int, int], int]) -> list[int]:
    get = merges.get
    values = list(map(get, pairwise(ids), repeat(_NONE)))
    while values:
        best = min(values)
        if best == _NONE:
            break
        at = values.index(best)  # the leftmost
        merged = best & _ID
        ids[at] = merged
        del ids[at + 1], values[at]
        if at < len(values):
            values[at] = get((merged, ids[at + 1]), _NONE)
        if at:
            values[at - 1] = get((ids[at - 1], merged), _NONE)
    return ids


def _merge_long(ids: list[int], merges: dict[tuple[int, int], int]) -> list[int]:
    """A queue of merges, each with the places where it may apply; a linked list of the places that live."""
    get = merges.get
    n = len(ids)
    after = list(range(1, n + 1))
    before = list(range(-1, n - 1))
    values = list(map(get, pairwise(ids), repeat(_NONE)))
    values.append(_NONE)
    places: dict[int, list[int]] = {}
    for k, value in enumerate(values):
        if value != _NONE:
            places.setdefault(value, []).append(k)
    queue = list(places)
    heapify(queue)
    while queue:
        best = heappop(queue)
        merged = best & _ID
        todo = places.pop(best)
        todo.sort()
        for done, k in enumerate(todo):
            if values[k] != best:
                continue  # one of the two has been merged with its other neighbour
            dead = after[k]
            right = after[dead]
            left = before[k]
            ids[k] = merged
            ids[dead] = -1
            values[dead] = _NONE
            after[k] = right
            value = _NONE
            lowest = best
            if right < n:
                before[right] = k
                value = get((merged, ids[right]), _NONE)
                if value != _NONE:
                    if value in places:
                        places[value].append(k)
                    else:
                        places[value] = [k]
                        heappush(queue, value)
                        lowest = value
            values[k] = value
            if left >= 0:
                value = get((ids[left], merged), _NONE)
                values[left] = value
                if value != _NONE:
                    if value in places:
                        places[value].append(left)
                    else:
                        places[value] = [left]
                        heappush(queue, value)
                        lowest = min(lowest, value)
            if lowest < best:  # only where a listed merge comes before the merge that made one of its parts
                places[best] = todo[done + 1 :]
                heappush(queue, best)
                break
    return [token_id for token_id in ids if token_id >= 0]
