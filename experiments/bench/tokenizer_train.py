"""BPE training beside Hugging Face tokenizers and rustbpe: CPU seconds, wall seconds, peak memory.

python -m experiments.bench.tokenizer_train --data FOLDER [--json FILE]

The corpus is all .txt files of the folder and of its .zip archives, each one document (a file with <|endoftext|> is
several). Each measurement is a process of its own, the trainers take turns, and medians are shown. CPU seconds are
those of the process and its children, with one thread; wall seconds those with all threads. The peers get their
documents in memory, purelm reads the file. purelm's machine code comes from numba's cache on disk, and loading it
counts; "compiling" is the first time ever on a machine. "second call" is in the same process, when all code is loaded.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments.bench.report import publish, row
from experiments.console import program, say

END = "<|endoftext|>"
PEERS = ("tokenizers", "rustbpe")
PACKAGES = ("purelm", "numba", "numpy", "regex", "tokenizers", "rustbpe")

# argv: trainer, path, vocabulary size, threads, calls. Prints CPU and wall seconds of each call, merges, and totals.
CHILD = r"""
import json, resource, sys, time
name, path, vocab_size, threads, calls = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
END = "<|endoftext|>"
def cpu():
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in use)
def documents():
    with open(path, encoding="utf-8", newline="") as file:
        return [text for text in file.read().split(END) if text]
if name == "purelm":
    from purelm.tokenizer import train
    run = lambda: len(train(path, vocab_size, [END], n_workers=threads).merges)
elif name == "tokenizers":
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    texts = documents()
    def run():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer.get_vocab_size() - 257
else:
    import rustbpe
    texts = documents()
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    def run():
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(iter(texts), vocab_size - 1, pattern=pattern)
        return len(tokenizer.get_mergeable_ranks()) - 256
out = []
for _ in range(calls):
    before, start = cpu(), time.perf_counter()
    merges = run()
    out.append({"cpu": cpu() - before, "wall": time.perf_counter() - start})
with open("/proc/self/status") as file:  # not ru_maxrss, which a process inherits from the one that started it
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
print(json.dumps({"calls": out, "merges": merges, "process": cpu(), "peak": peak}))
"""


@dataclass(frozen=True)
class Args:
    """BPE training beside its peers."""

    data: Path
    """folder of .txt and .zip files with English text"""
    vocab_sizes: tuple[int, ...] = (10_000, 32_000)
    rounds: int = 3
    json: Path | None = None


def texts(folder: Path) -> Iterator[str]:
    """The text of every .txt file under folder, archives included; a file that is not UTF-8 is read as Latin-1."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".txt":
            parts = [path.read_bytes()]
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                parts = [archive.read(name) for name in sorted(archive.namelist()) if name.endswith(".txt")]
        else:
            continue
        for data in parts:
            try:
                yield data.decode("utf-8")
            except UnicodeDecodeError:
                yield data.decode("latin-1")


def measure(name: str, path: Path, vocab_size: int, threads: int, calls: int = 1, **env: str) -> dict[str, Any]:
    """Run CHILD in a process of its own and read the figures that it prints."""
    root = Path(__file__).resolve().parents[2]
    search = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, name, str(path), str(vocab_size), str(threads), str(calls)],
        env={**os.environ, "RAYON_NUM_THREADS": str(threads), "PYTHONPATH": search, **env},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"{name} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def median(results: list[dict], key: str, call: int | None = None) -> float:
    return statistics.median(result[key] if call is None else result["calls"][call][key] for result in results)


@program
def main(args: Args) -> None:
    if not args.data.is_dir():
        raise ValueError(f"data {args.data}: no such folder")
    corpus = END.join(texts(args.data))
    n_bytes = len(corpus.encode())
    if not n_bytes:
        raise ValueError(f"data {args.data}: no .txt or .zip file with text in it")
    say(f"{n_bytes / 1e6:.1f} MB, {corpus.count(END) + 1:,} documents")
    processors = len(os.sched_getaffinity(0))
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "corpus.txt")
        path.write_text(corpus, encoding="utf-8", newline="")
        del corpus
        peers = [name for name in PEERS if importlib.util.find_spec(name) is not None]
        measure("purelm", path, 300, 1)  # fills numba's cache where this machine has none
        compiling = measure("purelm", path, args.vocab_sizes[0], 1, NUMBA_CACHE_DIR=str(Path(folder, "empty")))
        for vocab_size in args.vocab_sizes:
            one: dict[str, list[dict]] = {name: [] for name in ("purelm", *peers)}
            every: dict[str, list[dict]] = {name: [] for name in ("purelm", *peers)}
            for _ in range(args.rounds):
                for name in one:
                    one[name].append(measure(name, path, vocab_size, 1, calls=2 if name == "purelm" else 1))
                    every[name].append(measure(name, path, vocab_size, processors))
            merges = {name: results[0]["merges"] for name, results in one.items()}
            if len(set(merges.values())) > 1:
                raise ValueError(f"the trainers made different numbers of merges: {merges}")
            title = f"train {vocab_size:,} on {n_bytes / 1e6:.0f} MB"
            for peer in PEERS:
                known = peer in peers

                def compare(
                    what: str, value: float, key: str, unit: str, results: dict, call: int | None, *,
                    peer=peer, known=known, title=title,
                ) -> None:  # fmt: skip
                    peer_value = median(results[peer], key, call) if known else None
                    rows.append(
                        row(f"{title}: {what}", value, unit, peer=peer, peer_value=peer_value, packages=PACKAGES)
                    )

                compare("call", median(one["purelm"], "cpu", 0), "cpu", "CPU s", one, 0)
                compare("second call", median(one["purelm"], "cpu", 1), "cpu", "CPU s", one, 0)
                compare("process", median(every["purelm"], "process"), "process", "CPU s", every, None)
                compare(f"{processors} threads", median(every["purelm"], "wall", 0), "wall", "s", every, 0)
                compare("peak memory", median(every["purelm"], "peak"), "peak", "MiB", every, None)
            if vocab_size == args.vocab_sizes[0]:
                compare("compiling", compiling["calls"][0]["cpu"], "cpu", "CPU s", one, 0)
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
