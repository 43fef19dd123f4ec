"""Stage 2: which of all kept documents are duplicates of one before them.

A document's number is its place among the kept documents of all inputs, in the order of the inputs' names. Of each
cluster the least number is kept, so the choice depends on the inputs alone. Digests and signatures are sorted in files
within dedup.memory_megabytes; beside it are at most 18 bytes in memory for each document.
"""

import heapq
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.curate.config import Curate
from experiments.curate.files import rows_at, write_json
from experiments.curate.shard import Tell, min_hash
from purelm.curate.external import first_of_digests, near_duplicates_of_files
from purelm.curate.minhash import MinHash
from purelm.curate.shingles import U64
from purelm.files import staging

__all__ = ["Found", "duplicates", "find_duplicates"]

KEEP, EXACT, NEAR = 0, 1, 2  # of keep.npy
SHOWN_CLUSTERS, SHOWN_MEMBERS, SHOWN = 20, 4, 400  # the largest ones; characters
AT_ONCE = 1 << 16  # documents


class Found(NamedTuple):
    """What `duplicates` finds for D documents."""

    roots: NDArray[np.int64]  # (D,) the first document of each one's cluster
    exact: NDArray[np.bool_]  # (D,) whether an equal one stands before it
    sizes: NDArray[np.int64]  # documents of each input


def duplicates(shards: Sequence[Path], cfg: MinHash | None, compression: str, folder: Path, memory: int) -> Found:
    """Clusters over the outputs of stage 1.

    cfg: of near-duplicates; None for exact ones alone. Exact duplicates are found first, and near ones among what is
    left. folder: for files that are removed again: numbers, and the texts of documents that share a band with another.
    memory: bytes for sorting and for sets of shingles.
    """
    sizes = _sizes(shards)
    firsts = first_of_digests(_digests(shards), folder, memory)
    exact = np.empty(len(firsts), np.bool_)
    for numbers in _numbers(len(firsts)):
        exact[numbers] = firsts[numbers] != numbers
    if cfg is None:
        return Found(firsts, exact, sizes)
    signatures = [shard / "signatures.npy" for shard in shards]
    for path, size in zip(signatures, sizes.tolist(), strict=True):
        if (n := len(np.load(path, mmap_mode="r"))) != size:
            raise ValueError(f"{path}: {n:,} signatures for {size:,} documents; remove its folder and start again")
    with (
        staging(folder) as staged,
        open(staged / "texts", "wb+") as texts,
        open(staged / "places", "wb+") as places,  # (start, size) in texts, of each document that is there
    ):

        def copy(wanted: NDArray[np.bool_]) -> None:
            start = 0
            for i, row in _rows(shards, sizes, wanted, compression):
                data = row["text"].encode("utf-8", "surrogatepass")
                texts.write(data)
                places.seek(16 * i)
                places.write(np.array([start, len(data)]).data)
                start += len(data)
            texts.flush()
            places.flush()

        def text_of(i: int) -> str:
            start, size = np.frombuffer(os.pread(places.fileno(), 16, 16 * i), np.int64).tolist()
            return os.pread(texts.fileno(), size, start).decode("utf-8", "surrogatepass")

        roots = near_duplicates_of_files(signatures, text_of, cfg, staged, memory, firsts=firsts, prepare=copy)
    return Found(roots, exact, sizes)


def _sizes(shards: Sequence[Path]) -> NDArray[np.int64]:
    """Documents of each input."""
    return np.array([len(np.load(shard / "digests.npy", mmap_mode="r")) for shard in shards], np.int64)


def _digests(shards: Sequence[Path]) -> Iterator[U64]:
    for shard in shards:
        part = np.load(shard / "digests.npy", mmap_mode="r")
        for start in range(0, len(part), AT_ONCE):
            yield np.array(part[start : start + AT_ONCE]).view("<u8").astype(np.uint64)


def _numbers(n: int) -> Iterator[NDArray[np.int64]]:
    """0 to n - 1, in parts."""
    for start in range(0, n, AT_ONCE):
        yield np.arange(start, min(start + AT_ONCE, n))


def _rows(
    shards: Sequence[Path], sizes: NDArray[np.int64], wanted: NDArray[np.bool_], compression: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of the documents wanted, in order; inputs without one are not read."""
    start = 0
    for shard, size in zip(shards, sizes.tolist(), strict=True):
        numbers = np.flatnonzero(wanted[start : start + size])
        for i, row in rows_at(shard / f"kept.jsonl.{compression}", numbers):
            yield start + i, row
        start += size


def find_duplicates(cfg: Curate, shards: Sequence[Path], out: Path, tell: Tell) -> None:
    """The stage: keep.npy (D,) of KEEP, EXACT or NEAR; starts.npy, where each input begins in it; clusters.json."""
    if cfg.dedup.kind == "none":
        sizes = _sizes(shards)
        D = int(sizes.sum())
        found = Found(np.arange(D), np.zeros(D, np.bool_), sizes)
    else:
        near = min_hash(cfg) if cfg.dedup.kind == "near" else None
        memory = int(cfg.dedup.memory_megabytes * 1e6)
        found = duplicates(shards, near, cfg.compression, out / "sorting", memory)
    D = len(found.roots)
    keep = np.empty(D, np.uint8)
    for numbers in _numbers(D):
        gone = np.where(found.exact[numbers], EXACT, NEAR)
        keep[numbers] = np.where(found.roots[numbers] == numbers, KEEP, gone)
    np.save(out / "keep.npy", keep)
    np.save(out / "starts.npy", np.concatenate([[0], np.cumsum(found.sizes)]).astype(np.int64))
    write_json(out / "clusters.json", _report(found, keep, shards, cfg.compression))
    tell(D, 0)


def _report(found: Found, keep: NDArray[np.uint8], shards: Sequence[Path], compression: str) -> dict[str, Any]:
    """Counts, sizes of clusters, and the beginnings of some members of the largest."""
    roots, D = found.roots, len(keep)
    members = np.zeros(D, np.uint32)
    kinds, sizes = Counter[int](), Counter[int]()
    for numbers in _numbers(D):
        np.add.at(members, roots[numbers], np.uint32(1))
        kinds.update(dict(enumerate(np.bincount(keep[numbers]).tolist())))
    largest: list[tuple[int, int]] = []  # (-documents, root)
    for numbers in _numbers(D):
        some = numbers[members[numbers] > 1]
        sizes.update(dict(zip(*(x.tolist() for x in np.unique(members[some], return_counts=True)), strict=True)))
        several = zip((-members[some].astype(np.int64)).tolist(), some.tolist(), strict=True)
        largest = heapq.nsmallest(SHOWN_CLUSTERS, [*largest, *several])
    shown: dict[int, list[int]] = {root: [] for _, root in largest}
    wanted = np.zeros(D, np.bool_)
    for numbers in _numbers(D):
        for root, known in shown.items():
            more = numbers[roots[numbers] == root][: SHOWN_MEMBERS - len(known)]
            known += more.tolist()
            wanted[more] = True
    rows = dict(_rows(shards, found.sizes, wanted, compression))
    return {
        "documents": D,
        "exact": kinds[EXACT],
        "near": kinds[NEAR],
        "clusters": {str(size): sizes[size] for size in sorted(sizes)},
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
