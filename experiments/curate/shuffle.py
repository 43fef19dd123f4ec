"""Stages 3 and 4: the kept documents in a random order of all of them, as final shards of text.

Document i of input s has the key h(seed, s, i), 64 bits; the order of all documents is that of their keys, and final
shard k of n holds the keys from k 2^64 / n on. Each input is first written by keys, a frame for each final shard
(scatter); then each final shard collects its frames and sorts them (gather). So no stage holds more than one input's
or one final shard's text, and nothing depends on which worker did it.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.curate.config import Curate
from experiments.curate.duplicates import KEEP
from experiments.curate.files import append_packed, packed_lines, write_json
from experiments.curate.shard import Tell
from purelm.curate.shingles import mixed

__all__ = ["gather", "keys_of", "scatter"]


def keys_of(seed: int, number: int, n: int) -> NDArray[np.uint64]:
    """(n,) keys of the documents of input `number`.

    Each is a bijection of 64 bits of a counter, so that no two of one input are equal; of two inputs they are with
    probability 2^-64 a pair, and then the one of the first input comes first.
    """
    start = mixed(mixed(np.array([seed], np.uint64) + np.uint64(1)) ^ np.uint64(number))
    return mixed(start + np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def final_shard(keys: NDArray[np.uint64], n: int) -> NDArray[np.int64]:
    """The final shard of each key: floor(key / 2^64 n), by the upper 32 bits."""
    return ((keys >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def scatter(cfg: Curate, number: int, n_outputs: int, shard: Path, duplicates: Path, out: Path, tell: Tell) -> None:
    """Stage 3, of one input: frames, keys in their order, and where each final shard's part of both begins."""
    starts = np.load(duplicates / "starts.npy")
    keep = np.load(duplicates / "keep.npy", mmap_mode="r")[starts[number] : starts[number + 1]]
    keys = keys_of(cfg.seed, number, len(keep))
    order = np.flatnonzero(keep == KEEP)
    order = order[np.argsort(keys[order], kind="stable")]
    # All of one input's are in memory while they are sorted: a file of a crawl is small.
    with open(shard / f"kept.jsonl.{cfg.compression}", "rb") as file:
        every = packed_lines(file, cfg.compression)
        rows = [line if kept == KEEP else b"" for kept, line in zip(keep.tolist(), every, strict=True)]
    cuts = np.searchsorted(final_shard(keys[order], n_outputs), np.arange(n_outputs + 1))
    offsets = []
    with open(out / "frames", "wb") as file:
        for k in range(n_outputs):
            offsets.append(file.tell())
            if cuts[k] < cuts[k + 1]:
                with append_packed(file, cfg.compression) as lines:
                    for i in order[cuts[k] : cuts[k + 1]].tolist():
                        lines.write(rows[i])
        offsets.append(file.tell())
    np.save(out / "keys.npy", keys[order])
    np.save(out / "cuts.npy", cuts.astype(np.int64))
    np.save(out / "offsets.npy", np.array(offsets, np.int64))
    tell(len(order), sum(map(len, rows)))


def gather(cfg: Curate, k: int, parts: Sequence[Path], out: Path, tell: Tell) -> None:
    """Stage 4, of final shard k: documents.jsonl.zst and counts.json."""
    lines: list[bytes] = []
    keys = []
    for part in parts:
        cuts, offsets = np.load(part / "cuts.npy"), np.load(part / "offsets.npy")
        if cuts[k] == cuts[k + 1]:
            continue
        keys.append(np.load(part / "keys.npy", mmap_mode="r")[cuts[k] : cuts[k + 1]])
        with open(part / "frames", "rb") as file:
            file.seek(offsets[k])
            lines += packed_lines(io.BytesIO(file.read(offsets[k + 1] - offsets[k])), cfg.compression)
    order = np.argsort(np.concatenate(keys), kind="stable") if keys else np.zeros(0, np.int64)
    assert len(order) == len(lines)
    target = out / f"documents.jsonl.{cfg.compression}"
    with open(target, "wb") as made, append_packed(made, cfg.compression) as packed:
        for i in order.tolist():
            packed.write(lines[i])
    characters = sum(len(json.loads(line)["text"]) for line in lines)
    write_json(out / "counts.json", {"documents": len(lines), "characters": characters})
    tell(len(lines), sum(map(len, lines)))
