"""Strategies of batches for a Model's loss.

    @given(configs().flatmap(lambda cfg: st.tuples(st.just(cfg), batches(cfg))))
    def test_my_loss(case): ...

Legend: B rows, T positions.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from purelm import random
from purelm.data.checks import check_int
from purelm.models.config import Config
from purelm.models.model import Model
from purelm.testing.strategies.choices import chosen
from purelm.testing.strategies.tensor import seeds, sides

__all__ = ["BatchKind", "Field", "batches"]

BatchKind = Literal["full", "padded", "packed", "masked"]
Field = Literal["weights", "segment_ids", "denominator"]
KINDS: tuple[BatchKind, ...] = get_args(BatchKind)
FIELDS: tuple[Field, ...] = get_args(Field)
NEEDED: dict[BatchKind, tuple[Field, ...]] = {
    "full": (),
    "padded": ("weights",),
    "packed": ("weights", "segment_ids"),
    "masked": ("weights",),
}
LONGEST = 16  # most positions unless max_length says more
GRADES = (1.0, 0.0, 0.25, 0.5, 2.0)  # weights that sum exactly


def batches(
    of: Config | Model | int,
    kinds: BatchKind | Sequence[BatchKind] | None = None,
    *,
    fields: Field | Sequence[Field] | tuple[()] = FIELDS,
    max_rows: int = 4,
    max_length: int | None = None,
    nothing: bool = False,
    device: torch.device | str | None = None,
) -> SearchStrategy[dict[str, Tensor]]:
    """Batches as `Loss` takes them: "tokens" and "targets" (B, T) int64, and some of the fields.

    Args:
        of: a Config, a Model or the size of the vocabulary.
        kinds: None: all that the fields allow.
            full: every position predicts the next of its row.
            padded: at least one row ends early; what is behind has weight 0.
            packed: documents one after another, told apart by segment_ids 1, 2, ... and 0 on padding, as `data.pack`
            makes them; at least one row has several, others may have one, with padding behind them or without.
            masked: all targets of at least one row have weight 0, be it text or padding; the other rows are any of
            the above.
        fields: that may be there. "weights": float32 (B, T), 0 or 1, or in 0, 1/4, 1/2, 1, 2, also in the middle of
            a row. "segment_ids": int64 (B, T), also where all are 1. "denominator": 0-d float32, the sum of the
            weights, 1, or 64 as of a larger batch.
        max_rows, max_length: most B and T; max_length None: the model's context_length, and no more than 16.
        nothing: all weights may be 0, so that the loss is 0; else some target counts.

    Targets of weight 0 are ids of tokens, or all of them -1 or -100. Shrinks to one full row of one token, id 0.

    >>> from hypothesis import find
    >>> find(batches(8), lambda batch: True)
    {'tokens': tensor([[0]]), 'targets': tensor([[0]])}
    """
    if not isinstance(of, int) and not hasattr(of, "vocab_size"):
        raise ValueError(f"of must be a Config, a Model or the size of the vocabulary, got {of!r}")
    n_tokens = of if isinstance(of, int) else of.vocab_size
    check_int("of", n_tokens, 1)
    check_int("max_rows", max_rows, 1)
    longest = None if isinstance(of, int) else of.context_length
    if max_length is None:
        max_length = min(LONGEST, longest or LONGEST)
    check_int("max_length", max_length, 1, longest)
    optional = chosen("fields", fields, FIELDS) if fields else ()
    some = KINDS if kinds is None else chosen("kinds", kinds, KINDS)
    reasons = {kind: _why_not(kind, optional, max_rows, max_length, nothing) for kind in some}
    some = tuple(kind for kind in some if not reasons[kind])
    refused = [reason for reason in reasons.values() if reason]
    if refused and (kinds is not None or not some):
        raise ValueError(f"kinds: {'; '.join(refused)}")
    return _batches(n_tokens, some, optional, max_rows, max_length, nothing, device)


def _why_not(kind: BatchKind, fields: Sequence[Field], max_rows: int, max_length: int, nothing: bool) -> str:
    """What keeps batches of this kind from being drawn; "" if nothing does."""
    if missing := [name for name in NEEDED[kind] if name not in fields]:
        return f"{kind!r} needs the fields {', '.join(missing)}"
    if kind in ("padded", "packed") and max_length < 2:
        return f"{kind!r} needs max_length 2 or more"
    if kind == "masked" and max_rows < 2 and not nothing:
        return "'masked' needs max_rows 2 or more, or nothing=True"
    return ""


@st.composite
def _batches(
    draw: DrawFn,
    n_tokens: int,
    kinds: Sequence[BatchKind],
    fields: Sequence[Field],
    max_rows: int,
    max_length: int,
    nothing: bool,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    kind = draw(st.sampled_from(kinds))
    B = draw(st.integers(2 if kind == "masked" and not nothing else 1, max_rows))
    T = draw(st.sampled_from([n for n in sides(max_length) if n > 1 or kind in ("full", "masked")]))
    weighted = "weights" in fields and (kind != "full" or draw(st.booleans()))
    packed = "segment_ids" in fields and (kind == "packed" or draw(st.booleans()))
    segments_BT, counted_BT = _places(draw, kind, B, T, packed, nothing)
    seed = draw(seeds())
    ids_BT, ends_BT, grades_BT = random.bits(random.key(seed), (3, B, T)) * (seed > 0)
    padding = draw(st.sampled_from(sorted({0, n_tokens - 1})))
    tokens_BT = torch.where(segments_BT > 0, ids_BT % n_tokens, padding)
    follows_BT = torch.cat([segments_BT[:, 1:] == segments_BT[:, :-1], torch.zeros(B, 1, dtype=torch.bool)], 1)
    targets_BT = torch.where(follows_BT, tokens_BT.roll(-1, 1), ends_BT % n_tokens)
    batch = {"tokens": tokens_BT, "targets": targets_BT}
    n_targets = float(B * T)
    if weighted:
        weights_BT = counted_BT.float()
        if draw(st.booleans()):
            graded_BT = weights_BT * torch.tensor(GRADES)[grades_BT % len(GRADES)]
            weights_BT = graded_BT if nothing or graded_BT.any() else weights_BT
        n_targets = float(weights_BT.sum())
        ignored = draw(st.sampled_from([None, -1, -100]))
        if ignored is not None:
            batch["targets"] = torch.where(weights_BT == 0, ignored, targets_BT)
        batch["weights"] = weights_BT
    if packed:
        batch["segment_ids"] = segments_BT
    if "denominator" in fields:
        total = draw(st.sampled_from([None, n_targets or 1.0, 1.0, 64.0]))
        if total is not None:
            batch["denominator"] = torch.tensor(total)
    return batch if device is None else {name: x.to(device) for name, x in batch.items()}


def _places(draw: DrawFn, kind: BatchKind, B: int, T: int, packed: bool, nothing: bool) -> tuple[Tensor, Tensor]:
    """(segment ids, 0 on padding; whether the target counts) of each place of a batch of this kind."""
    if kind == "full":
        segments_BT = torch.ones(B, T, dtype=torch.int64)
        return segments_BT, segments_BT > 0
    must = draw(st.sampled_from(range(B))) if kind != "masked" else None  # the row that makes the batch one of its kind
    rows = [_row(draw, T, packed and kind != "padded", kind if i == must else None) for i in range(B)]
    segments_BT = torch.tensor(rows)
    if kind != "masked":
        return segments_BT, segments_BT > 0
    masked = draw(st.sets(st.sampled_from(range(B)), min_size=1, max_size=B - (not nothing)))
    masked_B1 = torch.tensor([[i in masked] for i in range(B)])
    if draw(st.booleans()):  # rows of padding alone, as the last batch of an evaluation has
        segments_BT = segments_BT * ~masked_B1
    return segments_BT, (segments_BT > 0) & ~masked_B1


def _row(draw: DrawFn, T: int, packed: bool, kind: BatchKind | None) -> list[int]:
    """Segment ids of a row; of kind "padded" it has padding, of kind "packed" two or more documents."""
    padding = draw(st.integers(1 if kind == "padded" else 0, T - (2 if kind == "packed" else 1)))
    n = T - padding
    cuts: set[int] = set()
    if packed and n > 1:
        cuts = draw(st.sets(st.sampled_from(range(1, n)), min_size=int(kind == "packed"), max_size=3))
    ends = [0, *sorted(cuts), n]
    ids = [i for i, (start, end) in enumerate(itertools.pairwise(ends), 1) for _ in range(start, end)]
    return ids + [0] * padding
