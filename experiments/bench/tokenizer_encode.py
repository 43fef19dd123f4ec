"""Encoding and decoding beside tiktoken and Hugging Face tokenizers: MB/s of CPU time, one thread.

python -m experiments.bench.tokenizer_encode --data FOLDER [--vocabulary FILE] [--json FILE]

The documents are all .txt files of the folder and of its .zip archives (a file with <|endoftext|> is several
documents), encoded by one call each, without special tokens. All libraries have the same vocabulary: FILE (.tiktoken or
tokenizer.json; by default r50k_base.tiktoken, GPT-2's, in FOLDER or in a folder `tokenizers` beside it), or one of
32,000 tokens that is trained on the documents. The libraries take turns, results are dropped at once, and the best
round counts.

"warm": all pieces were encoded before. "cold": a new tokenizer in each round, without tables or remembered pieces. The
machine code is loaded in both cases. tiktoken and tokenizers are measured warm. "two workers" is the wall
time of `encode_file` against one worker; "first call" that of the first compiled call in a new process.
"""

import dataclasses
import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.bench.report import publish, row
from experiments.bench.tokenizer_train import END, texts
from experiments.console import program, say
from purelm import tokenizer
from purelm.tokenizer.files import encode_file

PACKAGES = ("purelm", "numba", "numpy", "regex", "tiktoken", "tokenizers")
WORST = {
    "one letter": "a" * 10**6,
    "spaces": " " * 10**6,
    "newlines": "\n" * 10**6,
    "exclamation marks": "!" * 10**6,
    "emoji": "\U0001f600" * 250_000,
    "combining marks": "\u0301" * 500_000,
    "two Chinese characters": "\u4e2d\u6587" * 166_666,
    "U+FFFD": "\ufffd" * 333_333,
}


@dataclass(frozen=True)
class Args:
    """Encoding beside its peers."""

    data: Path
    """folder of .txt and .zip files with English text"""
    vocabulary: Path | None = None
    rounds: int = 5
    json: Path | None = None


def load_vocabulary(args: Args, documents: Sequence[str]) -> tuple[str, tokenizer.BPE]:
    """(its name, the BPE): the one asked for, else GPT-2's if it is found, else one trained on the documents."""
    candidates = [folder / "r50k_base.tiktoken" for folder in (args.data, args.data.resolve().parent / "tokenizers")]
    path = args.vocabulary or next((path for path in candidates if path.exists()), None)
    if path is not None:
        return path.name, tokenizer.load(path)
    say("no r50k_base.tiktoken: training a vocabulary of 32,000 on the documents")
    return "trained, 32,000", tokenizer.train(documents, 32_000, [END])


def tiktoken_peer(bpe: tokenizer.BPE) -> Any:
    import tiktoken

    special = {name: i for i, t in bpe.vocab.items() for name in bpe.special_tokens if t == name.encode()}
    ranks = {token: i for i, token in bpe.vocab.items() if i not in special.values()}
    return tiktoken.Encoding("peer", pat_str=bpe.pattern, mergeable_ranks=ranks, special_tokens=special)


def huggingface_peer(bpe: tokenizer.BPE) -> Any:
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(bpe, Path(folder, "tokenizer.json"))
        return tokenizers.Tokenizer.from_file(str(Path(folder, "tokenizer.json")))


def each(function: Callable[[Any], Any], items: Sequence[Any]) -> None:
    for item in items:
        function(item)


