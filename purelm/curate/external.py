"""Duplicates of a corpus that does not fit in memory: exact ones and near ones, by sorting in files.

    clusters = near_duplicates_of_files(signature_files, text_of, MinHash(), folder, memory=4 << 30)
    firsts = first_of_digests(digest_blocks, folder, memory=4 << 30)

Both give what `near_duplicates.near_duplicates` and `exact.first_of` give for the same texts, to the last number. In
memory are 8 bytes for each document, the result, beside `memory`; on disk at most 32 (48 for digests) bytes for each.
Legend: D documents, K hashes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from purelm.curate.exact import digest
from purelm.curate.external_sort import least_memory, sorted_blocks
from purelm.curate.limits import check_several
from purelm.curate.minhash import MinHash, band_keys
from purelm.curate.near_duplicates import join_group_
from purelm.curate.normalise import comparable
from purelm.curate.shingles import U64, jaccard, shingles
from purelm.data.checks import check_int

__all__ = ["digests", "first_of_digests", "near_duplicates_of_files"]

SIGNED_AT_ONCE = 1 << 14  # documents whose signatures are in memory


def near_duplicates_of_files(
    signature_files: Sequence[Path], text_of: Callable[[int], str], cfg: MinHash, folder: Path, memory: int
) -> NDArray[np.int64]:
    """(D,): for each document the number of the first one of its cluster, as `near_duplicates` gives.

    For each band, (key, document) is sorted; documents of one key are compared by the true Jaccard similarity of their
    texts and joined. Documents have numbers from 0, over all files in their order.

    Args:
        signature_files: .npy files, uint32 (D_i, K), of `minhash.signatures(texts, cfg)`.
        text_of: the text of a document. It is asked for those that share a band alone; shingles of the last ones are
            kept, in half of `memory`.
        folder: where temporary files are made, and removed.
        memory: bytes for the sort (half of it) and for shingles; those of two documents are kept in any case.

    Raises ValueError for files of another dtype or shape, and too little memory.
    """
    check_int("memory", memory, 2 * least_memory(2))
    sizes = [len(_opened(path, cfg)) for path in signature_files]
    root = np.arange(sum(sizes), dtype=np.int64)
    shingles_of = _kept(lambda i: np.unique(shingles(comparable(text_of(i)), cfg.ngram)), memory // 2)

    def same(i: int, j: int) -> bool:
        return jaccard(shingles_of(i), shingles_of(j)) >= cfg.jaccard

    for band in range(cfg.n_bands):
        rows = sorted_blocks(_band(signature_files, cfg, band), 2, folder, memory // 2)
        for group in _groups(rows):
            join_group_(root, group, same)
    while (root[root] != root).any():
        root = root[root]
    return root


def _opened(path: Path, cfg: MinHash) -> NDArray[np.uint32]:
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    if found.dtype != np.uint32 or found.ndim != 2 or found.shape[1] != cfg.n_hashes:
        raise ValueError(f"{path}: {found.dtype} {found.shape}; signatures are uint32 (documents, {cfg.n_hashes})")
    return found


def _band(paths: Sequence[Path], cfg: MinHash, band: int) -> Iterator[U64]:
    """(key, document) of one band, in the order of documents."""
    n = cfg.n_hashes // cfg.n_bands
    alone = replace(cfg, n_hashes=n, n_bands=1)
    first = 0
    for path in paths:
        signed = _opened(path, cfg)
        for start in range(0, len(signed), SIGNED_AT_ONCE):
            keys = band_keys(np.array(signed[start : start + SIGNED_AT_ONCE, band * n : (band + 1) * n]), alone)
            documents = np.arange(first + start, first + start + len(keys), dtype=np.uint64)
            yield np.stack([keys[:, 0], documents], 1)
        first += len(signed)


def _groups(blocks: Iterable[U64]) -> Iterator[list[int]]:
    """Documents of one key, ascending, for each key of at least two; blocks are sorted rows (key, document)."""
    held: list[U64] = []  # rows of the last key so far: the next block may go on with it
    for block in blocks:
        cuts = np.flatnonzero(block[1:, 0] != block[:-1, 0]) + 1
        if held and held[0][0, 0] != block[0, 0]:
            yield from _two_or_more(held)
            held = []
        if not len(cuts):
            held.append(block.copy())
            continue
        yield from _two_or_more([*held, block[: cuts[0]]])
        starts, ends = cuts[:-1], cuts[1:]
        for start, end in zip(*(x[ends - starts > 1].tolist() for x in (starts, ends)), strict=True):
            yield block[start:end, 1].tolist()
        held = [block[cuts[-1] :].copy()]
    yield from _two_or_more(held)


def _two_or_more(parts: list[U64]) -> Iterator[list[int]]:
    if sum(map(len, parts)) > 1:
        yield np.concatenate(parts)[:, 1].tolist()


def _kept(make: Callable[[int], U64], n_bytes: int) -> Callable[[int], U64]:
    """`make`, whose last results are kept while they take at most n_bytes; of the last two in any case."""
    recent: dict[int, U64] = {}
    held = 0

    def get(i: int) -> U64:
        nonlocal held
        found = recent.pop(i, None)
        if found is None:
            found = make(i)
            held += found.nbytes
        recent[i] = found  # the last one is the youngest
        while held > n_bytes and len(recent) > 2:
            held -= recent.pop(next(iter(recent))).nbytes
        return found

    return get


def digests(texts: Iterable[str]) -> U64:
    """(D, 2): the 128 bits of `exact.digest` of each text."""
    check_several("texts", texts)
    return np.frombuffer(b"".join(map(digest, texts)), ">u8").astype(np.uint64).reshape(-1, 2)


def first_of_digests(blocks: Iterable[U64], folder: Path, memory: int) -> NDArray[np.int64]:
    """(D,): for each document the number of the first with the same digest, as `exact.first_of` gives.

    blocks: (any n, 2) uint64 of `digests`, documents in order. folder, memory, errors: those of `sorted_blocks`, for
    rows of 3 columns. Different texts share one of 128 bits with probability D^2 / 2^129 among D: 1.5e-19 for 10^10.
    """
    n = 0

    def numbered() -> Iterator[U64]:
        nonlocal n
        for block in blocks:
            yield np.column_stack([block, np.arange(n, n + len(block), dtype=np.uint64)])
            n += len(block)

    ordered = sorted_blocks(numbered(), 3, folder, memory)
    first = np.zeros(0, np.int64)
    last: U64 | None = None  # the first row of the last digest
    for rows in ordered:
        if not len(first):
            first = np.empty(n, np.int64)  # sorting has read them all
        if last is not None:
            rows = np.concatenate([last, rows])
        new = np.ones(len(rows), bool)
        new[1:] = (rows[1:, :2] != rows[:-1, :2]).any(1)
        heads = rows[new]
        first[rows[:, 2].astype(np.int64)] = heads[np.cumsum(new) - 1, 2].astype(np.int64)
        last = heads[-1:]
    return first
