"""Approach 2: the best size of each budget of compute, and a power law through these.

`minima` takes a parabola in log N through a budget's runs (Hoffmann et al. 2022, section 3.2), or the run of the lowest
loss, which CS336's assignment 3 suggests: that is off by up to half of the grid's spacing. Parabolas are biased where
grids are wide or not centred, and where alpha and beta differ (arXiv:2603.22339); `variable_projection` is not.
"""

from typing import Literal, NamedTuple

import numpy as np

from purelm.scaling.laws import FLOPS, PowerLaw
from purelm.scaling.runs import Array, Runs, budgets, check, taken

__all__ = ["Minima", "laws_of", "minima", "power_law"]


class Minima(NamedTuple):
    """The best of each of K budgets, by rising compute."""

    flops: Array  # (K,)
    parameters: Array  # (K,)
    loss: Array  # (K,)
    inside: Array  # (K,) 1 where the minimum lies between the smallest and the largest of the budget's runs

    @property
    def tokens(self) -> Array:
        """C / 6 N."""
        return self.flops / (FLOPS * self.parameters)


def minima(
    runs: Runs, how: Literal["parabola", "lowest"] = "parabola", *, nearest: int | None = None, tolerance: float = 0.01
) -> Minima:
    """The minimum of each budget. nearest: of a parabola, the runs around the lowest alone; at least 3.

    ValueError for a budget of fewer than 3 sizes, or whose parabola opens downwards, by its FLOPs.
    """
    if how not in ("parabola", "lowest"):
        raise ValueError(f"how must be parabola or lowest, got {how!r}")
    if nearest is not None and (how != "parabola" or nearest < 3):
        raise ValueError(f"nearest must be at least 3, and is of parabolas alone, got {nearest}")
    found = []
    for c, group in budgets(check(runs), tolerance):
        some = taken(runs, group)
        some = taken(some, np.argsort(some.parameters, kind="stable"))
        best = int(np.argmin(some.loss))
        ends = some.parameters[0], some.parameters[-1]
        if (sizes := len({*some.parameters.tolist()})) < 3:
            raise ValueError(f"budget of {c:.3g} FLOPs: a minimum needs 3 sizes, got {sizes}")
        if how == "lowest":
            found.append((c, some.parameters[best], some.loss[best], 0 < best < len(group) - 1))
            continue
        if nearest is not None:
            first = min(max(best - nearest // 2, 0), max(len(group) - nearest, 0))
            some = taken(some, slice(first, first + nearest))
            if len({*some.parameters.tolist()}) < 3:
                raise ValueError(f"budget of {c:.3g} FLOPs: nearest {nearest} are fewer than 3 sizes")
        # Centred and scaled, so that the fit is well conditioned whatever the sizes are.
        x = np.log(some.parameters)
        middle, width = x.mean(), np.ptp(x)
        a, b, e = np.polyfit((x - middle) / width, some.loss, 2)
        if not a > 0:
            raise ValueError(f"budget of {c:.3g} FLOPs: loss has no minimum over sizes, its parabola opens downwards")
        n = float(np.exp(middle - width * b / (2 * a)))
        found.append((c, n, e - b**2 / (4 * a), ends[0] <= n <= ends[1]))
    return Minima(*(np.array(x, dtype=np.float64) for x in zip(*found, strict=True)))


def power_law(x: Array, y: Array) -> PowerLaw:
    """y = coefficient x^exponent by least squares of log y. ValueError for fewer than 2 different x."""
    x, y = np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64))
    if len({*x.tolist()}) < 2:
        raise ValueError("a power law needs at least 2 different values")
    middle = x.mean()
    exponent = float(((x - middle) * y).sum() / np.square(x - middle).sum())
    return PowerLaw(float(np.exp(y.mean() - exponent * middle)), exponent)


def laws_of(found: Minima) -> tuple[PowerLaw, PowerLaw]:
    """(N* of C, D* of C)."""
    return power_law(found.flops, found.parameters), power_law(found.flops, found.tokens)
