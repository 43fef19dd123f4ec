"""Data that are seen more than once: what an epoch is still worth (Muennighoff et al. 2023, arXiv:2305.16264).

    D' = U (1 + R* (1 - exp(-R / R*))),  U unique tokens, R = D / U - 1 repetitions            (their equation 5)
    N' = U_N (1 + R_N* (1 - exp(-R_N / R_N*))),  U_N the parameters best for U, R_N = N / U_N - 1

and the law of new data holds for N' and D'. Their fit: R* = 15.39, R_N* = 5.31.
"""

from typing import Any

import numpy as np

from purelm.scaling.laws import Law, exponents, loss

__all__ = ["R_PARAMETERS", "R_TOKENS", "effective", "loss_of_repeated", "parameters_for"]

R_TOKENS, R_PARAMETERS = 15.387756, 5.309743


def effective(n: Any, unique: Any, decay: float) -> Any:
    """What n is worth where `unique` of it are new: n up to `unique`, then less and less, at most unique (1 + decay).

    >>> [round(float(effective(n * 1e9, 1e9, R_TOKENS)) / 1e9, 2) for n in (0.5, 1, 4, 40)]
    [0.5, 1.0, 3.73, 15.17]
    """
    if not 0 < decay < float("inf"):
        raise ValueError(f"decay must be positive and finite, got {decay}")
    more = np.maximum(n / unique - 1, 0.0)
    return np.minimum(n, unique) + unique * decay * -np.expm1(-more / decay)


def parameters_for(law: Law, tokens: Any) -> Any:
    """The parameters for which these tokens are the best number: N* where D* = tokens."""
    a, b = exponents(law)
    g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    return g * (g * tokens) ** (a / b)


def loss_of_repeated(
    law: Law, parameters: Any, tokens: Any, unique: Any, *, r_tokens: float = R_TOKENS,
    r_parameters: float = R_PARAMETERS,
) -> Any:  # fmt: skip
    """Loss after `tokens`, of which `unique` are different; the law's own where none is repeated.

    A model below its best size for the unique tokens counts as it is.
    """
    fewer = np.minimum(unique, tokens)
    return loss(
        law, effective(parameters, parameters_for(law, fewer), r_parameters), effective(tokens, fewer, r_tokens)
    )
