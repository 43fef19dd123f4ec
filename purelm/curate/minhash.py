"""MinHash: short signatures that agree in a share of places near the Jaccard similarity of two sets of shingles.

    h_i(x) = (a_i x + b_i mod 2^64) >> 32,   signature_i = min over the shingles x of h_i(x)
    P(signature_i equal) = J(A, B), up to the quality of h_i

Source: Broder 1997; multiply-shift hashing, Dietzfelbinger et al. 1997. Legend: K hashes, M shingles, D documents.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from purelm.caches import memo
from purelm.curate.limits import check_several
from purelm.curate.normalise import comparable
from purelm.curate.shingles import U64, mixed, shingles
from purelm.data.checks import check_int

__all__ = ["MinHash", "band_keys", "match_probability", "signature", "signatures"]

AT_ONCE = 512  # shingles hashed at a time: the table of K x AT_ONCE numbers stays in a core's cache
NOTHING = np.uint32(0xFFFFFFFF)  # the signature of an empty set


@dataclass(frozen=True)
class MinHash:
    """How near-duplicates are found: signatures in bands, then the true similarity of those that share one."""

    n_hashes: int = 112
    n_bands: int = 14  # two documents are compared if all n_hashes / n_bands numbers of some band agree
    ngram: int = 5  # words
    jaccard: float = 0.8  # least similarity of duplicates
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("n_hashes", 1 << 16), ("n_bands", 1 << 16), ("ngram", 1 << 10)):
            check_int(name, getattr(self, name), 1, most)
        check_int("seed", self.seed, 0, (1 << 63) - 1)
        if self.n_hashes % self.n_bands:
            raise ValueError(f"n_bands must divide n_hashes {self.n_hashes}, got {self.n_bands}")
        is_number = isinstance(self.jaccard, int | float) and not isinstance(self.jaccard, bool)
        if not is_number or not 0.0 < self.jaccard <= 1.0:
            raise ValueError(f"jaccard={self.jaccard!r}: allowed is above 0, to 1")


def match_probability(similarity: float, cfg: MinHash) -> float:
    """1 - (1 - s^r)^b: how likely two documents of similarity s share one of b bands of r numbers.

    >>> round(match_probability(0.8, MinHash()), 3)
    0.924
    """
    rows = cfg.n_hashes // cfg.n_bands
    return 1.0 - (1.0 - similarity**rows) ** cfg.n_bands


@memo(8)
def _hashes(n: int, seed: int) -> tuple[U64, U64]:
    """(a, b), each (n, 1); a odd."""
    numbers = mixed((np.arange(1, 2 * n + 1, dtype=np.uint64) + np.uint64(seed << 1)) * np.uint64(0x9E3779B97F4A7C15))
    return numbers[:n, None] | np.uint64(1), numbers[n:, None]


def signature(hashes_M: U64, cfg: MinHash) -> NDArray[np.uint32]:
    """(K,) of one document's shingles; all 2^32 - 1 for none."""
    a_K1, b_K1 = _hashes(cfg.n_hashes, cfg.seed)
    least_K = np.full(cfg.n_hashes, np.uint64(0xFFFFFFFFFFFFFFFF))
    for start in range(0, len(hashes_M), AT_ONCE):
        # The least is found before the shift, which keeps the order.
        table = a_K1 * hashes_M[None, start : start + AT_ONCE]
        table += b_K1
        np.minimum(least_K, table.min(1), out=least_K)
    return (least_K >> np.uint64(32)).astype(np.uint32)


def signatures(texts: Iterable[str], cfg: MinHash) -> NDArray[np.uint32]:
    """(D, K): of each text, `normalise.comparable`."""
    check_several("texts", texts)
    found = [signature(shingles(comparable(text), cfg.ngram), cfg) for text in texts]
    return np.stack(found) if found else np.zeros((0, cfg.n_hashes), np.uint32)


def band_keys(signatures_DK: NDArray[np.uint32], cfg: MinHash) -> U64:
    """(D, bands): one 64-bit key for the numbers of each band; equal where all of them are."""
    D, rows = len(signatures_DK), cfg.n_hashes // cfg.n_bands
    parts = signatures_DK.reshape(D, cfg.n_bands, rows).astype(np.uint64)
    key = np.full((D, cfg.n_bands), np.uint64(rows))
    for r in range(rows):
        key = mixed(key * np.uint64(0x9E3779B97F4A7C15) + parts[:, :, r])
    return key
