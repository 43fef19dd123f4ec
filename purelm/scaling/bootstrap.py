"""Intervals of laws and of what is predicted from them, by fits to runs that are drawn again.

    laws = resampled(key, runs, law, n=1000)                      # fields of (1000,)
    low, high = interval(optimum(laws, 1e24).parameters)          # 95 %

R runs are drawn from the R with replacement, and the law is fitted again from the one of all runs, by the objective of
`parametric` (Besiroglu et al. 2024 do so 4,000 times).
"""

import numpy as np
from torch import Tensor

from purelm import random
from purelm.scaling.laws import Law
from purelm.scaling.parametric import DELTA, law_of, refit, unknowns_of
from purelm.scaling.runs import Array, Runs, check

__all__ = ["interval", "resampled"]


def resampled(key: Tensor, runs: Runs, law: Law, n: int = 1000, *, delta: float = DELTA, most_steps: int = 500) -> Law:
    """The laws of n bootstrap samples, whose fields are (n,). key: of purelm.random."""
    runs = check(runs, least=5)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    R = len(runs.loss)
    drawn = random.randint(key, (n, R), 0, R).numpy()
    log_n, log_d, log_loss = (np.log(x)[drawn] for x in runs)
    begin = np.repeat(unknowns_of(law)[None], n, 0)
    found = refit((log_n, log_d, log_loss), begin, delta, most_steps)
    return law_of(found.x)


def interval(values: Array, coverage: float = 0.95) -> tuple[float, float]:
    """The central interval that has this share of the values."""
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be in (0, 1), got {coverage}")
    low, high = np.quantile(np.asarray(values, np.float64), [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)
