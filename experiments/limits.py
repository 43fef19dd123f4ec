"""Ranges of numbers and texts in a configuration: written beside the field, checked in one place.

    steps: Count = 1000                                       # an int, at least 1
    lr: Annotated[float, Range(0, FP32_MAX)] = 1e-3
    check(cfg)                                                # ValueError naming the field, its value and the range

`experiments.console.program` checks the configuration before anything is read or written. nan and inf lie in no range.
Dataclasses of purelm have no such annotations: the ranges of their fields are in `OTHERS`.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from purelm.models.config import Config
from purelm.ops.rope import RopeScaling

FP32_MAX = 3.4e38  # numbers that a step computes with become fp32 tensors
MOST = 10**15  # of counts: larger than any in use, and exact in fp64. capacity.py refuses what does not fit


@dataclass(frozen=True)
class Range:
    """From low to high, ends included unless open; or_zero: 0 is allowed too, outside of the range."""

    low: float
    high: float = MOST
    open_low: bool = False
    open_high: bool = False
    or_zero: bool = False

    def holds(self, value: float) -> bool:
        if self.or_zero and value == 0:
            return True
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below  # both are False for nan

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {_plain(self.low)}"
        high = f"{'below' if self.open_high else 'at most'} {_plain(self.high)}"
        high = "" if self.high in (MOST, FP32_MAX) else high
        text = f"{low} and {high}" if high else low
        return f"0, or {text}" if self.or_zero else text


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


@dataclass(frozen=True)
class Unicode:
    """Text that UTF-8 can encode. (Python gives bytes of an argument that are not UTF-8 as lone surrogates.)"""


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Seed = Annotated[int, Range(-(2**63), 2**63, open_high=True)]  # of random.key
Factor = Annotated[float, Range(0, FP32_MAX)]
Positive = Annotated[float, Range(0, FP32_MAX, open_low=True)]
Share = Annotated[float, Range(0, 1)]
Beta = Annotated[float, Range(0, 1, open_high=True)]
# The smallest normal number of fp32. An eps that rounds to 0 would make 0 / (0 + eps) nan.
Epsilon = Annotated[float, Range(1.2e-38, FP32_MAX)]
Text = Annotated[str, Unicode()]
Place = Annotated[Path, Unicode()]  # reports contain these names

_size, _number, _positive = Range(1), Range(0), Range(0, FP32_MAX, open_low=True)
OTHERS: dict[type, dict[str, Range]] = {
    Config: {
        **dict.fromkeys(
            ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"), _size
        ),
        "norm_eps": Range(1.2e-38, FP32_MAX),
        "rope_theta": _positive,
        "window": _number,
        "attention_scale": _positive,
        "attention_softcap": _positive,
        "logit_softcap": _positive,
    },
    RopeScaling: {
        "factor": Range(1, FP32_MAX),
        "original_length": _size,
        **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), _positive),
        "attention_factor": _positive,
    },
}


def check(cfg: Any, prefix: str = "") -> None:
    """Raise a ValueError that names the first field outside of its range, in a dataclass or in one within it."""
    hints = get_type_hints(type(cfg), include_extras=True)
    for field in dataclasses.fields(cfg):
        name, value = f"{prefix}{field.name}", getattr(cfg, field.name)
        inner = [x for x in (value if isinstance(value, tuple) else (value,)) if dataclasses.is_dataclass(x)]
        for x in inner:
            check(x, f"{name}.")
        if inner:
            continue
        rule = rule_of(type(cfg), field.name, hints[field.name])
        for item in value if isinstance(value, tuple | list) else (value,):
            _check_one(name, item, rule)


def _check_one(name: str, value: Any, rule: "Range | Unicode | None") -> None:
    if isinstance(rule, Range) and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, {rule}, got {value}")
        if not rule.holds(value):
            most = f", and at most {rule.high:g}" if value > rule.high in (MOST, FP32_MAX) else ""
            raise ValueError(f"{name} must be {rule}{most}, got {value}")
    elif isinstance(rule, Unicode) and isinstance(value, str | Path):
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} must be text that UTF-8 can hold, got {str(value)!r}: {error.reason}") from None


def rule_of(owner: type, name: str, hint: Any) -> "Range | Unicode | None":
    """The rule of a field, from its annotation or from `OTHERS`."""
    if owner in OTHERS:
        return OTHERS[owner].get(name)
    return next((part for part in _metadata(hint) if isinstance(part, Range | Unicode)), None)


def _metadata(hint: Any) -> Iterator[Any]:
    """Metadata of every Annotated in a type, those within a union such as Count | None included."""
    if get_origin(hint) is Annotated:
        yield from hint.__metadata__
    for part in get_args(hint):
        if not isinstance(part, str | int | float | None):
            yield from _metadata(part)
