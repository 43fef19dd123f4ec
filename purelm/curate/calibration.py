"""Scores that mean what they say: a temperature fitted on held-out texts, and how far scores are from frequencies.

z (B, L) logits, y (B,) numbers of the right labels.
"""

import numpy as np

__all__ = ["HIGHEST", "LOWEST", "auc", "calibration_error", "softmax", "temperature"]

LOWEST, HIGHEST = 0.01, 100.0  # of a temperature: logits that tell all held-out texts apart would have 0


def softmax(z: np.ndarray) -> np.ndarray:
    """exp(z) / sum exp(z), over the last axis."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def temperature(z: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The T in LOWEST .. HIGHEST that minimises the mean of -log softmax(z / T)[y] (Guo et al. 2017, arXiv:1706.04599).

    In s = 1/T the loss is convex, its slope mean(sum_k p_k z_k - z_y): bisection finds where that is 0. LOWEST where no
    text is on the wrong side, 1 where all logits of each text are equal.
    """
    z, y = np.asarray(z, np.float64), np.asarray(y)
    if z.ndim != 2 or not len(z) or y.shape != z.shape[:1] or not np.isfinite(z).all():
        raise ValueError(f"z, y: finite logits (B, L) and (B,) labels of one text or more, got {z.shape} and {y.shape}")
    w = np.ones(len(z)) if weights is None else np.asarray(weights, np.float64)
    right = z[np.arange(len(z)), y]
    if (z == z[:, :1]).all():  # every temperature is as good
        return 1.0
    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(60):
        s = (low + high) / 2
        slope = (w * ((softmax(s * z) * z).sum(1) - right)).sum()
        low, high = (s, high) if slope <= 0 else (low, s)
    return 2 / (low + high)


def calibration_error(p: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of (n_b / n) |accuracy_b - mean confidence_b| (Guo et al. 2017, eq. 3).

    p (B, L) scores. A text lies in bin ceil(bins * its best score), bins of one width.
    """
    p, y = np.asarray(p, np.float64), np.asarray(y)
    if p.ndim != 2 or not len(p) or y.shape != p.shape[:1] or bins < 1:
        raise ValueError(f"p, y, bins: scores (B, L), labels (B,), 1 bin or more; got {p.shape}, {y.shape}, {bins}")
    best, right = p.max(1), p.argmax(1) == y
    place = np.clip(np.ceil(best * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, right, bins) - np.bincount(place, best, bins)
    return float(np.abs(gaps).sum() / len(p))


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """The share of pairs of a positive and a negative text in which the positive has the higher score; a tie is half.

    By ranks (Mann and Whitney 1947): (sum of the positives' mean ranks - n(n + 1)/2) / (n m).
    """
    score, positive = np.asarray(score, np.float64), np.asarray(positive, bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m or np.isnan(score).any():
        raise ValueError(f"score, positive: both classes and no nan; got {n} positive and {m} negative texts")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))
