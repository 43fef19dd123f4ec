"""From raw text to a trained language model in one command.

    python -m experiments.quickstart                      # stories from a grammar of known entropy
    python -m experiments.quickstart --data my_text.txt   # .txt .jsonl .zip .gz .zst, a folder, or hub:owner/name

Corpus, BPE tokenizer, token files, a small Transformer, held-out bits per byte, a sample, a report. For the built-in
stories the entropy of the source is known in closed form, so the report says how far from the best possible model
this one is.
"""

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from experiments.config import Optim, Pretrain
from experiments.console import program, say
from experiments.generate import END, complete
from experiments.loop import finish, start, summarise, train
from purelm import track
from purelm.data import Prepared, prepare, synthetic
from purelm.models import transformer
from purelm.tokenizer import save
from purelm.tokenizer import train as train_tokenizer
from purelm.tokenizer.files import encode_file

MARK = "quickstart.json"  # tells a folder of ours, which may be written again, from another's


@dataclass(frozen=True)
class Quickstart:
    """From raw text to a trained language model."""

    run: Path = Path("runs/quickstart")
    data: str | None = None
    """a file, a folder or hub:owner/name; the built-in stories if not given"""
    encoding: tuple[str, ...] = ("utf-8",)
    """of the user's text; with several, each document takes the first that fits it: --encoding utf-8 cp1252"""
    stories: int = 24_000
    """how many built-in stories to generate"""
    max_bytes: int = 100_000_000
    """of the user's text"""
    vocab_size: int = 2048
    steps: int = 850
    batch_size: int = 12
    context_length: int = 256
    d_model: int = 192
    n_layers: int = 3
    n_heads: int = 6
    optim: Optim = field(
        default_factory=lambda: Optim(name="muon", lr=4e-3, adamw_lr_ratio=1.0, lr_min_ratio=0.0, warmup_steps=50)
    )
    seed: int = 0
    device: str = "auto"
    prompt: str | None = None
    """of the sample; the first words of a held-out document if not given"""


@contextmanager
def phase(number: int, title: str) -> Iterator[None]:
    say(f"[{number}/5] {title}")
    before = time.perf_counter()
    yield
    say(f"      {time.perf_counter() - before:.1f} s")


def fresh(run: Path) -> None:
    """An empty folder for the run; what an earlier quickstart left is removed, another's folder is refused."""
    if run.exists():
        if any(run.iterdir()) and not (run / MARK).is_file():
            raise ValueError(f"run {run} exists and was not made by quickstart: give another --run")
        shutil.rmtree(run)
    run.mkdir(parents=True)
    track.write_json(run / MARK, {"made_by": "experiments.quickstart"})


def corpus(cfg: Quickstart, folder: Path) -> Prepared:
    source: str | Iterable[str]
    if cfg.data is None:
        source = synthetic.sample(cfg.seed, cfg.stories)
        return prepare(source, folder, heldout_fraction=0.02, seed=cfg.seed)
    return prepare(
        cfg.data, folder, heldout_fraction=0.05, max_bytes=cfg.max_bytes, encoding=cfg.encoding, seed=cfg.seed
    )


def source_floor(heldout: Path) -> dict[str, float]:
    """Bits per byte that the best possible model needs: expected over the grammar, and on these very documents."""
    held = [d for d in heldout.read_text(encoding="utf-8").split(END) if d]
    return {
        "entropy of the source, bits per byte": synthetic.entropy().bits_per_byte,
        "floor of these held-out documents": synthetic.floor_bits_per_byte(held),
    }


@program
def main(cfg: Quickstart) -> None:
    began = time.perf_counter()
    fresh(cfg.run)
    data = cfg.run / "data"
    with phase(1, "corpus: " + (cfg.data or f"{cfg.stories:,} stories from the built-in grammar")):
        prepared = corpus(cfg, data)
        say(f"      {prepared.n_documents:,} documents, {prepared.n_bytes:,} bytes")
    with phase(2, f"tokenizer: byte-level BPE, {cfg.vocab_size:,} ids"):
        bpe = train_tokenizer(Path(prepared.train_path), cfg.vocab_size, special_tokens=(END,))
        save(bpe, cfg.run / "tokenizer.json")
    with phase(3, "token files"):
        train_file = encode_file(bpe, prepared.train_path, data / "train.bin")
        heldout_file = encode_file(bpe, prepared.heldout_path, data / "heldout.bin")
        say(f"      {train_file.n_tokens:,} + {heldout_file.n_tokens:,} tokens")
    model = transformer.Config(
        vocab_size=len(bpe.vocab),
        context_length=cfg.context_length,
        d_model=cfg.d_model,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
    )
    job = Pretrain(
        run=cfg.run,
        train=data / "train.bin",
        heldout=data / "heldout.bin",
        tokenizer=cfg.run / "tokenizer.json",
        model=model,
        optim=cfg.optim,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        eval_every=max(cfg.steps // 6, 1),
        eval_tokens=20_000,
        last_eval_tokens=None if cfg.data is None else 500_000,
        # A story has 160 tokens: a model that may not see how it began cannot reach the floor.
        eval_stride=max(cfg.context_length // 4, 1),
        save_every=max(cfg.steps // 2, 1),
        keep_last=1,
        device=cfg.device,
    )
    with phase(4, "model"):
        ready = start(job)
        result = train(job, ready)
    with phase(5, "sample and report"):
        summary: dict[str, Any] = summarise(job, ready.model, result)
        floor = None
        if cfg.data is None:
            floors = source_floor(Path(prepared.heldout_path))
            floor = floors["floor of these held-out documents"]
            assert result.score is not None
            summary |= {**floors, "above the floor": f"{100 * (result.score.bits_per_byte / floor - 1):.1f} %"}
        with open(prepared.heldout_path, encoding="utf-8") as file:
            opening = " ".join(file.read(400).replace(END, " ").split()[:4])
        prompt = cfg.prompt if cfg.prompt is not None else opening
        samples = [(prompt, complete(result.state.params, ready.model, bpe, prompt, seed=cfg.seed))]
    summary["seconds in all"] = round(time.perf_counter() - began, 1)
    finish(job, ready.model, summary, title="purelm quickstart", samples=samples, floor=floor)
    print(f'continue: python -m experiments.generate {cfg.run} --prompt "{prompt}"')


if __name__ == "__main__":
    main(tyro.cli(Quickstart))
