"""Approach 3: the law fitted to all runs at once, by a robust loss of the logarithm.

    minimise  sum_r huber_delta( LSE(a - alpha log N_r, b - beta log D_r, e) - log L_r )
    A = exp(a), B = exp(b), E = exp(e)

Hoffmann et al. 2022, equation 3 and appendix D.3, with delta 1e-3. The sum, and not the mean: with a mean, optimizers
whose tolerance is absolute stop early, which is why published values and refits differ (Besiroglu et al. 2024,
arXiv:2404.10102). About a third of the starts of their grid end at the best value, so all of them are taken.
"""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from purelm.scaling.laws import Law
from purelm.scaling.minimise import Found, minimise
from purelm.scaling.runs import Array, Runs, check

__all__ = ["DELTA", "fit", "law_of", "logs", "objective", "refit", "starts", "unknowns_of"]

DELTA = 1e-3
MOST = 700.0  # e^710 is no float64
Logs = tuple[Array, Array, Array]


def starts() -> Array:
    """The 4,500 starts (a, b, e, alpha, beta) of Hoffmann et al., appendix D.3."""
    a = b = np.arange(0.0, 26.0, 5.0)
    e = np.arange(-1.0, 1.1, 0.5)
    alpha = beta = np.arange(0.0, 2.1, 0.5)
    return np.array(list(product(a, b, e, alpha, beta)))


def law_of(x: Array) -> Law:
    """The law, or laws, of unknowns (..., 5). Coefficients stay finite: runs that do not determine one give e^700."""
    a, b, e, alpha, beta = np.moveaxis(np.asarray(x, np.float64), -1, 0)
    e, a, b = np.exp(np.minimum((e, a, b), MOST))
    return Law(e, a, b, alpha, beta)


def unknowns_of(law: Law) -> Array:
    """(..., 5): the inverse of `law_of`, of positive E, A and B."""
    return np.stack([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta], -1)


def objective(runs: Runs, law: Law, delta: float = DELTA) -> Array:
    """The sum of Huber losses of one law, or of each of many."""
    x = np.atleast_2d(unknowns_of(Law(*map(np.asarray, law))))
    value, _ = _value_and_gradient(x, *logs(runs), delta)
    return value if np.ndim(law.E) else value[0]


def fit(runs: Runs, *, delta: float = DELTA, begin: Array | None = None, most_steps: int = 500) -> tuple[Law, Found]:
    """(the law of the least objective, what came of each start). begin: starts (S, 5), default all 4,500."""
    runs, delta = check(runs, least=5), _checked(delta)
    found = refit(logs(runs), starts() if begin is None else begin, delta, most_steps)
    best = int(np.argmin(np.where(np.isfinite(found.value), found.value, np.inf)))
    # As exactly as float64 allows.
    x = found.x[best : best + 1]
    polished = refit(logs(runs), x, delta, 10 * most_steps)
    return Law(*(float(y[0]) for y in law_of(polished.x))), found


def logs(runs: Runs) -> Logs:
    """Of N, D and L, (1, R) each."""
    return np.log(runs.parameters)[None], np.log(runs.tokens)[None], np.log(runs.loss)[None]


def refit(data: Logs, begin: Array, delta: float, most_steps: int) -> Found:
    """Minima from the starts begin (S, 5). data: logarithms of N, D and L, (S, R), or (1, R), which all share."""

    def function(x: Array, at: NDArray[np.int64]) -> tuple[Array, Array]:
        log_n, log_d, log_loss = (y if len(y) == 1 else y[at] for y in data)
        return _value_and_gradient(x, log_n, log_d, log_loss, delta)

    return minimise(function, begin, most_steps=most_steps)


def _checked(delta: float) -> float:
    if not 0 < delta < np.inf:
        raise ValueError(f"delta must be positive and finite, got {delta}")
    return delta


def _value_and_gradient(x: Array, log_n: Array, log_d: Array, log_loss: Array, delta: float) -> tuple[Array, Array]:
    """(S,) and (S, 5). The gradient of log-sum-exp is the share that each term has of the loss."""
    a, b, e, alpha, beta = x.T[:, :, None]
    p, q = a - alpha * log_n, b - beta * log_d
    top = np.maximum(np.maximum(p, q), e)
    p, q, r = np.exp(p - top), np.exp(q - top), np.exp(e - top)
    total = p + q + r
    residual = np.log(total)
    residual += top - log_loss
    clipped = np.clip(residual, -delta, delta)
    value = (clipped * (residual - 0.5 * clipped)).sum(1)  # r^2 / 2 inside, delta (|r| - delta / 2) outside
    clipped /= total
    p *= clipped
    q *= clipped
    r *= clipped
    slope = [p.sum(1), q.sum(1), r.sum(1), -(p * log_n).sum(1), -(q * log_d).sum(1)]
    return value, np.stack(slope, 1)
