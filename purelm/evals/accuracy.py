"""Shares of right answers: an interval for one, and pass@k and maj@k of several samples a question."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["majority", "pass_at_k", "powers", "wilson"]


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """An interval in which the true share lies with confidence 95 % (z standard deviations) after `right` of n.

    (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n); Wilson 1927. Unlike p +- z sqrt(p (1 - p)/n) it is
    also right near 0 and 1.

    >>> [round(x, 4) for x in wilson(0, 40)]
    [0.0, 0.0876]
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"wilson: right must be in 0..n and n at least 1, got {right} and {n}")
    p, w = right / n, z * z / n
    middle, half = p + w / 2, z * math.sqrt(p * (1 - p) / n + w / (4 * n))
    return max((middle - half) / (1 + w), 0.0), min((middle + half) / (1 + w), 1.0)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, from n samples of which `right` are: 1 - C(n - right, k) / C(n, k).

    The unbiased estimate of Chen et al. 2021 (arXiv:2107.03374), section 2.1.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"pass_at_k: needs 1 <= k <= n and 0 <= right <= n, got n {n}, right {right}, k {k}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str | None], key: Callable[[str], Any] = str) -> str | None:
    """The answer that most samples give (maj@k); the first of those that tie; None if no sample has one.

    key: answers of equal keys are one answer, of which the first form is given back.

    >>> majority(["3", None, "4", "4"]), majority(["3", "3", "4.0", "4", "4.00"], float)
    ('4', '4.0')
    """
    given = [answer for answer in answers if answer is not None]
    keys = [key(answer) for answer in given]
    return given[keys.index(Counter(keys).most_common(1)[0][0])] if given else None


def powers(k: int) -> list[int]:
    """1, 2, 4, ... below k, and k: for which j to report pass@j of k samples.

    >>> powers(6), powers(8), powers(1)
    ([1, 2, 4, 6], [1, 2, 4, 8], [1])
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return [*(1 << i for i in range((k - 1).bit_length())), k]
