"""What a run will cost in loss that is larger than all runs so far, with an interval.

    fits = fitted(key, runs)                                   # of all runs, and of two ranges of them
    loss, low, high = forecast(key, fits, parameters=7e10, tokens=1.4e12, coverage=0.9)

Two things make a forecast miss. Noise: a bootstrap shows how the law would differ for other draws of the same runs,
and the runs' residuals how one run differs from the law. And the law itself, which is another one for larger models and
more tokens: a bootstrap knows nothing of that, and the more runs, the narrower it gets around a law that is off. So the
law is also fitted without the quarter of runs with the least FLOPs, and without that with the most; each of the three
has an equal part of the samples. `experiments.scaling.backtest` measures on a user's own runs how often intervals hold.
"""

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from purelm import random
from purelm.scaling import variable_projection
from purelm.scaling.bootstrap import interval, resampled
from purelm.scaling.laws import Law, loss
from purelm.scaling.runs import Array, Runs, check, taken

__all__ = ["Fitted", "Forecast", "Ranges", "fitted", "forecast", "ranges"]

LEAST = 8  # runs of a range: with fewer, five numbers follow the noise


class Forecast(NamedTuple):
    """Losses in nats a token."""

    loss: float
    low: float
    high: float


class Fitted(NamedTuple):
    """Runs, the law fitted to them, and those of their bootstrap samples, whose fields are (n,)."""

    runs: Runs
    law: Law
    laws: Law


class Ranges(NamedTuple):
    """Fits to all runs, and to parts of them."""

    whole: Fitted
    parts: tuple[Fitted, ...]


def ranges(runs: Runs) -> tuple[Runs, ...]:
    """The runs without the quarter of the least FLOPs, and without that of the most, in the order of FLOPs."""
    order = np.argsort(runs.flops, kind="stable")
    out = len(order) // 4
    return taken(runs, order[out:]), taken(runs, order[: len(order) - out])


def fitted(key: Tensor, runs: Runs, n: int = 1000, *, parts: bool = True) -> Ranges:
    """Fits by `variable_projection` with n bootstrap samples each. key: of purelm.random.

    parts: also of `ranges`; those are left out that have fewer than `LEAST` runs, or too few sizes or numbers of tokens
        to determine a law.
    """
    runs = check(runs)
    found = []
    for i, some in enumerate((runs, *(ranges(runs) if parts else ()))):
        if i > 0 and len(some.loss) < LEAST:
            continue
        try:
            law = variable_projection.fit(some)
        except ValueError:
            if i == 0:
                raise
            continue
        found.append(Fitted(some, law, resampled(random.fold_in(key, i), some, law, n)))
    return Ranges(found[0], tuple(found[1:]))


def forecast(key: Tensor, fits: Ranges, parameters: float, tokens: float, coverage: float = 0.9) -> Forecast:
    """The loss of one more run by the law of all runs, and the central interval of the samples.

    A sample is the loss by a bootstrap law times e^r, r drawn from the residuals ln(loss / law) of the runs which that
    law was fitted to, widened by sqrt(R / (R - 5)) for the five numbers that were fitted. key: of purelm.random.

    ValueError where one of all runs is not finite: they are too few, or too much alike. Of parts, such are left out.
    """
    whole, *parts = (
        _samples(random.fold_in(key, i), fit, parameters, tokens) for i, fit in enumerate((fits.whole, *fits.parts))
    )
    if bad := int((~np.isfinite(whole)).sum()):
        raise ValueError(f"{bad} of {len(whole)} bootstrap laws are not finite: too few runs, or too much alike")
    each = np.concatenate([whole, *(x[np.isfinite(x)] for x in parts)])
    return Forecast(float(loss(fits.whole.law, parameters, tokens)), *interval(each, coverage))


def _samples(key: Tensor, fit: Fitted, parameters: float, tokens: float) -> Array:
    residuals = np.log(fit.runs.loss / loss(fit.law, fit.runs.parameters, fit.runs.tokens))
    spread = math.sqrt(len(residuals) / max(1, len(residuals) - 5))
    drawn = random.randint(key, (len(fit.laws.E),), 0, len(residuals)).numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # of a law that a sample does not determine
        return loss(fit.laws, parameters, tokens) * np.exp(spread * residuals[drawn])
