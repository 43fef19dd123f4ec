"""Batched sampling with a KV cache; the docstring of `purelm.generate` says what a row's sample depends on."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purelm import random
from purelm.generate.engine import Job, found_tokens
from purelm.generate.prompts import check_options, check_stop, rows_of
from purelm.generate.readings import Found, together
from purelm.generate.rows import Draw, StepFn, draw
from purelm.generate.sampling import Sampling
from purelm.generate.stops import LENGTH, Decode, Stop, text_of
from purelm.generate.types import NEVER, PLAIN, Generation, Progress, Prompts, Step
from purelm.models.model import Model

__all__ = ["generate", "stream"]

WrapStep = Callable[[StepFn], StepFn]


def stream(
    model: Model,
    params: Any,
    prompts: Prompts,
    key: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    stop: Stop = NEVER,
    decode_fn: Decode | None = None,
    batch_size: int | None = None,
    n_samples: int = 1,
    wrap_step: WrapStep | None = None,
    read_every: int | None = None,
    draw: Draw = draw,
) -> Iterator[Step]:
    """Yields a Step for each new position until every row has finished; arguments as for `generate`.

    A row whose prompt fills the context, or any row if max_new_tokens is 0, has only None. Arguments are checked when
    `stream` is called, and not when the first Step is taken.
    """
    job = _job(
        model, params, prompts, key, max_new_tokens, sampling, stop, decode_fn, batch_size, n_samples, wrap_step,
        read_every, draw,
    )  # fmt: skip
    n_rows = len(job.limits)

    def steps() -> Iterator[Step]:
        for found in found_tokens(job):
            for i in range(int(found.count_M.max(initial=0))):
                step = Step([None] * n_rows, [None] * n_rows, [None] * n_rows, [None] * n_rows)
                for m in np.flatnonzero(found.count_M > i).tolist():
                    row = int(found.row_M[m])
                    step.tokens[row] = int(found.tokens_Mn[m, i])
                    step.logprobs[row] = float(found.logprobs_Mn[m, i])
                    step.model_logprobs[row] = float(found.model_logprobs_Mn[m, i])
                    if i == found.count_M[m] - 1:
                        step.finish_reasons[row] = found.ended.get(row)
                yield step

    return steps()


def generate(
    model: Model,
    params: Any,
    prompts: Prompts,
    key: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    stop: Stop = NEVER,
    decode_fn: Decode | None = None,
    batch_size: int | None = None,
    n_samples: int = 1,
    wrap_step: WrapStep | None = None,
    read_every: int | None = None,
    draw: Draw = draw,
    progress: Callable[[Progress], Any] | None = None,
) -> Generation:
    """Continues each prompt until a stop id, a stop string, max_new_tokens or the end of the model's context.

    Args:
        prompts: an iterable of rows of token ids, each 1 to context_length long.
        key: one key, from which row r gets fold_in(key, r); or a key for each row, (R, 2).
        sampling: temperature and filters.
        stop: ids and strings that end a row.
        decode_fn: list of ids -> text; needed for stop.strings and for `Generation.texts`.
        batch_size: rows at a time; the next prompt takes the place of a row that has finished. None: all at once.
        n_samples: continuations of each prompt, which is computed once: row i * n_samples + j is one of prompt i.
        wrap_step: maps the step (params, rows, cache) -> (rows, cache) of `generate.rows` to one that is compiled or
            recorded (`on_graph`; `reused(on_graph)` for many calls). Shapes are the same in every call of the step.
        read_every: steps after which the host reads the new tokens and fills free places. None: 1 on a CPU, 4 on a
            GPU, which goes on meanwhile: free places are filled one reading late. Rows do not depend on it.
        draw: gives each row a token of its logits, as `rows.draw`; `purelm.kernels.draw.draw_` is one kernel on a GPU.
        progress: is called with a `Progress` after each reading.

    ValueError for a wrong argument, and for rows whose logits are NaN or inf: the parameters have diverged, or a 16-bit
    dtype overflows.

    >>> from purelm.models import transformer
    >>> model = transformer.make(transformer.Config(vocab_size=8, context_length=16, d_model=4, n_layers=1, n_heads=2))
    >>> params = model.init(random.key(0))
    >>> out = generate(model, params, [[1], [2, 3, 4]], random.key(1), max_new_tokens=3, n_samples=2, batch_size=3)
    >>> [len(t) for t in out.tokens], out.finish_reasons
    ([3, 3, 3, 3], ['length', 'length', 'length', 'length'])
    """
    begin = time.perf_counter()
    job = _job(
        model, params, prompts, key, max_new_tokens, sampling, stop, decode_fn, batch_size, n_samples, wrap_step,
        read_every, draw,
    )  # fmt: skip
    n_rows = len(job.limits)
    reasons = [LENGTH] * n_rows
    every: list[Found] = []
    n_tokens, n_done = 0, sum(limit == 0 for limit in job.limits)
    for found in found_tokens(job):
        every.append(found)
        n_tokens, n_done = n_tokens + int(found.count_M.sum()), n_done + len(found.ended)
        for row, reason in found.ended.items():
            reasons[row] = reason
        if progress is not None:
            seconds = time.perf_counter() - begin
            progress(Progress(n_tokens, seconds, n_tokens / seconds, n_done, n_rows))
    rows = together(every, n_rows)
    texts = None
    if decode_fn is not None:
        ends = zip(rows, reasons, strict=True)
        texts = [text_of(decode_fn, ids.tolist(), reason, stop.strings) for (ids, _, _), reason in ends]
    return Generation(
        [torch.from_numpy(ids) for ids, _, _ in rows],
        [torch.from_numpy(logprobs.astype(np.float32)) for _, logprobs, _ in rows],
        reasons,
        texts,
        [torch.from_numpy(logprobs.astype(np.float32)) for _, _, logprobs in rows],
    )


def _job(
    model: Model, params: Any, prompts: Prompts, key: Tensor, max_new_tokens: int, sampling: Sampling, stop: Stop,
    decode_fn: Decode | None, batch_size: int | None, n_samples: int, wrap_step: WrapStep | None,
    read_every: int | None, draw: Draw,
) -> Job:  # fmt: skip
    """The arguments, checked."""
    rows = rows_of(prompts, model)
    check_options(key, len(rows), max_new_tokens, batch_size, n_samples, read_every)
    check_stop(stop, model, max_new_tokens, decode_fn)
    limits = [min(max_new_tokens, model.context_length - len(row)) for row in rows for _ in range(n_samples)]
    keys = random.split(key, len(limits)) if key.ndim == 1 else key  # split(key, n)[r] is fold_in(key, r)
    return Job(
        model, params, rows, n_samples, keys, limits, batch_size, sampling, stop, decode_fn, wrap_step, read_every,
        draw,
    )  # fmt: skip
