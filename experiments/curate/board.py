"""Judge a token file by the model that it trains: bits per byte of clean reference texts, with all else fixed.

    python -m experiments.curate.board --tokens runs/web/tokens --tokenizer tokenizer.json \
        --reference speeches.txt stories.txt --name rules --size cpu --table board.jsonl
    python -m experiments.curate.board --table board.jsonl          # the Markdown table again

The rule is that of CS336's assignment 4, in small: a model, a budget of tokens and the optimizer are given (`SIZES`,
under a version), the training data are yours, and a loss on text that you have not trained on decides. Each seed draws
new parameters and a new order. It appends a row to the table, JSON lines, and renders them beside it as Markdown.

Refused: reference texts of which the token file holds more than --most-shared (of distinct runs of 13 words), token
files of another tokenizer, and fewer tokens than the budget without --epochs. Rows compare only within a size, a
version, a tokenizer and the same reference texts: the Markdown has a table for each such group.
"""

import dataclasses
import hashlib
import math
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import resume
from experiments.bench.report import cpu_name, versions
from experiments.config import Optim, Pretrain
from experiments.console import pick_device, program, progress_bar, say
from experiments.curate.board_page import render
from experiments.curate.overlap import shared
from experiments.eval_text import score_text
from experiments.limits import Count, Place, Range, Seed, Share, Text
from experiments.ops import SDPA
from experiments.setup import start
from purelm import accounting, track
from purelm.data import DELIMITER, check_ids, check_tokenizer, documents, open_tokens, windows_per_epoch
from purelm.data.tokens import TokenFile
from purelm.dist.world import World
from purelm.models import transformer
from purelm.tokenizer import BPE, fingerprint, load

__all__ = ["SIZES", "VERSION", "Args", "Size", "judged", "main"]

# Raised where a number of SIZES, or anything else that a result depends on, changes.
VERSION = 1


@dataclass(frozen=True)
class Size:
    """All that is fixed; the vocabulary is the token file's."""

    d_model: int
    n_layers: int
    n_heads: int
    context_length: int
    batch_size: int  # sequences
    steps: int
    optim: Optim

    @property
    def budget(self) -> int:
        """Tokens that are trained on."""
        return self.steps * self.batch_size * self.context_length


SIZES = {
    "smoke": Size(16, 1, 2, 16, 4, 20, Optim("muon", 1e-2, adamw_lr_ratio=1.0, lr_min_ratio=0.0, warmup_steps=2)),
    # 410,000 tokens in about a minute of one core, with a vocabulary of 2,048.
    "cpu": Size(128, 3, 4, 128, 16, 200, Optim("muon", 4e-3, adamw_lr_ratio=1.0, lr_min_ratio=0.0, warmup_steps=20)),
    # GPT-2's small shape, as the assignment's; 20 tokens a parameter (Hoffmann et al. 2022).
    "gpu": Size(768, 12, 12, 512, 256, 19_000, Optim("adamw", 1e-3, lr_min_ratio=0.0, warmup_steps=400)),
}


@dataclass(frozen=True)
class Args:
    """Judge a token file by the model that it trains."""

    table: Place
    """JSON lines; the row is appended, and the Markdown written beside it"""
    tokens: Place | None = None
    """token file or folder of shards, as experiments.curate writes them; none: render the table"""
    tokenizer: Place | None = None
    """with which the tokens were made"""
    reference: tuple[Place, ...] = ()
    """clean texts: .txt, .jsonl (field text), also .gz, .zst, .zip"""
    name: Text = ""
    """of the data, for the table; a name has one row in a group"""
    size: Literal["smoke", "cpu", "gpu"] = "cpu"
    seeds: tuple[Seed, ...] = (0, 1, 2)
    epochs: Annotated[float, Range(0, 10_000, open_low=True)] = 1.0
    """most times that the data are gone over; a smaller data set is refused"""
    most_shared: Share = 0.001
    """share of a reference's runs of words that may stand in the tokens"""
    microbatches: Count = 1
    """parts in which the gradients of a batch are accumulated: the same result but for rounding, in less memory"""
    device: str = "auto"


@program
def main(args: Args) -> None:
    if args.tokens is None:
        given = [name for name in ("tokenizer", "reference", "name") if getattr(args, name)]
        if given:
            raise ValueError(f"{given[0]}: is of a judgement, which needs --tokens too")
        if not args.table.is_file():
            raise ValueError(f"table {args.table}: no such file")
    else:
        row = judged(args)
        track.drop_rows(args.table, lambda row: False)  # but for a last line that a kill cut short
        track.jsonl_sink(args.table)(row)
    rows = track.read_rows(args.table)
    page = args.table.with_suffix(".md")
    track.write_text(page, render(rows))
    say(f"{args.table}: {len(rows):,} rows, and {page.name}")


