"""Prompts and options of `generate`, checked before anything is computed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from purelm.generate.stops import Decode, Stop
from purelm.generate.types import Prompts
from purelm.models.model import Model
from purelm.models.tokens import check_tokens

__all__ = ["check_options", "check_stop", "listed", "rows_of"]


def listed(prompts: Prompts) -> list[Any]:
    """The prompts as a list, since an iterator can be read only once."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be rows of token ids, got {prompts!r}: encode text first")
    return list(prompts)


def rows_of(prompts: Prompts, model: Model) -> list[Tensor]:
    """The prompts as (n,) int64 tensors on the host, validated."""
    rows = []
    for i, p in enumerate(listed(prompts)):
        try:
            rows.append(torch.as_tensor(p).cpu())
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"prompts[{i}] must be token ids, got {p!r:.80}") from error
    if not rows:
        raise ValueError("prompts must hold at least one row, got none")
    for i, row in enumerate(rows):
        if row.ndim != 1 or not 1 <= row.numel() <= model.context_length:
            raise ValueError(
                f"prompts[{i}] must be 1..{model.context_length} token ids (context_length), got shape "
                f"{tuple(row.shape)}"
            )
        check_tokens(row, model, f"prompts[{i}]")
    return [row.to(torch.int64) for row in rows]


def check_options(
    key: Tensor, n_rows: int, max_new_tokens: Any, batch_size: Any, n_samples: Any, read_every: Any
) -> None:
    """ValueError for a number that is none or too small, or a key of the wrong shape."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
    for name, value, may_be_none in (
        ("n_samples", n_samples, False), ("batch_size", batch_size, True), ("read_every", read_every, True),
    ):  # fmt: skip
        if (value is not None or not may_be_none) and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise ValueError(
                f"{name} must be an integer of at least 1{' or None' if may_be_none else ''}, got {value!r}"
            )
    n_rows *= n_samples
    if tuple(key.shape) not in ((2,), (n_rows, 2)):
        raise ValueError(f"key must be one key, or one for each of {n_rows} rows, got shape {tuple(key.shape)}")


def check_stop(stop: Stop, model: Model, max_new_tokens: int, decode_fn: Decode | None) -> None:
    """ValueError for a stop that these other arguments do not go with."""
    if stop.min_new_tokens > max_new_tokens:
        raise ValueError(
            f"stop.min_new_tokens must be in 0..max_new_tokens {max_new_tokens}, got {stop.min_new_tokens}"
        )
    if stop.strings and decode_fn is None:
        raise ValueError("decode_fn (ids -> text) must be given with stop.strings, got None")
    check_tokens(torch.tensor(stop.ids, dtype=torch.int64), model, "stop.ids")
    if stop.min_new_tokens and len(set(stop.ids)) >= model.vocab_size:
        raise ValueError("stop.ids must leave a token to generate when min_new_tokens is above 0, got all ids")
