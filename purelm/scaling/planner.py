"""Which runs to do next: those that make the predicted optimum surest for their cost.

    plan = propose(runs, law, target=1e24, budget=3e21, candidates=grid((1e8, 1e10), (1e19, 1e21)))

The delta method. With theta = (ln A, ln B, ln E, alpha, beta) and errors of log L that are independent and of standard
deviation s, least squares has the covariance

    V = (sum_r j_r j_r^T / s^2 + P)^-1,    j_r = d log L(N_r, D_r) / d theta = (p, q, 1 - p - q, -p ln N_r, -q ln D_r)
    p = A N_r^-alpha / L,  q = B D_r^-beta / L,  P a weak prior's, for where runs are too few to determine a law

and what is predicted has the variance g^T V g, g its gradient. A further run with gradient j lowers it by

    (g^T V j)^2 / (s^2 + j^T V j),    V <- V - V j j^T V / (s^2 + j^T V j)

so choices are compared before anything is trained. The robust fit (`parametric`, with a delta below s) has up to pi / 2
times this variance where errors are normal, for every choice alike. That the law holds is taken for granted: the plan
guards against noise, not against runs beyond which another law would hold, so let candidates reach towards the target.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from purelm.scaling.laws import FLOPS, Law, loss, optimum
from purelm.scaling.parametric import unknowns_of
from purelm.scaling.runs import Array, Runs, check

__all__ = ["PRIOR", "Plan", "Points", "covariance", "gradient", "grid", "noise_of", "propose", "sensitivities"]

PRIOR = (10.0, 10.0, 1.0, 0.3, 0.3)  # standard deviations of ln A, ln B, ln E, alpha and beta around the law's
Of = Literal["parameters", "loss"]
Cost = Callable[[Array, Array], Array]
EXCHANGES = 200  # at most; each lowers the variance
LEAST_NOISE = 1e-6


class Points(NamedTuple):
    """K runs that could be done."""

    parameters: Array  # (K,)
    tokens: Array  # (K,)


class Plan(NamedTuple):
    """P runs to do, the most worth for its cost first, and what the variance of ln N* (or ln L*) then is."""

    parameters: Array  # (P,)
    tokens: Array  # (P,)
    cost: Array  # (P,)
    variance: Array  # (P,) after each
    variance_before: float
    variance_after: float
    noise: float  # standard deviation of log L that was taken


def propose(
    runs: Runs, law: Law, target: float, budget: float, candidates: Points, cost: Cost | None = None,
    n: int | None = None, *, of: Of = "parameters", noise: float | None = None,
    prior: tuple[float, ...] | None = PRIOR, repeats: int = 1,
) -> Plan:  # fmt: skip
    """The candidates that most lower the variance of ln N* (or ln L*) at `target` FLOPs, at most n, for at most budget.

    Args:
        runs: finished ones, to which `law` was fitted; may be none where `noise` and a prior are given.
        cost: (parameters, tokens), arrays, -> what each run costs, in the unit of `budget`; None: 6 N D FLOPs.
        of: what is to be predicted: N* ("parameters") or the loss there ("loss").
        noise: standard deviation of log L between runs that differ in their seed; None: from the runs' residuals.
        prior: standard deviations of theta; None: no prior.
        repeats: how often one candidate may be taken (with another seed).

    The better of two greedy choices, by the reduction for its cost and by the reduction alone, in which single runs are
    then exchanged as long as that helps. With n = 1 it is the best candidate. The sum of costs is at most the budget.

    ValueError for numbers that are not positive and finite, and where the runs and the prior do not determine the law.
    """
    points = Points(*(np.asarray(x, np.float64) for x in candidates))
    if points.parameters.ndim != 1 or points.parameters.shape != points.tokens.shape:
        shapes = " and ".join(str(x.shape) for x in points)
        raise ValueError(f"candidates: parameters and tokens must have one shape (K,), got {shapes}")
    for name, x in points._asdict().items():
        _positive(f"candidates: {name}", x)
    _positive("target", target)
    _positive("budget", budget)
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1 or None, got {n}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    costs = np.asarray((_six_n_d if cost is None else cost)(*points), np.float64)
    if costs.shape != points.parameters.shape:
        raise ValueError(f"cost must return one number for each candidate, got shape {costs.shape}")
    _positive("cost", costs)
    s = noise_of(runs, law) if noise is None else noise
    v = covariance(runs, law, s, prior)
    g = gradient(law, target, of)
    rows = sensitivities(law, *points)
    chosen = _chosen(v, g, rows / s, costs, budget, len(costs) * repeats if n is None else n, repeats)
    order, variance = _ordered(v, g, rows / s, costs, chosen)
    before = float(g @ v @ g)
    return Plan(
        points.parameters[order], points.tokens[order], costs[order], variance, before,
        float(variance[-1]) if len(variance) else before, float(s),
    )  # fmt: skip


def grid(
    parameters: tuple[float, float], flops: tuple[float, float], sizes: int = 16, budgets: int = 8, *,
    tokens_each: tuple[float, float] = (1.0, 1000.0),
) -> Points:  # fmt: skip
    """Candidates: `sizes` of N and `budgets` of C, evenly in their logarithms, with D = C / 6 N.

    tokens_each: the least and the most tokens a parameter, D / N; what lies outside is left out.
    """
    for name, ends in (("parameters", parameters), ("flops", flops), ("tokens_each", tokens_each)):
        if not 0 < ends[0] <= ends[1] < np.inf:
            raise ValueError(f"{name} must be (least, most) of positive numbers, got {ends}")
    for name, count in (("sizes", sizes), ("budgets", budgets)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    c, n = (x.ravel() for x in np.meshgrid(np.geomspace(*flops, budgets), np.geomspace(*parameters, sizes)))
    d = c / (FLOPS * n)
    some = (d >= tokens_each[0] * n) & (d <= tokens_each[1] * n)
    if not some.any():
        raise ValueError(f"candidates: none of parameters {parameters} and flops {flops} has {tokens_each} tokens each")
    return Points(n[some], d[some])


def sensitivities(law: Law, parameters: Any, tokens: Any) -> Array:
    """(K, 5): d log L / d (ln A, ln B, ln E, alpha, beta) at each point."""
    n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
    total = loss(law, n, d)
    p, q = law.A * n**-law.alpha / total, law.B * d**-law.beta / total
    return np.stack([p, q, law.E / total, -p * np.log(n), -q * np.log(d)], -1)


def gradient(law: Law, flops: float, of: Of = "parameters") -> Array:
    """(5,): d ln N* / d theta at this budget, or d ln L* / d theta.

    The loss there moves with theta as if N* and D* stayed: its derivative along the budget is 0.
    """
    if of not in ("parameters", "loss"):
        raise ValueError(f"of must be parameters or loss, got {of!r}")
    best = optimum(law, flops)
    if of == "loss":
        return sensitivities(law, best.parameters, best.tokens)
    both = law.alpha + law.beta
    log_n = float(np.log(best.parameters))  # (ln(alpha A / beta B) + beta ln(C / 6)) / (alpha + beta)
    slope = np.array([1.0, -1.0, 0.0, 1 / law.alpha - log_n, np.log(flops / FLOPS) - log_n - 1 / law.beta])
    return slope / both


def covariance(runs: Runs, law: Law, noise: float, prior: tuple[float, ...] | None = PRIOR) -> Array:
    """(5, 5): of theta = (ln A, ln B, ln E, alpha, beta), given these runs; formulas at the top of this file."""
    _check_law(law)
    _positive("noise", noise)
    rows = sensitivities(law, *_checked(runs)[:2]) / noise
    if prior is not None:
        if len(prior) != 5:
            raise ValueError(f"prior must have 5 standard deviations, got {len(prior)}")
        _positive("prior", prior)
        rows = np.concatenate([rows, np.diag(1 / np.asarray(prior, np.float64))])
    # Of the rows' singular values, and scaled: the normal matrix itself would lose half of the digits.
    scale = np.sqrt(np.square(rows).sum(0))
    if len(rows) < 5 or not (scale > 0).all():
        raise ValueError(f"{len(runs.loss)} runs without a prior do not determine the law")
    _, sizes, vt = np.linalg.svd(rows / scale, full_matrices=False)
    if sizes[-1] < 1e-12 * sizes[0]:
        raise ValueError("the runs, without a prior, do not determine the law: some of its numbers could be any")
    half = vt.T / sizes / scale[:, None]
    return half @ half.T


def noise_of(runs: Runs, law: Law) -> float:
    """The standard deviation of log L around the law, 1.4826 times the median of the residuals' sizes: few bad runs
    do not move it. Corrected for the five numbers that were fitted.

    ValueError for fewer than 8 runs, and for runs that lie on the law.
    """
    runs = _checked(runs)
    if (R := len(runs.loss)) < 8:
        raise ValueError(f"noise must be given: {R} runs are too few to say, 8 are needed")
    residual = np.log(loss(law, runs.parameters, runs.tokens) / runs.loss)
    s = 1.4826 * float(np.median(np.abs(residual))) * np.sqrt(R / (R - 5))
    if s < LEAST_NOISE:
        raise ValueError(f"noise must be given: the runs lie on the law, to {s:.1g}")
    return float(s)


def _chosen(v: Array, g: Array, rows: Array, costs: Array, budget: float, n: int, repeats: int) -> list[int]:
    """Numbers of the chosen candidates. rows: sensitivities over the noise."""
    ends = []  # of two starts: by the reduction for its cost cheap runs can leave too little for the one that matters
    for price in (costs, np.ones_like(costs)):
        some = _exchanged(v, g, rows, costs, _greedy(v, g, rows, costs, price, budget, n, repeats), budget, n, repeats)
        ends.append((_variance(v, g, rows[some]), some))
    return min(ends, key=lambda x: x[0])[1]


def _greedy(
    v: Array, g: Array, rows: Array, costs: Array, price: Array, budget: float, n: int, repeats: int,
    begin: list[int] | None = None,
) -> list[int]:  # fmt: skip
    """One after another, the most reduction for its price of those that fit into what is left."""
    chosen = list(begin or [])
    taken = np.bincount(np.array(chosen, np.int64), minlength=len(costs))
    v = _after(v, rows[chosen])
    while len(chosen) < n:
        fits = (taken < repeats) & (math.fsum(costs[chosen]) + costs <= budget)
        if not fits.any():
            break
        i = int(np.argmax(np.where(fits, _reduction(v, g, rows) / price, -np.inf)))
        chosen.append(i)
        taken[i] += 1
        v = _with(v, rows[i])
    return chosen


def _exchanged(
    v: Array, g: Array, rows: Array, costs: Array, chosen: list[int], budget: float, n: int, repeats: int
) -> list[int]:
    """One run out, others in for what is then left, as long as the variance falls."""
    least = _variance(v, g, rows[chosen])
    for _ in range(EXCHANGES):
        for k in sorted(range(len(chosen)), key=lambda k: -costs[chosen[k]]):
            rest = chosen[:k] + chosen[k + 1 :]
            tried = [_greedy(v, g, rows, costs, p, budget, n, repeats, rest) for p in (costs, np.ones_like(costs))]
            value, some = min(((_variance(v, g, rows[x]), x) for x in tried), key=lambda x: x[0])
            if value < least * (1 - 1e-9):
                least, chosen = value, some
                break
        else:
            break
    return chosen


def _ordered(v: Array, g: Array, rows: Array, costs: Array, chosen: list[int]) -> tuple[list[int], Array]:
    """The chosen by their reduction for their cost, each after those before; and the variance after each."""
    left, order, variance = list(chosen), [], []
    while left:
        i = max(left, key=lambda i: float(_reduction(v, g, rows[i : i + 1])[0]) / costs[i])
        left.remove(i)
        v = _with(v, rows[i])
        order.append(i)
        variance.append(float(g @ v @ g))
    return order, np.array(variance)


def _reduction(v: Array, g: Array, rows: Array) -> Array:
    """(K,): by how much each row alone would lower g^T V g."""
    return np.square(rows @ (v @ g)) / (1 + np.einsum("kp,pq,kq->k", rows, v, rows))


def _with(v: Array, row: Array) -> Array:
    """The covariance after one more run."""
    u = v @ row
    lower: Array = v - np.outer(u, u) / (1 + row @ u)
    return lower


def _after(v: Array, rows: Array) -> Array:
    """The covariance after these runs, at once: with v = l l^T it is l (1 + (rows l)^T rows l)^-1 l^T."""
    if not len(rows):
        return v
    half = np.linalg.cholesky(v)
    x = rows @ half
    lower: Array = np.asarray(half @ np.linalg.solve(np.eye(len(v)) + x.T @ x, half.T), np.float64)
    return lower


def _variance(v: Array, g: Array, rows: Array) -> float:
    """g^T V g after these runs."""
    return float(g @ _after(v, rows) @ g)


def _six_n_d(parameters: Array, tokens: Array) -> Array:
    return FLOPS * parameters * tokens


def _checked(runs: Runs) -> Runs:
    return check(runs, least=0)


def _check_law(law: Law) -> None:
    if not np.isfinite(unknowns_of(law)).all() or not min(law.alpha, law.beta) > 0:
        raise ValueError(f"law: E, A, B, alpha and beta must be positive and finite, got {law}")


def _positive(name: str, x: Any) -> None:
    values = np.atleast_1d(np.asarray(x, np.float64))
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
        raise ValueError(f"{name} must be positive and finite, got {values[bad[0]]}")
