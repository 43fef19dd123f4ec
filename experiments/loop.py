"""The training loop behind `experiments.pretrain` and `experiments.quickstart`: steps, evaluation, saving.

    ready = start(cfg)          # experiments.setup: everything is checked, nothing written
    result = train(cfg, ready)
    finish(cfg, ready.model, summarise(cfg, ready.model, result), title="...")      # experiments.report
"""

import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from experiments import resume
from experiments.config import Pretrain
from experiments.console import progress_bar, quiet, say
from experiments.report import Result, finish, summarise
from experiments.setup import Setup, make_core, start
from experiments.signals import asked_to_stop
from purelm import accounting, checkpoint, track
from purelm.dist.agreement import non_finite_ranks
from purelm.evals import Score
from purelm.train import TrainState

__all__ = ["Clock", "Result", "Setup", "finish", "make_core", "save", "start", "summarise", "train"]


class Clock:
    """Seconds of the whole run (resumed parts added), and steps per second since the last reading.

    Time within `paused` (evaluations, saves) does not count for steps per second.
    """

    def __init__(self, spent: float, step: int, now: Callable[[], float] = time.perf_counter):
        self.now = now
        self.spent, self.start = spent, now()
        self.idle = 0.0
        self.paused_at: float | None = None
        self.mark, self.mark_step = 0.0, step

    def total(self) -> float:
        return self.spent + self.now() - self.start

    def worked(self) -> float:
        """Seconds since the start without pauses."""
        at = self.now() if self.paused_at is None else self.paused_at
        return at - self.start - self.idle

    def steps_per_second(self, step: int, at: float | None = None) -> float:
        """Since the last reading. at: value of `worked` when the step was done; default now."""
        at = self.worked() if at is None else at
        seconds, steps = at - self.mark, step - self.mark_step
        self.mark, self.mark_step = at, step
        return steps / seconds if seconds > 0 else math.nan

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.paused_at = self.now()
        try:
            yield
        finally:
            self.idle += self.now() - self.paused_at
            self.paused_at = None


class _Pending(NamedTuple):
    """Metrics that are read one step late, since reading waits for the device."""

    step: int
    metrics: dict[str, torch.Tensor]
    at: float | None  # Clock.worked when the step was done; None on a GPU, where that is not known before it is read


def train(cfg: Pretrain, ready: Setup) -> Result:
    """The loop: step, log one step late, evaluate, save. A signal ends it after a step, with SystemExit."""
    state, spent = _first_state(cfg, ready)
    first = ready.done
    emit = _sinks(cfg, ready)
    tokens_per_step = cfg.batch_size * ready.model.context_length
    flops_per_step = accounting.train_flops(ready.model, cfg.batch_size, ready.model.context_length)
    device = ready.world.device
    peak = accounting.peak_flops(device)
    clock = Clock(spent, first)

    def log(row_of: _Pending) -> str:
        values = {k: float(v) for k, v in row_of.metrics.items()}
        rank = int(values.pop("non_finite_rank", -1.0))
        if not math.isfinite(values["loss"]):
            where = f" (first on rank {rank})" if rank >= 0 and ready.world.size > 1 else ""
            raise ValueError(f"loss is {values['loss']} at step {row_of.step}{where}; {_advice(cfg)}")
        rate = clock.steps_per_second(row_of.step, row_of.at)
        row = {"step": row_of.step, "tokens": row_of.step * tokens_per_step, "seconds": round(clock.total(), 3)}
        row |= {**values, "tokens_per_second": round(rate * tokens_per_step, 1)}
        if peak is not None:
            row["mfu"] = flops_per_step * rate / (peak * ready.world.size)
        emit(row)
        return f"loss {values['loss']:.3f}  {row['tokens_per_second'] / 1e3:,.1f}k tokens/s"

    pending: _Pending | None = None
    text, done, number = "", first, 0
    with ExitStack() as stack:
        rest = stack.enter_context(_collector_at_rest())
        asked = stack.enter_context(asked_to_stop(ready.world))
        update: Callable[..., None] = quiet
        for i in range(first, cfg.steps):
            if i == first:
                state, metrics = _first_step(ready, state, i)
                if ready.first:  # measured from here on: the first step compiles
                    update = stack.enter_context(progress_bar("training", cfg.steps, "steps"))
            else:
                state, metrics = ready.run.step(state, ready.batch(i))
            done = i + 1
            at = clock.worked() if device.type == "cpu" else None
            if i == first + 2:
                with clock.paused():
                    rest()
            if pending is not None:
                text, pending = log(pending), None
            if done == 1 or done % cfg.log_every == 0 or done == cfg.steps:
                pending = _Pending(done, metrics, at)
            update(done, text)
            number = asked()
            if number or done == cfg.steps:
                break
            evaluates, saves = _due(cfg.eval_every if cfg.heldout else 0, done), _due(cfg.save_every, done)
            if evaluates or saves:
                if pending is not None:  # write its row now: a run resumed from this checkpoint will not
                    text, pending = log(pending), None
                _wait_for(device)
                with clock.paused():
                    if evaluates:
                        emit(eval_row(ready.evaluate(state.params, cfg.eval_tokens), done))
                    if saves:
                        save(cfg, ready, state, done, clock.total())
        if pending is not None:
            update(done, log(pending))
        seconds = clock.total()
        if done > first:
            save(cfg, ready, state, done, seconds)
        if number and done < cfg.steps and _due(cfg.eval_every if cfg.heldout else 0, done):
            emit(eval_row(ready.evaluate(state.params, cfg.eval_tokens), done))
    if number:
        if ready.first:
            say(f"step {done:,} of {cfg.steps:,} is saved in {cfg.run}: the same command and --resume go on from there")
        raise SystemExit(128 + number)
    result = ready.evaluate(state.params, cfg.last_eval_tokens)
    if result is not None:
        emit(eval_row(result, cfg.steps))
    return Result(state, result, seconds, (cfg.steps - first) * tokens_per_step)


