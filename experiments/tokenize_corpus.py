"""Turn a corpus into token files: OUT/train.bin and OUT/heldout.bin, each with a .json beside it.

    python -m experiments.tokenize_corpus --input corpus.txt --tokenizer runs/tok/tokenizer.json --out runs/corpus
    python -m experiments.tokenize_corpus --input train.txt --heldout valid.txt --tokenizer ... --out runs/corpus

Without --heldout a part of the documents is held out, chosen by a hash of their text (see `prepare` in purelm.data),
and both parts are also written as text to OUT/train.txt and OUT/heldout.txt. Inputs are files,
archives, folders or hub:OWNER/NAME; their documents are separated by <|endoftext|>, which must be a special token of
the tokenizer.

All files are made in a folder OUT/.new-ID and renamed when they are complete: old files in OUT stay until then, a new
train.bin never lies beside an old heldout.bin, and the next run removes what a killed run left. No input is ever
overwritten.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.console import program, say
from experiments.train_tokenizer import bar, check_numbers, check_source, is_text_file, read_documents
from purelm.data import DELIMITER, TokenFile, open_tokens, prepare
from purelm.data.checks import check_int
from purelm.data.corpora import check_outside
from purelm.data.token_format import move, remove
from purelm.files import refuse_overwrite, staging
from purelm.tokenizer import BPE, load
from purelm.tokenizer.files import encode_documents, encode_file

TEXTS = ("train.txt", "heldout.txt", "prepared.json")


@dataclass(frozen=True)
class Args:
    """Turn a corpus into token files."""

    input: str
    """text file, archive, folder or hub:OWNER/NAME"""
    tokenizer: Path
    """tokenizer.json, .tiktoken, or a folder with one"""
    out: Path
    """folder for train.bin and heldout.bin"""
    heldout: str | None = None
    """the held-out corpus; if not given, a part of the input"""
    heldout_fraction: float = 0.05
    """fraction of the input's documents that is held out; 0 for none"""
    max_bytes: int | None = None
    """the most bytes of text to read, from the input and from the held-out corpus each"""
    seed: int = 0
    """seed for the choice of held-out documents"""
    n_workers: int | None = None
    """worker processes; default one for each processor"""
    field: str = "text"
    """field of JSON lines and hub records that holds the text"""
    encoding: tuple[str, ...] = ("utf-8",)
    """encodings of text files and JSON lines; each document is decoded by the first that fits"""
    verify: bool = False
    """read the written files again and compare them with their checksums"""


def check(args: Args) -> None:
    """Find the errors that can be known before the corpus is read."""
    if not 0 <= args.heldout_fraction < 1:  # nan too
        raise ValueError(f"heldout_fraction={args.heldout_fraction}: allowed is 0 to less than 1")
    check_numbers(args.n_workers, args.max_bytes)
    check_int("seed", args.seed, -(2**63), 2**63 - 1)
    sources = [args.input] if args.heldout is None else [args.input, args.heldout]
    for source, argument in zip(sources, ("input", "heldout"), strict=False):
        check_source(source, argument)
        read_documents(source, args.field, args.encoding, args.max_bytes)  # looks at field and encoding
    here = [source for source in sources if not source.startswith("hub:")]
    if len(here) == 2 and os.path.samefile(*here):
        raise ValueError(f"heldout {args.heldout}: is the input; held-out text must be other text")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"out {args.out}: is a file; a folder is expected")
    made = [args.out / f"{name}.{ending}" for name in ("train", "heldout") for ending in ("bin", "json")]
    if splits(args):
        made += [args.out / name for name in TEXTS]
        check_outside(args.input, [args.out / name for name in TEXTS[:2]])
    elif args.heldout is None:
        for path in (args.out / "heldout.bin", args.out / "heldout.json"):
            if path.exists():
                raise ValueError(f"{path}: is of another run, and this one holds nothing out; remove it first")
    refuse_overwrite(made, [*here, args.tokenizer])


def splits(args: Args) -> bool:
    """Whether the held-out part is cut out of the input."""
    return args.heldout is None and args.heldout_fraction > 0


def tokenize(args: Args, bpe: BPE, source: str, out: Path, encoding: tuple[str, ...], max_bytes: int | None) -> None:
    """One corpus to a token file: a .txt file as it is, any other source document by document."""
    name, start = out.stem, time.perf_counter()
    if is_text_file(source, encoding, max_bytes):
        with bar(name, Path(source).stat().st_size) as progress:
            tokens = encode_file(bpe, source, out, n_workers=args.n_workers, progress=progress)
    else:
        texts = read_documents(source, args.field, encoding, max_bytes)
        with bar(name, None) as progress:
            tokens = encode_documents(bpe, texts, out, eot=DELIMITER, n_workers=args.n_workers, progress=progress)
    if not tokens.n_tokens:
        raise ValueError(f"{source}: empty corpus: no document in it has any text")
    say(f"{args.out / out.name}: {told(tokens)}, {time.perf_counter() - start:.1f} s")


def told(tokens: TokenFile) -> str:
    n_bytes = tokens.n_bytes or 0
    ratio = n_bytes / max(tokens.n_tokens, 1)
    return f"{tokens.n_tokens:,} tokens, {n_bytes:,} bytes, {ratio:.3f} bytes per token"


@contextmanager
def publishing(folder: Path) -> Iterator[None]:
    """Hold a lock: if two processes end at once, files of one must not lie beside those of the other."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def publish(staged: Path, out: Path) -> None:
    """Move the new files to their place. Old held-out files are removed first, and new ones come last."""
    with publishing(out):
        texts = (staged / TEXTS[0]).exists()
        if texts:
            for name in TEXTS[1:]:
                (out / name).unlink(missing_ok=True)
        if (staged / "heldout.bin").exists():
            remove(out / "heldout.bin")
        if texts:
            os.replace(staged / TEXTS[0], out / TEXTS[0])
        move(staged / "train.bin", out / "train.bin")
        if (staged / "heldout.bin").exists():
            move(staged / "heldout.bin", out / "heldout.bin")
        if texts:
            for name in TEXTS[1:]:
                os.replace(staged / name, out / name)


@program
def main(args: Args) -> None:
    check(args)
    bpe = load(args.tokenizer)
    if DELIMITER not in bpe.special_tokens:
        raise ValueError(f"tokenizer {args.tokenizer}: {DELIMITER} is no special token of it")
    with staging(args.out) as staged:
        train, heldout, encoding, max_bytes = args.input, args.heldout, args.encoding, args.max_bytes
        if splits(args):
            parts = prepare(
                args.input,
                staged,
                heldout_fraction=args.heldout_fraction,
                max_bytes=args.max_bytes,
                seed=args.seed,
                field=args.field,
                encoding=args.encoding,
            )
            say(f"{parts.n_train_documents:,} documents to train on, {parts.n_heldout_documents:,} held out")
            train, heldout, encoding, max_bytes = parts.train_path, parts.heldout_path, ("utf-8",), None
        tokenize(args, bpe, train, staged / "train.bin", encoding, max_bytes)
        if heldout is not None:
            tokenize(args, bpe, heldout, staged / "heldout.bin", encoding, max_bytes)
        publish(staged, args.out)
    if args.verify:
        for name in ("train",) if heldout is None else ("train", "heldout"):
            open_tokens(args.out / f"{name}.bin", verify=True)
        say("read again: equal to the checksums")


if __name__ == "__main__":
    main(tyro.cli(Args))
