"""Train a classifier of texts (purelm.curate.classifier) for quality, toxicity and the like, and say how good it is.

    python -m experiments.train_classifier --positive wiki.warc.gz --negative crawl.jsonl.gz --out quality.safetensors

Files are what `purelm.curate.read` reads (JSON lines, WARC, WET, Parquet, folders of it, hub:OWNER/NAME) and text
(.txt, also .gz, .zst or .zip), cut into documents at --separator. Pages of WARC files become text by
`curate.extract`.

Each text goes to the training, calibration or test part by a hash of its folded words and the seed: copies never lie in
two of them, and are taken once. A text under both labels is an error. The temperature is fitted on the calibration
part; accuracy, AUC, calibration error and the table of thresholds are of the test part, which nothing was fitted on.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from experiments.console import program, progress_bar, say
from experiments.limits import Count, Place, Positive, Range, Seed, Text, Whole
from purelm import random
from purelm.curate.calibration import auc, calibration_error, softmax, temperature
from purelm.curate.classifier import Classifier, Config, classify, logits_of
from purelm.curate.classifier_files import save_classifier
from purelm.curate.classifier_fit import Fit, class_weights, fit
from purelm.curate.document import Document, Drop, Raw
from purelm.curate.extract import Extraction, extract
from purelm.curate.features import Features, features
from purelm.curate.normalise import folded
from purelm.curate.read import records
from purelm.curate.skipped import Skipped
from purelm.data.archives import bare_name, streams
from purelm.files import refuse_overwrite

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
LEAST_TEST = 2  # texts of each class in a part


@dataclass(frozen=True)
class Args:
    """Train a classifier of texts."""

    positive: tuple[Text, ...]
    negative: tuple[Text, ...]
    out: Place
    """the .safetensors to write"""
    labels: tuple[Text, Text] = ("positive", "negative")
    limit: Count | None = None
    """first texts of each file"""
    field: Text = "text"
    """of JSON lines and rows"""
    separator: Text = "<|endoftext|>"
    """between documents in text files; \\n\\n for paragraphs"""
    least_characters: Whole = 1
    """shorter texts are left out"""
    buckets: Annotated[int, Range(1, 1 << 28)] = 1 << 20
    word_ngrams: Annotated[int, Range(1, 5)] = 2
    character_ngrams: tuple[Annotated[int, Range(0, 8)], Annotated[int, Range(0, 8)]] = (0, 0)
    """least and most; 0 0: none"""
    most_text: Annotated[int, Range(1, 1 << 24)] = 20_000
    """characters of a text that are looked at"""
    dimension: Annotated[int, Range(0, 1024)] = 0
    """of an embedding; 0: linear in the n-grams"""
    epochs: Annotated[int, Range(1, 10_000)] = 5
    batch: Annotated[int, Range(1, 1 << 20)] = 64
    lr: Positive = 0.1
    held_out: Annotated[float, Range(0.01, 0.9)] = 0.3
    """share of the texts; half of it for calibration, half for the test"""
    weighted: bool = True
    """both classes weigh as much in training; scores are then of classes of one size"""
    seed: Seed = 0
    overwrite: bool = False


@dataclass
class Texts:
    """What was read."""

    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)  # 0 training, 1 calibration, 2 test
    seen: dict[bytes, int] = field(default_factory=dict)
    copies: int = 0
    skipped: int = 0


@program
def main(args: Args) -> None:
    try:
        train(args)
    except ModuleNotFoundError as error:  # an extra that a kind of file needs
        raise ValueError(str(error)) from None


def train(args: Args) -> None:
    """Check, read, train, calibrate, test, write."""
    _check(args)
    least, most = args.character_ngrams
    kinds = Features(args.buckets, args.word_ngrams, least, most, args.most_text)
    cfg = Config(tuple(args.labels), kinds, args.dimension)
    read = Texts()
    for label, files in enumerate((args.positive, args.negative)):
        for name in files:
            before = len(read.texts)
            _add(read, name, label, args)
            say(f"{name}: {len(read.texts) - before:,} texts as {args.labels[label]}")
    say(f"left out: {read.copies:,} copies, {read.skipped:,} without text or too short")
    _check_parts(read, args)
    ids = [features(text, cfg.features) for text in read.texts]
    parts = [[i for i, part in enumerate(read.parts) if part == number] for number in range(3)]
    labels = [read.labels[i] for i in parts[0]]
    began = time.perf_counter()
    with progress_bar("training", args.epochs * -(-len(parts[0]) // args.batch), "steps") as update:
        params = fit(
            [ids[i] for i in parts[0]], labels, cfg, random.key(args.seed), Fit(args.epochs, args.batch, args.lr),
            weights=class_weights(labels, 2) if args.weighted else None,
            watch=lambda step, steps, loss: update(step, f"loss {loss:.3f}"),
        )  # fmt: skip
    seconds = time.perf_counter() - began
    z, y = ([logits_of(params, [ids[i] for i in part]) for part in parts],
            [np.array([read.labels[i] for i in part]) for part in parts])  # fmt: skip
    if not all(np.isfinite(x).all() for x in z):
        raise ValueError("training gave numbers that are not finite; take a smaller lr")
    model = Classifier(params, cfg, temperature(z[1], y[1]))
    save_classifier(args.out, model)
    _report(model, z[2], y[2], [len(part) for part in parts], seconds)
    _speed(model, [read.texts[i] for i in parts[2]])
    print(f"{args.out}: {os.path.getsize(args.out):,} bytes")


def _check(args: Args) -> None:
    for name in ("positive", "negative"):
        if not getattr(args, name):
            raise ValueError(f"{name}: give a file at least")
    if args.labels[0] == args.labels[1]:
        raise ValueError(f"labels: {args.labels[0]!r} twice")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"out {args.out}: must end in .safetensors")
    resolved = [Path(x).resolve() for x in args.positive]
    for name in args.negative:
        if Path(name).resolve() in resolved:
            raise ValueError(f"{name}: is positive and negative")
    refuse_overwrite([args.out], [*args.positive, *args.negative])
    if os.path.lexists(args.out) and not args.overwrite:
        raise ValueError(f"{args.out}: exists; remove it first, write elsewhere or give --overwrite")
    if not args.out.parent.is_dir():
        raise ValueError(f"out {args.out}: its folder does not exist")
    if not args.separator:
        raise ValueError("separator: must not be empty")


def _texts(name: str, args: Args) -> Iterator[str | None]:
    """The texts of a file; None for what has none."""
    bare = bare_name(name.lower())
    if not name.startswith("hub:") and (bare.endswith((".txt", ".zip"))):
        separator = args.separator.replace("\\n", "\n")
        for stream in streams(Path(name), name):
            yield from b"".join(stream.blocks).decode("utf-8", "replace").split(separator)
        return
    for item in records(name, field=args.field):
        if isinstance(item, Skipped):
            yield None
            continue
        found: Document | Drop = extract(item, Extraction()) if isinstance(item, Raw) else item
        yield None if isinstance(found, Drop) else found.text


def _add(read: Texts, name: str, label: int, args: Args) -> None:
    kept = 0
    for text in _texts(name, args):
        if text is None or len(text.strip()) < max(1, args.least_characters) or not (words := folded(text)):
            read.skipped += 1
            continue
        key = blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in read.seen:
            if read.seen[key] != label:
                raise ValueError(f"{name}: a text is positive and negative, it begins with {text.strip()[:60]!r}")
            read.copies += 1
            continue
        read.seen[key] = label
        read.texts.append(text)
        read.labels.append(label)
        read.parts.append(part_of(key, args.seed, args.held_out))
        kept += 1
        if kept == args.limit:
            return


def part_of(key: bytes, seed: int, held_out: float) -> int:
    """0 training, 1 calibration, 2 test, by the hash of a text's words: a share held_out is 1 or 2, half of each."""
    drawn = blake2b(key + seed.to_bytes(8, "little", signed=True), digest_size=8).digest()
    at = int.from_bytes(drawn, "little") / 2**64
    return 0 if at >= held_out else 1 if at >= held_out / 2 else 2


