"""Documents packed into rows of one length, with segment ids so that no position attends to another document.

A document d of k tokens is k - 1 predictions, so it takes k - 1 positions: tokens d[:-1] and targets d[1:]. No target
is a token of the next document. A document longer than a row is cut into pieces that share one token (the last target
of a piece is the first token of the next), so that each prediction is still made exactly once. segment_ids count 1, 2,
... within a row; 0 marks padding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from purelm.data.checks import check_int

__all__ = ["first_fit", "pack", "packed_rows"]

T = TypeVar("T")

Row = dict[str, np.ndarray]


def packed_rows(
    documents: Iterable[Sequence[int] | np.ndarray],
    context_length: int,
    *,
    method: Literal["first_fit", "sequential"] = "first_fit",
    open_rows: int = 64,
    pad_id: int = 0,
) -> Iterator[Row]:
    """Stream of rows: "tokens", "targets", "segment_ids" int64 (T,) and "weights" float32 (T,), 0 on padding.

    Args:
        documents: token ids of each document, with the delimiter if the model is to predict it. A document of fewer
            than two tokens has no prediction and is left out.
        method: "sequential" fills each row to the end and cuts the document that does not fit (no padding but in the
            last row). "first_fit" keeps documents of up to context_length predictions whole, and puts each piece
            into the oldest open row with room for it.
        open_rows: for first_fit: the most rows that are open at a time; beyond it the oldest is closed.
        pad_id: token and target on padding.

    Pieces in a row are in the order in which they came.
    """
    check_int("context_length", context_length, 1)
    check_int("pad_id", pad_id, -(2**63), 2**63 - 1)
    if method not in ("first_fit", "sequential"):
        raise ValueError(f"method={method!r}: allowed are 'first_fit' and 'sequential'")
    check_int("open_rows", open_rows, 1)
    if isinstance(documents, str | bytes) or not isinstance(documents, Iterable):
        raise ValueError(f"documents is {type(documents).__name__}; give an iterable of documents, each a list of ids")
    if method == "sequential":
        rows = _sequential(documents, context_length)
    else:
        rows = _first_fit(documents, context_length, open_rows)
    for pieces in rows:
        yield _row(pieces, context_length, pad_id)


def pack(
    documents: Iterable[Sequence[int] | np.ndarray],
    context_length: int,
    *,
    method: Literal["first_fit", "sequential"] = "first_fit",
    open_rows: int = 64,
    pad_id: int = 0,
) -> dict[str, Tensor]:
    """All of `packed_rows` stacked: a dict of (n_rows, context_length) tensors, from which `shuffled_rows` draws.

    >>> rows = pack([[1, 2, 3], [4, 5]], context_length=4)
    >>> rows["tokens"].tolist(), rows["targets"].tolist(), rows["segment_ids"].tolist()
    ([[1, 2, 4, 0]], [[2, 3, 5, 0]], [[1, 1, 2, 0]])
    """
    rows = list(packed_rows(documents, context_length, method=method, open_rows=open_rows, pad_id=pad_id))
    if not rows:
        raise ValueError("documents: none has two tokens or more, so there is nothing to predict")
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def first_fit(
    items: Iterable[T], size: Callable[[T], int], capacity: int, *, open_rows: int = 64
) -> Iterator[list[T]]:
    """Rows of items whose sizes sum to at most capacity: each goes into the oldest open row that has room for it.

    ValueError for an item that is larger than a row, or of no size. open_rows: as for `packed_rows`.

    >>> list(first_fit([3, 2, 1, 2], size=lambda n: n, capacity=4))
    [[3, 1], [2, 2]]
    """
    check_int("capacity", capacity, 1)
    check_int("open_rows", open_rows, 1)
    rows: list[list[T]] = []
    rooms: list[int] = []
    for number, item in enumerate(items):
        needed = size(item)
        if not 0 < needed <= capacity:
            raise ValueError(f"item {number} has size {needed}; sizes are 1 to capacity, {capacity}")
        at = next((at for at, room in enumerate(rooms) if room >= needed), None)
        if at is None:
            if len(rows) == open_rows:
                del rooms[0]
                yield rows.pop(0)
            at = len(rows)
            rows.append([])
            rooms.append(capacity)
        rows[at].append(item)
        rooms[at] -= needed
        if not rooms[at]:
            del rooms[at]
            yield rows.pop(at)
    yield from rows


def _sequential(documents: Iterable[Sequence[int] | np.ndarray], length: int) -> Iterator[list[np.ndarray]]:
    pieces: list[np.ndarray] = []
    room = length
    for document in documents:
        ids = _ids(document)
        while len(ids) > 1:
            pieces.append(ids[: room + 1])
            room -= len(pieces[-1]) - 1
            ids = ids[len(pieces[-1]) - 1 :]
            if not room:
                yield pieces
                pieces, room = [], length
    if pieces:
        yield pieces


def _first_fit(
    documents: Iterable[Sequence[int] | np.ndarray], length: int, n_open: int
) -> Iterator[list[np.ndarray]]:
    def pieces() -> Iterator[np.ndarray]:
        for document in documents:
            ids = _ids(document)
            for start in range(0, len(ids) - 1, length):
                yield ids[start : start + length + 1]

    return first_fit(pieces(), lambda piece: len(piece) - 1, length, open_rows=n_open)


def _ids(document: Sequence[int] | np.ndarray) -> np.ndarray:
    ids = np.asarray(document)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"documents: one has dtype {ids.dtype} and shape {ids.shape}; 1-d integers are needed")
    if ids.dtype.kind == "i" and ids.size and int(ids.min()) < 0:
        raise ValueError(f"documents: one holds the id {int(ids.min())}; ids are 0 or more")
    return ids


def _row(pieces: list[np.ndarray], length: int, pad_id: int) -> Row:
    row: Row = {
        "tokens": np.full(length, pad_id, np.int64),
        "targets": np.full(length, pad_id, np.int64),
        "segment_ids": np.zeros(length, np.int64),
        "weights": np.zeros(length, np.float32),
    }
    at = 0
    for segment, piece in enumerate(pieces, 1):
        end = at + len(piece) - 1
        row["tokens"][at:end] = piece[:-1]
        row["targets"][at:end] = piece[1:]
        row["segment_ids"][at:end] = segment
        row["weights"][at:end] = 1
        at = end
    return row
