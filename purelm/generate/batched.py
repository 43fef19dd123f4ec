"""Batched sampling with a KV cache; the docstring of `purelm.generate` says what a row's sample depends on."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import random
from purelm.generate.sampling import Sampling, distribution, forbid, pick
from purelm.generate.stops import LENGTH, STOP_ID, STOP_STRING, Decode, Stop, stopped, text_of
from purelm.models.model import Model
from purelm.models.tokens import check_tokens

__all__ = ["Generation", "Step", "generate", "stream"]

PLAIN, NEVER = Sampling(), Stop()

Prompts = Iterable[Sequence[int] | Tensor] | Tensor


class Step(NamedTuple):
    """One new token of each row; entries are None for rows that finished in an earlier step."""

    tokens: list[int | None]
    logprobs: list[float | None]  # log-probabilities under the distribution sampled from (after temperature, filters)
    finish_reasons: list[str | None]  # stop_id, stop_string or length if the row ends with this token, else None


class Generation(NamedTuple):
    """What was generated, without the prompts."""

    tokens: list[Tensor]  # one (n,) int64 a row, including the stop id or the token that completes the stop string
    logprobs: list[Tensor]  # one (n,) fp32 a row: as in `Step`
    finish_reasons: list[str]  # stop_id, stop_string or length
    texts: list[str] | None  # decoded without the stop id, up to the end of the stop string; None without decode_fn


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
) -> Iterator[Step]:
    """Yields a Step for each new position until every row has finished; arguments as for `generate`.

    A row whose prompt fills the context, or any row if max_new_tokens is 0, has only None. Arguments are checked when
    `stream` is called, and not when the first Step is taken.
    """
    rows = _rows(prompts, model)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
    if stop.min_new_tokens > max_new_tokens:
        raise ValueError(
            f"stop.min_new_tokens must be in 0..max_new_tokens {max_new_tokens}, got {stop.min_new_tokens}"
        )
    if stop.strings and decode_fn is None:
        raise ValueError("decode_fn (ids -> text) must be given with stop.strings, got None")
    check_tokens(torch.tensor(stop.ids, dtype=torch.int64), model, "stop.ids")
    if stop.min_new_tokens and len(set(stop.ids)) >= model.vocab_size:
        raise ValueError("stop.ids must leave a token to generate when min_new_tokens is above 0, got all ids")
    if key.ndim == 2 and key.shape[0] != len(rows):
        raise ValueError(f"key must be one key, or one for each of {len(rows)} rows, got shape {tuple(key.shape)}")
    limits = [min(max_new_tokens, model.context_length - len(row)) for row in rows]

    def steps() -> Iterator[Step]:
        generated: list[list[int]] = [[] for _ in rows]
        open_rows = [limit > 0 for limit in limits]
        source = _logits(model, params, rows, max(limits))
        request: tuple[Tensor, list[bool]] | None = None
        uniform_BN = _uniforms(key, [len(row) for row in rows], max(limits))
        for n in range(max(limits)):
            logits_BV = source.send(request)
            if n < stop.min_new_tokens:
                logits_BV = forbid(logits_BV, stop.ids)
            logits_BV = _finite(logits_BV, open_rows, n)
            log_probs_BV = distribution(logits_BV, **vars(sampling))
            next_B = pick(log_probs_BV, uniform_BN[:, n].to(log_probs_BV.device))
            picked_B = log_probs_BV.gather(-1, next_B.unsqueeze(-1)).squeeze(-1)
            step = Step([None] * len(rows), [None] * len(rows), [None] * len(rows))
            for i, (token, logprob) in enumerate(zip(next_B.tolist(), picked_B.tolist(), strict=True)):
                if not open_rows[i]:
                    continue
                generated[i].append(token)
                step.tokens[i], step.logprobs[i] = token, logprob
                if token in stop.ids:
                    step.finish_reasons[i] = STOP_ID
                elif (
                    decode_fn is not None
                    and n + 1 >= stop.min_new_tokens
                    and stopped(decode_fn, generated[i], stop.strings)
                ):
                    step.finish_reasons[i] = STOP_STRING
                elif len(generated[i]) == limits[i]:
                    step.finish_reasons[i] = LENGTH
                open_rows[i] = step.finish_reasons[i] is None
            yield step
            if not any(open_rows):
                return
            request = (next_B, open_rows)

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
) -> Generation:
    """Continues each prompt until a stop id, a stop string, max_new_tokens or the end of the model's context.

    Args:
        prompts: an iterable of rows of token ids, each 1 to context_length long.
        key: one key, from which row i gets fold_in(key, i); or a key for each row, (B, 2).
        sampling: temperature and filters.
        stop: ids and strings that end a row.
        decode_fn: list of ids -> text; needed for stop.strings and for `Generation.texts`.

    ValueError for a wrong argument, and for rows whose logits are NaN or inf: the parameters have diverged, or a 16-bit
    dtype overflows.

    >>> from purelm.models import transformer
    >>> model = transformer.make(transformer.Config(vocab_size=8, context_length=16, d_model=4, n_layers=1, n_heads=2))
    >>> params = model.init(random.key(0))
    >>> out = generate(model, params, [[1], [2, 3, 4]], random.key(1), max_new_tokens=3)
    >>> [len(t) for t in out.tokens], out.finish_reasons
    ([3, 3], ['length', 'length'])
    """
    prompts = _prompts(prompts)  # a list, since an iterator could be read only once
    steps = stream(
        model,
        params,
        prompts,
        key,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        decode_fn=decode_fn,
    )
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    reasons = [LENGTH for _ in prompts]
    for step in steps:
        for i, (token, logprob, reason) in enumerate(zip(*step, strict=True)):
            if token is not None and logprob is not None:
                tokens[i].append(token)
                logprobs[i].append(logprob)
            reasons[i] = reason or reasons[i]
    texts = None
    if decode_fn is not None:
        texts = [text_of(decode_fn, ids, reason, stop.strings) for ids, reason in zip(tokens, reasons, strict=True)]
    return Generation(
        [torch.tensor(t, dtype=torch.int64) for t in tokens],
        [torch.tensor(x, dtype=torch.float32) for x in logprobs],
        reasons,
        texts,
    )


def _prompts(prompts: Prompts) -> list[Any]:
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be rows of token ids, got {prompts!r}: encode text first")
    return list(prompts)


def _finite(logits_BV: Tensor, open_rows: list[bool], n: int) -> Tensor:
    """The logits, with 0 in finished rows that are not finite; ValueError naming unfinished rows that are not."""
    # A row's maximum is NaN if any logit is, and -inf if all are. Waiting for it here costs little: the host waits for
    # this step's token anyway.
    finite_B = torch.isfinite(logits_BV.amax(-1))
    is_finite = finite_B.tolist()
    bad = [i for i, (good, is_open) in enumerate(zip(is_finite, open_rows, strict=True)) if is_open and not good]
    if bad:
        raise ValueError(
            f"the model's logits are not finite (NaN or inf) in rows {', '.join(map(str, bad[:8]))} after {n} new "
            "tokens: its parameters have diverged, or their dtype overflows"
        )
    return logits_BV if all(is_finite) else torch.where(finite_B.unsqueeze(-1), logits_BV, 0.0)


def _rows(prompts: Prompts, model: Model) -> list[Tensor]:
    """The prompts as (n,) int64 tensors on the host, validated."""
    rows = []
    for i, p in enumerate(_prompts(prompts)):
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


def _uniforms(key: Tensor, lengths: list[int], n: int) -> Tensor:
    """(B, n) fp64: entry (b, j) is random number lengths[b] + j of row b's key, for the token at that position."""
    keys = [random.fold_in(key, i) for i in range(len(lengths))] if key.ndim == 1 else list(key)
    draws = [
        random.uniform(k, (n,), dtype=torch.float64, index=start) for k, start in zip(keys, lengths, strict=True)
    ]
    return torch.stack(draws)


