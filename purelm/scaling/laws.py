"""The law of loss over parameters and tokens, and what follows from it for a budget of compute.

    L(N, D) = E + A / N^alpha + B / D^beta                                           (Hoffmann et al. 2022, equation 2)

    C = k N D, k = 6:   N* = G (C / k)^a,  D* = (C / k)^b / G,
    a = beta / (alpha + beta),  b = 1 - a,  G = (alpha A / (beta B))^(1 / (alpha + beta))          (their equation 4)

N parameters, D tokens, C FLOPs, L nats a token. Numbers are floats, or arrays and tensors that broadcast: functions are
made of operators alone, so they can be differentiated and vectorised by what they are given.
"""

from typing import Any, NamedTuple

__all__ = ["FLOPS", "Law", "Optimum", "PowerLaw", "exponents", "loss", "optimum", "power"]

FLOPS = 6.0  # of training, for each parameter and token: 2 forward, 4 backward


class Law(NamedTuple):
    """E + A / N^alpha + B / D^beta; one law, or as many as its fields are long."""

    E: Any  # nats: what remains of infinite models and data
    A: Any
    B: Any
    alpha: Any
    beta: Any


class PowerLaw(NamedTuple):
    """coefficient x^exponent."""

    coefficient: Any
    exponent: Any


class Optimum(NamedTuple):
    """The best that a budget of compute gives."""

    parameters: Any
    tokens: Any
    loss: Any


def loss(law: Law, parameters: Any, tokens: Any) -> Any:
    """L(N, D), in nats a token."""
    return law.E + law.A * parameters**-law.alpha + law.B * tokens**-law.beta


def power(law: PowerLaw, x: Any) -> Any:
    """The power law's value at x."""
    return law.coefficient * x**law.exponent


def exponents(law: Law) -> tuple[Any, Any]:
    """(a, b) of N* ~ C^a and D* ~ C^b; a + b = 1."""
    a = law.beta / (law.alpha + law.beta)
    return a, 1 - a


def optimum(law: Law, flops: Any, flops_each: float = FLOPS) -> Optimum:
    """N and D of the least loss among those with flops_each N D = flops.

    >>> best = optimum(Law(1.69, 406.4, 410.7, 0.34, 0.28), 5.76e23)  # Chinchilla's budget, by its third approach
    >>> f"{best.parameters:.2e} {best.tokens:.2e} {best.loss:.3f}"
    '3.22e+10 2.98e+12 1.931'
    """
    a, b = exponents(law)
    g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    parameters, tokens = g * (flops / flops_each) ** a, (flops / flops_each) ** b / g
    return Optimum(parameters, tokens, loss(law, parameters, tokens))
