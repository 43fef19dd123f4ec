"""Stage 2: which of all kept documents are duplicates of one before them.

A document's number is its place among the kept documents of all inputs, in the order of the inputs' names. Of each
cluster the least number is kept, so the choice depends on the inputs alone.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.curate.config import Curate
from experiments.curate.files import rows_in, write_json
from experiments.curate.shard import Tell, min_hash
from purelm.curate.minhash import MinHash, band_keys
from purelm.curate.near_duplicates import buckets, cluster
from purelm.curate.normalise import comparable
from purelm.curate.shingles import U64, jaccard, shingles

__all__ = ["Found", "duplicates", "find_duplicates"]

KEEP, EXACT, NEAR = 0, 1, 2  # of keep.npy
SHOWN_CLUSTERS, SHOWN_MEMBERS, SHOWN = 20, 4, 400  # the largest ones; characters


class Found(NamedTuple):
    """What `duplicates` finds for D documents."""

    roots: NDArray[np.int64]  # (D,) the first document of each one's cluster
    exact: NDArray[np.bool_]  # (D,) whether an equal one stands before it
    sizes: NDArray[np.int64]  # documents of each input


def duplicates(shards: Sequence[Path], cfg: MinHash | None, compression: str) -> Found:
    """Clusters over the outputs of stage 1.

    cfg: of near-duplicates; None for exact ones alone. Exact duplicates are found first, and near ones among what is
    left. Memory: 16 + 4 n_hashes + 8 n_bands bytes a document, and the texts of those that share a band.
    """
    digests = [np.load(shard / "digests.npy") for shard in shards]
    sizes = np.array([len(part) for part in digests], np.int64)
    D = int(sizes.sum())
    keys = np.concatenate(digests).view("V16").reshape(-1) if D else np.zeros(0, "V16")
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    roots = first.astype(np.int64)[inverse.reshape(-1)]
    exact = roots != np.arange(D)
    if cfg is None or not D:
        return Found(roots, exact, sizes)
    left = np.flatnonzero(~exact)
    signatures = np.concatenate([np.load(shard / "signatures.npy") for shard in shards])[left]
    bands = band_keys(signatures, cfg)
    del signatures
    wanted = {int(left[i]) for band in range(cfg.n_bands) for group in buckets(bands[:, band]) for i in group}
    sets = _shingles_of(shards, sizes, wanted, cfg, compression)
    near = cluster(bands, lambda i, j: jaccard(sets[int(left[i])], sets[int(left[j])]) >= cfg.jaccard)
    root_of = np.arange(D)
    root_of[left] = left[near]
    return Found(root_of[roots], exact, sizes)


def _shingles_of(
    shards: Sequence[Path], sizes: NDArray[np.int64], wanted: set[int], cfg: MinHash, compression: str
) -> dict[int, U64]:
    texts = _rows(shards, sizes, wanted, compression)
    return {i: np.unique(shingles(comparable(row["text"]), cfg.ngram)) for i, row in texts}


def _rows(
    shards: Sequence[Path], sizes: NDArray[np.int64], wanted: set[int], compression: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of the documents wanted; inputs without one are not read."""
    numbers, start = np.array(sorted(wanted), np.int64), 0
    for shard, size in zip(shards, sizes.tolist(), strict=True):
        if np.searchsorted(numbers, start) < np.searchsorted(numbers, start + size):
            for i, row in enumerate(rows_in(shard / f"kept.jsonl.{compression}"), start):
                if i in wanted:
                    yield i, row
        start += size


def find_duplicates(cfg: Curate, shards: Sequence[Path], out: Path, tell: Tell) -> None:
    """The stage: keep.npy (D,) of KEEP, EXACT or NEAR; starts.npy, where each input begins in it; clusters.json."""
    if cfg.dedup.kind == "none":
        sizes = np.array([len(np.load(shard / "digests.npy", mmap_mode="r")) for shard in shards], np.int64)
        D = int(sizes.sum())
        found = Found(np.arange(D), np.zeros(D, np.bool_), sizes)
    else:
        found = duplicates(shards, min_hash(cfg) if cfg.dedup.kind == "near" else None, cfg.compression)
    D = len(found.roots)
    keep = np.where(found.roots == np.arange(D), KEEP, np.where(found.exact, EXACT, NEAR)).astype(np.uint8)
    np.save(out / "keep.npy", keep)
    np.save(out / "starts.npy", np.concatenate([[0], np.cumsum(found.sizes)]).astype(np.int64))
    write_json(out / "clusters.json", _report(found, keep, shards, cfg.compression))
    tell(D, 0)


def _report(found: Found, keep: NDArray[np.uint8], shards: Sequence[Path], compression: str) -> dict[str, Any]:
    """Counts, sizes of clusters, and the beginnings of some members of the largest."""
    members = np.bincount(found.roots, minlength=len(found.roots))
    sizes, n = np.unique(members[members > 1], return_counts=True)
    largest = sorted(np.flatnonzero(members > 1).tolist(), key=lambda root: (-members[root], root))[:SHOWN_CLUSTERS]
    shown = {root: np.flatnonzero(found.roots == root)[:SHOWN_MEMBERS].tolist() for root in largest}
    rows = dict(_rows(shards, found.sizes, {i for some in shown.values() for i in some}, compression))
    return {
        "documents": len(keep),
        "exact": int((keep == EXACT).sum()),
        "near": int((keep == NEAR).sum()),
        "clusters": {str(size): int(k) for size, k in zip(sizes.tolist(), n.tolist(), strict=True)},
        "largest": [
            {
                "documents": int(members[root]),
                "members": [
                    {name: rows[i][name] for name in ("id", "url")} | {"text": rows[i]["text"][:SHOWN]} for i in some
                ],
            }
            for root, some in shown.items()
        ],
    }
