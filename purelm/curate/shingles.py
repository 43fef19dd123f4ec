"""Runs of n words of a text, as 64-bit hashes: what MinHash samples and Jaccard similarity is a share of.

Legend: C bytes of a text, W words, M shingles.

    S_i = sum_{j < i} c_j B^j                      c_j a random 64-bit number for each byte value, mod 2^64
    hash(i..k) = mix((S_k - S_i) B^-i)             of bytes i to k - 1: the same wherever they stand

All shingles of a text come from one sum, without a loop in Python. Texts made to collide can (the hash is no secret);
others do with probability 2^-64 a pair.
"""

import numpy as np
from numpy.typing import NDArray

from purelm.caches import memo

__all__ = ["jaccard", "mixed", "shingles"]

B = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse mod 2^64
INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
BLOCK = 1 << 20  # bytes that are summed at a time, and whose powers are kept
POWER, INVERSE_POWER = pow(int(B), BLOCK, 1 << 64), pow(int(INVERSE), BLOCK, 1 << 64)

U64 = NDArray[np.uint64]


def mixed(x: U64) -> U64:
    """A bijection of 64-bit numbers whose bits each depend on all (splitmix64's; Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@memo(1)
def _of_bytes() -> U64:
    """(256,): a number for each byte value."""
    return mixed(np.arange(1, 257, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95))


@memo(1)
def _powers() -> tuple[U64, U64]:
    """B^0 .. B^(BLOCK-1) and their inverses, mod 2^64."""
    found = []
    for base in (B, INVERSE):
        powers = np.full(BLOCK, base)
        powers[:1] = 1
        found.append(np.multiply.accumulate(powers))
    return found[0], found[1]


def shingles(text: str, n: int) -> U64:
    """(M,) hashes of the M = max(W - n + 1, 1) runs of n words; of a text of fewer words, of all; none of an empty one.

    text: words with one space between them, as `normalise.folded` gives. Equal runs have equal hashes and are repeated.
    Memory: some 60 bytes a word beside the text.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 word, got {n}")
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    if not len(data):
        return np.zeros(0, np.uint64)
    spaces = np.flatnonzero(data == 32)
    starts, ends = np.concatenate([[0], spaces + 1]), np.concatenate([spaces, [len(data)]])
    if len(starts) > n:
        starts, ends = starts[: len(starts) - n + 1], ends[n - 1 :]
    else:
        starts, ends = starts[:1], ends[-1:]
    powers, inverses = _powers()
    at_start, at_end, inverse = (np.empty(len(starts), np.uint64) for _ in range(3))  # S_i, S_k, B^-i
    total, power, inverse_power = np.zeros(1, np.uint64), 1, 1  # S_i, B^i and B^-i at a block's first byte i
    for first in range(0, len(data), BLOCK):
        block = data[first : first + BLOCK]
        sums = np.empty(len(block) + 1, np.uint64)
        sums[0] = 0
        np.cumsum(_of_bytes()[block] * powers[: len(block)], out=sums[1:])
        sums = sums * np.uint64(power) + total
        low, high = np.searchsorted(starts, (first, first + len(block)))
        at_start[low:high] = sums[starts[low:high] - first]
        inverse[low:high] = inverses[starts[low:high] - first] * np.uint64(inverse_power)
        low, high = np.searchsorted(ends, (first + 1, first + len(block) + 1))
        at_end[low:high] = sums[ends[low:high] - first]
        total, power, inverse_power = sums[-1:], power * POWER % (1 << 64), inverse_power * INVERSE_POWER % (1 << 64)
    return mixed((at_end - at_start) * inverse)


def jaccard(a: U64, b: U64) -> float:
    """|A and B| / |A or B| of two sets of hashes; 1 for two empty ones."""
    a, b = np.unique(a), np.unique(b)
    both = len(np.intersect1d(a, b, assume_unique=True))
    either = len(a) + len(b) - both
    return both / either if either else 1.0
