"""How much of each source goes into a corpus, in whole tokens or documents, and which comes when.

    shares = tempered([8_000_000, 500_000], temperature=2.0)          # 0.8, 0.2
    tokens = amounts(shares, sizes=[8_000_000, 500_000], budget=4_000_000, most_epochs=4.0)
    order = [element(key, 500_000, i) for i in range(n)]              # (epoch, document) of one source

Legend: S sources.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, cast

import torch

from purelm import random
from purelm.data.checks import check_int
from purelm.data.shuffle import permuted
from purelm.random import Key

__all__ = ["amounts", "element", "tempered"]


def tempered(sizes: Sequence[int], temperature: float = 1.0) -> list[float]:
    """(S,) p_i = n_i^(1/T) / sum_j n_j^(1/T): T 1 is in proportion, larger T nearer to equal shares; inf is equal.

    Source: Devlin et al., multilingual BERT (T = 1 / 0.7); Conneau et al. 2020, section 3.1, equation 1. A source of
    size 0 has share 0. ValueError for no sources, sizes that are all 0 or negative, and T not above 0.

    >>> tempered([16, 4, 0], 2.0)
    [0.6666666666666666, 0.3333333333333333, 0.0]
    """
    numbers = [check_int(f"sizes[{i}]", size, 0) for i, size in enumerate(sizes)]
    if not any(numbers):
        raise ValueError(f"sizes={list(sizes)!r}: at least one must be above 0")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
        raise ValueError(f"temperature={temperature!r}: allowed is a number above 0, or inf")
    most = max(numbers)  # powers of n / most are at most 1: no overflow
    powers = [math.exp((math.log(n) - math.log(most)) / temperature) if n else 0.0 for n in numbers]
    total = math.fsum(powers)
    return [power / total for power in powers]


def amounts(
    weights: Sequence[float], sizes: Sequence[int], budget: int, most_epochs: float | Sequence[float] = math.inf
) -> list[int]:
    """(S,) whole numbers that add up to budget exactly: in proportion to weights, none above its cap.

        x_i = min(cap_i, L w_i),   sum_i x_i = budget,   cap_i = floor(most_epochs_i n_i)

    The level L is found exactly (weights and epochs are taken as the fractions that they are): what a source cannot
    give, the others do in proportion to their weights (water-filling). Parts below one go to the largest remainders
    among those below their cap, to the first of equal ones; so each is within one of its exact x_i.

    Args:
        weights: finite, from 0; they need not add up to 1. A weight of 0 is no part at all, also where others are full.
        sizes: what each source has, in the budget's unit: tokens or documents.
        most_epochs: how often a source may be repeated, from 0, one for all or one each; inf: as often as it takes.

    Raises ValueError for wrong numbers, and if the sources cannot fill the budget: it says how much they can.

    >>> amounts([0.5, 0.5], [100, 10], 60, 1.0)
    [50, 10]
    """
    S = len(sizes)
    each: list[Any] = [most_epochs] * S if isinstance(most_epochs, Real) else list(cast(Sequence[float], most_epochs))
    if not len(weights) == S == len(each):
        counts = f"{len(weights)}, {S} and {len(each)} entries"
        raise ValueError(f"weights, sizes and most_epochs have {counts}; allowed: one each")
    for name, values, high in (("weights", weights, False), ("most_epochs", each, True)):
        for i, x in enumerate(values):
            number = isinstance(x, Real) and not isinstance(x, bool)
            if not number or not x >= 0 or (math.isinf(x) and not high):
                allowed = "a number from 0, or inf" if high else "a finite number from 0"
                raise ValueError(f"{name}[{i}]={x!r}: allowed is {allowed}")
    numbers = [check_int(f"sizes[{i}]", size, 0) for i, size in enumerate(sizes)]
    budget = check_int("budget", budget, 0)
    w = [_exact(x) for x in weights]
    caps = []
    for i, (n, e) in enumerate(zip(numbers, each, strict=True)):
        possible = n > 0 and w[i] > 0
        caps.append(budget if possible and math.isinf(e) else min(int(_exact(e) * n), budget) if possible else 0)
    if sum(caps) < budget:
        most = f"{sum(caps):,} within most_epochs={most_epochs!r}"
        raise ValueError(f"budget={budget:,}: the sources give at most {most}")
    # Sources are full in the order of cap / weight; the level is that of those which are left.
    open_ones = sorted((i for i in range(S) if caps[i]), key=lambda i: (caps[i] / w[i], i))
    exact, left = [Fraction(0)] * S, Fraction(budget)
    total = sum((w[i] for i in open_ones), Fraction(0))
    for i in open_ones:
        exact[i] = min(Fraction(caps[i]), left * w[i] / total)
        left, total = left - exact[i], total - w[i]
    found = [int(x) for x in exact]
    rest = sorted((i for i in range(S) if exact[i] > found[i]), key=lambda i: (found[i] - exact[i], i))
    for i in rest[: budget - sum(found)]:
        found[i] += 1
    return found


def _exact(x: float) -> Fraction:
    return Fraction(x if isinstance(x, int) else float(x))  # numpy's numbers are no Rational


def element(key: Key, n: int, index: int) -> tuple[int, int]:
    """(epoch, which of 0..n-1) is number `index` of an endless sequence: one random order after another.

    Each epoch has an order of its own, `shuffle.permuted` under fold_in(key, epoch): no list is held. A source that is
    drawn x times is elements 0 to x - 1, so each of its n comes floor(x / n) or ceil(x / n) times.

    >>> [element(random.key(0), 3, i)[0] for i in range(6)]
    [0, 0, 0, 1, 1, 1]
    """
    epoch, place = divmod(check_int("index", index, 0), check_int("n", n, 1))
    return epoch, int(permuted(random.fold_in(key.cpu(), epoch), n, torch.tensor(place)))