def best(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds of each program: the best of `rounds` rounds in which they take turns, after one for warm-up."""
    seconds = dict.fromkeys(programs, float("inf"))
    for number in range(rounds + 1):
        for name, run in programs.items():
            gc.collect()
            start = time.process_time()
            run()
            if number > 0:
                seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def encode_rows(bpe: tokenizer.BPE, documents: list[str], rounds: int, name: str) -> list[dict]:
    """Documents one by one: both engines, warm and cold; a copy cut into 4 KB; lists."""
    engines = [engine for engine in ("numba", "python") if engine == "python" or importlib.util.find_spec("numba")]
    short = [text[k : k + 4000] for text in documents for k in range(0, len(text), 4000)]
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    say(f"{name}: {megabytes:.1f} MB, {len(documents):,} documents")
    tokenizer.encode(bpe, "compile", engine=engines[0])

    def encoder(engine: str, fresh: bool, docs: list[str], as_list: bool = False) -> Callable[[], None]:
        def run() -> None:
            made = dataclasses.replace(bpe) if fresh else bpe
            for text in docs:
                ids = tokenizer.encode(made, text, None, engine=engine)
                if as_list:
                    ids.tolist()

        return run

    mine: dict[str, Callable[[], Any]] = {}
    for engine in engines:
        mine[f"{engine}, warm"] = encoder(engine, False, documents)
        mine[f"{engine}, cold"] = encoder(engine, True, documents)
    mine[f"{engines[0]}, warm, to lists"] = encoder(engines[0], False, documents, as_list=True)
    mine[f"{engines[0]}, warm, 4 KB at a time"] = encoder(engines[0], False, short)
    peers: dict[str, Callable[[], Any]] = {}
    if importlib.util.find_spec("tiktoken"):
        encoding = tiktoken_peer(bpe)
        peers["tiktoken list"] = partial(each, encoding.encode_ordinary, documents)
        to_numpy = partial(encoding.encode_to_numpy, disallowed_special=())
        peers["tiktoken numpy"] = partial(each, to_numpy, documents)
        peers["tiktoken list, 4 KB"] = partial(each, encoding.encode_ordinary, short)
    seconds = best({**mine, **peers}, rounds)
    if importlib.util.find_spec("tokenizers"):
        other = huggingface_peer(bpe)
        seconds |= best({"tokenizers": partial(each, lambda text: other.encode(text).ids, documents)}, 1)
    rows = []
    for what in mine:
        against = ["tiktoken list, 4 KB"] if "4 KB" in what else ["tiktoken list"]
        if what == f"{engines[0]}, warm":
            against += ["tiktoken numpy", "tokenizers"]
        for peer in against:
            peer_value = megabytes / seconds[peer] if peer in seconds else None
            value = megabytes / seconds[what]
            rows.append(row(f"encode, {what}", value, "MB/s", peer=peer, peer_value=peer_value, packages=PACKAGES))
    if engines[0] == "numba":
        rows.append(workers_row(bpe, documents))
    return rows


def workers_row(bpe: tokenizer.BPE, documents: list[str]) -> dict:
    """`encode_file` of some 100 MB with two workers and with one, wall time."""
    text = END.join(documents).encode()
    wall = {1: float("inf"), 2: float("inf")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        n_copies = -(-100_000_000 // len(text))
        path.write_bytes(END.encode().join([text] * n_copies))
        megabytes = path.stat().st_size / 1e6
        for _ in range(3):
            for n in wall:
                start = time.perf_counter()
                encode_file(bpe, path, Path(folder) / f"{n}.bin", n_workers=n, engine="numba")
                wall[n] = min(wall[n], time.perf_counter() - start)
    return row(
        "encode_file, numba, two workers, wall",
        megabytes / wall[2],
        "MB/s",
        peer="one worker",
        peer_value=megabytes / wall[1],
        packages=PACKAGES,
    )


def decode_rows(bpe: tokenizer.BPE, documents: list[str], rounds: int) -> list[dict]:
    """Documents one by one: arrays of ids for purelm, lists for the others."""
    arrays = [tokenizer.encode(bpe, text, None) for text in documents]
    lists = [ids.tolist() for ids in arrays]
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    programs: dict[str, Callable[[], Any]] = {
        "array": partial(each, partial(tokenizer.decode, bpe), arrays),
        "join": partial(each, lambda ids: b"".join(map(bpe.vocab.__getitem__, ids)).decode(), lists),
    }
    if importlib.util.find_spec("tiktoken"):
        programs["tiktoken"] = partial(each, tiktoken_peer(bpe).decode, lists)
    seconds = best(programs, rounds)
    rows = []
    for peer, label in (("tiktoken", "tiktoken"), ("join", 'b"".join(map(vocab))')):
        peer_value = megabytes / seconds[peer] if peer in seconds else None
        rows.append(
            row("decode", megabytes / seconds["array"], "MB/s", peer=label, peer_value=peer_value, packages=PACKAGES)
        )
    return rows


def worst_rows(bpe: tokenizer.BPE) -> list[dict]:
    """The worst cases, a megabyte of one repeated thing each: CPU seconds, cold."""
    engines = [engine for engine in ("numba", "python") if engine == "python" or importlib.util.find_spec("numba")]
    encoding = tiktoken_peer(bpe) if importlib.util.find_spec("tiktoken") else None
    rows = []
    for what, text in WORST.items():
        peer_value = None
        if encoding is not None:
            peer_value = best({"peer": partial(encoding.encode_ordinary, text)}, 2)["peer"]
        for engine in engines:
            run = best({engine: partial(tokenizer.encode, bpe, text, engine=engine)}, 2)
            rows.append(
                row(
                    f"1 MB of {what}, {engine}",
                    run[engine],
                    "CPU s",
                    peer="tiktoken",
                    peer_value=peer_value,
                    packages=PACKAGES,
                )
            )
    return rows


def first_call_row(empty_cache: bool) -> dict:
    """Wall seconds of the first compiled call of a process, imports of purelm.tokenizer not counted."""
    code = (
        "import time; from purelm.tokenizer import encode, make\n"
        "bpe = make({i: bytes([i]) for i in range(256)}, [])\n"
        "start = time.perf_counter(); encode(bpe, 'text', engine='numba'); print(time.perf_counter() - start)"
    )

    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, **({"NUMBA_CACHE_DIR": folder} if empty_cache else {})}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    what = "first on this machine (compiling)" if empty_cache else "machine code on disk"
    return row(f"first call, {what}", float(done.stdout), "s", packages=PACKAGES)


@program
def main(args: Args) -> None:
    if not args.data.is_dir():
        raise ValueError(f"data {args.data}: no such folder")
    documents = [part for text in texts(args.data) for part in text.split(END) if part]
    if not documents:
        raise ValueError(f"data {args.data}: no .txt or .zip file with text in it")
    name, bpe = load_vocabulary(args, documents)
    rows = encode_rows(bpe, documents, args.rounds, name)
    rows += decode_rows(bpe, documents, args.rounds)
    rows += worst_rows(bpe)
    if importlib.util.find_spec("numba"):
        rows += [first_call_row(empty_cache=False), first_call_row(empty_cache=True)]
    assert all(np.isfinite(r["value"]) for r in rows)
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
