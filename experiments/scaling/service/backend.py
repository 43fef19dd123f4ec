"""What a back end is: a function that carries out one experiment, and what it may ask and tell meanwhile.

    outcome = backend.run(cfg, rules, control)

A worker calls it in a process of its own. The clock is device-seconds of the run: it starts after data are loaded and
everything is compiled, and is carried over from attempt to attempt, so that work lost in a kill is not charged.
A run ends in one of four ways: Done, Late (out of time), Broken (an error), Stopped (preempted, to be taken up again).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.scaling.service.schemas import Rules, TrainingConfig

__all__ = ["Backend", "Broken", "Control", "Done", "Late", "Outcome", "Stopped", "charge", "hard_limit"]


class Control(NamedTuple):
    """The side of the worker."""

    folder: Path  # of this experiment, empty at first; what is written here outlasts preemption and kills
    seed: int  # of the key's owner: what a surrogate draws its hidden law from
    started: Callable[[float], None]  # the clock runs, from so many seconds of earlier attempts
    evaluated: Callable[[Sequence[float], float], None]  # all validation losses so far, seconds used
    stop: Callable[[], bool]  # whether to leave off now; asked between updates


class Done(NamedTuple):
    seconds: float
    val_losses: tuple[float, ...]


class Late(NamedTuple):
    seconds: float
    val_losses: tuple[float, ...]  # those there was time for


class Broken(NamedTuple):
    seconds: float
    failure: str  # one line


class Stopped(NamedTuple):
    seconds: float


Outcome = Done | Late | Broken | Stopped


class Backend(NamedTuple):
    """A way to carry experiments out."""

    name: str  # "real" or "surrogate": answers carry it in X-Backend
    run: Callable[[TrainingConfig, Rules, Control], Outcome]
    # What is told after the final run, by (cfg, rules, seed, budget in seconds); None: nothing is hidden.
    reveal: Callable[[TrainingConfig, Rules, int, float], dict[str, object]] | None = None


def charge(seconds: float, max_runtime_seconds: float) -> float:
    """Device-seconds a finished run costs: clip(seconds, 1, max_runtime_seconds)."""
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"seconds must be finite and at least 0, got {seconds}")
    return min(max(1.0, seconds), max_runtime_seconds)


def hard_limit(max_runtime_seconds: float) -> float:
    """Seconds after which a worker that did not notice is killed: evaluations may take it over the limit a little."""
    return 1.05 * max_runtime_seconds + 10.0
