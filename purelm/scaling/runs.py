"""Finished runs, as arrays."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from purelm.scaling.laws import FLOPS

__all__ = ["Array", "Runs", "budgets", "check", "lowest_of_each", "of_budgets", "taken", "without_highest"]

Array = NDArray[np.float64]


class Runs(NamedTuple):
    """R finished runs; the loss is of data that were not trained on."""

    parameters: Array  # (R,)
    tokens: Array  # (R,)
    loss: Array  # (R,) nats a token

    @property
    def flops(self) -> Array:
        """6 N D."""
        return FLOPS * self.parameters * self.tokens


def of_budgets(rows: Iterable[Mapping[str, Any]], flops_each: float = FLOPS) -> Runs:
    """Runs of rows with parameters, compute_budget and final_loss (CS336's file): D = C / (flops_each N)."""
    rows = list(rows)
    try:
        n, c, loss = (np.array([float(r[k]) for r in rows]) for k in ("parameters", "compute_budget", "final_loss"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"rows need numbers named parameters, compute_budget and final_loss: {error!r}") from None
    return check(Runs(n, c / (flops_each * n), loss))


def check(runs: Runs, least: int = 1) -> Runs:
    """The runs as float64 arrays; ValueError for other shapes, too few, and what is not positive and finite."""
    arrays = [np.asarray(x, dtype=np.float64) for x in runs]
    n = arrays[0].shape
    for name, x in zip(Runs._fields, arrays, strict=True):
        if x.ndim != 1 or x.shape != n:
            raise ValueError(f"runs: parameters, tokens and loss must have one shape (R,), {name} has {x.shape}")
        if bad := np.flatnonzero(~(np.isfinite(x) & (x > 0))).tolist():
            raise ValueError(f"runs: {name} of run {bad[0]} is {x[bad[0]]}, and must be positive and finite")
    if len(arrays[0]) < least:
        raise ValueError(f"runs: {len(arrays[0])} are too few, at least {least} are needed")
    return Runs(*arrays)


def taken(runs: Runs, at: Any) -> Runs:
    """The runs at these places, or where a mask is True."""
    return Runs(*(x[at] for x in runs))


def without_highest(runs: Runs, n: int) -> Runs:
    """The runs but the n of the highest losses, in their order; ValueError if none is left."""
    if not 0 <= n < len(runs.loss):
        raise ValueError(f"drop_highest: {n} of {len(runs.loss)} runs leave none")
    return taken(runs, np.sort(np.argsort(runs.loss, kind="stable")[: len(runs.loss) - n]))


def lowest_of_each(runs: Runs) -> Runs:
    """Of the runs with one N and D (several learning rates, say) that of the lowest loss; in the order of the first.

    >>> lowest_of_each(Runs(np.array([1.0, 2, 1]), np.array([5.0, 5, 5]), np.array([3.0, 2, 1]))).loss
    array([1., 2.])
    """
    best: dict[tuple[float, float], int] = {}
    for i, (n, d) in enumerate(zip(runs.parameters.tolist(), runs.tokens.tolist(), strict=True)):
        if (n, d) not in best or runs.loss[i] < runs.loss[best[n, d]]:
            best[n, d] = i
    return taken(runs, list(best.values()))


def budgets(runs: Runs, tolerance: float = 0.01) -> list[tuple[float, NDArray[np.int64]]]:
    """(FLOPs, places of its runs) by rising compute; budgets within a share `tolerance` of the next are one."""
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    order = np.argsort(runs.flops, kind="stable")
    c = runs.flops[order]
    starts = np.flatnonzero(np.diff(np.log(c), prepend=-np.inf) > np.log1p(tolerance))
    groups = np.split(order, starts[1:])
    return [(float(np.exp(np.log(runs.flops[g]).mean())), g) for g in groups]
