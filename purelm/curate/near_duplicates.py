"""Clusters of documents that are nearly the same: candidates by bands, their true similarity, union-find.

    clusters = near_duplicates(texts, MinHash(n_hashes=100, n_bands=10, ngram=5, jaccard=0.8))
    kept = [text for text, cluster, i in zip(texts, clusters, count()) if cluster == i]    # the first of each cluster

Legend: D documents.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from purelm.curate.minhash import MinHash, band_keys, signatures
from purelm.curate.normalise import comparable
from purelm.curate.shingles import U64, jaccard, shingles

__all__ = ["buckets", "cluster", "find", "join_group_", "near_duplicates"]

KEPT = 4096  # sets of shingles in memory while candidates are compared


def near_duplicates(texts: Sequence[str], cfg: MinHash) -> NDArray[np.int64]:
    """(D,): for each document the number of the first one of its cluster, its own if it is the first or alone.

    Documents are in one cluster where a chain of pairs leads from one to the other that share a band and whose shingles
    have a Jaccard similarity of at least cfg.jaccard. Which pairs share a band depends on cfg.seed: pairs of similarity
    s are found with `minhash.match_probability(s, cfg)`. No pair below cfg.jaccard is ever joined by itself.

    Memory: 4 n_hashes + 8 n_bands bytes a document beside the texts.
    """
    keys = band_keys(signatures(texts, cfg), cfg)
    recent: dict[int, U64] = {}

    def shingles_of(i: int) -> U64:
        if i not in recent:
            if len(recent) >= KEPT:
                del recent[next(iter(recent))]
            recent[i] = np.unique(shingles(comparable(texts[i]), cfg.ngram))
        return recent[i]

    return cluster(keys, lambda i, j: jaccard(shingles_of(i), shingles_of(j)) >= cfg.jaccard)


def buckets(keys_D: U64) -> Iterator[NDArray[np.int64]]:
    """The numbers of documents that have one key, ascending, for each key that at least two have."""
    order = np.argsort(keys_D, kind="stable")
    cuts = np.flatnonzero(np.diff(keys_D[order])) + 1
    for group in np.split(order, cuts):
        if len(group) > 1:
            yield group


def cluster(keys: U64, same: Callable[[int, int], bool]) -> NDArray[np.int64]:
    """(D,) roots of the clusters of pairs that share a key of one band, keys (D, bands), and for which same(i, j).

    A root is the least number of its cluster. `same` is asked for a pair only while nothing else has joined it; in a
    bucket a document is compared with the members of one cluster until one is the same.
    """
    root = np.arange(len(keys))
    for band in range(keys.shape[1]):
        for group in buckets(keys[:, band]):
            join_group_(root, group.tolist(), same)
    return np.array([find(root, i) for i in range(len(root))], np.int64)


def join_group_(root: NDArray[np.int64], group: Sequence[int], same: Callable[[int, int], bool]) -> None:
    """Join those of a group, ascending numbers, for which same(i, j): `root` is written to. See `cluster`."""
    known: dict[int, list[int]] = {}  # by the cluster's root: those of the group that came before
    for j in group:
        joined = []
        for top in sorted(known):
            if find(root, top) != find(root, j):
                if not any(same(i, j) for i in known[top]):
                    continue
                _join(root, top, j)
            joined.append(top)
        members = known.pop(joined[0]) if joined else []
        for top in joined[1:]:
            members.extend(known.pop(top))
        members.append(j)
        known[find(root, j)] = members


def find(root: NDArray[np.int64], i: int) -> int:
    """The root of i; the way to it is shortened."""
    top = i
    while root[top] != top:
        top = int(root[top])
    while root[i] != top:
        root[i], i = top, int(root[i])
    return top


def _join(root: NDArray[np.int64], i: int, j: int) -> None:
    a, b = find(root, i), find(root, j)
    root[max(a, b)] = min(a, b)
