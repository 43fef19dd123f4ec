r"""Text to ids: encode(bpe, text) -> numpy, with special tokens cut out first; and the Python engine that does it.

    ids(text) = ids of each piece, one after the other        pieces: `splitting.split` between special tokens
    ids(piece) = ids of its bytes, then the first merge in rank order, again and again until none applies

A BPE with a normalizer has the text between special tokens normalized first (see `normalize`); bytes that have no
token are left out of a piece (see `bpe`).

The compiled engine (`compiled.encoding`) gives the same ids, several times as fast as tiktoken, for the known patterns;
`engine.choose` says when it is used.
"""

from array import array
from collections.abc import Collection, Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise, repeat

import numpy as np

from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE
from purelm.tokenizer.cuts import SAFE_SPACE
from purelm.tokenizer.engine import choose
from purelm.tokenizer.normalize import is_plain, segments
from purelm.tokenizer.patterns import LONE_SURROGATE, Pattern, safe_at_spaces
from purelm.tokenizer.splitting import special_matcher, split

_BLOCK = 1 << 15  # characters that are split at a time: a whole text is rarely ASCII, such a stretch often is
_LONGEST_KEPT = 64  # characters of a piece in the memo
_MOST_KEPT = 1 << 18  # pieces in the memo of a BPE, about 50 MB


def encode(
    bpe: BPE,
    text: str,
    allowed_special: str | Collection[str] | None = "all",
    disallowed_special: str | Collection[str] = (),
    *,
    engine: str = "auto",
) -> np.ndarray:
    """The ids of `text`, (n,) uint16 where every id of the vocabulary fits, else uint32.

    Args:
        allowed_special: the special tokens that become their ids: "all", some of `bpe.special_tokens`, or none of them
            (None, "none" or empty). The text of the others is ordinary text. Of several at one position the longest
            wins.
        disallowed_special: the special tokens whose appearance in the text is an error, even inside an allowed one or
            across its end; "all" is all that are not allowed.
        engine: "auto" (by the size of the text), "python" or "numba", see `purelm.tokenizer.engine.choose`.

    Raises ValueError on a disallowed special token and on a lone surrogate, naming the place, and on names that are no
    special tokens of `bpe`.

    >>> from purelm.tokenizer import make
    >>> bpe = make({i: bytes([i]) for i in range(256)} | {256: b"hi"}, [(b"h", b"i")], ["<|endoftext|>"])
    >>> encode(bpe, "hi!<|endoftext|>").tolist()
    [256, 33, 257]
    """
    if not isinstance(text, str):
        raise ValueError(f"text is {type(text).__name__}; give a str (bytes: decode them first)")
    every = tables.special_set(bpe)
    allowed = _special_names(bpe, allowed_special, "allowed_special", every)
    disallowed = _special_names(bpe, disallowed_special, "disallowed_special", every - allowed)
    if disallowed:
        _refuse(text, disallowed)
    chosen = choose(engine, "encode", len(text), bpe.pattern)  # characters: the bytes are as many or more
    try:
        if chosen == "python":
            return encode_python(bpe, text, allowed, tables.once(bpe, "memo", PieceMemo))
        data = text.encode()
    except UnicodeEncodeError:
        check_surrogates(text)
        raise
    from purelm.tokenizer.compiled.encoding import encode_numba

    return encode_numba(bpe, data, allowed)


def check_surrogates(text: str, offset: int = 0, of: str = "") -> None:
    """ValueError that names the first lone surrogate of `text`, which lies `offset` characters into its source."""
    found = None if text.isascii() else LONE_SURROGATE.search(text)
    if found:
        where = f"character {offset + found.start()}{of}"
        raise ValueError(f"text has a lone surrogate, U+{ord(found.group()):04X}, at {where}: it has no UTF-8 form")


def _special_names(bpe: BPE, names, argument: str, every: frozenset[str]) -> frozenset[str]:
    """The special tokens that an argument of `encode` means; every: what "all" is."""
    if isinstance(names, str) and names == "all":
        return every
    if names is None or (isinstance(names, str) and names == "none"):
        return frozenset()
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise ValueError(f'{argument} is {names!r}; give "all", "none" or a collection of special tokens')
    names = tuple(names)  # once: it may be a generator
    known = tables.special_set(bpe)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{argument}: {unknown[0]!r} is no special token of this BPE: {sorted(known)}")
    return frozenset(names)


