"""A batch of rows that go on while finished ones make room for others from a queue.

Legend: B rows at a time, N the most new tokens of any, V vocabulary, R rows in all.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purelm import tree
from purelm.devices import sent
from purelm.generate.readings import Found, Places, Reading, ask, read
from purelm.generate.rows import Draw, Rows, StepFn, begin, make_step, uniforms
from purelm.generate.sampling import Sampling
from purelm.generate.stops import Decode, Stop, stop_mask
from purelm.models.cache_rows import insert_, take, with_lengths
from purelm.models.model import Model

__all__ = ["Job", "found_tokens"]

SLOTS = 64  # of which the slots of a compiled or recorded step are a multiple, and the padded lengths of late prompts
FEW = 2**14  # tokens of first prompts, which take the host longer to launch than a GPU to run: recorded as late ones
AHEAD = 512  # rows whose random numbers are computed before they begin


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
    draw: Draw

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
    places: Places
    lags: bool
    rows: Rows | None = None
    cache: Any = None
    uniforms: tuple[int, Tensor] | None = None  # the first row of some, and their random numbers
    recorded: Callable[..., Any] | None = None  # (f, params, *args) -> f(params, *args), recorded
    held: tuple[int, Tensor, Any] | None = None  # a prompt whose samples have not all begun, its logits, its cache


def found_tokens(job: Job, *, lags: bool | None = None) -> Iterator[Found]:
    """What is new of each row, at every reading; nothing is computed before it is asked for.

    lags: whether a reading is looked at only when the next steps are under way, and late prompts are padded to few
    shapes, as a GPU needs it. None: except on a CPU.
    """
    queue = deque(row for row, limit in enumerate(job.limits) if limit)
    if not queue:
        return
    weight = job.model.unembedding(job.params)  # only its device and dtype are used
    device = weight.device
    # The last token needs no slot, since nothing is generated after it.
    n_slots = max(job.length_of(row) + job.limits[row] - 1 for row in queue)
    if job.wrap_step is not None:  # so that calls of about the same lengths have the same shapes
        n_slots = -(-n_slots // SLOTS) * SLOTS
    stops_V = stop_mask(job.stop, job.model.vocab_size).to(device)
    B = min(len(queue), job.batch_size or len(queue))
    places = Places(B, np.asarray(job.limits), job.stop, job.decode_fn)
    lags = device.type != "cpu" if lags is None else lags
    batch = _Batch(job, queue, device, weight.dtype, n_slots, max(job.limits), stops_V, places, lags)
    read_every = job.read_every or (4 if lags else 1)
    step = make_step(job.model, job.sampling, job.stop, batch.stops_V, job.draw)
    if job.wrap_step is not None:
        step = job.wrap_step(step)
        batch.recorded = getattr(step, "recorded", None)
    asked: Reading | None = None  # of steps that the device may still be busy with
    while True:
        with torch.no_grad():
            if _may_fill(batch, -(-B // 16) if lags else 1):
                filled = _fill(batch)
                new = ask(batch.rows, places, 1, filled)
            elif places.left() > 0:
                n = _advance(batch, step, read_every)
                new = ask(batch.rows, places, n, np.arange(B))
            else:
                new = None
            if lags:  # while the host looks at what has come, the device goes on
                asked, new = new, asked
            found = None if new is None else read(batch.rows, places, new)
        if found is not None:
            yield found
        elif asked is None:
            return


def _may_fill(batch: _Batch, least: int) -> bool:
    """Whether rows are to come into free places: at least so many at a time, since on a GPU few prompts take as long as
    many."""
    n_free = len(batch.places.free())
    return bool(n_free and batch.queue) and n_free >= min(least, len(batch.queue))


def _fill(batch: _Batch) -> np.ndarray:
    """Rows from the queue into the free places, each with its first token; these places."""
    job, queue = batch.job, batch.queue
    free = batch.places.free()
    numbers = [queue.popleft() for _ in range(min(len(free), len(queue)))]
    free = free[: len(numbers)]
    held, n_old = batch.held, 0
    if held is not None:
        n_old = sum(job.prompt_of(row) == held[0] for row in numbers)  # they are the first
        copies = take(held[2], _sent([0] * n_old, batch.device))
        _admit(batch, free[:n_old], numbers[:n_old], held[1].expand(n_old, -1), copies)
        batch.held = held if queue and job.prompt_of(queue[0]) == held[0] else None
    if n_old == len(numbers):
        return free
    numbers = numbers[n_old:]
    prompts = list(dict.fromkeys(job.prompt_of(row) for row in numbers))
    logits_BV, cache = _prefill(batch, [job.prompts[p] for p in prompts])
    if queue and job.prompt_of(queue[0]) == prompts[-1]:
        batch.held = prompts[-1], logits_BV[-1:], take(cache, _sent([len(prompts) - 1], batch.device))
    if len(numbers) > len(prompts):
        index = {p: i for i, p in enumerate(prompts)}
        source = _sent([index[job.prompt_of(row)] for row in numbers], batch.device)
        logits_BV, cache = logits_BV[source], take(cache, source)
    _admit(batch, free[n_old:], numbers, logits_BV, cache)
    return free


def _sent(numbers: list[int], device: torch.device) -> Tensor:
    return sent(torch.tensor(numbers, dtype=torch.int64), device)


@dataclass(frozen=True)
class _Start:
    """(params, tokens_BT, lengths_B) -> (logits after each row's last token, a cache of these rows)."""

    model: Model
    n_slots: int
    dtype: torch.dtype
    device: torch.device

    def __call__(self, params: Any, tokens_BT: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Any]:
        model = self.model
        cache = model.init_cache(len(tokens_BT), self.n_slots, self.dtype, self.device)
        # On a CPU lengths are looked at, which costs nothing, and models without this keyword will do.
        known: dict[str, Any] = {} if self.device.type == "cpu" else {"used": 0}
        logits_BV, cache = model.prefill(
            params, tokens_BT, cache, lengths=lengths_B, n_positions=model.context_length, **known
        )
        return logits_BV, with_lengths(cache)


def _prefill(batch: _Batch, prompts: list[Tensor]) -> tuple[Tensor, Any]:
    job, device, n = batch.job, batch.device, len(prompts)
    longest = max(map(len, prompts))
    start: Callable[..., Any] = _Start(job.model, batch.n_slots, batch.dtype, device)
    size = -(-len(batch.places.row_B) // 16)
    padded = SLOTS << max(-(-longest // SLOTS) - 1, 0).bit_length()
    few = -(-n // size) * size * padded <= FEW
    late = batch.lags and (batch.rows is not None or (batch.recorded is not None and few))
    if late:
        # Rows come in again and again: in few different shapes, which are launched as before or recorded.
        longest = min(padded, batch.n_slots, job.model.context_length)  # padding has positions, too
        prompts = prompts + [prompts[0][:1]] * (-n % size)
        start = start if batch.recorded is None else partial(batch.recorded, start)
    tokens_BT = torch.stack([torch.cat([p, p.new_zeros(longest - len(p))]) for p in prompts])
    lengths = None
    if late or any(len(p) < longest for p in prompts):
        lengths = _sent([len(p) for p in prompts], device)
    logits_BV, cache = start(job.params, sent(tokens_BT, device), lengths)
    if len(prompts) > n:
        logits_BV, cache = logits_BV[:n], take(cache, _sent(list(range(n)), device))
    return logits_BV, cache


def _uniforms(batch: _Batch, numbers: list[int]) -> Tensor:
    """The random numbers of these rows, which are in order: computed for many rows at a time."""
    job = batch.job
    if batch.uniforms is None or numbers[-1] >= batch.uniforms[0] + len(batch.uniforms[1]):
        rows = range(numbers[0], min(len(job.limits), numbers[-1] + 1 + AHEAD))
        starts = [job.length_of(row) for row in rows]
        found = uniforms(job.keys_R2[rows.start : rows.stop], starts, batch.n_most)
        batch.uniforms = numbers[0], found.to(batch.device)
    first, uniforms_RN = batch.uniforms
    return uniforms_RN.index_select(0, _sent([row - first for row in numbers], batch.device))


def _admit(batch: _Batch, places: np.ndarray, numbers: list[int], logits_BV: Tensor, cache: Any) -> None:
    """Put these rows, after whose prompts these logits and this cache come, into these places."""
    if not numbers:
        return
    job, device = batch.job, batch.device
    new = begin([job.limits[row] for row in numbers], _uniforms(batch, numbers))
    new = job.draw(logits_BV, new, job.sampling, job.stop, batch.stops_V)
    if batch.rows is None:  # the first time all places are filled
        batch.rows, batch.cache = new, cache
    else:
        at = sent(torch.from_numpy(places), device)
        tree.map(lambda x, y: x.index_copy_(0, at, y), batch.rows, new)  # in place: a recorded step knows its memory
        batch.cache = insert_(batch.cache, at, cache)
    batch.places.enter(places, numbers)


def _advance(batch: _Batch, step: StepFn, read_every: int) -> int:
    """Up to read_every steps, and not more than any row needs unless they are one graph; their number."""
    job = batch.job
    many: Any = getattr(step, "many", None)
    if many is not None and batch.lags:
        batch.rows, batch.cache = many(job.params, batch.rows, batch.cache, read_every)
        return read_every
    n_steps = min(read_every, batch.places.left())
    longest = max(
        job.length_of(row) + n - 1
        for row, n in zip(batch.places.row_B.tolist(), batch.places.made_B.tolist(), strict=True)
        if row >= 0
    )
    for i in range(n_steps):
        known = {}
        if job.wrap_step is None and batch.device.type != "cpu":  # a CPU reads the lengths themselves
            known = {"used": min(longest + i, batch.n_slots - 1)}
        batch.rows, batch.cache = step(job.params, batch.rows, batch.cache, **known)
    return n_steps
