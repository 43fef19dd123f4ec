"""Duplicates of a corpus that does not fit in memory: exact ones and near ones, by sorting in files.

    firsts = first_of_digests(digest_blocks, folder, memory=4 << 30)
    clusters = near_duplicates_of_files(signature_files, text_of, MinHash(), folder, memory=4 << 30, firsts=firsts)

They give what `exact.first_of` and `near_duplicates.near_duplicates` give for the same texts, to the last number. In
memory are 8 bytes for each document, the result, beside `memory` (near duplicates: 9, and 8 of firsts). On disk are at
most 48 bytes for each (near duplicates: 32, and 16 for each band in which it is with others).
Legend: D documents, K hashes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from purelm.curate.exact import digest
from purelm.curate.external_sort import in_groups, least_memory, read_rows, sorted_blocks
from purelm.curate.limits import check_several
from purelm.curate.minhash import MinHash, band_keys
from purelm.curate.near_duplicates import join_group_
from purelm.curate.normalise import comparable
from purelm.curate.shingles import U64, jaccard, shingles
from purelm.data.checks import check_int
from purelm.files import staging

__all__ = ["digests", "first_of_digests", "near_duplicates_of_files"]

SIGNED_AT_ONCE = 1 << 14  # documents whose signatures are in memory
READ_AT_ONCE = 1 << 16  # rows of a file, or documents


def near_duplicates_of_files(
    signature_files: Sequence[Path],
    text_of: Callable[[int], str],
    cfg: MinHash,
    folder: Path,
    memory: int,
    *,
    firsts: NDArray[np.int64] | None = None,
    prepare: Callable[[NDArray[np.bool_]], object] | None = None,
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
        firsts: (D,) of `first_of_digests`. Only the first of equal documents is compared; the others go with it.
        prepare: called once, before the first text is asked for, with (D,): whose text may be. So texts that no file
            has in reach are copied in one pass.

    Raises ValueError for files of another dtype or shape, firsts that are none, and too little memory.
    """
    check_int("memory", memory, 2 * least_memory(2))
    D = sum(len(_opened(path, cfg)) for path in signature_files)
    root = np.arange(D, dtype=np.int64) if firsts is None else _checked(firsts, D).copy()
    shingles_of = _kept(lambda i: np.unique(shingles(comparable(text_of(i)), cfg.ngram)), memory // 2)

    def same(i: int, j: int) -> bool:
        return jaccard(shingles_of(i), shingles_of(j)) >= cfg.jaccard

    with staging(folder) as staged:
        wanted = np.zeros(D, np.bool_)
        for band in range(cfg.n_bands):
            rows = sorted_blocks(_band(signature_files, cfg, band, root), 2, staged / "sort", memory // 2)
            with (staged / f"band-{band}").open("wb") as file:
                for block, first, place in in_groups(rows, 1):
                    pairs = np.stack([first, block[:, 1]], 1)[place > 0]
                    wanted[pairs] = True
                    file.write(np.ascontiguousarray(pairs, "<u8").data)
        if prepare is not None:
            prepare(wanted)
        del wanted
        for band in range(cfg.n_bands):
            for group in _groups(read_rows(staged / f"band-{band}", 2, READ_AT_ONCE)):
                join_group_(root, group, same)
    for start in range(0, D, READ_AT_ONCE):  # no root is above its documents, so that those before are final
        part = root[start : start + READ_AT_ONCE]
        while (part != (up := root[part])).any():
            part[:] = up
    return root


def _checked(firsts: NDArray[np.int64], D: int) -> NDArray[np.int64]:
    if firsts.dtype != np.int64 or firsts.shape != (D,):
        raise ValueError(f"firsts must be int64 ({D},), a number for each signature, got {firsts.dtype} {firsts.shape}")
    for start in range(0, D, READ_AT_ONCE):
        part = firsts[start : start + READ_AT_ONCE]
        known = (part >= 0) & (part <= np.arange(start, start + len(part)))
        if not known.all() or (firsts[part] != part).any():
            raise ValueError("firsts must be numbers of documents that are their own first, and none after its own")
    return firsts


def _opened(path: Path, cfg: MinHash) -> NDArray[np.uint32]:
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    if found.dtype != np.uint32 or found.ndim != 2 or found.shape[1] != cfg.n_hashes:
        raise ValueError(f"{path}: {found.dtype} {found.shape}; signatures are uint32 (documents, {cfg.n_hashes})")
    return found


def _band(paths: Sequence[Path], cfg: MinHash, band: int, root: NDArray[np.int64]) -> Iterator[U64]:
    """(key, document) of one band, in the order of documents, of those that are their own root."""
    n = cfg.n_hashes // cfg.n_bands
    alone = replace(cfg, n_hashes=n, n_bands=1)
    first = 0
    for path in paths:
        signed = _opened(path, cfg)
        for start in range(0, len(signed), SIGNED_AT_ONCE):
            keys = band_keys(np.array(signed[start : start + SIGNED_AT_ONCE, band * n : (band + 1) * n]), alone)
            documents = np.arange(first + start, first + start + len(keys))
            is_root = root[documents] == documents
            yield np.stack([keys[:, 0], documents.astype(np.uint64)], 1)[is_root]
        first += len(signed)


def _groups(blocks: Iterable[U64]) -> Iterator[list[int]]:
    """Documents of one key, ascending; blocks are rows (the first of a key, one of its others), a key's together."""
    group: list[int] = []
    for block in blocks:
        for first, other in block.tolist():
            if not group or group[0] != first:
                if group:
                    yield group
                group = [first]
            group.append(other)
    if group:
        yield group


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
    found = np.zeros(0, np.int64)
    for rows, first, _ in in_groups(ordered, 2):
        if not len(found):
            found = np.empty(n, np.int64)  # sorting has read them all
        found[rows[:, 2].astype(np.int64)] = first.astype(np.int64)
    return found
