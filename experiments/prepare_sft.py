"""Turn files of examples into JSON lines of prompts and responses for `experiments.sft`, cleaned and counted.

    python -m experiments.prepare_sft gsm8k-train.jsonl --out runs/math.jsonl --decontaminate data/math data/eval
    python -m experiments.prepare_sft alpaca_data.json chats.jsonl.gz --out runs/chat.jsonl --dedupe normalised \
        --tokenizer SmolLM2-135M-Instruct --max-tokens 512
    python -m experiments.prepare_sft OpenR1-Math-220k/data --out runs/openr1.jsonl --verifiable --pass-rate 0.25 0.75
    python -m experiments.prepare_sft countdown:1000:21000 --out runs/countdown.jsonl  # problems 1000 to 20999

Inputs are Alpaca's, chats, pairs, GSM8K's (JSON lines, or a JSON array in a .json file; .gz and .zst too), parquet
files of OpenR1-Math-220k or hub:open-r1/OpenR1-Math-220k, which is downloaded, and Countdown, which is made. Then
`experiments.sft --train OUT --prompt "{prompt}\nAnswer:" --response " {response}"` trains on them.

Beside OUT lies OUT.provenance.json: the inputs' hashes, all settings, and the counts of every step. The same inputs and
settings give the same bytes. Files are made in a folder .new-ID and renamed; nothing that exists is overwritten.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import tyro

import purelm
from experiments.console import program, progress_bar, say
from experiments.data_kinds import Kind, identity, kind_of, question_files, questions_in, rows_from
from experiments.limits import Count, Place, Range, Share, Text, Whole
from purelm.align.data import (
    Counts,
    Removed,
    Row,
    Step,
    asked,
    both,
    clean,
    decontaminated,
    difficulty,
    exact,
    index,
    length_window,
    normalised,
    table,
    unique,
    verifiable,
)
from purelm.align.data import openr1 as numina
from purelm.align.data.countdown import Game
from purelm.files import refuse_overwrite, staging, sync
from purelm.tokenizer import BPE, encode, fingerprint, load

UPDATE_EVERY = 500  # rows


@dataclass(frozen=True)
class Args:
    """Turn files of examples into prompts and responses for `experiments.sft`."""

    inputs: Annotated[tuple[Text, ...], tyro.conf.Positional]
    """files, folders of parquet files, hub:OWNER/NAME, countdown:N or countdown:FIRST:LAST"""
    out: Place
    """the .jsonl to write"""
    kind: Kind = "auto"
    """auto: by the fields of a file's first row"""
    every_turn: bool = False
    """chats: an example for each answer, not for the last alone"""
    calculator: bool = False
    """GSM8K: keep the annotations <<48/2=24>> in worked answers"""
    bad: Literal["error", "drop"] = "error"
    """rows that lack what they need; lines that are no JSON are always an error"""
    limit: Count | None = None
    """first rows of each input"""
    dedupe: Literal["none", "exact", "normalised"] = "exact"
    """normalised: but for case, white space and punctuation"""
    dedupe_prompts: bool = False
    """one response to each question, where otherwise pairs are compared"""
    decontaminate: tuple[Place, ...] = ()
    """test sets, as files or folders with files of `evaluate`'s names: rows that contain their questions are removed"""
    ngram: Count = 13
    """words of a run that is looked for; shorter test questions are compared whole"""
    ratio: Share = 0.0
    """least share of a test question's runs that a row must contain to be removed; 0: one run"""
    decontaminate_responses: bool = False
    """look for them in prompts and responses, not in what was asked alone"""
    tokenizer: Place | None = None
    """tokenizer.json or a folder with one, for --min-tokens and --max-tokens"""
    min_tokens: Whole = 0
    max_tokens: Count | None = None
    """of prompt and response together"""
    verifiable: bool = False
    """keep rows whose "answer" a grader can check"""
    pass_rate: tuple[Share, Share] | None = None
    """OpenR1: keep problems solved in such a share of attempts, least and most"""
    generations: Literal["first", "shortest", "all"] = "first"
    """OpenR1: which of the complete and correct generations become responses"""
    unchecked: bool = False
    """OpenR1: take generations that are not complete or not correct, too"""
    removed: bool = False
    """write what was removed, and why, to OUT.removed.jsonl"""
    seed: Annotated[int, Range(0, 2**63)] = 0
    """of Countdown's problems"""
    game: Game = field(default_factory=Game)
    """Countdown's ranges"""


