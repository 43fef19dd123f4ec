"""Lines and substrings that stand more than once, beside plain Python and a suffix array: MB/s of CPU time, one core.

    python -m experiments.bench.repeated_text [--data text.zip pages.jsonl.gz ...] [--megabytes 16] [--json FILE]

Each source of --data is measured alone, and so is made-up text. Lines: files to files without the lines that stand more
than once, in memory and in files (4 MB for sorting); the peer counts the hashes of the lines of a file, and reads it
again; the outputs must be equal. Substrings of 200 bytes: spans of documents in memory; the peer is a suffix array and
the longest common prefixes of neighbours in it (pydivsufsort), without what Lee et al. 2021 do with them. It counts
windows that overlap each other, too, so that it may find more bytes than purelm, never fewer, which is checked.

datatrove has no deduplication of lines but of three sentences, and none of the substrings in Python alone.
"""

import gc
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from experiments.bench.report import publish, row
from experiments.console import program, say
from experiments.limits import Count, Range
from purelm.curate.lines import exact_line_deduplication
from purelm.curate.substrings import repeats
from purelm.data.sources import documents

PACKAGES = ("purelm", "numpy", "numba", "pydivsufsort")
N = 200  # bytes of a window
IN_FILES = 4 << 20  # bytes for sorting


@dataclass(frozen=True)
class Args:
    """Repeated lines and substrings."""

    data: tuple[Path, ...] = ()
    """.txt, .jsonl, .gz, .zst or .zip files, or folders of such"""
    megabytes: Annotated[float, Range(0.001, 10**5)] = 16.0
    """of made-up text"""
    rounds: Count = 3
    json: Path | None = None


def made_up(n_bytes: int) -> list[str]:
    """Documents of short lines; of both, one in ten is an earlier one."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 11))) for _ in range(20_000)]
    lines: list[str] = []
    texts: list[str] = []
    size = 0
    while size < n_bytes:
        start = len(lines)
        for _ in range(rng.randint(1, 60)):
            again = lines and rng.random() < 0.1
            line = rng.choice(lines) if again else " ".join(rng.choices(words, k=rng.randint(1, 9)))
            lines.append(line)
        texts.append(rng.choice(texts) if texts and rng.random() < 0.1 else "\n".join(lines[start:]))
        size += len(texts[-1]) + 1
    return texts


def lines_by_python(path: Path, out: Path) -> None:
    with path.open("rb") as file:
        counts = Counter(map(hash, file))
    with path.open("rb") as file, (out / path.name).open("wb") as made:
        made.writelines(line for line in file if counts[hash(line)] == 1)


def spans_by_suffix_array(items: NDArray[np.uint8], starts: NDArray[np.int64]) -> int:
    """Bytes in windows of N bytes that stand more than once."""
    from pydivsufsort import divsufsort, kasai

    order = divsufsort(items)
    alike = np.flatnonzero(kasai(items, order) >= N)  # a place in the order, and the next one
    places = np.unique(order[np.concatenate([alike, alike + 1])]).astype(np.int64)
    places = places[places + N <= starts[np.searchsorted(starts, places, "right")]]
    change = np.zeros(len(items) + 1, np.int64)
    change[places] += 1
    change[places + N] -= 1
    return int((np.cumsum(change) > 0).sum())


def spans_by_us(items: NDArray[np.uint8], starts: NDArray[np.int64]) -> int:
    return sum(int((x[:, 1] - x[:, 0]).sum()) for x in repeats(items, starts, N, keep="none"))


def measure(ways: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """(CPU seconds in the best round, what came out) by name; ways take turns; without those of missing packages."""
    seconds: dict[str, float] = {}
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            gc.collect()
            start = time.process_time()
            try:
                found[name] = way()
            except ModuleNotFoundError as error:
                say(f"{error.name} is missing: pip install {error.name}")
                continue
            seconds[name] = min(seconds.get(name, float("inf")), time.process_time() - start)
    return seconds, found


def lines_rows(name: str, texts: list[str], rounds: int, folder: Path) -> list[dict[str, Any]]:
    path = folder / "a.txt"
    path.write_bytes("".join(f"{text}\n" for text in texts).encode("utf-8", "surrogatepass"))
    for way in ("files", "plain"):
        (folder / way).mkdir(exist_ok=True)
    ways = {
        "lines": partial(exact_line_deduplication, [path], folder / "memory"),
        "lines, sorted in files": partial(exact_line_deduplication, [path], folder / "files", memory=IN_FILES),
        "Counter of hashes": partial(lines_by_python, path, folder / "plain"),
    }
    seconds, _ = measure(ways, rounds)
    outputs = [(folder / way / "a.txt").read_bytes() for way in ("memory", "files", "plain")]
    if not outputs[0] == outputs[1] == outputs[2]:
        raise ValueError(f"{name}: ways to take lines out differ")
    size, n = path.stat().st_size, path.read_bytes().count(b"\n")
    say(f"{name}: {n:,} lines of {size / n:.0f} bytes in the mean; {1 - len(outputs[0]) / size:.1%} are left out")
    speed = {way: size / 1e6 / x for way, x in seconds.items()}
    unit = partial(row, unit="MB/s", peer="Counter of hashes", peer_value=speed.pop("Counter of hashes"))
    return [unit(f"{way}, {name}", value, packages=PACKAGES) for way, value in speed.items()]


def substring_rows(name: str, texts: list[str], rounds: int) -> list[dict[str, Any]]:
    parts = [np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8) for text in texts]
    items = np.concatenate([np.zeros(0, np.uint8), *parts])
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
    functions = {"purelm": spans_by_us, "suffix array": spans_by_suffix_array}
    seconds, found = measure({way: partial(f, items, starts) for way, f in functions.items()}, rounds)
    if found.get("suffix array", len(items)) < found["purelm"]:
        raise ValueError(f"{name}: {found['purelm']:,} bytes are cut, the suffix array finds {found['suffix array']:,}")
    say(f"{name}: {len(texts):,} documents; bytes in substrings of {N} that repeat: {found}")
    speed = {way: len(items) / 1e6 / x for way, x in seconds.items()}
    unit = partial(row, unit="MB/s", peer="suffix array", peer_value=speed.get("suffix array"))
    return [unit(f"substrings, {name}", speed["purelm"], packages=PACKAGES)]


@program
def main(args: Args) -> None:
    sources = {path.name: list(documents(path, encoding=("utf-8", "cp1252"))) for path in args.data}
    sources["made up"] = made_up(int(args.megabytes * 1e6))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        few = ["warm-up\n" * 99] * 2  # loads the machine code
        lines_rows("warm-up", few, 1, Path(folder))
        substring_rows("warm-up", few, 1)
        for name, texts in sources.items():
            if not any(texts):
                raise ValueError(f"data {name}: no text")
            rows += lines_rows(name, texts, args.rounds, Path(folder)) + substring_rows(name, texts, args.rounds)
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
