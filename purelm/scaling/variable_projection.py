"""The default fit: for each pair of exponents the other three numbers are a linear problem, so only two are searched.

    minimise over alpha, beta of   min_{E, A, B >= 0}  sum_r w_r (E + A N_r^-alpha + B D_r^-beta - L_r)^2 / L_r^2

Golub and Pereyra 1973; for scaling laws arXiv:2603.22339, which shows that approach 2 is biased even without noise, and
that this is not. Errors are relative, which is the error of log L to first order. The search is a grid over the
exponents, made finer around its best cells, and Gauss-Newton on all five numbers at the end. From there the robust
objective of `parametric` is minimised, unless huber is None: one start in the place of 4,500.
"""

import numpy as np

from purelm.scaling.laws import Law, loss
from purelm.scaling.parametric import DELTA, law_of, logs, refit, unknowns_of
from purelm.scaling.runs import Array, Runs, check

__all__ = ["RANGE", "fit", "linear"]

RANGE = (0.01, 2.0)  # of both exponents
COARSE, FINE, ZOOMS, CELLS = 24, 7, 8, 3


def fit(runs: Runs, *, huber: float | None = DELTA, exponents: tuple[float, float] = RANGE) -> Law:
    """The law of least error; huber None: least squares of relative errors, else the objective of `parametric`.

    ValueError for fewer than 5 runs, and for runs that do not determine it: one size, one number of tokens, or both
    proportional to powers of one number.
    """
    runs = check(runs, least=5)
    low, high = exponents
    if not 0 < low < high < np.inf:
        raise ValueError(f"exponents must be a range of positive numbers, got {exponents}")
    if huber is not None and not 0 < huber < np.inf:
        raise ValueError(f"huber must be positive and finite, or None, got {huber}")
    _check_determined(runs)
    begins = _without_zeros(runs, _searched(runs, low, high), low, high)
    law = min((_polished(runs, x) for x in begins), key=lambda x: _cost(runs, x))
    if huber is None:
        return law
    # From the least squares: the objective of approach 3 has many minima, and this start lies near the best.
    e, a, b = (float(np.maximum(x, 1e-300)) for x in law[:3])  # logarithms are searched
    law = Law(e, a, b, law.alpha, law.beta)
    found = refit(logs(runs), _begins(law), huber, 2000)
    best = found.x[int(np.argmin(found.value))]
    return Law(*(float(x) for x in law_of(best)))


def linear(runs: Runs, alpha: Array, beta: Array) -> tuple[Array, Array]:
    """((G, 3) E, A, B not below 0; (G,) sums of squared relative errors) for each of G pairs of exponents."""
    scale_n, scale_d = _scales(runs)
    basis = np.stack([
        np.broadcast_to(1 / runs.loss, (len(alpha), len(runs.loss))),
        np.exp(-alpha[:, None] * np.log(runs.parameters / scale_n)) / runs.loss,
        np.exp(-beta[:, None] * np.log(runs.tokens / scale_d)) / runs.loss,
    ], -1)  # fmt: skip
    x, cost = _least_squares(basis, (0, 1, 2))
    # Where one is negative the best has another 0, and is the least squares of those that are left: all are tried.
    bad = np.flatnonzero((x < 0).any(1) | ~np.isfinite(cost))
    x[bad], cost[bad] = 0.0, np.inf
    for some in ((0, 1), (0, 2), (1, 2), (0,), (1,), (2,)) if len(bad) else ():
        y, c = _least_squares(basis[bad], some)
        better = (y >= 0).all(1) & (c < cost[bad])
        x[bad[better]], cost[bad[better]] = y[better], c[better]
    return x * np.stack([np.ones_like(alpha), scale_n**alpha, scale_d**beta], -1), cost


def _least_squares(basis: Array, some: tuple[int, ...]) -> tuple[Array, Array]:
    """Coefficients (0 for columns that are left out) of least squares to 1, and the cost, for each basis (G, R, 3)."""
    chosen = basis[..., list(some)]
    q, r = np.linalg.qr(chosen)
    x = np.zeros(basis.shape[::2])
    right = q.sum(-2)[..., None]
    singular = np.abs(np.diagonal(r, axis1=-2, axis2=-1)).min(-1) < 1e-13 * np.abs(r).max((-2, -1))
    r = np.where(singular[:, None, None], np.eye(len(some)), r)
    x[:, list(some)] = np.linalg.solve(r, right)[..., 0]
    cost = np.square((basis @ x[..., None])[..., 0] - 1).sum(-1)
    return x, np.where(singular, np.inf, cost)


