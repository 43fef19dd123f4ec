"""Learning-rate schedules: pure functions of the step, a 0-d (or batched) integer tensor or an int.

    schedule(step) -> learning rate, 0-d fp32 tensor on the step's device

The first update is step 0. Warmup is linear from `lr_initial` at step 0 to `lr_peak` at step `n_warmup`: with the
default 0.0 the first update moves nothing, which is the course's formula lr = t / T_w lr_peak with t from 0. The last
value, `lr_final`, is reached at step `n_steps` and kept from there on: updates 0 .. n_steps - 1 stop just short of it.
A tensor step below 0 counts as 0, a Python number below 0 is a ValueError, and so are rates that are negative or not
finite. No Python branch depends on the step: a compiled train step is compiled once.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cosine_decay",
    "join",
    "linear",
    "linear_decay",
    "one_minus_sqrt_decay",
    "wsd",
]

Schedule = Callable[[Tensor | int], Tensor]


def constant(lr_peak: float, *, n_warmup: int = 0, lr_initial: float = 0.0) -> Schedule:
    """lr_peak at every step, after an optional warmup.

    >>> constant(3e-4)(100)
    tensor(0.0003)
    """
    return _piecewise(lr_peak, n_warmup, n_warmup, n_warmup, lr_initial, lr_peak, linear_decay)


def linear(
    lr_peak: float, n_steps: int, *, n_warmup: int = 0, lr_final: float = 0.0, lr_initial: float = 0.0
) -> Schedule:
    """Warmup, then a straight line to lr_final at n_steps.

    >>> linear(1.0, n_steps=10)(5)
    tensor(0.5000)
    """
    return _piecewise(lr_peak, n_warmup, n_warmup, n_steps, lr_initial, lr_final, linear_decay)


def cosine(
    lr_peak: float, n_steps: int, *, n_warmup: int = 0, lr_final: float = 0.0, lr_initial: float = 0.0
) -> Schedule:
    """Warmup, then half a cosine to lr_final at n_steps (Loshchilov & Hutter, 1608.03983, equation 5, one cycle).

    The course's get_lr_cosine_schedule: alpha_max = lr_peak, alpha_min = lr_final, T_w = n_warmup, T_c = n_steps.

    >>> cosine(1.0, n_steps=21, n_warmup=7, lr_final=0.1)(14)
    tensor(0.5500)
    """
    return _piecewise(lr_peak, n_warmup, n_warmup, n_steps, lr_initial, lr_final, cosine_decay)


def wsd(
    lr_peak: float,
    n_steps: int,
    *,
    n_warmup: int = 0,
    n_decay: int,
    lr_final: float = 0.0,
    lr_initial: float = 0.0,
    decay: Callable[[Tensor], Tensor] | None = None,
) -> Schedule:
    """Warmup, stable at lr_peak, then decay over the last n_decay steps (Hu et al., MiniCPM, 2404.06395, section 4).

    `decay` maps the share of the decay that has passed, in [0, 1], to the share of lr_peak - lr_final that is left:
    `linear_decay` (None), `cosine_decay`, or `one_minus_sqrt_decay` (Haegele et al., 2405.18392, equation 4).

    >>> schedule = wsd(1.0, n_steps=100, n_warmup=10, n_decay=20)
    >>> schedule(torch.tensor([0, 5, 10, 80, 90, 100]))
    tensor([0.0000, 0.5000, 1.0000, 1.0000, 0.5000, 0.0000])
    """
    _check(lr_peak, n_warmup, n_steps, lr_initial, lr_final)
    if not 0 <= n_decay <= n_steps - n_warmup:
        raise ValueError(f"n_decay must be in [0, n_steps - n_warmup = {n_steps - n_warmup}], got {n_decay}")
    return _piecewise(
        lr_peak, n_warmup, n_steps - n_decay, n_steps, lr_initial, lr_final, linear_decay if decay is None else decay
    )


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another: schedules[i] from step boundaries[i - 1] until boundaries[i], counted from its start.

        schedule(t) = schedules[i](t - boundaries[i - 1]),   boundaries[i - 1] <= t < boundaries[i]

    as optax.join_schedules. Boundaries ascend, one fewer than schedules; a boundary twice leaves out what is between.

    >>> schedule = join([linear(1.0, 4, lr_final=0.5), constant(0.5), cosine(0.5, 2)], boundaries=[4, 6])
    >>> schedule(torch.tensor([0, 2, 4, 5, 6, 7, 8]))
    tensor([1.0000, 0.7500, 0.5000, 0.5000, 0.5000, 0.2500, 0.0000])
    """
    parts, starts = list(schedules), list(boundaries)
    for i, part in enumerate(parts):
        if not callable(part):
            raise ValueError(f"join: schedules[{i}] is {part!r}; functions of the step are needed: constant({part!r})")
    if not parts or len(starts) != len(parts) - 1:
        raise ValueError(f"join: {len(parts)} schedules need {max(len(parts) - 1, 0)} boundaries, got {len(starts)}")
    if any(not isinstance(b, int) or b < 0 for b in starts) or starts != sorted(starts):
        raise ValueError(f"join: boundaries must be ascending integers of at least 0, got {starts}")

    def schedule(step: Tensor | int) -> Tensor:
        t = _as_tensor(step)
        value = parts[0](t)
        for part, start in zip(parts[1:], starts, strict=True):
            # A part is asked for its own steps only: before them, for its first one.
            value = torch.where(t < start, value, part((t - start).clamp(min=0)))
        return value

    return schedule