def _check_parts(read: Texts, args: Args) -> None:
    for label, name in enumerate(("positive", "negative")):
        own = [part for x, part in zip(read.labels, read.parts, strict=True) if x == label]
        counts = [own.count(part) for part in range(3)]
        if min(counts) < LEAST_TEST:
            raise ValueError(
                f"{name}: {sum(counts)} texts, of which training, calibration and test have {counts}; each needs "
                f"{LEAST_TEST}: give more, or another held_out (it is {args.held_out:g})"
            )


def _report(model: Classifier, z: np.ndarray, y: np.ndarray, sizes: list[int], seconds: float) -> None:
    p, before = softmax(z / model.temperature), softmax(z)
    first = model.cfg.labels[0]
    print(f"{sizes[0]:,} texts for training ({seconds:.1f} s), {sizes[1]:,} for calibration, {sizes[2]:,} for the test")
    print(f"accuracy {(p.argmax(1) == y).mean():.4f}   AUC {auc(p[:, 0], y == 0):.4f}")
    print(f"calibration error {calibration_error(before, y):.4f} before, {calibration_error(p, y):.4f} after "
          f"temperature {model.temperature:.3f}")  # fmt: skip
    print(f"{'threshold':>9}  {'kept':>6}  {'precision':>9}  {'recall':>6}     of {first!r}, score at least")
    for least in THRESHOLDS:
        kept = p[:, 0] >= least
        precision = f"{(y[kept] == 0).mean():9.4f}" if kept.any() else f"{'-':>9}"
        print(f"{least:9.2f}  {kept.mean():6.3f}  {precision}  {kept[y == 0].mean():6.3f}")


def _speed(model: Classifier, texts: list[str]) -> None:
    began = time.process_time()
    for text in texts:
        classify(model, text)
    seconds = max(time.process_time() - began, 1e-9)
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    print(f"scoring: {len(texts) / seconds:,.0f} texts/s, {size / seconds / 1e6:.1f} MB/s of CPU time, one thread")


if __name__ == "__main__":
    main(tyro.cli(Args))
