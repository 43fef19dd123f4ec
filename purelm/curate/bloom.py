"""A Bloom filter of runs of words: which documents and paragraphs consist of what was seen before, in fixed memory.

    bloom = empty(n=10**9, false_positive=0.01)                # 1.2 GB for a thousand million runs
    for document in documents:
        outcome = unseen_(document, bloom, BloomDedup())        # Document | Drop; the filter learns what is kept

Legend: M runs, k hashes, b bits.

    b = -n ln p / (ln 2)^2,   k = (b / n) ln 2
    P(a new run seems seen) = (1 - (1 - 1/b)^(k n))^k

Sources: Bloom 1970; the use on n-grams of BFF, as in DCLM (Li et al. 2024, arXiv:2406.11794, appendix).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from purelm.curate.document import Document, Drop
from purelm.curate.normalise import folded
from purelm.curate.shingles import U64, mixed, shingles

__all__ = ["Bloom", "BloomDedup", "add_", "contains", "empty", "false_positives", "union", "unseen_"]

MOST_BYTES = 1 << 40


class Bloom(NamedTuple):
    """The filter: b bits in bytes, and how many of them a member sets."""

    bits: NDArray[np.uint8]
    n_hashes: int


def empty(n: int, false_positive: float) -> Bloom:
    """A filter that mistakes a share `false_positive` of new members for old ones when it has n."""
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be an integer of at least 1, got {n!r}")
    if not 0.0 < false_positive < 1.0:
        raise ValueError(f"false_positive must be above 0 and below 1, got {false_positive}")
    n_bits = -n * math.log(false_positive) / math.log(2) ** 2
    n_bytes = max(-(-int(n_bits) // 64) * 8, 8)
    if n_bytes > MOST_BYTES:
        raise ValueError(f"n {n} and false_positive {false_positive} take {n_bytes:,} bytes, more than {MOST_BYTES:,}")
    return Bloom(np.zeros(n_bytes, np.uint8), max(round(n_bits / n * math.log(2)), 1))


def _places(bloom: Bloom, hashes_M: U64) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """(M, k) numbers of bytes, and the bit in each: those of h + i h', h' odd (Kirsch and Mitzenmacher 2006)."""
    h = mixed(hashes_M ^ np.uint64(0xA0761D6478BD642F))[:, None]
    step = (mixed(hashes_M ^ np.uint64(0xE7037ED1A0B428DB)) | np.uint64(1))[:, None]
    at = (h + np.arange(bloom.n_hashes, dtype=np.uint64) * step) % np.uint64(8 * len(bloom.bits))
    return (at >> np.uint64(3)).astype(np.int64), np.left_shift(np.uint8(1), (at & np.uint64(7)).astype(np.uint8))


def contains(bloom: Bloom, hashes_M: U64) -> NDArray[np.bool_]:
    """(M,): True for every member that was added, and for some others."""
    place, bit = _places(bloom, hashes_M)
    return ((bloom.bits[place] & bit) != 0).all(1)


def add_(bloom: Bloom, hashes_M: U64) -> None:
    """These are members from now on; the filter's memory is written to."""
    place, bit = _places(bloom, hashes_M)
    np.bitwise_or.at(bloom.bits, place.ravel(), bit.ravel())


def union(a: Bloom, b: Bloom) -> Bloom:
    """The filter of the members of both, which must be of one size."""
    if len(a.bits) != len(b.bits) or a.n_hashes != b.n_hashes:
        raise ValueError(
            f"filters must be of one size, got {len(a.bits)} bytes with {a.n_hashes} hashes and {len(b.bits)} with "
            f"{b.n_hashes}"
        )
    return Bloom(a.bits | b.bits, a.n_hashes)


def false_positives(bloom: Bloom) -> float:
    """The share of new members that seem old: (share of bits that are set)^k."""
    ones_of = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # of each value of a byte
    parts = (bloom.bits[i : i + (1 << 24)] for i in range(0, len(bloom.bits), 1 << 24))  # bincount widens to 64 bits
    n_ones = sum(int((np.bincount(part, minlength=256) * ones_of).sum()) for part in parts)
    return float(n_ones / (8 * len(bloom.bits))) ** bloom.n_hashes


@dataclass(frozen=True)
class BloomDedup:
    """What is looked for; the defaults are BFF's as DCLM used it."""

    ngram: int = 13  # words
    seen: float = 0.8  # least share of a text's runs by which it counts as seen
    paragraphs: bool = True  # leave out paragraphs that were seen, too: lines of the text

    def __post_init__(self) -> None:
        if not isinstance(self.ngram, int) or self.ngram < 1:
            raise ValueError(f"ngram must be an integer of at least 1, got {self.ngram!r}")
        if not 0.0 < self.seen <= 1.0:
            raise ValueError(f"seen must be above 0 and at most 1, got {self.seen}")


def unseen_(document: Document, bloom: Bloom, cfg: BloomDedup) -> Document | Drop:
    """The document, without paragraphs that were seen before if cfg.paragraphs; or why it is dropped.

    A text counts as seen if a share of at least cfg.seen of its runs of words is in the filter; one without a word
    never does. The runs of what is kept are added, so the order of documents decides which of two is kept: the first.
    """
    runs = shingles(folded(document.text), cfg.ngram)
    share = _share(bloom, runs)
    if share >= cfg.seen:
        return Drop("seen before", round(share, 4))
    if cfg.paragraphs:
        lines = document.text.split("\n")
        kept = [line for line in lines if _share(bloom, shingles(folded(line), cfg.ngram)) < cfg.seen]
        if len(kept) < len(lines):
            if not any(folded(line) for line in kept):
                return Drop("all paragraphs seen before", len(lines))
            document = document._replace(text="\n".join(kept))
            runs = shingles(folded(document.text), cfg.ngram)
        # A paragraph shorter than a run is found again by itself alone.
        for line in kept:
            add_(bloom, shingles(folded(line), cfg.ngram))
    add_(bloom, runs)
    return document


def _share(bloom: Bloom, runs_M: U64) -> float:
    return float(contains(bloom, runs_M).mean()) if len(runs_M) else 0.0
