"""What each step of the pipeline does to the model: raw, filtered and deduplicated variants of one crawl, judged alike.

    python -m experiments.curate.study --input web/*.jsonl.gz warc/*.warc.gz --positive rural.txt \
        --reference speeches.txt stories.txt --work runs/study

A third of the documents of JSON lines, by hashes of their text, is set aside: the classifier's negatives are English
ones of these, so that it never scores what it was trained on. Of all else it makes the variants (`VARIANTS`) by
`experiments.curate`, with one tokenizer, trained on the raw one, and judges each by `experiments.curate.board`, with
every seed, a fixed budget of training tokens and however many epochs that is. Of each reference file the first
--reference-bytes are used. A study that was stopped goes on: variants that are in the table are not judged again.

It leaves in RESULTS: board.jsonl, board.md, data_study.md, data_study.json and data_study.png.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import train_classifier
from experiments.console import program, say
from experiments.curate import board
from experiments.curate.config import Classes, Curate, Dedup, Filter, Final
from experiments.curate.files import read_json, rows_in
from experiments.curate.plan import find_inputs
from experiments.curate.run import curate
from experiments.curate.study_page import write
from experiments.limits import Count, Place, Range, Seed, Share, Text
from purelm import track
from purelm.curate.classes import scorer
from purelm.curate.document import Document
from purelm.curate.read import records
from purelm.data import DELIMITER, documents
from purelm.tokenizer import save, train

__all__ = ["VARIANTS", "main"]

RAW = Filter(languages=("all",), rules="none", pii=False)
ENGLISH = replace(RAW, languages=("en",))
NONE = Dedup("none")
SET_ASIDE = 3  # one document of so many
# (what it is, filter, deduplication); "classifier" gets its model when that is trained.
VARIANTS: dict[str, tuple[str, Filter, Dedup]] = {
    "raw": ("all text that extraction gives", RAW, NONE),
    "deduplicated": ("raw without exact and near duplicates", RAW, Dedup("near")),
    "english": ("raw, the language step alone", ENGLISH, NONE),
    "rules": ("english, then the quality rules of Gopher, C4 and FineWeb", replace(ENGLISH, rules="english"), NONE),
    "classifier": ("english, the pages most like clean text by a classifier", ENGLISH, NONE),
    "raw, cut": ("random documents of raw, as many characters as rules has", RAW, NONE),
}


@dataclass(frozen=True)
class Args:
    """Judge variants of a crawl."""

    input: tuple[Text, ...]
    """files or patterns, as of experiments.curate"""
    positive: tuple[Place, ...]
    """clean text for the classifier, of which no reference may be a part"""
    reference: tuple[Place, ...]
    work: Place = Path("runs/data-study")
    results: Place = Path("experiments/results/curate")
    separator: Text = "\\n\\n"
    """between the documents of the positives"""
    least: Share | None = None
    """score of the classifier from which on a document is kept; None: that which keeps as many characters as rules"""
    size: Literal["smoke", "cpu", "gpu"] = "cpu"
    vocab_size: Annotated[int, Range(257, 2**16)] = 2048
    seeds: tuple[Seed, ...] = (0, 1, 2)
    epochs: Annotated[float, Range(0, 10_000, open_low=True)] = 20.0
    reference_bytes: Count = 60_000
    seed: Seed = 0
    """of the classifier and of the order of documents"""
    device: str = "auto"
    conclusion: Text = ""
    """what you make of the results, for the page"""
    only: tuple[Text, ...] = ()
    """variants to judge in this call; the page has all that are in the table"""


@program
def main(args: Args) -> None:
    if wrong := [x for x in args.only if x not in VARIANTS]:
        raise ValueError(f"only: {wrong[0]!r} is no variant; there are {', '.join(VARIANTS)}")
    args.work.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    pool, aside = _divided(args)
    references = tuple(_cut(args, path) for path in args.reference)
    tokenizer = args.work / "tokenizer.json"
    _curated(args, "raw", pool, RAW, NONE, None)
    if not tokenizer.exists():
        save(train([row["text"] for row in _rows(args, "raw")], args.vocab_size, [DELIMITER]), tokenizer)
    model = _classifier(args, aside)
    variants = {}
    for name, (_, steps, dedup) in VARIANTS.items():
        inputs = pool
        if name == "classifier":
            steps = replace(steps, quality=Classes(model, "positive", _least(args, model)))
        if name == "raw, cut":
            inputs = (str(_random_part(args)),)
        variants[name] = _curated(args, name, inputs, steps, dedup, tokenizer)
    table = args.results / "board.jsonl"
    for name in args.only or VARIANTS:
        if any(row["name"] == name for row in track.read_rows(table)):
            say(f"{name}: is in {table} already")
            continue
        board.main(
            board.Args(
                table, args.work / _folder(name) / "tokens", tokenizer, references, name, args.size, args.seeds,
                args.epochs, most_shared=0.01, device=args.device,
            )
        )  # fmt: skip
    meanings = {name: what for name, (what, _, _) in VARIANTS.items()}
    write(args.results, track.read_rows(table), meanings, variants, args.conclusion)


def _folder(name: str) -> str:
    return "variant-" + name.replace(", ", "-")


def _set_aside(text: str) -> bool:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") % SET_ASIDE == 0


def _divided(args: Args) -> tuple[tuple[str, ...], Path]:
    """(inputs of the variants, the file of the documents that are set aside)."""
    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    others = []
    for item in find_inputs(args.input, args.work):
        if ".jsonl" not in item.path:
            others.append(item.path)
            continue
        for found in records(item.path):
            if isinstance(found, Document):
                rows[_set_aside(found.text)].append({"id": found.id, "url": found.url, "text": found.text})
    paths = {True: args.work / "aside.jsonl", False: args.work / "pool.jsonl"}
    for is_aside, path in paths.items():
        _write_rows(path, rows[is_aside])
    return (*others, str(paths[False])), paths[True]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines; a file that has them already is left as it is, so that its date is too."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        track.write_text(path, text)


def _cut(args: Args, path: Path) -> Path:
    """The first documents of a reference, until reference_bytes; the last one is cut at a blank, where there is one."""
    rows, left = [], args.reference_bytes
    for text in documents(path):
        data = text.encode()
        is_cut = len(data) > left
        if is_cut:
            part = data[:left].decode(errors="ignore")
            text = part.rpartition(" ")[0] or part
        if text.strip():
            rows.append({"text": text})
        left -= len(text.encode())
        if is_cut or left < 100:
            break
    target = args.work / f"{path.name.split('.')[0]}.jsonl"
    _write_rows(target, rows)
    return target


def _curated(
    args: Args, name: str, inputs: tuple[str, ...], steps: Filter, dedup: Dedup, tokenizer: Path | None
) -> dict[str, Any]:
    """The counts of a run of the pipeline; one that is there already is taken, and finished."""
    output = args.work / _folder(name)
    curate(Curate(inputs, output, steps, dedup, Final(tokenizer=tokenizer), args.seed % 2**63, examples=0))
    counts = read_json(output / "counts.json")
    text = counts["text"]
    return {
        "documents": sum(x["documents"] for x in text), "characters": sum(x["characters"] for x in text),
        "duplicates": counts["duplicates"]["exact"] + counts["duplicates"]["near"],
    }  # fmt: skip


def _rows(args: Args, name: str) -> Iterator[dict[str, Any]]:
    for path in sorted((args.work / _folder(name) / "text").iterdir()):
        yield from rows_in(path)


def _classifier(args: Args, aside: Path) -> Path:
    """A model of clean text against English documents that are set aside."""
    out = args.work / "quality.safetensors"
    if not out.exists():
        _curated(args, "aside", (str(aside),), ENGLISH, NONE, None)
        negative = args.work / "negative.jsonl"
        _write_rows(negative, [{"text": row["text"]} for row in _rows(args, "aside")])
        train_classifier.train(
            train_classifier.Args(
                tuple(map(str, args.positive)), (str(negative),), out, separator=args.separator, seed=args.seed,
                least_characters=200, buckets=1 << 18,
            )
        )  # fmt: skip
    return out


def _least(args: Args, model: Path) -> float:
    """The threshold: documents of english with the highest scores, until they have the characters of rules."""
    if args.least is not None:
        return args.least
    find = scorer(model, "positive")
    found = sorted(((find(row["text"])[1], len(row["text"])) for row in _rows(args, "english")), reverse=True)
    wanted, characters = _characters(args, "rules"), 0
    for score, n in found:
        characters += n
        if characters >= wanted:
            return score
    return 0.0


def _characters(args: Args, name: str) -> int:
    return sum(len(row["text"]) for row in _rows(args, name))


def _random_part(args: Args) -> Path:
    """Documents of raw in its random order, until they have as many characters as rules'; the last may exceed it."""
    wanted = _characters(args, "rules")
    rows: list[dict[str, Any]] = []
    for row in _rows(args, "raw"):
        if sum(len(x["text"]) for x in rows) >= wanted:
            break
        rows.append({name: row[name] for name in ("id", "url", "text")})
    path = args.work / "part.jsonl"
    _write_rows(path, rows)
    return path


if __name__ == "__main__":
    main(tyro.cli(Args))
