"""From raw text to a trained language model in one command.

    python -m experiments.quickstart                      # stories from a grammar of known entropy
    python -m experiments.quickstart --data my_text.txt   # .txt .jsonl .zip .gz .zst, a folder, or hub:owner/name

Corpus, BPE tokenizer, token files, a small Transformer, held-out bits per byte, a sample, a report. For the built-in
stories the entropy of the source is known in closed form, so the report says how far from the best possible model
this one is.

An earlier quickstart in the same folder stays until the new corpus, tokenizer and token files are complete, which then
replace it. One that was stopped goes on with --resume.
"""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from experiments import capacity
from experiments.config import Optim, Pretrain, config_json
from experiments.console import pick_device, program, say
from experiments.generate import END, complete
from experiments.limits import Count, Place, Range, Seed, Text
from experiments.lock import LOCK, locked
from experiments.loop import train
from experiments.report import finish, summarise
from experiments.setup import Setup, n_moments, start
from purelm import track
from purelm.data import Prepared, open_prepared, prepare, synthetic
from purelm.data.corpora import FEW_DOCUMENTS
from purelm.models import transformer
from purelm.tokenizer import BPE, load, save
from purelm.tokenizer import train as train_tokenizer
from purelm.tokenizer.files import encode_file

MARK = "quickstart.json"  # marks a folder that a quickstart made, and so may replace
NEW = ".new"  # subfolder in which the next run is prepared
CORPUS = ("data", "encoding", "stories", "max_bytes", "vocab_size", "seed")  # what a resumed run must not change
STORY_BYTES = 1100  # of disk for one story: 700 of text, 200 tokens of 2 bytes


@dataclass(frozen=True)
class Quickstart:
    """From raw text to a trained language model."""

    run: Place = Path("runs/quickstart")
    data: str | None = None
    """a file, a folder or hub:owner/name; the built-in stories if not given"""
    encoding: tuple[str, ...] = ("utf-8",)
    """encodings of the user's text; each document is decoded by the first that fits: --encoding utf-8 cp1252"""
    # The split cuts through documents if there are fewer, and the entropy of half a story is not known.
    stories: Annotated[int, Range(FEW_DOCUMENTS)] = 24_000
    """how many built-in stories to generate"""
    max_bytes: Count = 100_000_000
    """the most bytes of the user's text to read"""
    vocab_size: Annotated[int, Range(257, 2**32)] = 2048
    """256 bytes, the token between documents, and merges"""
    steps: Count = 850
    batch_size: Count = 12
    context_length: Count = 256
    d_model: Count = 192
    n_layers: Count = 3
    n_heads: Count = 6
    optim: Optim = field(
        default_factory=lambda: Optim(name="muon", lr=4e-3, adamw_lr_ratio=1.0, lr_min_ratio=0.0, warmup_steps=50)
    )
    seed: Seed = 0
    device: str = "auto"
    prompt: Text | None = None
    """beginning of the sample; default the first words of a held-out document"""
    resume: bool = False
    """go on with what an earlier quickstart prepared, from its newest checkpoint"""


class Material(NamedTuple):
    """What the model is trained on."""

    prepared: Prepared
    bpe: BPE
    floors: dict[str, float]  # lowest bits per byte that a model can reach, where known (built-in stories)
    opening: str  # first words of a held-out document


@contextmanager
def phase(number: int, title: str) -> Iterator[None]:
    say(f"[{number}/5] {title}")
    before = time.perf_counter()
    yield
    say(f"      {time.perf_counter() - before:.1f} s")


def check(cfg: Quickstart) -> None:
    """Find the errors that can be known before anything is read or written."""
    device = pick_device(cfg.device)
    moments = n_moments(cfg.optim)
    capacity.check_fits(model_of(cfg, cfg.vocab_size), cfg.batch_size, device, moments=moments)
    if cfg.run.is_dir() and not (cfg.run / MARK).is_file():
        if set(entry.name for entry in cfg.run.iterdir()) - {LOCK, NEW}:
            raise ValueError(f"run {cfg.run} exists and was not made by quickstart: give another --run")
    if cfg.data is None:
        capacity.check_disk(cfg.stories * STORY_BYTES, cfg.run, f"stories {cfg.stories:,}")
    elif not cfg.data.startswith("hub:"):
        data, run = Path(cfg.data).resolve(), cfg.run.resolve()
        if data == run or run in data.parents:
            raise ValueError(f"data {cfg.data} lies in the folder of the run, {cfg.run}, which is written anew")
        if data in run.parents:
            raise ValueError(f"run {cfg.run} lies in the folder that is read, data {cfg.data}: give another --run")


def model_of(cfg: Quickstart, vocab_size: int) -> transformer.Config:
    return transformer.Config(
        vocab_size=vocab_size,
        context_length=cfg.context_length,
        d_model=cfg.d_model,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
    )


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


def material(cfg: Quickstart, prepared: Prepared, bpe: BPE) -> Material:
    with open(prepared.heldout_path, encoding="utf-8") as file:
        opening = " ".join(file.read(400).replace(END, " ").split()[:4])
    floors = source_floor(Path(prepared.heldout_path)) if cfg.data is None else {}
    return Material(prepared, bpe, floors, opening)


