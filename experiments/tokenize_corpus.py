"""Turn a corpus into token files: OUT/train.bin and OUT/heldout.bin, each with a .json beside it.

    python -m experiments.tokenize_corpus --input corpus.txt --tokenizer runs/tok/tokenizer.json --out runs/corpus
    python -m experiments.tokenize_corpus --input train.txt --heldout valid.txt --tokenizer ... --out runs/corpus

Without --heldout a part of the documents is held out, chosen by what they say (see `prepare` in purelm.data), and the
two parts also lie as text in OUT/train.txt and OUT/heldout.txt. Inputs are files, archives, folders or hub:OWNER/NAME;
their documents are separated by <|endoftext|>, which must be a special token of the tokenizer.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.console import program, say
from experiments.train_tokenizer import bar, is_text_file, limited
from purelm.data import DELIMITER, documents, prepare
from purelm.tokenizer import BPE, load
from purelm.tokenizer.files import encode_documents, encode_file


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
    """of the documents of the input; 0 for no held-out part"""
    max_bytes: int | None = None
    """of text to read; not for one .txt file that is encoded whole"""
    seed: int = 0
    """of the choice of held-out documents"""
    n_workers: int | None = None
    """all processors if not given"""
    field: str = "text"
    """of JSON lines and hub records"""
    encoding: tuple[str, ...] = ("utf-8",)
    """of text files and JSON lines; of several the first that fits, document by document"""


def tokenize(args: Args, bpe: BPE, source: str, name: str, encoding: tuple[str, ...]) -> None:
    """One corpus to OUT/NAME.bin: a .txt file as it is, any other source document by document."""
    out = args.out / f"{name}.bin"
    start = time.perf_counter()
    if is_text_file(source, encoding):
        with bar(name, Path(source).stat().st_size) as progress:
            tokens = encode_file(bpe, source, out, n_workers=args.n_workers, progress=progress)
    else:
        texts = limited(documents(source, field=args.field, encoding=encoding), args.max_bytes)
        with bar(name, None) as progress:
            tokens = encode_documents(bpe, texts, out, eot=DELIMITER, n_workers=args.n_workers, progress=progress)
    n_bytes = tokens.n_bytes or 0
    ratio = n_bytes / max(tokens.n_tokens, 1)
    seconds = time.perf_counter() - start
    say(f"{out}: {tokens.n_tokens:,} tokens, {n_bytes:,} bytes, {ratio:.3f} bytes per token, {seconds:.1f} s")


@program
def main(args: Args) -> None:
    encoding = args.encoding
    split = args.heldout is None and args.heldout_fraction > 0
    if args.max_bytes is not None and not split:
        for source in filter(None, (args.input, args.heldout)):
            if is_text_file(source, encoding):
                raise ValueError(f"max-bytes: not for one .txt file, which is encoded whole: {source}")
    bpe = load(args.tokenizer)
    if DELIMITER not in bpe.special_tokens:
        raise ValueError(f"tokenizer {args.tokenizer}: {DELIMITER} is no special token of it")
    train, heldout = args.input, args.heldout
    if split:
        parts = prepare(
            args.input,
            args.out,
            heldout_fraction=args.heldout_fraction,
            max_bytes=args.max_bytes,
            seed=args.seed,
            field=args.field,
            encoding=args.encoding,
        )
        say(f"{parts.n_train_documents:,} documents to train on, {parts.n_heldout_documents:,} held out")
        train, heldout, encoding = parts.train_path, parts.heldout_path, ("utf-8",)
    tokenize(args, bpe, train, "train", encoding)
    if heldout is not None:
        tokenize(args, bpe, heldout, "heldout", encoding)


if __name__ == "__main__":
    main(tyro.cli(Args))
