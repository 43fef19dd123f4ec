"""What the host learns of rows under way: once in some steps, for all rows at once, while the device may go on.

Legend: B places of rows, N the most new tokens of any, n steps between two readings, M rows with new tokens.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from purelm.devices import sent
from purelm.generate.rows import Rows
from purelm.generate.stops import LENGTH, STOP_ID, STOP_STRING, Decode, Stop, stopped

__all__ = ["Found", "Places", "Reading", "ask", "bad_message", "read", "together"]

FREE = -1


class Found(NamedTuple):
    """New tokens of some rows."""

    row_M: np.ndarray
    count_M: np.ndarray  # how many of the n columns are new, 1 to n
    tokens_Mn: np.ndarray
    logprobs_Mn: np.ndarray
    model_logprobs_Mn: np.ndarray
    ended: dict[int, str]  # row -> why it ends with the last of them


class Places:
    """Which row is in each place, and how far it has come; changed by the functions of this module alone."""

    def __init__(self, B: int, limit_R: np.ndarray, stop: Stop, decode_fn: Decode | None):
        self.limit_R, self.stop, self.decode_fn = limit_R, stop, decode_fn
        self.row_B = np.full(B, FREE)
        self.read_B = np.zeros(B, np.int64)  # new tokens of the row that were read
        self.made_B = np.zeros(B, np.int64)  # and that it has if it has not ended, with those that were not read
        self.generated: list[list[int]] = [[] for _ in range(B)]  # they, where there are stop strings to look for

    def free(self) -> np.ndarray:
        """Places without a row."""
        return np.flatnonzero(self.row_B == FREE)

    def enter(self, places: np.ndarray, rows: list[int]) -> None:
        """These rows begin in these places."""
        self.row_B[places] = rows
        self.read_B[places] = self.made_B[places] = 0
        for place in places:
            self.generated[place] = []

    def left(self) -> int:
        """The most tokens that a row may still get."""
        busy_B = self.row_B != FREE
        return int((self.limit_R[self.row_B[busy_B]] - self.made_B[busy_B]).max(initial=0))


class Reading(NamedTuple):
    """What is on its way to the host after n steps."""

    n: int
    row_B: np.ndarray  # those that the steps were of
    table: Tensor  # (B, 3 n + 4) fp64 on the host
    ready: Any  # an event after which the table is there; None: it is


def ask(rows: Rows | None, places: Places, n: int, stepped: np.ndarray) -> Reading:
    """Begin to read what the last n steps bring, which were of the rows in the places `stepped`."""
    assert rows is not None
    device, N = rows.n_B.device, rows.tokens_BN.shape[1]
    first_B1 = torch.from_numpy(places.made_B.copy()).unsqueeze(-1)
    at_Bn = sent((first_B1 + torch.arange(n)).clamp(max=N - 1), device)
    texts = [x.gather(1, at_Bn).double() for x in (rows.tokens_BN, rows.logprobs_BN, rows.model_logprobs_BN)]
    marks = torch.stack([rows.n_B, rows.open_B, rows.stopped_B, rows.bad_B], 1).double()
    table = torch.cat([*texts, marks], 1)
    places.made_B[stepped] += n
    if device.type != "cuda":
        return Reading(n, places.row_B.copy(), table.cpu(), None)
    there = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    there.copy_(table, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(device))
    return Reading(n, places.row_B.copy(), there, ready)


def read(rows: Rows | None, places: Places, reading: Reading) -> Found:
    """What the reading brings of each row; finished rows leave their places.

    ValueError for rows whose logits were not finite.
    """
    n = reading.n
    if reading.ready is not None:
        reading.ready.synchronize()
    table = reading.table.numpy()
    now_B, open_B, by_id_B, bad_B = (table[:, 3 * n + i].astype(np.int64) for i in range(4))
    at_M = np.flatnonzero((reading.row_B != FREE) & (reading.row_B == places.row_B))  # others have ended before
    row_M = places.row_B[at_M]
    count_M = now_B[at_M] - places.read_B[at_M]
    tokens_Mn = table[at_M, :n].astype(np.int64)
    bad_M, ends_M = bad_B[at_M] > 0, open_B[at_M] == 0
    by_string: dict[int, int] = {}  # place -> tokens up to the end of the stop string
    if places.stop.strings:
        for m, place in enumerate(at_M.tolist()):
            k, seen = int(count_M[m]), places.generated[place]
            end = _string_end(places, seen, tokens_Mn[m, :k].tolist())
            if end is not None and (end < k or not by_id_B[place]):
                by_string[place], bad_M[m], ends_M[m] = end, False, True
                count_M[m] = end
    if bad_M.any():
        raise ValueError(bad_message(list(zip(row_M[bad_M].tolist(), now_B[at_M[bad_M]].tolist(), strict=True))))
    ended = {}
    for place, row in zip(at_M[ends_M].tolist(), row_M[ends_M].tolist(), strict=True):
        ended[row] = STOP_STRING if place in by_string else STOP_ID if by_id_B[place] else LENGTH
    places.read_B[at_M] = now_B[at_M]
    places.row_B[at_M[ends_M]] = FREE
    if cut := [place for place in by_string if open_B[place]]:
        assert rows is not None
        rows.open_B.index_fill_(0, sent(torch.tensor(cut), rows.open_B.device), False)
    some = count_M > 0
    at_M, columns = at_M[some], (slice(n, 2 * n), slice(2 * n, 3 * n))
    logprobs_Mn, model_logprobs_Mn = (table[at_M, column] for column in columns)
    return Found(row_M[some], count_M[some], tokens_Mn[some], logprobs_Mn, model_logprobs_Mn, ended)


def _string_end(places: Places, seen: list[int], tokens: list[int]) -> int | None:
    """How many of the row's new tokens it takes to complete a stop string; None if they complete none."""
    assert places.decode_fn is not None
    for i, token in enumerate(tokens):
        seen.append(token)
        if len(seen) >= places.stop.min_new_tokens and stopped(places.decode_fn, seen, places.stop.strings):
            return i + 1
    return None


def together(found: list[Found], n_rows: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, log-probabilities, the model's) of each row, in order."""
    if not found:
        empty = np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
        return [empty for _ in range(n_rows)]
    new = [np.arange(x.tokens_Mn.shape[1]) < x.count_M[:, None] for x in found]
    row = np.concatenate([np.repeat(x.row_M, x.count_M) for x in found])
    order = np.argsort(row, kind="stable")
    cuts = np.cumsum(np.bincount(row, minlength=n_rows))[:-1]
    columns = [
        np.concatenate([getattr(x, name)[mask] for x, mask in zip(found, new, strict=True)])[order]
        for name in ("tokens_Mn", "logprobs_Mn", "model_logprobs_Mn")
    ]
    return list(zip(*(np.split(x, cuts) for x in columns), strict=True))


def bad_message(bad: list[tuple[int, int]]) -> str:
    """What is said of rows whose logits are not finite: (row, its new tokens) of each."""
    by_n: dict[int, list[int]] = {}
    for row, n in sorted(bad)[:8]:
        by_n.setdefault(n, []).append(row)
    where = "; ".join(f"rows {', '.join(map(str, rows))} after {n} new tokens" for n, rows in by_n.items())
    return (
        f"the model's logits are not finite (NaN or inf) in {where}: its parameters have diverged, or their dtype "
        "overflows"
    )
