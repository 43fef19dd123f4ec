"""Rewards of responses, by name, as programs offer them: (response, gold text) -> {"reward": ...} and its parts."""

from collections.abc import Callable
from typing import Literal

from purelm.align.graders import gsm8k, question_only, r1_zero

__all__ = ["GradeName", "Reward", "grader_named"]

GradeName = Literal["none", "exact", "number", "boxed", "r1_zero"]
Reward = Callable[[str, str], dict[str, float]]


def _exact(response: str, gold: str) -> dict[str, float]:
    return {"reward": float(response.strip() == gold.strip())}


def _number(response: str, gold: str) -> dict[str, float]:
    return {"reward": float(gsm8k(response, gold).equal)}


def grader_named(name: GradeName) -> Reward | None:
    """The grader of this name; None for "none"."""
    return {"none": None, "exact": _exact, "number": _number, "boxed": question_only, "r1_zero": r1_zero}[name]
