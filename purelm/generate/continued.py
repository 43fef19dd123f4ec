"""One row that goes on from what was computed before: the turns of a conversation.

    past = empty_past(model, params, n_slots=2048)
    for new in continued(model, params, prompt, key, past, max_new_tokens=100):
        show(new.token)
    for new in continued(model, params, longer_prompt, key, new.past, max_new_tokens=100):
        ...                                      # of longer_prompt only what is new is computed

A `Past` is a value that stays valid: going on from it writes to memory of its own, so that an earlier one can be
continued too, another time or in another way.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import random
from purelm.generate.prompts import check_options, check_stop, rows_of
from purelm.generate.readings import bad_message
from purelm.generate.rows import Draw, begin, draw, make_step, uniforms
from purelm.generate.sampling import Sampling
from purelm.generate.stops import LENGTH, STOP_ID, STOP_STRING, Decode, Stop, stop_mask, stopped
from purelm.generate.types import NEVER, PLAIN
from purelm.models.cache_rows import shortened
from purelm.models.model import Model

__all__ = ["Continued", "Past", "continued", "empty_past", "shared_prefix"]


class Past(NamedTuple):
    """Tokens that a model has processed, and its cache of them."""

    ids: tuple[int, ...]
    cache: Any  # of one row
    n_slots: int  # the most tokens that the cache has room for


class Continued(NamedTuple):
    """One new token."""

    token: int
    logprob: float  # under the distribution sampled from (after temperature and filters)
    model_logprob: float  # under the model: temperature 1, nothing excluded
    finish_reason: str | None  # stop_id, stop_string or length if this token is the last, else None
    past: Past  # the prompt and the new tokens before this one


def empty_past(model: Model, params: Any, n_slots: int | None = None) -> Past:
    """The past of no token, with room for n_slots; None: for model.context_length."""
    n_slots = model.context_length if n_slots is None else n_slots
    weight = model.unembedding(params)  # only its device and dtype are used
    return Past((), model.init_cache(1, n_slots, weight.dtype, weight.device), n_slots)


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of first items in which a and b agree.

    >>> shared_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def continued(
    model: Model,
    params: Any,
    prompt: Sequence[int] | Tensor,
    key: Tensor,
    past: Past | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    stop: Stop = NEVER,
    decode_fn: Decode | None = None,
    draw: Draw = draw,
) -> Iterator[Continued]:
    """Yields the new tokens of one prompt: those of generate(model, params, [prompt], key, ...), up to rounding.

    What the prompt shares with past.ids is not computed again, from the first token up to the first that differs;
    where a cache cannot forget its last tokens (`cache_rows.shortened`), all is, unless past.ids begins the prompt.
    The past must be of these parameters.

    Args:
        prompt: 1 to context_length ids.
        past: None: the empty one, with as many slots as are needed.
        max_new_tokens, sampling, stop, decode_fn, draw: as for `generate`. The row also ends, with reason "length",
            where the past has no slot left.
    Arguments are checked when `continued` is called; ValueError also for a prompt of more than past.n_slots ids, and
    for logits that are NaN or inf.

    >>> from purelm.models import transformer
    >>> model = transformer.make(transformer.Config(vocab_size=8, context_length=16, d_model=4, n_layers=1, n_heads=2))
    >>> params = model.init(random.key(0))
    >>> first = list(continued(model, params, [1, 2], random.key(1), empty_past(model, params), max_new_tokens=3))
    >>> ids = [1, 2, *(new.token for new in first)]
    >>> list(first[-1].past.ids) == ids[:-1]
    True
    >>> len(list(continued(model, params, [*ids, 5], random.key(2), first[-1].past, max_new_tokens=4)))
    4
    """
    (row,) = rows_of([prompt], model)
    check_options(key, 1, max_new_tokens, None, 1, None)
    check_stop(stop, model, max_new_tokens, decode_fn)
    ids = tuple(row.tolist())
    limit = min(max_new_tokens, model.context_length - len(ids))
    if past is None:
        past = empty_past(model, params, len(ids) + max(limit - 1, 0))
    if len(ids) > past.n_slots:
        raise ValueError(f"prompt: {len(ids)} ids do not fit into the past's {past.n_slots} slots")
    # The last token needs no slot, since nothing is computed after it.
    limit = min(limit, past.n_slots - len(ids) + 1)
    return _tokens(model, params, ids, key, past, limit, sampling, stop, decode_fn, draw)


def _tokens(
    model: Model, params: Any, ids: tuple[int, ...], key: Tensor, past: Past, limit: int, sampling: Sampling,
    stop: Stop, decode_fn: Decode | None, draw: Draw,
) -> Iterator[Continued]:  # fmt: skip
    if limit == 0:
        return
    weight = model.unembedding(params)
    device = weight.device
    stops_V = stop_mask(stop, model.vocab_size).to(device)
    step = make_step(model, sampling, stop, stops_V, draw)
    keys_R2 = random.split(key, 1) if key.ndim == 1 else key
    rows = begin([limit], uniforms(keys_R2, [len(ids)], limit).to(device))
    new: list[int] = []
    while True:
        with torch.no_grad():
            if not new:
                logits_BV, cache = _prefill(model, params, ids, past, weight)
                rows = draw(logits_BV, rows, sampling, stop, stops_V)
            else:
                rows, cache = step(params, rows, cache, used=len(ids) + len(new) - 1)
            at = min(len(new), limit - 1)
            drawn = (rows.token_B[0], rows.logprobs_BN[0, at], rows.model_logprobs_BN[0, at])
            marks = (rows.open_B[0], rows.stopped_B[0], rows.bad_B[0])
            token, logprob, model_logprob, is_open, by_id, is_bad = torch.stack(
                [x.double() for x in (*drawn, *marks)]
            ).tolist()  # waits for the device, once
        if is_bad:
            raise ValueError(bad_message([(0, len(new))]))
        before = Past((*ids, *new), cache, past.n_slots)
        new.append(int(token))
        reason = None if is_open else STOP_ID if by_id else LENGTH
        if reason != STOP_ID and stop.strings and len(new) >= stop.min_new_tokens:
            assert decode_fn is not None
            reason = STOP_STRING if stopped(decode_fn, new, stop.strings) else reason
        yield Continued(new[-1], logprob, model_logprob, reason, before)
        if reason is not None:
            return


def _prefill(model: Model, params: Any, ids: tuple[int, ...], past: Past, weight: Tensor) -> tuple[Tensor, Any]:
    """Logits (1, V) after the prompt, and the cache of it; the past's is not written to."""
    n = shared_prefix(past.ids, ids[:-1])  # at least one token is computed, since its logits are needed
    cache = past.cache if n == len(past.ids) else shortened(past.cache, n)
    if cache is None:
        n, cache = 0, model.init_cache(1, past.n_slots, weight.dtype, weight.device)
    tokens_1T = torch.tensor([ids[n:]], dtype=torch.int64, device=weight.device)
    return model.prefill(params, tokens_1T, cache, n_positions=model.context_length)