def linear_decay(x: Tensor) -> Tensor:
    """1 - x."""
    return 1 - x


def cosine_decay(x: Tensor) -> Tensor:
    """(1 + cos(pi x)) / 2."""
    return 0.5 * (1 + torch.cos(math.pi * x))


def one_minus_sqrt_decay(x: Tensor) -> Tensor:
    """1 - sqrt(x)."""
    return 1 - torch.sqrt(x)


def _piecewise(
    lr_peak: float,
    n_warmup: int,
    n_stable: int,
    n_steps: int,
    lr_initial: float,
    lr_final: float,
    decay: Callable[[Tensor], Tensor],
) -> Schedule:
    """Line to the peak at n_warmup, peak until n_stable, `decay` to lr_final at n_steps, lr_final after it."""
    _check(lr_peak, n_warmup, n_steps, lr_initial, lr_final)
    sudden = n_stable == n_steps  # the decay has no steps: the rate falls to lr_final at n_steps itself

    def schedule(step: Tensor | int) -> Tensor:
        # fp64: a step has more digits than fp32 holds, and these are a few operations once a step.
        t = _as_tensor(step).to(torch.float64).clamp(min=0)
        rising = lr_initial + (lr_peak - lr_initial) * (t / max(n_warmup, 1))
        passed = ((t - n_stable + sudden) / max(n_steps - n_stable, 1)).clamp(0, 1)
        falling = lr_final + (lr_peak - lr_final) * decay(passed)
        return torch.where(t < n_warmup, rising, falling).to(torch.float32)

    return schedule


def _as_tensor(step: Tensor | int) -> Tensor:
    if isinstance(step, Tensor):
        return step
    if not step >= 0:
        raise ValueError(f"step must be at least 0, got {step}")
    return torch.tensor(step, dtype=torch.float64 if isinstance(step, float) else torch.int64)


def _check(lr_peak: float, n_warmup: int, n_steps: int, lr_initial: float, lr_final: float) -> None:
    for name, rate in (("lr_peak", lr_peak), ("lr_initial", lr_initial), ("lr_final", lr_final)):
        if not 0.0 <= rate < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {rate}")
    if not n_steps >= 0:
        raise ValueError(f"n_steps must be at least 0, got {n_steps}")
    if not 0 <= n_warmup <= n_steps:
        raise ValueError(f"n_warmup must be in [0, n_steps = {n_steps}], got {n_warmup}")
