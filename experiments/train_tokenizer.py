"""Train a byte-level BPE tokenizer and print what it learned.

    python -m experiments.train_tokenizer --input corpus.txt --vocab-size 10000 --out runs/tok/tokenizer.json
    python -m experiments.train_tokenizer --input hub:roneneldan/TinyStories --vocab-size 10000 --out runs/tok.json

The input is a .txt file (mapped and counted by all processors), .jsonl, .zip, .gz, .zst, a folder of these, or
hub:OWNER/NAME. The output is Hugging Face's tokenizer.json, or a .tiktoken file, by its ending.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiments.console import program, progress_bar, say
from purelm.data import DELIMITER, documents
from purelm.data.archives import check_is_file
from purelm.data.checks import check_int
from purelm.data.corpora import document_limit, limited
from purelm.data.sources import parse_hub
from purelm.files import refuse_overwrite
from purelm.tokenizer import BPE, encode, resolve, save, train_from_counts
from purelm.tokenizer.counting import count_pieces
from purelm.tokenizer.formats.huggingface import to_json
from purelm.workers import check_workers

SAMPLE_PIECES = 50_000  # distinct pieces over which bytes per token is computed


@dataclass(frozen=True)
class Args:
    """Train a byte-level BPE tokenizer."""

    input: str
    """text file, archive, folder or hub:OWNER/NAME"""
    vocab_size: int
    """number of tokens: bytes, merges and special tokens together"""
    out: Path = Path("runs/tokenizer/tokenizer.json")
    """.json (Hugging Face) or .tiktoken"""
    special_tokens: tuple[str, ...] = (DELIMITER,)
    pattern: str = "gpt2"
    """gpt2, cl100k, o200k, another known name, or a regular expression"""
    tie_break: Literal["course", "hf"] = "course"
    n_workers: int | None = None
    """worker processes; default one for each processor"""
    field: str = "text"
    """field of JSON lines and hub records that holds the text"""
    encoding: tuple[str, ...] = ("utf-8",)
    """encodings of text files and JSON lines; each document is decoded by the first that fits"""
    max_bytes: int | None = None
    """the most bytes of text to read"""


@contextmanager
def bar(description: str, total: int | None) -> Iterator[Callable[[int, int | None], None]]:
    """A progress function (done, total) for one stage; without a known total it counts MB."""
    with progress_bar(description, total or 0, "bytes" if total else "") as update:
        yield lambda done, _: update(done, "" if total else f"{done / 1e6:,.0f} MB")


def is_text_file(source: str, encoding: tuple[str, ...], max_bytes: int | None = None) -> bool:
    """Whether source is a whole UTF-8 .txt file, which is mapped into memory and not read document by document."""
    is_txt = not source.startswith("hub:") and Path(source).suffix == ".txt" and Path(source).is_file()
    whole = max_bytes is None or (is_txt and Path(source).stat().st_size <= max_bytes)
    return is_txt and whole and [name.lower() for name in encoding] in (["utf-8"], ["utf8"])


def read_documents(source: str, field: str, encoding: tuple[str, ...], max_bytes: int | None) -> Iterator[str]:
    """The documents in the first max_bytes of a corpus; no more is read."""
    return limited(documents(source, field=field, encoding=encoding, **document_limit(max_bytes)), max_bytes)


def check_source(source: str, argument: str) -> None:
    """Raise ValueError or FileNotFoundError if there can be no corpus at source."""
    if not source:
        raise ValueError(f"{argument} is empty: give a text file, archive, folder or hub:OWNER/NAME")
    if source.startswith("hub:"):
        parse_hub(source)
    elif not Path(source).is_dir():
        check_is_file(Path(source), source)


def check_numbers(n_workers: int | None, max_bytes: int | None) -> None:
    check_workers(n_workers)
    if max_bytes is not None:
        check_int("max_bytes", max_bytes, 1)


def bytes_per_token(bpe: BPE, counts: Counter[bytes]) -> float:
    """Bytes per token of the training text; if it has very many distinct pieces, of the most frequent ones."""
    most_common = counts.most_common(SAMPLE_PIECES)
    n_bytes = sum(len(piece) * count for piece, count in most_common)
    n_tokens = sum(len(encode(bpe, piece.decode("utf-8"), None)) * count for piece, count in most_common)
    return n_bytes / n_tokens


def shown(token: bytes) -> str:
    return repr(token.decode("utf-8", "replace"))


@program
def main(args: Args) -> None:
    if args.out.suffix not in (".json", ".tiktoken"):
        raise ValueError(f"out {args.out}: the name must end in .json or .tiktoken")
    check_numbers(args.n_workers, args.max_bytes)
    check_source(args.input, "input")
    refuse_overwrite([args.out], [args.input])
    if args.out.is_dir():
        raise ValueError(f"out {args.out}: is a folder")
    pattern = resolve(args.pattern)
    # Raises for a bad vocabulary size, or a pattern that the file cannot hold, before the corpus is counted.
    empty = train_from_counts({b" ": 1}, args.vocab_size, args.special_tokens, pattern, args.tie_break)
    if args.out.suffix == ".json":
        to_json(empty)
    whole = is_text_file(args.input, args.encoding, args.max_bytes)
    texts = read_documents(args.input, args.field, args.encoding, args.max_bytes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if whole:
        with bar("counting", Path(args.input).stat().st_size) as progress:
            counts = count_pieces(args.input, pattern, args.special_tokens, n_workers=args.n_workers, progress=progress)
    else:
        with bar("counting", None) as progress:
            counts = count_pieces(texts, pattern, args.special_tokens, n_workers=args.n_workers, progress=progress)
    if not counts:
        raise ValueError(f"{args.input}: no text to train on")
    counted = time.perf_counter()
    with progress_bar("merging", args.vocab_size - 256 - len(args.special_tokens), "merges") as update:
        bpe = train_from_counts(
            counts,
            args.vocab_size,
            args.special_tokens,
            pattern,
            args.tie_break,
            lambda _, done, total: update(done),
        )
    merged = time.perf_counter()
    save(bpe, args.out)
    n_bytes = sum(len(piece) * count for piece, count in counts.items())
    learned = sorted((left + right for left, right in bpe.merges), key=len, reverse=True)
    if len(bpe.vocab) < args.vocab_size:
        say(f"the corpus has no more pairs to merge: {len(bpe.vocab):,} ids instead of {args.vocab_size:,}")
    say(f"{n_bytes:,} bytes, {sum(counts.values()):,} pre-tokens, {len(counts):,} distinct")
    parts = f"256 bytes, {len(bpe.merges):,} merges, {len(bpe.special_tokens)} special tokens"
    say(f"vocabulary {len(bpe.vocab):,}: {parts}")
    say(f"{bytes_per_token(bpe, counts):.3f} bytes per token on the training text")
    say("longest tokens: " + ", ".join(map(shown, learned[:10])))
    say(f"{counted - start:.1f} s counting, {merged - counted:.1f} s merging; wrote {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
