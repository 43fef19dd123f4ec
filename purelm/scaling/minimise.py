"""Minimisation of many small problems at once: BFGS with a backtracking line search, in float64.

Legend: S problems, P unknowns of each.

A fit from 4,500 starts is 4,500 problems of five unknowns, whose functions are evaluated in one call. Each keeps its
own inverse Hessian and step; problems that have converged are left out of later calls. Nocedal and Wright 2006,
algorithm 6.1, with the Armijo condition alone: a pair (s, y) without positive curvature changes nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from purelm.scaling.runs import Array

__all__ = ["Found", "minimise"]

# (x (s, P), numbers of these problems (s,)) -> (values (s,), gradients (s, P))
Function = Callable[[Array, NDArray[np.int64]], tuple[Array, Array]]
SHRINK, ARMIJO, MOST_HALVINGS = 0.5, 1e-4, 40


class Found(NamedTuple):
    """What came of each problem."""

    x: Array  # (S, P)
    value: Array  # (S,)
    converged: NDArray[np.bool_]  # (S,): gradient or improvement below its tolerance
    steps: NDArray[np.int64]  # (S,)


def minimise(
    function: Function, x: Array, *, most_steps: int = 500, gradient: float = 1e-10, improvement: float = 1e-14
) -> Found:
    """Local minima from the starts x (S, P).

    A problem has converged when the largest component of its gradient is at most `gradient`, or when three steps in a
    row lower its value by at most the share `improvement`; also where no step along the gradient lowers it at all.
    A start whose value is not finite is returned as it is, not converged.
    """
    x = np.array(x, dtype=np.float64)
    S, P = x.shape
    every = np.arange(S)
    value, slope = (np.array(y) for y in function(x, every))
    inverse = np.broadcast_to(np.eye(P), (S, P, P)).copy()
    steps, small = np.zeros(S, np.int64), np.zeros(S, np.int64)
    first = np.ones(S, np.bool_)  # the identity has no scale yet
    converged = np.abs(slope).max(1, initial=0.0) <= gradient
    live = every[np.isfinite(value) & ~converged]
    while len(live) and int(steps.max(initial=0)) < most_steps:
        direction = -np.einsum("spq,sq->sp", inverse[live], slope[live])
        descent = np.einsum("sp,sp->s", direction, slope[live])
        wrong = ~(descent < 0)
        if wrong.any():  # rounding: begin again from the gradient
            again = live[wrong]
            inverse[again], first[again] = np.eye(P), True
            direction[wrong] = -slope[again]
            descent[wrong] = -np.square(slope[again]).sum(1)
        scale = np.where(first[live], 1 / np.maximum(np.abs(direction).max(1), 1.0), 1.0)
        new_x, new_value, new_slope, moved = _searched(function, x, value, slope, live, direction, descent, scale)
        s, y = new_x - x[live], new_slope - slope[live]
        gain = value[live] - new_value
        few = gain <= improvement * np.abs(new_value)
        small[live] = np.where(few, small[live] + 1, 0)
        _update(inverse, first, live[moved], s[moved], y[moved])
        # A step that finds nothing lower is tried once more from the gradient, and then this is the minimum.
        restart = ~moved & ~first[live]
        inverse[live[restart]], first[live[restart]] = np.eye(P), True
        x[live], value[live], slope[live] = new_x, new_value, new_slope
        steps[live] += 1
        flat = np.abs(new_slope).max(1) <= gradient
        ended = flat | (small[live] >= 3) | (~moved & ~restart)
        converged[live[ended]] = True
        live = live[~ended]
    return Found(x, value, converged, steps)


def _searched(
    function: Function, x: Array, value: Array, slope: Array, live: NDArray[np.int64], direction: Array, descent: Array,
    scale: Array,
) -> tuple[Array, Array, Array, NDArray[np.bool_]]:  # fmt: skip
    """(x, value, gradient, whether it moved) of live problems after a line search; the old ones if none is lower."""
    new_x, new_value, new_slope = x[live], value[live], slope[live]
    moved = np.zeros(len(live), np.bool_)
    open_ = np.arange(len(live))
    step = scale.copy()
    for _ in range(MOST_HALVINGS):
        tried = x[live[open_]] + step[open_, None] * direction[open_]
        with np.errstate(over="ignore", invalid="ignore"):
            f, g = function(tried, live[open_])
        good = f <= value[live[open_]] + ARMIJO * step[open_] * descent[open_]
        good &= np.isfinite(f) & np.isfinite(g).all(1)
        done = open_[good]
        new_x[done], new_value[done], new_slope[done], moved[done] = tried[good], f[good], g[good], True
        open_ = open_[~good]
        if not len(open_):
            break
        step[open_] *= SHRINK
    return new_x, new_value, new_slope, moved


def _update(inverse: Array, first: NDArray[np.bool_], at: NDArray[np.int64], s: Array, y: Array) -> None:
    """BFGS's update of the inverse Hessians at these places, in place; the first is scaled (their equation 6.20)."""
    sy, yy = np.einsum("sp,sp->s", s, y), np.einsum("sp,sp->s", y, y)
    with np.errstate(invalid="ignore"):
        curved = sy > 1e-12 * np.sqrt(yy * np.einsum("sp,sp->s", s, s))
    at, s, y, sy, yy = at[curved], s[curved], y[curved], sy[curved], yy[curved]
    begin = first[at]
    inverse[at[begin]] *= (sy[begin] / yy[begin])[:, None, None]
    first[at] = False
    h = inverse[at]
    hy = np.einsum("spq,sq->sp", h, y)
    rho = 1 / sy
    yhy = np.einsum("sp,sp->s", y, hy)
    inverse[at] = (
        h
        - rho[:, None, None] * (hy[:, :, None] * s[:, None, :] + s[:, :, None] * hy[:, None, :])
        + (rho * (1 + rho * yhy))[:, None, None] * s[:, :, None] * s[:, None, :]
    )
