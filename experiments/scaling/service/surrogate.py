"""A back end that trains nothing: runs of a hidden law, in milliseconds, so that a study can be practised anywhere.

    backend(Surrogate())            # Backend("surrogate", run, reveal)

Each key has a law of its own (`hidden_law`), which `reveal` tells after the final run. Runs behave as on a device: they
take as long, end when their time is over, diverge where the learning rate is too large (the loss rises; far above the
edge the run breaks), and differ between seeds. One configuration gives one result, whatever its max_runtime_seconds.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from experiments import limits
from experiments.scaling.service.backend import Backend, Broken, Control, Done, Late, Outcome, Stopped
from experiments.scaling.service.best_run import best
from experiments.scaling.service.hidden_law import (
    SGD_LR,
    Hidden,
    Surrogate,
    ceiling,
    centres,
    draw,
    edge_of,
    eval_seconds,
    expected,
    penalty,
    schedule,
    setup_of,
    sgd_of,
    step_seconds,
)
from experiments.scaling.service.schemas import (
    Rules,
    TrainingConfig,
    eval_steps,
    total_steps,
)
from purelm import random

__all__ = ["Surrogate", "Trajectory", "backend", "trajectory"]

TICK = 0.1  # seconds between two looks at control.stop
BREAKS = 1.5  # so far above the edge, in ln lr, the loss is no number soon
GRID = 2000  # points at which the schedule is searched for the edge
STATE = "surrogate.json"


class Trajectory(NamedTuple):
    """All of a run: it could be looked up."""

    seconds: NDArray[Any]  # (n,) when each evaluation ends
    val_losses: NDArray[Any]  # (n,) of those there is time for
    outcome: Outcome


def backend(settings: Surrogate) -> Backend:
    """The surrogate with these settings. ValueError for numbers out of their range."""
    limits.check(settings)
    return Backend("surrogate", functools.partial(_run, settings), functools.partial(_reveal, settings))


def trajectory(settings: Surrogate, cfg: TrainingConfig, rules: Rules, hidden: Hidden, seed: int) -> Trajectory:
    """What becomes of cfg, for the key with this seed and hidden law."""
    s, plan = setup_of(cfg, rules), cfg.optimizer_config.lr_scheduler
    steps, every = total_steps(cfg, rules), eval_steps(cfg, rules)
    each = float(step_seconds(settings, s, rules.seq_len))
    evaluation = float(eval_seconds(settings, s, rules, cfg.val_batch_size))
    chunk = every * each + evaluation
    n = int(min(cfg.n_evals, cfg.max_runtime_seconds // chunk))
    done = every * np.arange(1, n + 1, dtype=np.int64)

    lr_star, batch_star = centres(hidden, s)
    if sgd_of(cfg):
        lr_star *= SGD_LR
    most = float(max(plan.peak_value, plan.init_value if plan.warmup_frac else 0.0))
    q = penalty(hidden, np.log(most / lr_star), np.log(s.batch / batch_star)) + hidden.sgd * sgd_of(cfg)
    share = done / steps
    losses = expected(hidden, settings, s, q, done * (s.tokens / steps), schedule(plan, share) / most, plan.warmup_frac)

    # Divergence: from the first update whose learning rate is over the edge the loss rises, and stays above.
    over = np.log(most / lr_star) - edge_of(hidden, plan.warmup_frac, cfg.optimizer_config.grad_clip_norm is not None)
    begins = 1.0
    if over > 0:
        fine = np.union1d(np.linspace(0, 1, GRID), plan.warmup_frac)  # the peak is among them
        begins = float(fine[np.argmax(np.log(np.maximum(schedule(plan, fine), 1e-300) / most) >= -over - 1e-12)])
        risen = -np.expm1(-np.maximum(share - begins, 0) / 0.03)
        losses = losses + (ceiling(s) + 0.3 - losses) * np.where(share > begins, risen, 0.0)
    losses = losses + _noise(hidden, cfg, seed, done)

    seconds = chunk * np.arange(1, n + 1, dtype=np.float64)
    broken = int(begins * steps) + 1
    if over > BREAKS and (at := broken * each + (broken - 1) // every * evaluation) <= cfg.max_runtime_seconds:
        n = (broken - 1) // every
        return Trajectory(seconds[:n], losses[:n], Broken(at, f"the loss is not finite after update {broken}"))
    values = tuple(losses.tolist())
    end = Done(chunk * n, values) if n == cfg.n_evals else Late(cfg.max_runtime_seconds, values)
    return Trajectory(seconds, losses, end)


def _noise(hidden: Hidden, cfg: TrainingConfig, seed: int, done: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of the run, and a fifth of that of each evaluation. What does not change training does not change it."""
    fields = cfg.model_dump(mode="json", exclude={"max_runtime_seconds", "n_evals", "val_batch_size"})
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).digest()
    key = random.fold_in(random.fold_in(random.key(int.from_bytes(digest[:8], signed=True)), seed), 1)
    whole, each = random.split(key)
    more = random.normal(each, done.shape, torch.float64, index=torch.from_numpy(done)).numpy()
    return hidden.noise * (random.normal(whole, (), torch.float64).item() + 0.2 * more)


