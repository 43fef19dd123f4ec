"""What is said of arguments that an optimizer cannot take: one line with the argument, what came, what is allowed."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_betas", "check_choice", "check_lr", "check_optimizer", "check_range", "check_update"]


def check_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low <= value < high."""
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join([repr(a) for a in allowed])}, got {value!r}")


def check_betas(name: str, betas: Any) -> tuple[float, float]:
    """The two decays; ValueError unless both are in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(
            f"{name}: betas is {_told(betas)}; a pair of numbers is needed. The learning rate is no argument of "
            f"{name}: it is given to each update(grads, state, params, lr)"
        )
    for i, b in enumerate(betas):
        check_range(f"betas[{i}]", b, 0.0, 1.0)
    return betas[0], betas[1]


def check_update(name: str, kind: type, grads: Any, state: Any, params: Any, lr: Any) -> None:
    """ValueError for the state of another optimizer, for no parameters, and for a schedule in place of its value.

    It looks at types alone, and does nothing under torch.compile.
    """
    if torch.compiler.is_compiling():
        return
    if not isinstance(state, kind):
        hint = " (checkpoint.load gives a NamedTuple back where it is told the form: like=)" * isinstance(state, dict)
        raise ValueError(
            f"{name}: state is of type {type(state).__name__}; {kind.__name__} is needed, as init(params) of this "
            f"optimizer makes it{hint}"
        )
    if params is None and grads is not None:
        raise ValueError(f"{name}: params is None; update(grads, state, params, lr) needs the parameters")
    check_lr(name, lr)


def check_lr(name: str, lr: Any) -> None:
    """ValueError where lr is a function (or missing), not a number or a 0-d tensor."""
    if not torch.compiler.is_compiling() and not isinstance(lr, Tensor) and (lr is None or callable(lr)):
        raise ValueError(
            f"{name}: lr is {_told(lr)}; a number or a 0-d tensor is needed, of a schedule its value at the step: "
            "schedule(step)"
        )


def check_optimizer(name: str, value: Any) -> None:
    """ValueError unless value has the two functions of an optimizer."""
    if not callable(getattr(value, "init", None)) or not callable(getattr(value, "update", None)):
        raise ValueError(f"{name} is {_told(value)}; a pair Optimizer(init, update) is needed, as adamw() makes it")


def _told(value: Any) -> str:
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"