def _first_state(cfg: Pretrain, ready: Setup) -> tuple[TrainState, float]:
    """(state, seconds spent), from the checkpoint or new. The first function that writes into the run's folder."""
    path = cfg.run / "metrics.jsonl"
    if not cfg.goes_on:
        state, spent = ready.run.init(), 0.0
    else:
        trees, meta = ready.run.load(cfg.run / "checkpoints")
        step = torch.full((), ready.done, dtype=torch.int64, device=ready.world.device)
        state, spent = TrainState(trees["params"], trees["opt_state"], step), float(meta["seconds"])
    if not ready.first:
        return state, spent
    cfg.run.mkdir(parents=True, exist_ok=True)
    if cfg.goes_on:
        resume.rewind(path, ready.done, cfg.steps)
        say(f"resumed from step {ready.done:,}")
        for line in ready.forced:
            say(f"  anyway: {line}")
        if ready.forced:
            track.jsonl_sink(path)({"step": ready.done, "resumed_anyway": ready.forced})
    else:
        path.unlink(missing_ok=True)
    own = cfg.run / "tokenizer.json"
    if cfg.tokenizer is not None and cfg.tokenizer.resolve() != own.resolve():
        temporary = own.with_name(f".{own.name}.{os.getpid()}.tmp")
        shutil.copyfile(cfg.tokenizer, temporary)
        os.replace(temporary, own)
    track.write_json(cfg.run / "config.json", ready.config)
    return state, spent


def _first_step(ready: Setup, state: TrainState, i: int) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """The first step, which compiles; the user is told so."""
    if not (ready.compiled and ready.first):
        return ready.run.step(state, ready.batch(i))
    say("compiling the step ...")
    before = time.perf_counter()
    out = ready.run.step(state, ready.batch(i))
    say(f"compiling the step ... {time.perf_counter() - before:.0f} s")
    return out


def _sinks(cfg: Pretrain, ready: Setup) -> Callable[[dict[str, Any]], None]:
    sinks = [track.jsonl_sink(cfg.run / "metrics.jsonl")] if ready.first else []
    if cfg.tensorboard and ready.first:
        sinks.append(track.tensorboard_sink(cfg.run / "tensorboard"))

    def emit(row: dict[str, Any]) -> None:
        for sink in sinks:
            sink(row)

    return emit


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _wait_for(device: torch.device) -> None:
    """Wait for steps under way, so that their time does not count as the evaluation's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def save(cfg: Pretrain, ready: Setup, state: TrainState, step: int, seconds: float) -> None:
    """Save a checkpoint if all its values are finite; else ValueError on every rank, and older checkpoints stay."""
    trees = {"params": state.params, "opt_state": state.opt_state}
    for name, values in trees.items():
        if ranks := non_finite_ranks(values):
            where = f" on rank {', '.join(map(str, ranks))}" if ready.world.size > 1 else ""
            raise ValueError(f"{name} hold inf or nan{where} after step {step}: nothing is saved; {_advice(cfg)}")
    meta = {
        "config": ready.config,
        "fingerprints": ready.fingerprints,
        "seed": cfg.seed,
        "data": {"key": "split(key(seed))[1]", "step": step},
        "seconds": seconds,
    }
    ready.run.save(cfg.run / "checkpoints", step, trees, meta=meta, keep_last=cfg.keep_last, finite=True)


def _advice(cfg: Pretrain) -> str:
    """Advice after a loss that is not finite: what to change, and which checkpoint to go on from."""
    newest = checkpoint.latest(cfg.run / "checkpoints")
    lower = f"lower optim.lr ({cfg.optim.lr}) or optim.clip ({cfg.optim.clip})"
    if newest is None:
        return f"{lower}; newest checkpoint: none"
    return f"{lower} and go on with --resume-anyway; newest checkpoint: {newest}"


@contextmanager
def _collector_at_rest() -> Iterator[Callable[[], None]]:
    """Yields a function that exempts all present objects from Python's garbage collection until the context ends.

    After compilation there are a million objects, and a full collection takes 0.2 to 0.4 s. It comes every 15 to 40
    steps, in each process at another time, while the other processes wait.
    """

    def rest() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield rest
    finally:
        gc.unfreeze()


def eval_row(result: Score | None, step: int) -> dict[str, Any]:
    assert result is not None
    row: dict[str, Any] = {"step": step, "heldout_loss": result.nats_per_token}
    if result.n_bytes:
        row["heldout_bits_per_byte"] = result.bits_per_byte
    return row