def _run(
    settings: Surrogate, cfg: TrainingConfig, rules: Rules, control: Control,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:  # fmt: skip
    """backend.run. Where time passes, the seconds used are kept in the experiment's folder."""
    all_of_it = trajectory(settings, cfg, rules, draw(settings, control.seed), control.seed)
    end = all_of_it.outcome
    state = control.folder / STATE
    used = min(_kept(state), end.seconds)
    control.started(used)
    if not settings.time_scale:
        if len(all_of_it.seconds):
            control.evaluated(all_of_it.val_losses.tolist(), float(all_of_it.seconds[-1]))
        return end

    def keep() -> None:
        new = state.with_suffix(".new")
        new.write_text(json.dumps({"seconds": used}))
        os.replace(new, state)

    told = -1
    while True:
        n = int(np.searchsorted(all_of_it.seconds, used, side="right"))
        if n > max(told, 0):
            control.evaluated(all_of_it.val_losses[:n].tolist(), float(all_of_it.seconds[n - 1]))
            keep()
        told = n
        if used >= end.seconds:
            return end
        if control.stop():
            keep()
            return Stopped(used)
        wait = min(TICK, (end.seconds - used) * settings.time_scale)
        sleep(wait)
        used = min(used + wait / settings.time_scale, end.seconds)


def _kept(state: Path) -> float:
    """Seconds of earlier attempts; none where a loss of power left the file without its text."""
    try:
        return float(json.loads(state.read_text())["seconds"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return 0.0


def _reveal(settings: Surrogate, cfg: TrainingConfig, rules: Rules, seed: int, budget: float) -> dict[str, object]:
    """backend.reveal: the hidden law, the best run that the budget allows, and how far cfg is from it.

    The regret is of losses without noise. It is None where cfg has no loss in the time, and can be below 0 by what the
    search for the best run misses, some 1e-4. `best` and the regret are None where no update fits into the budget.
    """
    quiet = draw(settings, seed)._replace(noise=0.0)
    seconds = float(budget)  # a final run may take longer than an experiment
    own = trajectory(settings, cfg.model_copy(update={"max_runtime_seconds": min(cfg.max_runtime_seconds, seconds)}),
                     rules, quiet, seed)  # fmt: skip
    found = best(settings, quiet, cfg, rules, seconds)
    mine = None if isinstance(own.outcome, Broken) or not len(own.val_losses) else float(own.val_losses[-1])
    told: dict[str, object] = {
        "simulated": True,
        "law": {**quiet.law._asdict(), "parameters": "of the blocks, without embeddings and head", "tokens": "trained"},
        "hidden": {k: v for k, v in draw(settings, seed)._asdict().items() if k != "law"},
        "final": {"loss": mine, "seconds": own.outcome.seconds, "outcome": type(own.outcome).__name__.lower()},
    }
    if found is None:
        return {**told, "best": None, "regret": None}
    theirs = trajectory(settings, found.model_copy(update={"max_runtime_seconds": seconds}), rules, quiet, seed)
    least = float(theirs.val_losses[-1])
    setup, lr = setup_of(found, rules), found.optimizer_config.lr_scheduler.peak_value
    run = {
        "loss": least, "parameters": int(setup.parameters), "tokens": int(setup.tokens), "learning_rate": lr,
        "batch_tokens": int(setup.batch), "seconds": theirs.outcome.seconds,
        "training_config": found.model_dump(mode="json"),
    }  # fmt: skip
    return {**told, "best": run, "regret": None if mine is None else mine - least}
