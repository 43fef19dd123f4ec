"""The course of a fine-tuning run: steps, evaluations, checkpoints, export, report; on one process or many."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from experiments import limits
from experiments.console import progress_bar, quiet, say
from experiments.export import export
from experiments.finetune.config import FineTuning
from experiments.finetune.heldout import Heldout
from experiments.finetune.report import Panels, finish
from experiments.finetune.setup import Ready
from experiments.lock import locked
from experiments.processes import joined
from experiments.run_state import begin_files, first_state, save_state
from experiments.setup import check_run_folder
from experiments.signals import asked_to_stop
from purelm.dist import world

C = TypeVar("C", bound=FineTuning)


def fine_tune(
    cfg: C,
    start: Callable[[C, world.World], Ready],
    heldout: Callable[[C, Ready], Heldout],
    panels: Panels,
    extra: str = "",
) -> None:
    """The whole run. start: checks all and reads all; panels: of curves.png; extra: more names of files, to be told."""
    limits.check(cfg)
    with joined(cfg.device, cfg.parallel.timeout) as here:
        check_run_folder(cfg.run, cfg.resume)
        with locked(cfg.run) if here.rank == 0 else nullcontext():
            ready = start(cfg, here)
            params = _run(cfg, ready, heldout(cfg, ready))
            if ready.first:
                if cfg.export:
                    fields = {"eos_token_id": ready.end[0], "pad_token_id": ready.pad} if ready.end else {}
                    export(cfg.run, params, ready.model, ready.bpe, fields, ready.chat)
                finish(cfg, ready.meta["config"], panels, extra)


def _run(cfg: FineTuning, ready: Ready, heldout: Heldout) -> Any:
    """The whole parameters after the last step."""
    names = ("metrics.jsonl", "generations.jsonl")
    emit = begin_files(cfg.run, names, ready.meta["config"], ready.bpe, ready.world, done=ready.done)
    state = first_state(cfg.run, ready.run, ready.world, done=ready.done, unit="step")

    def evaluate(number: int) -> None:
        row = heldout.evaluate(ready.run.whole(state.params), number)
        if row:
            emit({"step": number, **row})

    if ready.done == 0:
        evaluate(0)
    with progress_bar("fine-tuning", cfg.steps, "steps") if ready.first else nullcontext(quiet) as update:
        with asked_to_stop(ready.world) as asked:
            log = _Log(cfg, emit, update)
            for i in range(ready.done, cfg.steps):
                batch = ready.batch(i)
                state, metrics = ready.run.step(state, batch)
                number = i + 1
                n_tokens = batch["tokens"].numel() * ready.world.size
                log.add(_Pending(number, metrics, n_tokens, time.perf_counter()))
                signal = asked()
                last = number == cfg.steps
                evaluates = not signal and (last or (cfg.eval_every and number % cfg.eval_every == 0))
                saves = last or signal or (cfg.save_every and number % cfg.save_every == 0)
                if evaluates or saves:
                    log.flush()
                # Evaluated before it is saved: what is saved has its rows, and rows after it are written again.
                if evaluates:
                    evaluate(number)
                if saves:
                    save_state(
                        cfg.run, ready.run, state, number, ready.meta, keep_last=cfg.keep_last, unit="step"
                    )  # fmt: skip
                if evaluates or saves:
                    log.begin()
                if signal and not last:
                    if ready.first:
                        say(f"step {number:,} is saved in {cfg.run}: the same command and --resume go on from there")
                    raise SystemExit(128 + signal)
    return ready.run.whole(state.params)


class _Pending(NamedTuple):
    """A step whose metrics are read when the next one has been started, since reading waits for the device."""

    number: int
    metrics: dict[str, torch.Tensor]
    tokens: int  # positions of all processes, padding among them
    at: float  # the clock when it had been started, which on a CPU is when it had been done


class _Log:
    """Rows of metrics.jsonl, a step late."""

    def __init__(self, cfg: FineTuning, emit: Callable[[dict[str, Any]], None], update: Callable[..., None]):
        self.cfg, self.emit, self.update = cfg, emit, update
        self.pending: _Pending | None = None
        self.begin()

    def begin(self) -> None:
        """The clock of steps starts here."""
        self.since, self.tokens = time.perf_counter(), 0

    def add(self, step: _Pending) -> None:
        self.flush()
        self.pending = step

    def flush(self) -> None:
        """Read the step that is pending."""
        if self.pending is None:
            return
        (number, metrics, tokens, at), self.pending = self.pending, None
        values = {name: float(x) for name, x in metrics.items()}
        values.pop("non_finite_rank", None)
        if not np.isfinite(values["loss"]):
            raise ValueError(f"loss is {values['loss']} at step {number}: lower optim.lr ({self.cfg.optim.lr})")
        self.tokens += tokens
        rate = self.tokens / max(at - self.since, 1e-9)
        if number % self.cfg.log_every == 0 or number == self.cfg.steps:
            self.emit({"step": number, **values, "tokens_per_second": round(rate, 1)})
            self.since, self.tokens = at, 0
        self.update(number, f"loss {values['loss']:.3f}  {rate:,.0f} tokens/s")
