"""The training loop behind `experiments.pretrain` and `experiments.quickstart`: setup, steps, evaluation, saving."""

import dataclasses
import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.config import Optim, Pretrain
from experiments.console import can_compile, pick_device, progress_bar, say
from experiments.ops import ops_named
from experiments.parallel import Job, Run, alone, layout
from purelm import accounting, checkpoint, random, track, tree
from purelm.data import eval_windows, open_tokens, random_windows, shuffled_windows
from purelm.data.tokens import check_ids, check_tokenizer
from purelm.dist.world import World
from purelm.evals import Score
from purelm.models import transformer
from purelm.ops import Ops
from purelm.optim import Optimizer, adamw, is_matrix, muon_adamw, schedules
from purelm.tokenizer import BPE, fingerprint
from purelm.tokenizer import load as load_tokenizer
from purelm.train import FULL, MIXED, TrainState
from purelm.transforms import remat


class Result(NamedTuple):
    """What a finished run reports."""

    state: TrainState
    score: Score | None
    seconds: float
    tokens: int


def resolve_model(cfg: Pretrain, vocab_size: int | None) -> transformer.Config:
    """The model with the token file's vocabulary; a bare .bin does not say, so there the flag must."""
    if vocab_size is None:
        if cfg.model.vocab_size == 1:
            raise ValueError(f"model.vocab_size must be given: {cfg.train} has no .json beside it that tells it")
        return cfg.model
    if cfg.model.vocab_size == 1:
        return dataclasses.replace(cfg.model, vocab_size=vocab_size)
    if cfg.model.vocab_size < vocab_size:
        raise ValueError(f"model.vocab_size {cfg.model.vocab_size} is below {vocab_size}, that of {cfg.train}")
    return cfg.model


def make_core(optim: Optim) -> Optimizer:
    """The optimizer without clipping."""
    betas = (optim.beta1, optim.beta2)
    if optim.name == "muon":
        return muon_adamw(
            betas=betas, eps=optim.eps, weight_decay=optim.weight_decay, adamw_lr_scale=optim.adamw_lr_ratio
        )
    return adamw(betas=betas, eps=optim.eps, weight_decay=optim.weight_decay, mask=is_matrix)


def make_schedule(optim: Optim, steps: int) -> Callable[[torch.Tensor], torch.Tensor]:
    final, warmup = optim.lr * optim.lr_min_ratio, min(optim.warmup_steps, steps)
    if optim.schedule == "cosine":
        return schedules.cosine(optim.lr, steps, n_warmup=warmup, lr_final=final)
    if optim.schedule == "linear":
        return schedules.linear(optim.lr, steps, n_warmup=warmup, lr_final=final)
    if optim.schedule == "wsd":
        decay = min(max(round(optim.decay_ratio * steps), 1), steps - warmup)
        return schedules.wsd(optim.lr, steps, n_warmup=warmup, n_decay=decay, lr_final=final)
    return schedules.constant(optim.lr, n_warmup=warmup)


def token_bytes(bpe: BPE) -> torch.Tensor:
    """UTF-8 bytes that each id stands for; special tokens are no text and count 0."""
    special = {s.encode() for s in bpe.special_tokens}
    sizes = torch.zeros(max(bpe.vocab) + 1, dtype=torch.int64)
    for i, piece in bpe.vocab.items():
        sizes[i] = 0 if piece in special else len(piece)
    return sizes


def config_json(cfg: Pretrain, model: transformer.Config) -> dict[str, Any]:
    out = dataclasses.asdict(cfg)
    out["model"] = dataclasses.asdict(model)
    return {k: str(v) if isinstance(v, Path) else v for k, v in out.items()}


def model_of_run(run: Path) -> transformer.Config:
    """The model's Config as the run's newest checkpoint recorded it."""
    return transformer.config_from_dict(checkpoint.read_manifest(run / "checkpoints")["meta"]["config"]["model"])


def pick_ops(cfg: Pretrain) -> Ops:
    # SDPA has no soft cap: then the reference computes attention.
    uncapped = cfg.model.attention_softcap is None
    return ops_named(cfg.ops if uncapped or cfg.ops != "sdpa" else "reference")


class Setup(NamedTuple):
    """The functions and data of a run, made from its configuration."""

    model: transformer.Config
    run: Run
    batch: Callable[[int], dict]
    evaluate: Callable[[Any, int | None], Score | None]
    world: World

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.world.rank == 0


