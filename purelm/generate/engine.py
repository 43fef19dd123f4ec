"""A batch of rows that go on while finished ones make room for others from a queue.

Legend: B rows at a time, N the most new tokens of any, V vocabulary, R rows in all.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import tree
from purelm.generate.rows import Rows, StepFn, begin, draw, make_step, uniforms
from purelm.generate.sampling import Sampling
from purelm.generate.stops import LENGTH, STOP_ID, STOP_STRING, Decode, Stop, stop_mask, stopped
from purelm.models.cache_rows import insert_, take, with_lengths
from purelm.models.model import Model

__all__ = ["Job", "Piece", "bad_message", "pieces"]


class Piece(NamedTuple):
    """New tokens of one row."""

    row: int
    tokens: list[int]
    logprobs: list[float]
    model_logprobs: list[float]
    reason: str | None  # why the row ends with the last of them; None: it goes on


@dataclass(frozen=True)
class Job:
    """Everything that `generate` was asked for."""

    model: Model
    params: Any
    prompts: list[Tensor]
    n_samples: int
    keys_R2: Tensor
    limits: list[int]  # most new tokens of each row
    batch_size: int | None
    sampling: Sampling
    stop: Stop
    decode_fn: Decode | None
    wrap_step: Callable[[StepFn], StepFn] | None
    read_every: int | None

    def prompt_of(self, row: int) -> int:
        """The number of the row's prompt."""
        return row // self.n_samples

    def length_of(self, row: int) -> int:
        """The number of tokens of the row's prompt."""
        return len(self.prompts[self.prompt_of(row)])


@dataclass
class _Batch:
    """The rows under way: rows and cache on the device, and what the host knows of them."""

    job: Job
    queue: deque[int]  # rows that have not begun, samples of a prompt beside each other
    device: torch.device
    dtype: torch.dtype
    n_slots: int
    n_most: int  # N
    stops_V: Tensor
    row_of: list[int | None]  # the row in each of the B places
    n_read: list[int]  # new tokens of it that were read
    generated: list[list[int]]  # these tokens, where there are stop strings to look for
    rows: Rows | None = None
    cache: Any = None
    held: tuple[int, Tensor, Any] | None = None  # a prompt whose samples have not all begun, its logits, its cache


def pieces(job: Job) -> Iterator[list[Piece]]:
    """What is new of each row, at every reading; nothing is computed before it is asked for."""
    queue = deque(row for row, limit in enumerate(job.limits) if limit)
    if not queue:
        return
    weight = job.model.unembedding(job.params)  # only its device and dtype are used
    device = weight.device
    # The last token needs no slot, since nothing is generated after it.
    n_slots = max(job.length_of(row) + job.limits[row] - 1 for row in queue)
    stops_V = stop_mask(job.stop, job.model.vocab_size).to(device)
    B = min(len(queue), job.batch_size or len(queue))
    batch = _Batch(
        job, queue, device, weight.dtype, n_slots, max(job.limits), stops_V, [None] * B, [0] * B,
        [[] for _ in range(B)],
    )  # fmt: skip
    step = make_step(job.model, job.sampling, job.stop, batch.stops_V)
    if job.wrap_step is not None:
        step = job.wrap_step(step)
    read_every = job.read_every or (1 if device.type == "cpu" else 8)
    while True:
        with torch.no_grad():
            if queue and None in batch.row_of:
                _fill(batch)
                found = _read(batch, 1)
            elif any(row is not None for row in batch.row_of):
                found = _read(batch, _advance(batch, step, read_every))
            else:
                return
        yield found


def _fill(batch: _Batch) -> None:
    """Rows from the queue into the free places, each with its first token."""
    job, queue = batch.job, batch.queue
    free = [place for place, row in enumerate(batch.row_of) if row is None]
    numbers = [queue.popleft() for _ in range(min(len(free), len(queue)))]
    held, n_old = batch.held, 0
    if held is not None:
        n_old = sum(job.prompt_of(row) == held[0] for row in numbers)  # they are the first
        _admit(batch, free[:n_old], numbers[:n_old], held[1].expand(n_old, -1), take(held[2], [0] * n_old))
        batch.held = held if queue and job.prompt_of(queue[0]) == held[0] else None
    if n_old == len(numbers):
        return
    numbers = numbers[n_old:]
    prompts = list(dict.fromkeys(job.prompt_of(row) for row in numbers))
    logits_BV, cache = _prefill(batch, [job.prompts[p] for p in prompts])
    if queue and job.prompt_of(queue[0]) == prompts[-1]:
        batch.held = prompts[-1], logits_BV[-1:], take(cache, [len(prompts) - 1])
    if len(numbers) > len(prompts):
        index = {p: i for i, p in enumerate(prompts)}
        source = [index[job.prompt_of(row)] for row in numbers]
        logits_BV, cache = logits_BV[source], take(cache, source)
    _admit(batch, free[n_old : n_old + len(numbers)], numbers, logits_BV, cache)