def make(cfg: Quickstart, folder: Path) -> Material:
    """Corpus, tokenizer and token files, in a folder."""
    data = folder / "data"
    data.mkdir(parents=True)
    settings = {name: getattr(cfg, name) for name in CORPUS}
    track.write_json(folder / MARK, {"made_by": "experiments.quickstart", "corpus": settings})
    with phase(1, "corpus: " + (cfg.data or f"{cfg.stories:,} stories from the built-in grammar")):
        prepared = corpus(cfg, data)
        say(f"      {prepared.n_documents:,} documents, {prepared.n_bytes:,} bytes")
        if cfg.data is None and prepared.rule != "documents":
            raise ValueError(f"stories {cfg.stories}: fewer than {FEW_DOCUMENTS} of them differ; give more")
    with phase(2, f"tokenizer: byte-level BPE, {cfg.vocab_size:,} ids"):
        bpe = train_tokenizer(Path(prepared.train_path), cfg.vocab_size, special_tokens=(END,))
        save(bpe, folder / "tokenizer.json")
    with phase(3, "token files"):
        train_file = encode_file(bpe, prepared.train_path, data / "train.bin")
        heldout_file = encode_file(bpe, prepared.heldout_path, data / "heldout.bin")
        say(f"      {train_file.n_tokens:,} + {heldout_file.n_tokens:,} tokens")
    return material(cfg, prepared, bpe)


def made_before(cfg: Quickstart) -> Material:
    """What an earlier quickstart prepared in the run's folder; ValueError if it was made with other settings."""
    path = cfg.run / MARK
    if not path.is_file():
        raise ValueError(f"run {cfg.run} has no quickstart to go on with")
    before = json.loads(path.read_text(encoding="utf-8")).get("corpus", {})
    for name in CORPUS:
        now = json.loads(json.dumps(getattr(cfg, name)))
        if name in before and before[name] != now:
            raise ValueError(f"--resume: {name} {now!r} is not that of the run, {before[name]!r}")
    return material(cfg, open_prepared(cfg.run / "data"), load(cfg.run / "tokenizer.json"))


def put_in_place(run: Path) -> None:
    """Replace an earlier quickstart by what was prepared; the mark is there all the time."""
    for entry in run.iterdir():
        if entry.name not in (LOCK, NEW, MARK):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for entry in (run / NEW).iterdir():
        entry.replace(run / entry.name)
    (run / NEW).rmdir()


def job_in(cfg: Quickstart, folder: Path, vocab_size: int) -> Pretrain:
    """Configuration of the training run, with its files in a folder."""
    return Pretrain(
        run=folder,
        train=folder / "data" / "train.bin",
        heldout=folder / "data" / "heldout.bin",
        tokenizer=folder / "tokenizer.json",
        model=model_of(cfg, vocab_size),
        optim=cfg.optim,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        eval_every=max(cfg.steps // 6, 1),
        eval_tokens=20_000,
        last_eval_tokens=None if cfg.data is None else 500_000,
        # A story has 160 tokens: a model whose context does not reach back to its begin cannot reach the floor.
        eval_stride=max(cfg.context_length // 4, 1),
        save_every=max(cfg.steps // 2, 1),
        keep_last=1,
        device=cfg.device,
        resume=cfg.resume,
    )


def prepare_run(cfg: Quickstart) -> tuple[Material, Pretrain, Setup]:
    """Material and setup in the run's folder, whose old contents stay until both are complete."""
    if cfg.resume:
        found = made_before(cfg)
        job = job_in(cfg, cfg.run, len(found.bpe.vocab))
        return found, job, start(job)
    new = cfg.run / NEW
    shutil.rmtree(new, ignore_errors=True)  # left by a quickstart that was killed
    try:
        found = make(cfg, new)
        ready = start(job_in(cfg, new, len(found.bpe.vocab)))
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    put_in_place(cfg.run)
    job = job_in(cfg, cfg.run, len(found.bpe.vocab))
    # Open files stay open when they are renamed.
    return found, job, ready._replace(config=config_json(job, ready.model))


@program
def main(cfg: Quickstart) -> None:
    check(cfg)
    with locked(cfg.run):
        run(cfg)


def run(cfg: Quickstart) -> None:
    began = time.perf_counter()
    found, job, ready = prepare_run(cfg)
    if ready.finished:
        say(f"run {cfg.run} is finished: {ready.done:,} of {cfg.steps:,} steps; with more --steps it goes on")
        return
    with phase(4, "model"):
        result = train(job, ready)
    with phase(5, "sample and report"):
        summary: dict[str, Any] = summarise(job, ready.model, result)
        floor = found.floors.get("floor of these held-out documents")
        if floor is not None:
            assert result.score is not None
            above = f"{100 * (result.score.bits_per_byte / floor - 1):.1f} %"
            summary |= {**found.floors, "above the floor": above}
        prompt = cfg.prompt if cfg.prompt is not None else found.opening
        samples = [(prompt, complete(result.state.params, ready.model, found.bpe, prompt, seed=cfg.seed))]
    summary["seconds in all"] = round(time.perf_counter() - began, 1)
    finish(job, ready.model, summary, title="purelm quickstart", samples=samples, floor=floor)
    print(f'continue: python -m experiments.generate {cfg.run} --prompt "{prompt}"')


if __name__ == "__main__":
    main(tyro.cli(Quickstart))
