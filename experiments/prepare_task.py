"""Make a generated task, a tokenizer of bytes, and a small model of random parameters: all that `sft` and `grpo` need.

    python -m experiments.prepare_task --task sort --out tasks/sort --n-train 4000 --n-heldout 200 --sort.n-numbers 5 5
    python -m experiments.prepare_task --task modular --out tasks/mod --modular.modulus 23 --modular.n-operations 2 3
    python -m experiments.prepare_task --task addition --out tasks/add --addition.numbers 0 999 --style worded
    python -m experiments.prepare_task --task words --out tasks/words --words.numbers 2 20 --words.n-steps 1 2

It leaves in OUT: train.jsonl and heldout.jsonl (prompt, response, task, length, source), which share no problem, by the
way they are numbered (`purelm.align.data.tasks`); tokenizer.json, an id for each byte and one for the end; start/, open
weights that `--model` of `sft` takes; provenance.json. Word problems in English (`purelm.align.data.word_problems`) are
for models that read it, so words has neither tokenizer nor start. The same settings give the same bytes. OUT appears
whole or not at all, and nothing that exists is overwritten.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import purelm
from experiments.console import program
from experiments.limits import Count, Place, Range, Seed, Whole
from purelm import random, tree
from purelm.align.data import Row, word_problems
from purelm.align.data.tasks import Addition, Modular, Sort, Style, Task, split
from purelm.align.data.word_problems import WordProblems
from purelm.files import staging, sync
from purelm.models import hf, transformer
from purelm.tokenizer import BPE, fingerprint, make, save

END = "<|endoftext|>"
SMALL = transformer.Config(vocab_size=1, context_length=64, d_model=64, n_layers=3, n_heads=4)


@dataclass(frozen=True)
class Args:
    """Make a generated task and a model to start from."""

    task: Literal["sort", "modular", "addition", "words"]
    out: Place
    """the folder to make"""
    n_train: Count = 4000
    n_heldout: Whole = 200
    style: Style = "spaced"
    """of prompts: "6 6 0 4 8 ->", "66048>" or "Sort these numbers: 6, 6, 0, 4, 8. Answer:"; words has none"""
    sort: Sort = field(default_factory=Sort)
    modular: Modular = field(default_factory=Modular)
    addition: Addition = field(default_factory=Addition)
    words: WordProblems = field(default_factory=WordProblems)
    seed: Annotated[int, Range(0, 2**63)] = 0
    """of the problems"""
    start: bool = True
    """write start/, but for words"""
    model: transformer.Config = field(default_factory=lambda: SMALL)
    """of start/; vocab_size 1 means the tokenizer's"""
    model_seed: Seed = 0


@program
def main(args: Args) -> None:
    """Check, make, publish."""
    task = task_of(args)
    if os.path.lexists(args.out):
        raise ValueError(f"out {args.out}: exists; remove it first, or write elsewhere")
    sizes = {"n_train": args.n_train, "n_heldout": args.n_heldout}
    if isinstance(task, WordProblems):
        train, heldout = word_problems.split(task, args.seed, **sizes)
        bpe = None
    else:
        train, heldout = split(task, args.seed, **sizes, style=args.style)
        bpe = bytes_tokenizer()
        model = _model(args, bpe, [*train, *heldout])
        params = transformer.init(random.key(args.model_seed), model)
    with staging(args.out.parent) as staged:
        folder = staged / "task"
        folder.mkdir()
        for name, rows in (("train", train), ("heldout", heldout)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if bpe is not None:
            save(bpe, folder / "tokenizer.json")
            if args.start:
                hf.save(folder / "start", params, model, bpe, fields={"eos_token_id": 256, "pad_token_id": 256})
        _tell(args, task, folder, bpe)
        for path in (x for x in folder.rglob("*") if x.is_file()):
            sync(path)
        if os.path.lexists(args.out):  # another process may have written there meanwhile
            raise ValueError(f"out {args.out}: exists; remove it first, or write elsewhere")
        os.rename(folder, args.out)
    print(f"{args.out}: {len(train):,} + {len(heldout):,} problems, such as {train[0]['prompt']!r}")
    if bpe is not None and args.start:
        print(f"{args.out}/start: {tree.n_params(params):,} random parameters")


def task_of(args: Args) -> Task | WordProblems:
    """The task that is asked for; ValueError for ranges of another one, and what else would have no effect."""
    tasks: dict[str, Task | WordProblems] = {
        "sort": args.sort, "modular": args.modular, "addition": args.addition, "words": args.words
    }  # fmt: skip
    for name, x in tasks.items():
        if name != args.task and x != type(x)():
            raise ValueError(f"{name}: has ranges of its own, but the task is {args.task}")
    if args.task == "words":
        if args.style != "spaced":
            raise ValueError(f"style: is {args.style}, but words has sentences of its own: leave it out")
        if args.model != SMALL or args.model_seed:
            raise ValueError("model, model_seed: words comes without a model to start from: leave them out")
    return tasks[args.task]


def bytes_tokenizer() -> BPE:
    """Byte b has id b, the end of an answer 256; nothing is merged."""
    return make({b: bytes([b]) for b in range(256)}, [], [END])


def _model(args: Args, bpe: BPE, rows: list[Row]) -> transformer.Config:
    given, n = args.model.vocab_size, len(bpe.vocab)
    if given != 1 and given < n:
        raise ValueError(f"model.vocab_size is {given}: the tokenizer has {n} ids")
    # A space before the answer, which the README's templates have, and the end.
    longest = max(len(f"{row['prompt']} {row['response']}".encode()) + 1 for row in rows)
    if args.model.context_length < longest:
        raise ValueError(
            f"model.context_length is {args.model.context_length}: a problem and its answer have {longest}"
        )
    return dataclasses.replace(args.model, vocab_size=n if given == 1 else given)


def _tell(args: Args, task: Task | WordProblems, folder: Path, bpe: BPE | None) -> None:
    names = [name for name in ("train.jsonl", "heldout.jsonl", "start/model.safetensors") if (folder / name).is_file()]
    provenance: dict[str, Any] = {
        "program": "experiments.prepare_task", "purelm": purelm.__version__, "task": args.task,
        "ranges": task._asdict(), "seed": args.seed, "n_train": args.n_train, "n_heldout": args.n_heldout,
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    }  # fmt: skip
    if bpe is not None:
        provenance |= {"style": args.style, "tokenizer": fingerprint(bpe)}
        if args.start:
            provenance |= {"model": dataclasses.asdict(args.model), "model_seed": args.model_seed}
    text = json.dumps(provenance, indent=1, default=str) + "\n"
    (folder / "provenance.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
