"""Training of a byte-level BPE: count the pre-tokens of a corpus, then merge the most frequent pair again and again.

Sennrich et al. 2016, algorithm 1, on bytes (Radford et al. 2019). Counting is in `counting`. The merges are learned
incrementally: a merge visits only the places where its pair occurs and corrects the counts of the pairs beside them.
`learn_merges` does that in plain Python and is the reference of `compiled.training`; `engine` says which is used.

No two merges make the same bytes, so a vocabulary has one id for each token: what happens inside a stretch of bytes
that ends up as one token depends on these bytes alone, since a merge across its edge would have kept it from being one.
"""

import heapq
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

from purelm.tokenizer.bpe import BPE, MOST_IDS, make
from purelm.tokenizer.counting import count_pieces
from purelm.tokenizer.engine import choose
from purelm.tokenizer.formats.alphabet import byte_characters
from purelm.tokenizer.patterns import Pattern, resolve

# The ids of the bytes under tie_break "hf", as in GPT-2's vocabulary and Hugging Face's trainer: bytes in the order of
# the characters that stand for them, so the printable ones come first.
HF_BYTE_ORDER = bytes(sorted(range(256), key=byte_characters().__getitem__))


def train(
    source: str | os.PathLike | Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    pattern: Pattern = "gpt2",
    tie_break: Literal["course", "hf"] = "course",
    n_workers: int | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> BPE:
    """Train a tokenizer of `vocab_size` ids: 256 bytes, then the merges in order, then the special tokens.

    A corpus with too few pairs gives a smaller vocabulary, in which each of its pre-tokens is one token: compare
    `len(bpe.vocab)` with what was asked for, or look at the last call of `progress`.

    Args:
        source: path of a UTF-8 text file (a plain `str` is a path), or an iterable of texts; a merge never crosses
            from one text into the next. The bytes are taken as they are: CRLF stays, a byte order mark too.
        vocab_size: at least 256 + the number of special tokens (not counting those that are a single byte).
        special_tokens: cut out of the text before anything else, so they take no part in merges.
        pattern: "gpt2", "cl100k", "o200k", ..., a regex, or a tuple of them.
        tie_break: among pairs of equal count, "course" takes the lexicographically greater pair of byte strings, "hf"
            the smaller pair of ids, as Hugging Face's trainer does. Under "course" byte b has id b. Under "hf" the
            bytes have GPT-2's order, so that merges and ids equal Hugging Face's, but for the ids of special tokens.
        n_workers: for counting; None for one a processor, or fewer where the input is small. The result does not depend
            on it. The workers are threads; without numba they are processes, for which a script needs its
            `if __name__ == "__main__":`.
        progress: called as progress("count", bytes done, bytes in all or None) and progress("merge", done, wanted).

    Raises ValueError for an empty corpus, a vocab_size that is too small, a file that is not UTF-8 (naming byte and
    line).

    >>> bpe = train(["low low low lower lowest"], vocab_size=258)
    >>> bpe.merges
    ((b'o', b'w'), (b'l', b'ow'))
    """
    special_tokens, _ = _check(vocab_size, special_tokens, tie_break)
    pattern = resolve(pattern)
    counts = count_pieces(
        source, pattern, special_tokens, n_workers=n_workers, progress=progress and partial(progress, "count")
    )
    if not counts:
        name = f"{os.fspath(source)}" if isinstance(source, str | os.PathLike) else "source"
        raise ValueError(f"{name}: no text to train on" + (" beside special tokens" if special_tokens else ""))
    return train_from_counts(counts, vocab_size, special_tokens, pattern, tie_break, progress)


def train_from_counts(
    counts: Mapping[bytes, int],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    pattern: Pattern = "gpt2",
    tie_break: Literal["course", "hf"] = "course",
    progress: Callable[[str, int, int | None], None] | None = None,
) -> BPE:
    """`train` from pre-token counts: several vocabularies from one count, or counts that were made elsewhere.

    pattern is what the pre-tokens were cut with; it is written into the tokenizer. Counts below 1 are a ValueError.

    >>> train_from_counts({b"low": 3, b" low": 2}, 258).merges
    ((b'o', b'w'), (b'l', b'ow'))
    """
    special_tokens, n_special = _check(vocab_size, special_tokens, tie_break)
    if min(counts.values(), default=0) < 1:
        raise ValueError(f"counts: empty, or a count is below 1: {dict(list(counts.items())[:3])}...")
    byte_order = HF_BYTE_ORDER if tie_break == "hf" else bytes(range(256))  # byte_order[id] is the byte
    byte_ids = [byte_order.index(value) for value in range(256)]
    learn: Callable = learn_merges
    if choose("auto", "merge", sum(map(len, counts))) == "numba":
        from purelm.tokenizer.compiled.training import learn_merges as learn
    pairs = learn(
        list(counts),
        list(counts.values()),
        vocab_size - 256 - n_special,
        byte_ids,
        tie_break,
        progress and partial(progress, "merge"),
    )
    tokens = [bytes([value]) for value in byte_order]
    merges = []
    for left, right in pairs:
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    # Without `make`, whose checks take 0.1 s at 32,000 merges: what it would refuse cannot come up here.
    known = set(tokens)
    tokens += [token for name in special_tokens if (token := name.encode("utf-8")) not in known]
    return BPE(dict(enumerate(tokens)), tuple(merges), special_tokens, resolve(pattern))


def _check(vocab_size: int, special_tokens: Sequence[str], tie_break: str) -> tuple[tuple[str, ...], int]:
    """(special tokens, how many of them need an id of their own); ValueError for what cannot be trained."""
    if tie_break not in ("course", "hf"):
        raise ValueError(f'tie_break is {tie_break!r}: allowed are "course" and "hf"')
    if isinstance(special_tokens, Mapping):
        raise ValueError("special_tokens is a mapping: ids follow the merges here, give a sequence of strings")
    # `make` on the bytes alone checks the names, and tells which of them need an id.
    base = make({value: bytes([value]) for value in range(256)}, (), special_tokens)
    fits = isinstance(vocab_size, int) and not isinstance(vocab_size, bool)
    if not fits or not len(base.vocab) <= vocab_size <= MOST_IDS:
        raise ValueError(
            f"vocab_size is {vocab_size!r}: allowed is an int of at least {len(base.vocab)} "
            f"(256 bytes and {len(base.vocab) - 256} special tokens), and at most {MOST_IDS}"
        )
    return base.special_tokens, len(base.vocab) - 256


# 255 - b, so that the greater byte string sorts first in a min-heap.
_INVERTED = bytes(255 - value for value in range(256))


def learn_merges(
    pieces: Sequence[bytes],
    counts: Sequence[int],
    n_merges: int,
    byte_ids: Sequence[int],
    tie_break: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, int]]:
    """The first `n_merges` merges (fewer when no pair is left) as pairs of ids; merge i makes id 256 + i.

    pieces, counts: the distinct pre-tokens and how often each occurs. byte_ids[b] is the id of byte b.
    tie_break: "course" or "hf", see `train`. progress(merges done, n_merges).

    >>> learn_merges([b"low", b"lower"], [5, 2], 2, range(256), "course") == [(ord("o"), ord("w")), (ord("l"), 256)]
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
    # Sort key of a token: its id, or its bytes, inverted so that the greater string sorts first. A character above all
    # others ends them: where one string begins with the other, the longer one is the greater and sorts first.
    keys: list = [_descending(value) for value in token_bytes] if by_bytes else list(range(256))
    heap = [(-count, keys[pair[0]], keys[pair[1]], pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    out: list[tuple[int, int]] = []
    while heap and len(out) < n_merges:
        negative_count, key_left, key_right, pair = heapq.heappop(heap)
        count = pair_counts.get(pair, 0)
        if -negative_count != count:  # stale: after a pair was created its count falls
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
                continue  # an earlier merge changed one of the two
            times = weight[position]
            token[position] = new
            token[after] = -1
            before, beyond = previous[position], following[after]
            following[position] = beyond
            if before >= 0:
                x = token[before]
                _change(pair_counts, created, places, (x, left), (x, new), before, times)
            if beyond >= 0:
                previous[beyond] = position
                x = token[beyond]
                _change(pair_counts, created, places, (right, x), (new, x), position, times)
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


def _change(pair_counts: dict, created: dict, places: dict, old: tuple, new: tuple, at: int, times: int) -> None:
    """`times` occurrences of the pair `old` become occurrences of `new`, at a position."""
    if old in created:  # by the merge in hand: it is not in pair_counts yet
        created[old] -= times
    else:
        pair_counts[old] -= times
    created[new] = created.get(new, 0) + times
    places.setdefault(new, []).append(at)


def _descending(value: bytes) -> str:
    return value.translate(_INVERTED).decode("latin-1") + "\u0100"