def judged(args: Args) -> dict[str, Any]:
    """The row of a token file. ValueError for what cannot be judged, before anything is trained."""
    size = SIZES[args.size]
    bpe, tokens, references = _opened(args)
    needed = size.steps * size.batch_size / windows_per_epoch(len(tokens), size.context_length)
    if needed > args.epochs:
        raise ValueError(
            f"tokens {args.tokens}: {len(tokens):,} tokens; the budget of size {args.size}, {size.budget:,}, goes over "
            f"them {needed:.2f} times, and epochs allows {args.epochs:g}: give more data or --epochs {needed:.2f}"
        )
    hashes = {file.name: _sha256(file) for file in args.reference}
    row: dict[str, Any] = {
        "name": args.name, "version": VERSION, "size": args.size, "tokenizer": fingerprint(bpe), "reference": hashes,
        "tokens": resume.content(tokens), "n_tokens": len(tokens), "n_bytes": tokens.n_bytes, "budget": size.budget,
        "epochs": needed, "seeds": list(args.seeds),
    }  # fmt: skip
    for other in track.read_rows(args.table):
        if all(other.get(x) == row[x] for x in ("name", "version", "size", "tokenizer", "reference")):
            raise ValueError(f"name {args.name!r}: is in {args.table} already, with these settings and references")
    row["shared"] = _overlap(args, tokens, bpe, references)
    device = pick_device(args.device)
    found: list[dict[str, Any]] = []
    for seed in args.seeds:
        found.append(_trained(args, size, seed, bpe))
        say(f"{args.name}, seed {seed}: " + "  ".join(f"{k} {v['bits per byte']:.4f}" for k, v in found[-1].items()))
    per_byte = {name: [x[name]["bits per byte"] for x in found] for name in hashes}
    model = _model(size, bpe)
    return row | {
        "bits_per_byte": {name: _spread(values) for name, values in per_byte.items()},
        "mean": _spread([statistics.fmean(x) for x in zip(*per_byte.values(), strict=True)]),
        "reference_counts": {k: {x: v[x] for x in ("documents", "bytes", "tokens")} for k, v in found[0].items()},
        "parameters": accounting.n_params(model), "settings": dataclasses.asdict(size),
        "microbatches": args.microbatches,
        "device": cpu_name() if device.type == "cpu" else _gpu_name(device), "versions": versions(),
    }  # fmt: skip


def _opened(args: Args) -> tuple[BPE, TokenFile, dict[str, list[str]]]:
    """Everything that is read, checked."""
    assert args.tokens is not None
    for name in ("tokenizer", "reference", "name", "seeds"):
        if not getattr(args, name):
            raise ValueError(f"{name}: must be given with --tokens")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"seeds {args.seeds}: one is there twice")
    assert args.tokenizer is not None
    bpe = load(args.tokenizer)
    if DELIMITER not in bpe.special_tokens:
        raise ValueError(f"tokenizer {args.tokenizer}: {DELIMITER}, which ends documents, is no special token of it")
    tokens = open_tokens(args.tokens, verify=True)
    if tokens.tokenizer_sha256 is None:
        raise ValueError(f"tokens {args.tokens}: their .json does not say with which tokenizer they were made")
    check_tokenizer(tokens, fingerprint(bpe))
    check_ids(tokens, max(bpe.vocab) + 1)
    names = [file.name for file in args.reference]
    if len(set(names)) < len(names):
        raise ValueError(f"reference: several files are called {max(names, key=names.count)}; rows go by these names")
    for file in (args.table, args.table.with_suffix(".md")):
        if file.resolve() in {x.resolve() for x in (*args.reference, args.tokenizer)}:
            raise ValueError(f"table {args.table}: would be written over an input, {file}")
    if args.table.suffix != ".jsonl" or not args.table.parent.is_dir():
        raise ValueError(f"table {args.table}: must end in .jsonl, and its folder must be there")
    return bpe, tokens, {file.name: list(documents(file)) for file in args.reference}


def _overlap(args: Args, tokens: TokenFile, bpe: BPE, references: Mapping[str, list[str]]) -> dict[str, float]:
    with progress_bar("looking for the reference texts", len(tokens), "tokens") as update:
        found = shared(references, tokens, bpe, DELIMITER, update)
    for name, share in found.items():
        if share > args.most_shared:
            raise ValueError(
                f"reference {name}: {100 * share:.2f} % of its runs of words stand in the tokens {args.tokens}; "
                f"most_shared allows {100 * args.most_shared:g} %. Take other texts, or decontaminate the data"
            )
    return found


def _model(size: Size, bpe: BPE) -> transformer.Config:
    shape = {x: getattr(size, x) for x in ("context_length", "d_model", "n_layers", "n_heads")}
    return transformer.Config(vocab_size=max(bpe.vocab) + 1, **shape)


def _trained(args: Args, size: Size, seed: int, bpe: BPE) -> dict[str, dict[str, Any]]:
    """Figures of each reference text, by the model of one seed."""
    assert args.tokens is not None
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The steps and batches are those of `experiments.pretrain` with these flags; it would leave checkpoints.
        cfg = Pretrain(
            folder / "run", args.tokens, model=_model(size, bpe), optim=size.optim, steps=size.steps,
            batch_size=size.batch_size, microbatches=args.microbatches, order="shuffled", seed=seed,
            device=str(device), compile="auto" if device.type == "cuda" else "no",
        )  # fmt: skip
        ready = start(cfg, World(0, 1, device))
        state = ready.run.init()
        loss = math.nan
        with progress_bar(f"{args.name}, seed {seed}", size.steps, "steps") as update:
            for i in range(size.steps):
                state, metrics = ready.run.step(state, ready.batch(i))
                if (i + 1) % 50 == 0 or i + 1 == size.steps:
                    loss = float(metrics["loss"])
                    if not math.isfinite(loss):
                        raise ValueError(f"{args.name}, seed {seed}: the loss is {loss} at step {i + 1}")
                    update(i + 1, f"loss {loss:.3f}")
        model = transformer.make(ready.model, SDPA)
        T = size.context_length
        found = {
            file.name: score_text(
                model, state.params, bpe, file, folder / f"{i}.jsonl", window=T, stride=T // 2, begin=DELIMITER
            )
            for i, file in enumerate(args.reference)
        }
    for name, figures in found.items():
        if not math.isfinite(figures["bits per byte"]):
            raise ValueError(f"{args.name}, seed {seed}: bits per byte of {name} are {figures['bits per byte']}")
    return found


def _spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (null for one), the values in the order of the seeds."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None,
            "values": values}  # fmt: skip


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gpu_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main(tyro.cli(Args))
