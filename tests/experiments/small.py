"""Training runs of a few milliseconds, and what they leave behind, for tests of the programs around them."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from experiments.config import Optim, Pretrain
from experiments.loop import train
from experiments.report import Result, finish, summarise
from experiments.setup import start
from purelm import track
from purelm.data import TokenWriter
from purelm.models import transformer

MODEL = transformer.Config(vocab_size=1, context_length=16, d_model=16, n_layers=1, n_heads=2)


def token_file(path: Path, seed: int = 0, n: int = 4000) -> Path:
    """Random ids below 32."""
    with TokenWriter(path, vocab_size=32) as writer:
        writer.append(np.random.default_rng(seed).integers(0, 32, n))
    return path


def small(folder: Path, **changes) -> Pretrain:
    """A run in folder/run on folder/train.bin, evaluated on folder/heldout.bin."""
    for name, seed in (("train", 0), ("heldout", 1)):
        if not (folder / f"{name}.bin").exists():
            token_file(folder / f"{name}.bin", seed, 400)
    cfg = Pretrain(
        run=folder / "run",
        train=folder / "train.bin",
        heldout=folder / "heldout.bin",
        model=MODEL,
        optim=Optim(warmup_steps=1, schedule="constant"),
        batch_size=4,
        steps=4,
        save_every=2,
        eval_every=0,
        log_every=1,
        device="cpu",
        compile="no",
        deterministic=False,
    )
    return dataclasses.replace(cfg, **changes)


def trained(cfg: Pretrain) -> Result:
    return train(cfg, start(cfg))


def completed(cfg: Pretrain) -> Result:
    """With the report, after which a run counts as finished."""
    ready = start(cfg)
    result = train(cfg, ready)
    finish(cfg, ready.model, summarise(cfg, ready.model, result), title="small")
    return result


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(run: Path) -> list[dict]:
    """The rows of a run but for what is of its speed."""
    out = []
    for row in track.read_rows(run / "metrics.jsonl"):
        out.append({k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "mfu")})
    return out
