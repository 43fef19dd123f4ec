"""Figures of a set's answers."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from purelm.evals.accuracy import majority, pass_at_k, powers, wilson
from purelm.evals.tasks import Example

__all__ = ["summary_of", "summary_of_open"]


def summary_of(examples: Sequence[Example], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right answers; the interval is that of the first samples'. By subject where there are several."""
    n, k = len(rows), len(rows[0]["right"])
    right = sum(row["right"][0] for row in rows)
    low, high = wilson(right, n)
    found: dict[str, Any] = {
        "n": n, "right": right, "accuracy": right / n, "low": low, "high": high,
        "unparsed": sum(row["answers"][0] is None for row in rows),
    }  # fmt: skip
    if k > 1:
        for j in powers(k):
            found[f"pass@{j}"] = sum(pass_at_k(k, sum(row["right"]), j) for row in rows) / n
        chosen = [majority(row["answers"], _value) for row in rows]
        found[f"maj@{k}"] = sum(
            answer is not None and row["right"][row["answers"].index(answer)]
            for answer, row in zip(chosen, rows, strict=True)
        ) / n  # fmt: skip
    subjects: dict[str, list[bool]] = {}
    for example, row in zip(examples, rows, strict=True):
        subjects.setdefault(example.subject, []).append(row["right"][0])
    if len(subjects) > 1:
        shares = {name: sum(values) / len(values) for name, values in subjects.items()}
        found["macro accuracy"] = sum(shares.values()) / len(shares)
        found["subjects"] = {
            name: {"n": len(values), "right": sum(values), "accuracy": shares[name]}
            for name, values in sorted(subjects.items())
        }
    return found


def summary_of_open(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of answers that are not graded: how long the first samples are, in characters, and the share of empty ones."""
    texts = [row["responses"][0] for row in rows]
    return {
        "n": len(texts), "mean length": sum(map(len, texts)) / len(texts),
        "empty": sum(not text.strip() for text in texts) / len(texts),
    }  # fmt: skip


def _value(answer: str) -> Fraction | str:
    """4, 4.0 and 4.00 are one answer."""
    try:
        return Fraction(answer)
    except (ValueError, ZeroDivisionError):
        return answer