@program
def main(args: Args) -> None:
    try:
        prepare(args)
    except ModuleNotFoundError as error:  # an extra that a kind of file needs
        raise ValueError(str(error)) from None


def prepare(args: Args) -> None:
    """Check, read, clean, write, publish."""
    outputs = _outputs(args)
    kinds = {source: kind_of(source, args.kind) for source in args.inputs}
    if "openr1" in kinds.values() and set(kinds.values()) != {"openr1"}:
        raise ValueError("inputs: OpenR1's rows go through steps of their own: give other kinds a run of their own")
    bpe = load(args.tokenizer, text_only=True) if args.tokenizer is not None else None
    settings = _settings(args, bpe)
    identities = [identity(source) | {"kind": kinds[source]} for source in args.inputs]
    steps = _steps(args, bpe, "openr1" in kinds.values())
    refused: list[str] = []
    with staging(args.out.parent) as staged, progress_bar("rows", _total(args, identities), "rows") as update:
        files = {name: staged / path.name for name, path in outputs.items()}
        rows = _counted(_read(args, kinds, refused), update)
        with open(files["removed"], "w", encoding="utf-8") as removed:
            watch = partial(_write_removed, removed) if args.removed else None
            n_rows, counts = clean(rows, steps, into=partial(_write, files["rows"]), watch=watch)
        n_read = counts[0].n_in if counts else n_rows
        if refused:
            counts = (Counts("read", n_read + len(refused), n_read, {"refused": len(refused)}), *counts)
        if not n_rows:
            raise ValueError(f"no row is left; nothing is written:\n{table(counts)}")
        provenance = {
            "program": "experiments.prepare_sft", "purelm": purelm.__version__, "inputs": identities,
            **settings, "counts": [x._asdict() for x in counts],
            "rows": n_rows, "sha256": hashlib.sha256(files["rows"].read_bytes()).hexdigest(),
        }  # fmt: skip
        files["provenance"].write_text(json.dumps(provenance, indent=1, default=str) + "\n", encoding="utf-8")
        _outputs(args)  # another process may have written there meanwhile
        for name in ("provenance", *(("removed",) if args.removed else ()), "rows"):
            sync(files[name])
            os.replace(files[name], outputs[name])
    for given in identities:
        say(f"{given['name']}: {given['kind']}")
    if refused:
        say(f"{len(refused):,} rows lack what they need, the first: {refused[0]}")
    print(table(counts))
    beside = [outputs["provenance"].name, *([outputs["removed"].name] if args.removed else [])]
    print(f"{args.out}: {n_rows:,} rows; beside it {', '.join(beside)}")


def _outputs(args: Args) -> dict[str, Path]:
    """Where the files go; ValueError if one is there already, or would replace an input."""
    if args.out.suffix != ".jsonl":
        raise ValueError(f"out {args.out}: must end in .jsonl")
    found = {
        "rows": args.out,
        "provenance": args.out.with_name(f"{args.out.name}.provenance.json"),
        "removed": args.out.with_name(f"{args.out.name}.removed.jsonl"),
    }
    refuse_overwrite(found.values(), [*args.inputs, *args.decontaminate])
    for name in ("rows", "removed") if args.removed else ("rows",):  # provenance alone is what a kill may leave
        if os.path.lexists(found[name]):
            raise ValueError(f"{found[name]}: exists; remove it first, or write elsewhere")
    return found