def _prefill(batch: _Batch, prompts: list[Tensor]) -> tuple[Tensor, Any]:
    job, longest = batch.job, max(map(len, prompts))
    padded = [torch.cat([p, p.new_zeros(longest - len(p))]) for p in prompts]
    lengths = None
    if any(len(p) < longest for p in prompts):
        lengths = torch.tensor([len(p) for p in prompts], device=batch.device)
    cache = job.model.init_cache(len(prompts), batch.n_slots, batch.dtype, batch.device)
    logits_BV, cache = job.model.prefill(
        job.params, torch.stack(padded).to(batch.device), cache, lengths=lengths,
        n_positions=job.model.context_length,
    )  # fmt: skip
    return logits_BV, with_lengths(cache)


def _admit(batch: _Batch, places: list[int], numbers: list[int], logits_BV: Tensor, cache: Any) -> None:
    """Put these rows, after whose prompts these logits and this cache come, into these places."""
    if not numbers:
        return
    job, device = batch.job, batch.device
    starts = [job.length_of(row) for row in numbers]
    uniforms_BN = uniforms(job.keys_R2[numbers], starts, batch.n_most).to(device)
    new = begin([job.limits[row] for row in numbers], uniforms_BN)
    new = draw(logits_BV, new, job.sampling, job.stop, batch.stops_V)
    if batch.rows is None:  # the first time all places are filled
        batch.rows, batch.cache = new, cache
    else:
        at = torch.tensor(places, device=device)
        tree.map(lambda x, y: x.index_copy_(0, at, y), batch.rows, new)  # in place: a recorded step knows its memory
        batch.cache = insert_(batch.cache, at, cache)
    for place, row in zip(places, numbers, strict=True):
        batch.row_of[place], batch.n_read[place], batch.generated[place] = row, 0, []


def _advance(batch: _Batch, step: StepFn, read_every: int) -> int:
    """Up to read_every steps, and not more than any row needs; their number."""
    job = batch.job
    active = [(row, n) for row, n in zip(batch.row_of, batch.n_read, strict=True) if row is not None]
    n_steps = min(read_every, max(job.limits[row] - n for row, n in active))
    longest = max(job.length_of(row) + n - 1 for row, n in active)
    for i in range(n_steps):
        known = {}
        if job.wrap_step is None and batch.device.type != "cpu":  # a CPU reads the lengths themselves
            known = {"used": min(longest + i, batch.n_slots - 1)}
        batch.rows, batch.cache = step(job.params, batch.rows, batch.cache, **known)
    return n_steps


def _read(batch: _Batch, n: int) -> list[Piece]:
    """What the last n tokens of each row bring; finished rows leave their places. Waits for the device, once."""
    job, rows = batch.job, batch.rows
    assert rows is not None
    device, N = rows.n_B.device, rows.tokens_BN.shape[1]
    first_B1 = torch.tensor(batch.n_read, device=device).unsqueeze(-1)
    at_Bn = (first_B1 + torch.arange(n, device=device)).clamp(max=N - 1)
    texts = [x.gather(1, at_Bn).double() for x in (rows.tokens_BN, rows.logprobs_BN, rows.model_logprobs_BN)]
    marks = torch.stack([rows.n_B, rows.open_B, rows.stopped_B, rows.bad_B], 1).double()
    table = torch.cat([*texts, marks], 1).tolist()
    found, bad = [], []
    cut = []  # places whose rows end by a stop string
    for place, row in enumerate(batch.row_of):
        if row is None:
            continue
        line = table[place]
        n_now, is_open, by_id, is_bad = (int(x) for x in line[3 * n :])
        k = n_now - batch.n_read[place]
        tokens, logprobs, model_logprobs = [int(x) for x in line[:k]], line[n : n + k], line[2 * n : 2 * n + k]
        reason = None if is_open or is_bad else STOP_ID if by_id else LENGTH
        if job.stop.strings and (end := _string_end(job, batch.generated[place], tokens)) is not None:
            tokens, logprobs, model_logprobs = tokens[:end], logprobs[:end], model_logprobs[:end]
            if end < k or reason != STOP_ID:
                reason, is_bad = STOP_STRING, 0
            if is_open:
                cut.append(place)
        if is_bad:
            bad.append((row, n_now))
        batch.n_read[place] = n_now
        if reason is not None:
            batch.row_of[place] = None
        if tokens:
            found.append(Piece(row, tokens, logprobs, model_logprobs, reason))
    if bad:
        raise ValueError(bad_message(bad))
    if cut:
        rows.open_B.index_fill_(0, torch.tensor(cut, device=device), False)
    return found


def _string_end(job: Job, generated: list[int], tokens: list[int]) -> int | None:
    """How many of the row's new tokens it takes to complete a stop string; None if they complete none."""
    assert job.decode_fn is not None
    for i, token in enumerate(tokens):
        generated.append(token)
        if len(generated) >= job.stop.min_new_tokens and stopped(job.decode_fn, generated, job.stop.strings):
            return i + 1
    return None


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
