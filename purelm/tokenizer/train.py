"""Training of a byte-level BPE: count the pre-tokens of a corpus, then merge the most frequent pair again and again.

Sennrich et al. 2016, algorithm 1, on bytes (Radford et al. 2019). Counting is in `counting`, the merge loop in
`merging` (Python) and `fast_train` (numba); both loops give the same merges, and the size of the corpus decides.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

from purelm.tokenizer import merging
from purelm.tokenizer.bpe import BPE, MOST_IDS, make
from purelm.tokenizer.counting import count_pieces
from purelm.tokenizer.patterns import resolve

# Distinct pre-tokens of fewer bytes than this are merged in Python (at most 2 s), without waiting for numba.
FAST_BYTES = 400_000

# The ids of the bytes under tie_break "hf", as in GPT-2's vocabulary: the printable ones first, then the others, each
# in rising order. (GPT-2's file shows byte b as a character; the printable ones as themselves, the others from U+0100
# on; sorting these characters, as Hugging Face's trainer does, gives this order.)
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HF_BYTE_ORDER = bytes(_PRINTABLE + sorted(set(range(256)) - set(_PRINTABLE)))


def train(
    source: str | os.PathLike | Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    pattern: str = "gpt2",
    tie_break: Literal["course", "hf"] = "course",
    n_workers: int | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> BPE:
    """Train a tokenizer of `vocab_size` ids: 256 bytes, then the merges in order, then the special tokens.

    A corpus that has too few pairs for that gives a smaller vocabulary (all its pre-tokens are single tokens then);
    compare `len(bpe.vocab)` with what was asked for, or watch the last call of `progress`.

    Args:
        source: path of a UTF-8 text file (a plain `str` is a path), or an iterable of texts; a merge never crosses
            from one text into the next. The bytes are taken as they are: CRLF stays, a byte order mark too.
        vocab_size: at least 256 + the number of special tokens (those that are no single byte).
        special_tokens: cut out of the text before anything else, so they take no part in merges.
        pattern: "gpt2", "cl100k", "o200k", ... or a regex.
        tie_break: among pairs of equal count, "course" takes the lexicographically greater pair of byte strings, "hf"
            the smaller pair of ids, as Hugging Face's trainer does. Under "course" byte b has id b; under "hf" the
            bytes have GPT-2's order, and with it ids and merges (not the place of the specials) equal Hugging Face's.
        n_workers: for counting; None for as many as there are processors and the input is worth. The result does not
            depend on it. The workers are threads; without numba, processes, for which a script needs its
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
    pattern: str = "gpt2",
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
    n_bytes = sum(map(len, counts))
    loop = merging.merges
    if n_bytes >= FAST_BYTES and importlib.util.find_spec("numba") is not None:
        from purelm.tokenizer.fast_train import merges as loop
    pairs = loop(
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
    # Right by construction, so that the checks of `make` (0.1 s at 32,000) have nothing to find.
    known = set(tokens)
    tokens += [token for name in special_tokens if (token := name.encode("utf-8")) not in known]
    return BPE(dict(enumerate(tokens)), tuple(merges), special_tokens, resolve(pattern))


def _check(vocab_size: int, special_tokens: Sequence[str], tie_break: str) -> tuple[tuple[str, ...], int]:
    """(special tokens, how many of them need an id of their own); ValueError for what cannot be trained."""
    if tie_break not in ("course", "hf"):
        raise ValueError(f'tie_break is {tie_break!r}: allowed are "course" and "hf"')
    if isinstance(special_tokens, Mapping):
        raise ValueError("special_tokens is a mapping: ids follow the merges here, give a sequence of strings")
    # An empty vocabulary of bytes checks the names and appends them: one rule for which of them is new.
    base = make({value: bytes([value]) for value in range(256)}, (), special_tokens)
    fits = isinstance(vocab_size, int) and not isinstance(vocab_size, bool)
    if not fits or not len(base.vocab) <= vocab_size <= MOST_IDS:
        raise ValueError(
            f"vocab_size is {vocab_size!r}: allowed is an int of at least {len(base.vocab)} "
            f"(256 bytes and {len(base.vocab) - 256} special tokens), and at most {MOST_IDS}"
        )
    return base.special_tokens, len(base.vocab) - 256