def _logits(
    model: Model, params: Any, rows: list[Tensor], n_new: int
) -> Generator[Tensor, tuple[Tensor, list[bool]] | None, None]:
    """Generator of logits: send None for those after the prompts, then (tokens (B,), which rows are unfinished)."""
    weight = model.unembedding(params)  # only its device and dtype are used
    longest = max(len(row) for row in rows)
    ragged = any(len(row) != longest for row in rows)
    lengths_B = torch.tensor([len(row) for row in rows], device=weight.device) if ragged else None
    padded = [torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows]
    tokens = torch.stack(padded).to(weight.device)
    size = longest + max(n_new - 1, 0)  # the last token needs no slot, since nothing is generated after it
    with torch.no_grad():
        cache = model.init_cache(len(rows), size, weight.dtype, weight.device)
        logits_BV, cache = model.prefill(
            params, tokens, cache, lengths=lengths_B, n_positions=model.context_length
        )
    for used in range(longest, size + 1):
        request = yield logits_BV
        if request is None or used == size:
            return
        next_B, open_rows = request
        if cache.start is not None and not all(open_rows):
            # A finished row goes on as if it began at the current slot, so that its position stays in the context.
            is_open = torch.tensor(open_rows, device=weight.device)
            cache = cache._replace(start=torch.where(is_open, cache.start, cache.length))
        logits_BV, cache = model.decode_(params, next_B, cache, used=used, n_positions=model.context_length)