def make_deterministic() -> None:
    """Ask torch for kernels that add in a fixed order (compiled code otherwise uses atomics, on a CPU too)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it said before its first call
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs a pass over each buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def setup(cfg: Pretrain, world: World) -> Setup:
    device = world.device
    if cfg.batch_size % (world.size * cfg.microbatches):
        parts = f"{world.size} processes x {cfg.microbatches} microbatches"
        raise ValueError(f"batch_size {cfg.batch_size} is not divisible by {parts}")
    if cfg.deterministic:
        make_deterministic()
    tokens = open_tokens(cfg.train)
    model = resolve_model(cfg, tokens.vocab_size)
    check_ids(tokens, model.vocab_size)
    bpe = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    if bpe is not None:
        check_tokenizer(tokens, fingerprint(bpe))
    bf16 = cfg.compute == "bf16" or (cfg.compute == "auto" and device.type == "cuda")
    precision = MIXED if bf16 else FULL
    init_key, data_key = random.split(random.key(cfg.seed))
    windows = random_windows if cfg.order == "windows" else shuffled_windows

    def batch(i: int) -> dict:
        place = {"rank": world.rank, "world_size": world.size}
        return windows(tokens, data_key, i, cfg.batch_size, model.context_length, device=device, **place)

    batch(0)  # too few tokens is said now
    heldout = open_tokens(cfg.heldout) if cfg.heldout else None
    if heldout is not None:
        check_ids(heldout, model.vocab_size)
        if bpe is not None:
            check_tokenizer(heldout, fingerprint(bpe))
    sizes = token_bytes(bpe) if bpe is not None else None

    def evaluate(params: Any, limit: int | None) -> Score | None:
        """Windows overlap: each counted token but the first has context_length - stride tokens or more before it."""
        if heldout is None:
            return None
        part = heldout.tokens[: limit + 1] if limit is not None else heldout.tokens[:]
        if sizes is None:
            n_bytes = heldout.n_bytes if limit is None and heldout.n_bytes else 0
        else:  # the first token is context only: nothing predicts it
            n_bytes = int(sizes[torch.from_numpy(part[1:].astype("int64"))].sum())
        params = tree.cast(params, precision.compute)
        size = model.context_length
        stride = max(size // 2, 1) if cfg.eval_stride is None else cfg.eval_stride
        windows = eval_windows(part, min(cfg.batch_size, 16), size, device=device, stride=stride)
        return run.evaluate(params, windows, n_bytes)

    compiled = cfg.compile == "yes" or (cfg.compile == "auto" and can_compile(device))
    job = Job(
        model=model,
        init=partial(transformer.init, init_key, model),
        core=make_core(cfg.optim),
        max_norm=cfg.optim.clip,
        whole_matrices=cfg.optim.name == "muon",
        schedule=make_schedule(cfg.optim, cfg.steps),
        ops=pick_ops(cfg),
        wrap_block=remat if cfg.remat else transformer.identity,
        precision=precision,
        microbatches=cfg.microbatches,
    )
    if world.size == 1:
        graph = cfg.graph == "yes" or (cfg.graph == "auto" and compiled and device.type == "cuda")
        run = alone(job, device, compiled=compiled, graph=graph)
    else:
        run = layout(world, cfg.parallel, job, compiled=compiled)
    return Setup(model, run, batch, evaluate, world)


def restore(cfg: Pretrain, ready: Setup) -> tuple[TrainState, float]:
    """State and seconds of the newest checkpoint; the run's own config must be the one that is resumed."""
    trees, meta = ready.run.load(cfg.run / "checkpoints")
    if meta["seed"] != cfg.seed:
        raise ValueError(f"seed {cfg.seed} is not that of the checkpoint, {meta['seed']}: the data would differ")
    step = torch.full((), meta["step"], dtype=torch.int64, device=ready.world.device)
    if ready.first:
        track.truncate_rows(cfg.run / "metrics.jsonl", meta["step"])
    return TrainState(trees["params"], trees["opt_state"], step), float(meta["seconds"])