def _settings(args: Args, bpe: BPE | None) -> dict[str, Any]:
    """All that the result depends on beside the inputs; ValueError for settings that do not go together."""
    if not args.inputs:
        raise ValueError("inputs: give at least one")
    if (args.max_tokens is not None or args.min_tokens) and args.tokenizer is None:
        raise ValueError("max_tokens, min_tokens: need --tokenizer")
    if args.max_tokens is not None and args.max_tokens < args.min_tokens:
        raise ValueError(f"max_tokens {args.max_tokens} is less than min_tokens {args.min_tokens}")
    if args.pass_rate is not None and args.pass_rate[0] > args.pass_rate[1]:
        raise ValueError(f"pass_rate {args.pass_rate}: the least is more than the most")
    free = ("inputs", "out", "decontaminate", "tokenizer", "removed")  # said by what they hold, or no matter
    values = {name: value for name, value in dataclasses.asdict(args).items() if name not in free}
    return {
        "settings": values | {"game": args.game._asdict()}, "tokenizer": None if bpe is None else fingerprint(bpe),
        "decontaminate": [identity(str(file)) for path in args.decontaminate for file in question_files(path)],
    }  # fmt: skip


def _steps(args: Args, bpe: BPE | None, of_openr1: bool) -> list[Step]:
    """The steps asked for, cheap ones first."""
    steps: list[Step] = []
    if of_openr1:
        steps += [] if args.unchecked else [numina.correct()]
        steps += [] if args.pass_rate is None else [difficulty(*args.pass_rate, _rate)]
        steps += [numina.chosen(partial(min, key=len) if args.generations == "shortest" else lambda texts: texts[0])]
    elif args.pass_rate is not None:
        raise ValueError("pass_rate: only OpenR1's rows have one")
    if args.dedupe != "none":
        texts = asked if args.dedupe_prompts else both
        steps.append(unique(texts, exact if args.dedupe == "exact" else normalised))
    if args.decontaminate:
        files = [file for path in args.decontaminate for file in question_files(path)]
        tests = index((x for file in files for x in questions_in(file)), args.ngram)
        say(f"decontaminate: {len(tests.ids):,} questions, {len(tests.runs):,} runs of {args.ngram} words, "
            f"{len(tests.short):,} shorter questions")  # fmt: skip
        texts = (lambda row: (*asked(row), row["response"])) if args.decontaminate_responses else asked
        steps.append(decontaminated(tests, args.ratio, texts))
    if args.verifiable:
        steps.append(verifiable())
    if bpe is not None:
        steps.append(length_window(lambda text: len(encode(bpe, text, None)), args.min_tokens, args.max_tokens))
    return steps


def _rate(row: Row) -> float | None:
    return row["pass_rate"] if "pass_rate" in row else numina.pass_rate(row)


def _read(args: Args, kinds: dict[str, str], refused: list[str]) -> Iterator[Row]:
    for source, kind in kinds.items():
        rows = rows_from(
            source, kind, every_turn=args.every_turn, calculator=args.calculator, game=args.game, seed=args.seed,
            bad=refused.append if args.bad == "drop" else None,
        )  # fmt: skip
        if kind == "openr1" and args.generations == "all":
            rows = numina.each_generation(rows)
        yield from islice(rows, args.limit)


def _total(args: Args, identities: list[dict[str, Any]]) -> int:
    """Rows to read, where that is known before, and nothing else; else 0."""
    known = [given.get("lines") for given in identities]
    total = sum(min(n or 0, args.limit or n or 0) for n in known)
    return 0 if None in known or args.every_turn or args.generations == "all" else total


def _counted(rows: Iterator[Row], update: Callable[..., None]) -> Iterator[Row]:
    number = 0
    for number, row in enumerate(rows, 1):
        yield row
        if number % UPDATE_EVERY == 0:
            update(number)
    update(number)


def _write(path: Path, rows: Iterator[Row]) -> int:
    n = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            n += 1
            file.write(_line(row))
    return n


def _write_removed(file: IO[str], step: str, found: Removed) -> None:
    row = {"step": step, "reason": found.reason, "detail": found.detail, "row": found.row}
    file.write(_line(row))


def _line(row: Row) -> str:
    line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    for mark in "\x85\u2028\u2029":  # ends of lines to Unicode, and to readers that ask Unicode
        line = line.replace(mark, f"\\u{ord(mark):04x}")
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a field that is no prompt or response
        line = json.dumps(row, default=str) + "\n"
    return line


if __name__ == "__main__":
    main(tyro.cli(Args))
