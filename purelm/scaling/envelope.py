"""Approach 1: of all training curves the lowest loss at each compute, and whose it is (Hoffmann et al. 2022, 3.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from purelm.scaling.isoflop import Minima
from purelm.scaling.laws import FLOPS
from purelm.scaling.runs import Array

__all__ = ["Curve", "envelope"]


class Curve(NamedTuple):
    """One run's loss while it trains."""

    parameters: float
    tokens: Array  # (T,) rising
    loss: Array  # (T,) nats a token, smoothed


def envelope(curves: Sequence[Curve], n: int = 1500) -> Minima:
    """At n budgets, evenly in log C from the first to the last, the curve of the lowest loss, interpolated in log-log.

    Budgets that no curve reaches are left out. `inside` is 1 where the best curve is neither the smallest nor the
    largest model of those that reach the budget: only these say anything about the best size.

    ValueError for curves that do not rise in tokens, and for numbers that are not positive and finite.
    """
    if len(curves) < 2:
        raise ValueError(f"an envelope needs at least 2 curves, got {len(curves)}")
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    logs = []
    for i, curve in enumerate(curves):
        tokens, loss = np.asarray(curve.tokens, np.float64), np.asarray(curve.loss, np.float64)
        numbers = np.concatenate([tokens, loss, [curve.parameters]])
        if tokens.ndim != 1 or tokens.shape != loss.shape or not len(tokens):
            raise ValueError(f"curve {i}: tokens and loss must have one shape (T,), got {tokens.shape}, {loss.shape}")
        if not (np.isfinite(numbers) & (numbers > 0)).all() or (np.diff(tokens) <= 0).any():
            raise ValueError(f"curve {i}: numbers must be positive and finite, and tokens rise")
        logs.append((np.log(FLOPS * curve.parameters * tokens), np.log(loss)))
    grid = np.linspace(min(c[0] for c, _ in logs), max(c[-1] for c, _ in logs), n)
    loss_CG = np.stack([np.where((grid >= c[0]) & (grid <= c[-1]), np.interp(grid, c, y), np.inf) for c, y in logs])
    reached = np.isfinite(loss_CG).any(0)
    grid, loss_CG = grid[reached], loss_CG[:, reached]
    best = loss_CG.argmin(0)
    sizes = np.array([c.parameters for c in curves], np.float64)
    there = np.isfinite(loss_CG)
    smallest = np.where(there, sizes[:, None], np.inf).min(0)
    largest = np.where(there, sizes[:, None], -np.inf).max(0)
    chosen = sizes[best]
    inside = (chosen > smallest) & (chosen < largest)
    return Minima(np.exp(grid), chosen, np.exp(loss_CG.min(0)), inside.astype(np.float64))