class Clock:
    """Seconds of training: of the whole run (over resumes), and of the stretch since the last reading.

    Evaluations and saves are paused out of the stretch, so tokens per second is that of the steps.
    """

    def __init__(self, spent: float, step: int):
        self.start = time.perf_counter() - spent
        self.mark, self.mark_step = time.perf_counter(), step

    def total(self) -> float:
        return time.perf_counter() - self.start

    def steps_per_second(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self.mark_step) / max(now - self.mark, 1e-9)
        self.mark, self.mark_step = now, step
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.mark += time.perf_counter() - before


def save(cfg: Pretrain, ready: Setup, state: TrainState, step: int, seconds: float) -> None:
    meta = {
        "config": config_json(cfg, ready.model),
        "seed": cfg.seed,
        "data": {"key": "split(key(seed))[1]", "step": step},
        "seconds": seconds,
    }
    trees = {"params": state.params, "opt_state": state.opt_state}
    ready.run.save(cfg.run / "checkpoints", step, trees, meta=meta, keep_last=cfg.keep_last)


def train(cfg: Pretrain, ready: Setup) -> Result:
    """The loop: step, log one step late (reading a metric waits for the device), evaluate, save."""
    spent, first = 0.0, 0
    path = cfg.run / "metrics.jsonl"
    if cfg.resume:
        state, spent = restore(cfg, ready)
        first = int(state.step)
        if ready.first:
            say(f"resumed from step {first:,}")
    else:
        state = ready.run.init()
        if ready.first:
            path.unlink(missing_ok=True)
    sinks = [track.jsonl_sink(path)] if ready.first else []
    if cfg.tensorboard and ready.first:
        sinks.append(track.tensorboard_sink(cfg.run / "tensorboard"))
    tokens_per_step = cfg.batch_size * ready.model.context_length
    flops_per_step = accounting.train_flops(ready.model, cfg.batch_size, ready.model.context_length)
    peak = accounting.peak_flops(ready.world.device)
    clock = Clock(spent, first)

    def emit(row: dict[str, Any]) -> None:
        for sink in sinks:
            sink(row)

    def log(step: int, metrics: dict[str, torch.Tensor]) -> str:
        values = {k: float(v) for k, v in metrics.items()}
        rank = int(values.pop("non_finite_rank", -1.0))
        if not math.isfinite(values["loss"]):
            newest = checkpoint.latest(cfg.run / "checkpoints")
            where = f" (first on rank {rank})" if rank >= 0 and ready.world.size > 1 else ""
            raise ValueError(
                f"loss is {values['loss']} at step {step}{where}; lower optim.lr ({cfg.optim.lr}) or optim.clip "
                f"({cfg.optim.clip}); newest checkpoint: {'none' if newest is None else newest}"
            )
        rate = clock.steps_per_second(step)
        row = {"step": step, "tokens": step * tokens_per_step, "seconds": round(clock.total(), 3), **values}
        row["tokens_per_second"] = round(rate * tokens_per_step, 1)
        if peak is not None:
            row["mfu"] = flops_per_step * rate / (peak * ready.world.size)
        emit(row)
        return f"loss {values['loss']:.3f}  {row['tokens_per_second'] / 1e3:,.1f}k tokens/s"

    pending: tuple[int, dict[str, torch.Tensor]] | None = None
    text = ""
    bar = progress_bar("training", cfg.steps, "steps") if ready.first else nullcontext(_quiet)
    with bar as update, _collector_at_rest() as rest:
        for i in range(first, cfg.steps):
            state, metrics = ready.run.step(state, ready.batch(i))
            done = i + 1
            if i == first + 2:
                rest()
            if pending is not None:
                text, pending = log(*pending), None
            if done == 1 or done % cfg.log_every == 0 or done == cfg.steps:
                pending = (done, metrics)
            update(done, text)
            if done == cfg.steps:
                break
            with clock.paused():
                if cfg.heldout and cfg.eval_every and done % cfg.eval_every == 0:
                    emit(eval_row(ready.evaluate(state.params, cfg.eval_tokens), done))
                if cfg.save_every and done % cfg.save_every == 0:
                    if pending is not None:  # its row must be on disk: a run resumed from here will not write it
                        text, pending = log(*pending), None
                    save(cfg, ready, state, done, clock.total())
        if pending is not None:
            update(cfg.steps, log(*pending))
    seconds = clock.total()
    save(cfg, ready, state, cfg.steps, seconds)
    result = ready.evaluate(state.params, cfg.last_eval_tokens)
    if result is not None:
        emit(eval_row(result, cfg.steps))
    return Result(state, result, seconds, (cfg.steps - first) * tokens_per_step)


