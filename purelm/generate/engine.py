"""A batch of rows that go on while finished ones make room for others from a queue.

Legend: B rows at a time, N the most new tokens of any, V vocabulary, R rows in all.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import tree
from purelm.generate.rows import Rows, StepFn, begin, draw, make_step, uniforms
from purelm.generate.sampling import Sampling
from purelm.generate.stops import LENGTH, STOP_ID, STOP_STRING, Decode, Stop, stopped
from purelm.models.cache_rows import insert_, take, with_lengths
from purelm.models.model import Model

__all__ = ["Job", "Piece", "pieces"]


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
        return row // self.n_samples


@dataclass
class _Batch:
    """The rows under way: rows and cache on the device, and what the host knows of them."""

    rows: Rows | None = None
    cache: Any = None
    row_of: list[int | None] = field(default_factory=list)  # which row each of the B places holds
    n_read: list[int] = field(default_factory=list)  # new tokens of it that were read
    generated: list[list[int]] = field(default_factory=list)


def pieces(job: Job) -> Iterator[list[Piece]]:
    """What is new of each row, at every reading; nothing is computed before it is asked for."""
    queue = deque(row for row, limit in enumerate(job.limits) if limit)
    if not queue:
        return
    weight = job.model.unembedding(job.params)  # only its device and dtype are used
    device = weight.device
    B = min(len(queue), job.batch_size or len(queue))
    # The last token needs no slot, since nothing is generated after it.
    n_slots = max(len(job.prompts[job.prompt_of(row)]) + job.limits[row] - 1 for row in queue)
    N = max(job.limits)
    stops_V = torch.zeros(job.model.vocab_size, dtype=torch.bool)
    stops_V[list(job.stop.ids)] = True
    stops_V = stops_V.to(device)
    step = make_step(job.model, job.sampling, job.stop, stops_V)
    if job.wrap_step is not None:
        step = job.wrap_step(step)
    read_every = job.read_every or (1 if device.type == "cpu" else 8)
    batch = _Batch(None, None, [None] * B, [0] * B, [[] for _ in range(B)])
    held: tuple[int, Tensor, Any] | None = None  # the last prompt, its logits and its cache, while samples are left

    def admit(places: list[int], numbers: list[int], logits_BV: Tensor, cache: Any) -> None:
        """Put these rows, whose prompts have these logits and caches, into these places."""
        starts = [len(job.prompts[job.prompt_of(row)]) for row in numbers]
        new = begin([job.limits[row] for row in numbers], uniforms(job.keys_R2[numbers], starts, N).to(device))
        new = draw(logits_BV, new, job.sampling, job.stop, stops_V)
        if batch.rows is None:
            batch.rows, batch.cache = new, cache
        else:
            at = torch.tensor(places, device=device)
            tree.map(lambda x, y: x.index_copy_(0, at, y), batch.rows, new)
            batch.cache = insert_(batch.cache, at, cache)
        for place, row in zip(places, numbers, strict=True):
            batch.row_of[place], batch.n_read[place], batch.generated[place] = row, 0, []

    def prefill(numbers: list[int]) -> tuple[Tensor, Any, list[int]]:
        """(logits of each distinct prompt of these rows, cache, prompts), each prompt computed once."""
        distinct = list(dict.fromkeys(job.prompt_of(row) for row in numbers))
        rows = [job.prompts[p] for p in distinct]
        longest = max(len(row) for row in rows)
        tokens = torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in rows]).to(device)
        level = all(len(row) == longest for row in rows)
        lengths = None if level else torch.tensor([len(row) for row in rows], device=device)
        cache = job.model.init_cache(len(rows), n_slots, weight.dtype, device)
        n_positions = job.model.context_length
        logits, cache = job.model.prefill(job.params, tokens, cache, lengths=lengths, n_positions=n_positions)
        return logits, with_lengths(cache), distinct

    def fill() -> None:
        nonlocal held
        free = [place for place, row in enumerate(batch.row_of) if row is None]
        numbers = [queue.popleft() for _ in range(min(len(free), len(queue)))]
        old = [row for row in numbers if held is not None and job.prompt_of(row) == held[0]]
        new = numbers[len(old) :]
        if held is not None and old:
            n = len(old)
            admit(free[:n], old, held[1].expand(n, -1), take(held[2], [0] * n))
        if new:
            logits, cache, prompts = prefill(new)
            last = prompts[-1]
            more = bool(queue) and job.prompt_of(queue[0]) == last
            held = (last, logits[-1:], take(cache, [len(prompts) - 1])) if more else None
            if len(new) > len(prompts):
                source = [prompts.index(job.prompt_of(row)) for row in new]
                logits, cache = logits[source], take(cache, source)
            admit(free[len(old) : len(numbers)], new, logits, cache)
        elif not queue or (held is not None and job.prompt_of(queue[0]) != held[0]):
            held = None

    while True:
        with torch.no_grad():
            if queue and None in batch.row_of:
                fill()
                n_steps = 0
            else:
                active = [(place, row) for place, row in enumerate(batch.row_of) if row is not None]
                if not active:
                    return
                n_steps = min(read_every, max(job.limits[row] - batch.n_read[place] for place, row in active))
                most = max(len(job.prompts[job.prompt_of(row)]) + batch.n_read[place] - 1 for place, row in active)
                for i in range(n_steps):
                    known: dict[str, int] = {}
                    if job.wrap_step is None and device.type != "cpu":
                        known = {"used": min(most + i, n_slots - 1)}
                    batch.rows, batch.cache = step(job.params, batch.rows, batch.cache, **known)
            found = _read(job, batch, max(n_steps, 1))
        yield found


def _read(job: Job, batch: _Batch, n: int) -> list[Piece]:
    """What the last n tokens of each row bring; finished rows leave their places. Waits for the device, once."""
    rows = batch.rows
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
        raise ValueError(_bad_message(bad))
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


def _bad_message(bad: list[tuple[int, int]]) -> str:
    by_n: dict[int, list[int]] = {}
    for row, n in sorted(bad)[:8]:
        by_n.setdefault(n, []).append(row)
    where = "; ".join(f"rows {', '.join(map(str, rows))} after {n} new tokens" for n, rows in by_n.items())
    return (
        f"the model's logits are not finite (NaN or inf) in {where}: its parameters have diverged, or their dtype "
        "overflows"
    )
