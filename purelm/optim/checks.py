"""What is said of arguments that an optimizer cannot take: one line with the argument, what came, what is allowed."""

from typing import Any

__all__ = ["check_choice", "check_optimizer", "check_range"]


def check_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low <= value < high."""
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join([repr(a) for a in allowed])}, got {value!r}")


def check_optimizer(name: str, value: Any) -> None:
    """ValueError unless value has the two functions of an optimizer."""
    if not callable(getattr(value, "init", None)) or not callable(getattr(value, "update", None)):
        raise ValueError(f"{name} is {_told(value)}; a pair Optimizer(init, update) is needed, as adamw() makes it")


def _told(value: Any) -> str:
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"
