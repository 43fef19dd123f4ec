"""Clusters of near-duplicates from signatures, sorted in files, beside the same in memory and datasketch's LSH.

    python -m experiments.bench.clusters [--n-documents 20000] [--memory-megabytes 64] [--json FILE]

Documents have 20 to 60 made-up words; one in ten is an earlier one with a word changed. Signatures (112 hashes) are
made before and lie in files of 20,000 documents, texts in one. Each way is a process of its own, from files to
clusters: CPU seconds, and the growth of its peak memory over what it had with its machine code loaded. datasketch gives
candidates by the same 14 bands, and does not compare texts; the others do, and find equal clusters, which is checked.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from experiments.bench.report import publish, row
from experiments.console import program, say
from experiments.limits import Count, Range
from purelm.curate.external import near_duplicates_of_files
from purelm.curate.external_sort import sorted_rows
from purelm.curate.minhash import MinHash, band_keys, signatures
from purelm.curate.near_duplicates import cluster
from purelm.curate.normalise import comparable
from purelm.curate.shingles import jaccard, shingles

PACKAGES = ("purelm", "numpy", "numba", "datasketch")
CFG = MinHash()
IN_A_FILE = 20_000
WORDS = 20_000


@dataclass(frozen=True)
class Args:
    """Clusters of near-duplicates beside other ways."""

    n_documents: Annotated[int, Range(2, 10**8)] = 20_000
    memory_megabytes: Annotated[float, Range(0.01, 10**6)] = 64.0
    """for sorting and sets of shingles, in files"""
    datasketch: bool = True
    """some 200 microseconds and 4 kB a document"""
    rounds: Count = 1
    json: Path | None = None


def made_up(n: int, seed: int = 0) -> Iterator[str]:
    """n documents."""
    rng = np.random.default_rng(seed)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, k)) for k in rng.integers(2, 11, WORDS)]
    texts: list[str] = []
    for _ in range(n):
        if texts and rng.random() < 0.1:
            some = texts[rng.integers(len(texts))].split()
            some[rng.integers(len(some))] = "changed"
        else:
            some = [words[i] for i in (WORDS * rng.random(rng.integers(20, 61)) ** 2).astype(int).tolist()]
        texts.append(" ".join(some))
        yield texts[-1]


def write(folder: Path, n: int) -> None:
    """signatures-NNNNN.npy, texts, and starts.npy of each text and the end."""
    starts, part, number = [0], [], 0
    with open(folder / "texts", "wb") as file:
        for i, text in enumerate(made_up(n), 1):
            file.write(text.encode())
            starts.append(file.tell())
            part.append(text)
            if len(part) == IN_A_FILE or i == n:
                np.save(folder / f"signatures-{number:05d}.npy", signatures(part, CFG))
                part, number = [], number + 1
    np.save(folder / "starts.npy", np.array(starts))


def texts_of(folder: Path) -> Callable[[int], str]:
    starts = np.load(folder / "starts.npy", mmap_mode="r")

    def get(i: int) -> str:
        with open(folder / "texts", "rb") as file:
            file.seek(starts[i])
            return file.read(int(starts[i + 1] - starts[i])).decode()

    return get


def signature_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("signatures-*.npy"))


def in_files(folder: Path, memory: int) -> NDArray[np.int64]:
    return near_duplicates_of_files(signature_files(folder), texts_of(folder), CFG, folder / "sorting", memory)


def in_memory(folder: Path, memory: int) -> NDArray[np.int64]:
    text_of = texts_of(folder)
    keys = band_keys(np.concatenate([np.load(path) for path in signature_files(folder)]), CFG)
    sets: dict[int, Any] = {}

    def shingles_of(i: int) -> Any:
        if i not in sets:
            sets[i] = np.unique(shingles(comparable(text_of(i)), CFG.ngram))
        return sets[i]

    return cluster(keys, lambda i, j: jaccard(shingles_of(i), shingles_of(j)) >= CFG.jaccard)


def by_datasketch(folder: Path, memory: int) -> NDArray[np.int64]:
    """The least candidate of each document, itself among them."""
    from datasketch import MinHash as Peer
    from datasketch import MinHashLSH

    index = MinHashLSH(num_perm=CFG.n_hashes, params=(CFG.n_bands, CFG.n_hashes // CFG.n_bands))
    found: list[int] = []
    for path in signature_files(folder):
        for values in np.load(path):
            peer = Peer(num_perm=CFG.n_hashes, hashvalues=values.astype(np.uint64), scheme="legacy")
            index.insert(len(found), peer, check_duplication=False)
            found.append(min(index.query(peer)))
    return np.array(found, np.int64)


def peak() -> int:
    """Bytes: of this process since its program was loaded."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _measured(pipe: Any, way: Callable[[Path, int], NDArray[np.int64]], folder: Path, memory: int) -> None:
    sorted_rows(np.zeros((1 << 15, 2), np.uint64))  # loads the machine code
    before, start = peak(), time.process_time()
    found = way(folder, memory)
    pipe.send((time.process_time() - start, peak() - before, found))


def measure(way: Callable[[Path, int], NDArray[np.int64]], folder: Path, memory: int) -> tuple[float, int, Any]:
    """(CPU seconds, bytes, clusters) in a process of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(theirs, way, folder, memory))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise ValueError(f"{way.__name__} ended early") from None
    finally:
        process.join()


def has_datasketch() -> bool:
    try:
        import datasketch  # noqa: F401
    except ModuleNotFoundError:
        say("datasketch is missing: pip install datasketch")
        return False
    return True


@program
def main(args: Args) -> None:
    ways: dict[str, Callable[[Path, int], NDArray[np.int64]]] = {"in files": in_files, "in memory": in_memory}
    if args.datasketch and has_datasketch():
        ways["datasketch"] = by_datasketch
    n, best = args.n_documents, dict[str, tuple[float, int]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, n)
        size = sum(path.stat().st_size for path in signature_files(folder))
        say(f"{n:,} documents, {size / 1e6:,.0f} MB of signatures")
        clusters: dict[str, Any] = {}
        for _ in range(args.rounds):
            for way, run in ways.items():
                seconds, size, clusters[way] = measure(run, folder, int(args.memory_megabytes * 1e6))
                best[way] = min(best.get(way, (seconds, size)), (seconds, size))
    if (clusters["in files"] != clusters["in memory"]).any():
        raise ValueError("clusters in files and in memory differ")
    say(f"{(clusters['in files'] != np.arange(n)).sum():,} documents are near-duplicates of one before them")
    unit = partial(row, packages=PACKAGES)
    rows = []
    for peer in ("in memory", *(["datasketch"] if args.datasketch else [])):
        speed, most = (n / best[peer][0], best[peer][1] / 1e6) if peer in best else (None, None)
        rows.append(unit("clusters in files", n / best["in files"][0], "documents/CPU s", peer=peer, peer_value=speed))
        rows.append(unit("peak memory", best["in files"][1] / 1e6, "MB", peer=peer, peer_value=most))
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