def _refuse(text: str, disallowed: frozenset[str]) -> None:
    """Raise where one of `disallowed` appears in `text`, even inside an allowed token or across its end."""
    match = special_matcher(disallowed).search(text)
    if match is not None:
        raise ValueError(
            f"text holds the special token {match.group()!r} at character {match.start()}, which is in "
            "disallowed_special; allow it (allowed_special), or take it as ordinary text (disallowed_special=())"
        )


class PieceMemo(dict):
    """Piece -> its ids as bytes of the output dtype. A piece that it lacks is merged, and kept where it is short.

    It holds `most` pieces. When it is full it becomes the old half, from which a piece that comes up again returns.
    """

    def __init__(self, bpe: BPE, most: int | None = None):
        self.most = (_MOST_KEPT if most is None else most) // 2
        self.old: dict[str, bytes] = {}
        self.merges = tables.pair_merges(bpe)
        self.byte_ids = tables.byte_ids(bpe)
        self.drops = -1 in self.byte_ids
        self.whole = tables.whole_tokens(bpe)
        self.typecode = "H" if tables.dtype(bpe) == np.uint16 else "I"

    def __missing__(self, piece: str) -> bytes:
        packed = self.old.get(piece)
        if packed is None:
            data = piece.encode()
            found = self.whole.get(data) if self.whole else None
            byte_ids = self.byte_ids
            if found is not None:
                ids = [found]
            else:
                ids = [byte_ids[value] for value in data]
                ids = merge([i for i in ids if i >= 0] if self.drops else ids, self.merges)
            packed = array(self.typecode, ids).tobytes()
            if len(piece) > _LONGEST_KEPT:
                return packed
        if len(self) >= self.most:
            self.old = dict(self)
            self.clear()
        self[piece] = packed
        return packed


def encode_python(bpe: BPE, text: str, allowed: frozenset[str], memo: PieceMemo) -> np.ndarray:
    """The ids of `text` by the Python engine."""
    ids_of = memo.__getitem__
    packed = bytearray()
    for span in _ordinary_spans(bpe, text, allowed, packed):
        for block in _blocks(span, bpe.pattern):
            packed += b"".join(map(ids_of, split(block, bpe.pattern)))
    return np.frombuffer(packed, tables.dtype(bpe))


def _ordinary_spans(bpe: BPE, text: str, allowed: frozenset[str], packed: bytearray) -> Iterator[str]:
    """The texts between special tokens; the id of each special token is appended to `packed` after the text before."""
    start = 0
    dtype = tables.dtype(bpe)
    if not is_plain(bpe, text):
        for span, token_id in segments(bpe, text, allowed):
            yield span
            if token_id >= 0:
                packed += dtype.type(token_id).tobytes()
        return
    if allowed:
        ids = tables.special_ids(bpe)
        for match in special_matcher(allowed).finditer(text):
            yield text[start : match.start()]
            packed += dtype.type(ids[match.group()]).tobytes()
            start = match.end()
    yield text[start:] if start else text


def _blocks(text: str, pattern: Pattern) -> Iterator[str]:
    """`text` in blocks of about _BLOCK characters, cut where a known pattern allows it (see `cuts`)."""
    if len(text) <= 2 * _BLOCK or not safe_at_spaces(pattern):
        yield text
        return
    start = 0
    while len(text) - start > 2 * _BLOCK:
        cut = SAFE_SPACE.search(text, start + _BLOCK)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


# ---- Merging one piece. `merges` is tables.pair_merges: (left id, right id) -> rank << 32 | id of the result. ----

_NONE = 1 << 64  # above every merge
_ID = (1 << 32) - 1
_SHORT = 128  # up to this many bytes, scanning for the smallest merge is faster than queues


def merge(ids: list[int], merges: dict[tuple[int, int], int]) -> list[int]:
    """The ids that remain after all merges of `ids`, a list that is overwritten; takes about linear time."""
    return _merge_short(ids, merges) if len(ids) <= _SHORT else _merge_long(ids, merges)


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
    """With a queue of merges, each with the places where it may apply, and a linked list of the places still in use."""
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
                continue  # one of the two was merged with its other neighbour
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
            if lowest < best:  # happens only where a merge is listed before the merge that makes one of its parts
                places[best] = todo[done + 1 :]
                heappush(queue, best)
                break
    return [token_id for token_id in ids if token_id >= 0]