@contextmanager
def _collector_at_rest() -> Iterator[Callable[[], None]]:
    """A function that takes all objects of now out of Python's garbage collections, until the context ends.

    After compilation there are a million, and a collection that looks at all of them takes 0.2 to 0.4 s: every 15 to 40
    steps, on each process at a time of its own, while the others wait.
    """

    def rest() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield rest
    finally:
        gc.unfreeze()


def _quiet(done: float, text: str = "") -> None:
    """The progress of all processes but the first."""


def eval_row(result: Score | None, step: int) -> dict[str, Any]:
    assert result is not None
    row: dict[str, Any] = {"step": step, "heldout_loss": result.nats_per_token}
    if result.n_bytes:
        row["heldout_bits_per_byte"] = result.bits_per_byte
    return row


def summarise(cfg: Pretrain, model: transformer.Config, result: Result) -> dict[str, Any]:
    """What came out, for the terminal and the report."""
    out: dict[str, Any] = {
        "parameters": accounting.n_params(model),
        "steps": cfg.steps,
        "tokens": cfg.steps * cfg.batch_size * model.context_length,
        "seconds of training": round(result.seconds, 1),
    }
    if result.score is not None:
        out["held-out loss, nats per token"] = result.score.nats_per_token
        out["held-out perplexity"] = result.score.perplexity
        if result.score.n_bytes:
            out["held-out bits per byte"] = result.score.bits_per_byte
    return out


def finish(
    cfg: Pretrain,
    model: transformer.Config,
    summary: dict[str, Any],
    *,
    title: str,
    samples: Sequence[tuple[str, str]] = (),
    floor: float | None = None,
) -> None:
    """curves.png and report.html from metrics.jsonl, and the summary on the terminal."""
    curves = cfg.run / "curves.png"
    track.plot_curves(track.read_rows(cfg.run / "metrics.jsonl"), curves, floor=floor)
    config = config_json(cfg, model)
    track.write_report(
        cfg.run / "report.html", title=title, summary=summary, config=config, curves=curves, samples=samples
    )
    track.write_json(cfg.run / "summary.json", summary)
    for name, value in summary.items():
        print(f"{name:34} {track.show(value)}")
    for prompt, text in samples:
        print(f"\n--- {prompt!r}\n{text}")
    print(f"\n{cfg.run}: config.json, metrics.jsonl, curves.png, report.html, checkpoints/")


def start(cfg: Pretrain, world: World | None = None) -> Setup:
    """Check the request, make the run's folder, copy the tokenizer there and write config.json."""
    if cfg.steps < 1 or cfg.batch_size < 1 or cfg.log_every < 1:
        raise ValueError(
            f"steps, batch_size and log_every must be positive: {cfg.steps}, {cfg.batch_size}, {cfg.log_every}"
        )
    there = checkpoint.latest(cfg.run / "checkpoints")
    if there is not None and not cfg.resume:
        raise ValueError(f"run {cfg.run} has a checkpoint of step {there}: give --resume, or another --run")
    stride, context_length = cfg.eval_stride, cfg.model.context_length
    if stride is not None and not 1 <= stride <= context_length:
        raise ValueError(f"eval_stride is {stride}: allowed is 1 to model.context_length, {context_length}")
    ready = setup(cfg, world or World(0, 1, pick_device(cfg.device)))
    if not ready.first:
        return ready
    cfg.run.mkdir(parents=True, exist_ok=True)
    if cfg.tokenizer is not None and cfg.tokenizer.resolve() != (cfg.run / "tokenizer.json").resolve():
        shutil.copyfile(cfg.tokenizer, cfg.run / "tokenizer.json")
    track.write_json(cfg.run / "config.json", config_json(cfg, ready.model))
    size, n_params = ready.model.context_length, accounting.n_params(ready.model)
    where = f"{ready.world.size} processes, {cfg.parallel.mode}" if ready.world.size > 1 else str(ready.world.device)
    say(f"{n_params:,} parameters on {where}; {cfg.steps:,} steps of {cfg.batch_size} x {size} tokens")
    return ready