def _searched(runs: Runs, low: float, high: float) -> Law:
    """The best of a grid over log exponents that is made finer, around several cells."""
    centres = [(np.log(low) + np.log(high)) / 2 * np.ones(2)]
    half = (np.log(high) - np.log(low)) / 2
    size = COARSE
    for _ in range(ZOOMS):
        offsets = np.linspace(-half, half, size)
        points = np.concatenate([
            np.stack(np.meshgrid(c[0] + offsets, c[1] + offsets, indexing="ij"), -1).reshape(-1, 2) for c in centres
        ]).clip(np.log(low), np.log(high))  # fmt: skip
        x, cost = linear(runs, *np.exp(points).T)
        order = np.argsort(cost, kind="stable")
        centres = [points[order[0]]]
        spacing = 2 * half / (size - 1)
        for k in order[1:200]:
            if len(centres) == CELLS:
                break
            if min(np.abs(points[k] - c).max() for c in centres) > 1.5 * spacing:
                centres.append(points[k])
        half, size = 1.5 * spacing, FINE
    best = order[0]
    return Law(*(float(y) for y in x[best]), *(float(y) for y in np.exp(points[best])))


def _without_zeros(runs: Runs, law: Law, low: float, high: float) -> list[Law]:
    """The law, and where the search left A or B at 0 laws in which its term is a thousandth of the loss.

    On a grid the other term takes over what a small one explains, so the search may end there in spite of a better law.
    """
    found = [law]
    for name, exponent, x in (("A", "alpha", runs.parameters), ("B", "beta", runs.tokens)):
        if getattr(law, name) == 0:
            for e in (e for e in (0.1, 0.2, 0.4, 0.8) if low <= e <= high):
                size = 1e-3 * float(np.exp(np.log(runs.loss).mean() + e * np.log(x).mean()))
                found.append(law._replace(**{name: size, exponent: e}))
    return found


def _cost(runs: Runs, law: Law) -> float:
    return float(np.square(loss(law, runs.parameters, runs.tokens) / runs.loss - 1).sum())


def _polished(runs: Runs, law: Law, most: int = 200) -> Law:
    """Gauss-Newton on relative errors, damped, as long as it lowers them.

    In log A and log B: along the valley of nearly equal laws these rise with the exponents in a straight line. What is
    0 stays 0.
    """
    log_n, log_d = np.log(runs.parameters), np.log(runs.tokens)

    def residual(x: Array) -> tuple[Array, Array, Array]:
        with np.errstate(over="ignore"):
            p, q = np.exp(x[1] - x[3] * log_n) / runs.loss, np.exp(x[2] - x[4] * log_d) / runs.loss
        return x[0] / runs.loss + p + q - 1, p, q

    with np.errstate(divide="ignore"):
        x = np.array([law.E, np.log(law.A), np.log(law.B), law.alpha, law.beta], np.float64)
    r, p, q = residual(x)
    damping = 1e-6
    for _ in range(most):
        jacobian = np.stack([1 / runs.loss, p, q, -p * log_n, -q * log_d], 1)
        size = np.sqrt(np.square(jacobian).sum(0))
        free = size > 0
        size[~free] = 1.0
        scaled = np.concatenate([jacobian / size, np.sqrt(damping) * np.eye(5)])
        step = np.linalg.lstsq(scaled, np.concatenate([-r, np.zeros(5)]), rcond=1e-15)[0] / size
        new = x + np.where(free, step, 0.0)
        r_new, p_new, q_new = residual(new)
        if new[0] >= 0 and (new[3:] > 0).all() and np.square(r_new).sum() < np.square(r).sum():
            done = np.abs(step[free]).max() <= 1e-15 * np.abs(x[free]).max()
            x, r, p, q, damping = new, r_new, p_new, q_new, damping / 10
            if done:
                break
        elif damping > 1e6:
            break
        else:
            damping = max(10 * damping, 1e-12)
    return Law(float(x[0]), float(np.exp(x[1])), float(np.exp(x[2])), float(x[3]), float(x[4]))


def _begins(law: Law) -> Array:
    """The law and its neighbours, from which robust fits start."""
    x = unknowns_of(law)
    moves = np.array([(0, 0), (0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)])
    return np.stack([x + np.array([0, 0, 0, a * law.alpha, b * law.beta]) for a, b in moves])


def _scales(runs: Runs) -> tuple[float, float]:
    """Geometric means: with N and D divided by them columns are of size 1, and far from parallel."""
    return float(np.exp(np.log(runs.parameters).mean())), float(np.exp(np.log(runs.tokens).mean()))


def _check_determined(runs: Runs) -> None:
    n, d = (np.log(x) - np.log(x).mean() for x in (runs.parameters, runs.tokens))
    for name, x in (("parameters", n), ("tokens", d)):
        if len({*np.round(x, 9).tolist()}) < 3:
            raise ValueError(f"runs: {name} must have at least 3 different values for a law")
    if np.linalg.svd(np.stack([n, d], 1), compute_uv=False)[1] < 1e-6:
        raise ValueError("runs: tokens are a power of parameters in all of them, which does not tell A from B")
