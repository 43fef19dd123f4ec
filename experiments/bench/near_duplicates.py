"""MinHash signatures beside datasketch and rensa: documents a second of CPU time, on one core.

    python -m experiments.bench.near_duplicates [--data FILE.jsonl.gz] [--n-documents 700] [--json FILE]

All get the same folded texts and sign their runs of five words with 112 hashes; finding the runs is part of the time
of each. "with folding" is the library's own way from raw text. Without data, documents are drawn from 20,000 made-up
words.
"""

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import tyro

from experiments.bench.report import publish, row
from experiments.console import program, say
from experiments.limits import Count
from purelm.curate.minhash import MinHash, signature, signatures
from purelm.curate.normalise import folded
from purelm.curate.shingles import shingles
from purelm.data.json_lines import json_rows

PACKAGES = ("purelm", "numpy", "datasketch", "rensa")
CFG = MinHash()


@dataclass(frozen=True)
class Args:
    """MinHash beside other libraries."""

    data: Path | None = None
    """JSON lines with a "text"; also .gz and .zst"""
    n_documents: Count = 700
    rounds: Count = 3
    json: Path | None = None


def made_up(n: int) -> list[str]:
    """n documents of 100 to 1,300 words, some of which are more frequent than others."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 11))) for _ in range(20_000)]
    return [" ".join(words[int(20_000 * rng.random() ** 3)] for _ in range(rng.randint(100, 1300))) for _ in range(n)]


def runs(text: str) -> list[str]:
    words = text.split()
    return [" ".join(words[i : i + CFG.ngram]) for i in range(max(len(words) - CFG.ngram + 1, 1))]


def by_datasketch(text: str) -> Any:
    from datasketch import MinHash as Peer

    found = Peer(num_perm=CFG.n_hashes)
    found.update_batch([run.encode() for run in runs(text)])
    return found


def by_rensa(text: str) -> Any:
    from rensa import RMinHash

    found = RMinHash(num_perm=CFG.n_hashes, seed=1)
    found.update(runs(text))
    return found.digest()


def ours(text: str) -> Any:
    return signature(shingles(text, CFG.ngram), CFG)


def measure(ways: dict[str, Callable[[str], Any]], texts: list[str], rounds: int) -> dict[str, float | None]:
    """Name -> documents a second in the best round, None where a package is missing. Ways take turns."""
    seconds: dict[str, float] = {}
    for name, way in ways.items():
        try:
            way(texts[0])
            seconds[name] = float("inf")
        except ModuleNotFoundError:
            say(f"{name} is missing: pip install {name}")
    for _ in range(rounds):
        for name in seconds:
            gc.collect()
            start = time.process_time()
            for text in texts:
                ways[name](text)
            seconds[name] = min(seconds[name], time.process_time() - start)
    return {name: len(texts) / seconds[name] if name in seconds else None for name in ways}


@program
def main(args: Args) -> None:
    if args.data is None:
        raw = made_up(args.n_documents)
    else:
        raw = [str(found["text"]) for _, found in islice(json_rows(args.data), args.n_documents)]
    texts = [folded(text) for text in raw]
    say(f"{len(texts):,} documents of {sum(map(len, raw)) / len(raw):,.0f} characters in the mean")
    found = measure({"purelm": ours, "datasketch": by_datasketch, "rensa": by_rensa}, texts, args.rounds)
    whole = measure({"purelm": lambda text: signatures([text], CFG)}, raw, args.rounds)["purelm"]
    assert whole is not None and found["purelm"] is not None
    unit: Any = partial(row, unit="documents/CPU s", packages=PACKAGES)
    rows = [unit("signatures", found["purelm"], peer=name, peer_value=found[name]) for name in ("datasketch", "rensa")]
    publish([*rows, unit("with folding", whole, peer="datasketch", peer_value=found["datasketch"])], args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
