"""Text from a model: batched sampling with a cache, one key a row.

    out = generate(params, prompts, cfg, key, max_new_tokens=50, temperature=0.8, stop_ids=[end])
    out.tokens[0], out.logprobs[0], out.finish_reasons[0]

A row's sample is a function of its prompt and its key alone: number i of the row's key decides the token at position
i of the row, whatever the batch, the padding or the number of tokens asked for. (Up to rounding: the logits of a row
may differ in the last bits from one batch shape to another, which can matter when two tokens are as good as equal.)
So dynamic_ntk, which looks at a length, is given the model's context_length: that of the longest row is not each row's.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import random
from purelm.generate.sampling import distribution, forbid, pick
from purelm.models.cache import decode_, init_cache, prefill
from purelm.models.config import Config
from purelm.models.tokens import check_tokens
from purelm.ops import REFERENCE, Ops

__all__ = ["Generation", "Step", "generate", "stream"]

STOP_ID, STOP_STRING, LENGTH = "stop_id", "stop_string", "length"

Prompts = Iterable[Sequence[int] | Tensor] | Tensor
Decode = Callable[[list[int]], str]


class Step(NamedTuple):
    """One token of each row; None for rows that had finished before."""

    tokens: list[int | None]
    logprobs: list[float | None]  # under the distribution that was sampled from
    finish_reasons: list[str | None]  # of rows that finish with this token, else None


class Generation(NamedTuple):
    """What was generated, without the prompts."""

    tokens: list[Tensor]  # one (n,) int64 a row, with the stop id, or the token that completed the stop string
    logprobs: list[Tensor]  # one (n,) fp32 a row: log-probabilities under the distribution that was sampled from
    finish_reasons: list[str]  # stop_id, stop_string or length
    texts: list[str] | None  # decoded, without the stop id, and cut after the stop string; None without decode_fn


def stream(
    params: Any,
    prompts: Prompts,
    cfg: Config,
    key: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    min_new_tokens: int = 0,
    decode_fn: Decode | None = None,
    ops: Ops = REFERENCE,
) -> Iterator[Step]:
    """Yields a Step for each new position until every row has finished; arguments as for `generate`.

    Nothing is yielded for rows without room for a token. Arguments are checked at the call, not at the first token.
    """
    rows = _rows(prompts, cfg)
    stop_ids, stop_strings = _stop_ids(stop_ids), _stop_strings(stop_strings)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
    if not isinstance(min_new_tokens, int) or not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"min_new_tokens must be in 0..max_new_tokens {max_new_tokens}, got {min_new_tokens}")
    if stop_strings and decode_fn is None:
        raise ValueError("decode_fn (ids -> text) must be given with stop_strings, got None")
    check_tokens(torch.tensor(stop_ids, dtype=torch.int64), cfg, "stop_ids")
    if min_new_tokens and len(set(stop_ids)) >= cfg.vocab_size:
        raise ValueError("stop_ids must leave a token to generate when min_new_tokens is above 0, got all ids")
    if key.ndim == 2 and key.shape[0] != len(rows):
        raise ValueError(f"key must be one key, or one for each of {len(rows)} rows, got shape {tuple(key.shape)}")
    # One row that nobody reads, to have the filters check their arguments now.
    distribution(torch.zeros(1, 1), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    limits = [min(max_new_tokens, cfg.context_length - len(row)) for row in rows]

    def steps() -> Iterator[Step]:
        generated: list[list[int]] = [[] for _ in rows]
        open_rows = [limit > 0 for limit in limits]
        source = _logits(params, rows, cfg, ops, max(limits))
        request: tuple[Tensor, list[bool]] | None = None
        uniform_BN = _uniforms(key, [len(row) for row in rows], max(limits))
        for n in range(max(limits)):
            logits_BV = source.send(request)
            if n < min_new_tokens:
                logits_BV = forbid(logits_BV, stop_ids)
            logits_BV = _finite(logits_BV, open_rows, n)
            log_probs_BV = distribution(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            next_B = pick(log_probs_BV, uniform_BN[:, n].to(log_probs_BV.device))
            picked_B = log_probs_BV.gather(-1, next_B.unsqueeze(-1)).squeeze(-1)
            step = Step([None] * len(rows), [None] * len(rows), [None] * len(rows))
            for i, (token, logprob) in enumerate(zip(next_B.tolist(), picked_B.tolist(), strict=True)):
                if not open_rows[i]:
                    continue
                generated[i].append(token)
                step.tokens[i], step.logprobs[i] = token, logprob
                if token in stop_ids:
                    step.finish_reasons[i] = STOP_ID
                elif (
                    decode_fn is not None
                    and n + 1 >= min_new_tokens
                    and _stopped(decode_fn, generated[i], stop_strings)
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
    params: Any,
    prompts: Prompts,
    cfg: Config,
    key: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    min_new_tokens: int = 0,
    decode_fn: Decode | None = None,
    ops: Ops = REFERENCE,
) -> Generation:
    """Continues each prompt until a stop id, a stop string, max_new_tokens or the end of the model's context.

    Args:
        prompts: token ids of each row, of any lengths from 1 to context_length; any iterable of rows.
        key: one key, of which row i takes fold_in(key, i); or a key for each row, (B, 2).
        temperature: 0 is greedy; other settings as `purelm.sampling`.
        stop_ids: a row ends with any of them (and keeps it); forbidden until min_new_tokens are there.
        stop_strings: a row ends when its text, as decode_fn makes it of the new tokens, has any of them, also one
            that spans tokens; looked for from min_new_tokens on. The prompt does not count.
        decode_fn: ids -> text.

    ValueError names what is wrong with an argument, and rows whose logits are NaN or inf: the model has diverged, or
    overflowed in 16 bits.

    >>> from purelm.models import transformer
    >>> cfg = Config(vocab_size=8, context_length=16, d_model=4, n_layers=1, n_heads=2)
    >>> params = transformer.init(random.key(0), cfg)
    >>> out = generate(params, [[1], [2, 3, 4]], cfg, random.key(1), max_new_tokens=3)
    >>> [len(t) for t in out.tokens], out.finish_reasons
    ([3, 3], ['length', 'length'])
    """
    prompts, stop_strings = _prompts(prompts), _stop_strings(stop_strings)  # more than one look at each
    steps = stream(
        params,
        prompts,
        cfg,
        key,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_ids=stop_ids,
        stop_strings=stop_strings,
        min_new_tokens=min_new_tokens,
        decode_fn=decode_fn,
        ops=ops,
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
        texts = [_text(decode_fn, ids, reason, stop_strings) for ids, reason in zip(tokens, reasons, strict=True)]
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


def _stop_ids(stop_ids: Iterable[int]) -> tuple[int, ...]:
    if isinstance(stop_ids, str | bytes) or not isinstance(stop_ids, Iterable):
        raise ValueError(f"stop_ids must be a sequence of token ids, got {stop_ids!r}")
    stop_ids = tuple(int(i) if isinstance(i, Tensor) else i for i in stop_ids)
    if odd := [i for i in stop_ids if not isinstance(i, Integral)]:
        raise ValueError(f"stop_ids must be integers, got {odd[0]!r}")
    return tuple(int(i) for i in stop_ids)


def _stop_strings(stop_strings: Iterable[str]) -> tuple[str, ...]:
    """A string is itself a sequence of strings, of one character each: never what is meant."""
    if isinstance(stop_strings, str | bytes):
        raise ValueError(f"stop_strings must be a sequence of strings, got {stop_strings!r}: give [{stop_strings!r}]")
    stop_strings = tuple(stop_strings)
    if odd := [s for s in stop_strings if not isinstance(s, str) or not s]:
        raise ValueError(f"stop_strings must be strings that are not empty, got {odd[0]!r}")
    return stop_strings


def _finite(logits_BV: Tensor, open_rows: list[bool], n: int) -> Tensor:
    """ValueError that names open rows without a distribution; finished ones, which nobody reads, get an even one."""
    # The largest is NaN where any is, and -inf where nothing is possible. The host waits for this step's token anyway.
    finite_B = torch.isfinite(logits_BV.amax(-1))
    is_finite = finite_B.tolist()
    bad = [i for i, (good, is_open) in enumerate(zip(is_finite, open_rows, strict=True)) if is_open and not good]
    if bad:
        raise ValueError(
            f"the model's logits are not finite (NaN or inf) in rows {', '.join(map(str, bad[:8]))} after {n} new "
            "tokens: its parameters have diverged, or their dtype overflows"
        )
    return logits_BV if all(is_finite) else torch.where(finite_B.unsqueeze(-1), logits_BV, 0.0)


def _rows(prompts: Prompts, cfg: Config) -> list[Tensor]:
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
        if row.ndim != 1 or not 1 <= row.numel() <= cfg.context_length:
            raise ValueError(
                f"prompts[{i}] must be 1..{cfg.context_length} token ids (context_length), got shape {tuple(row.shape)}"
            )
        check_tokens(row, cfg, f"prompts[{i}]")
    return [row.to(torch.int64) for row in rows]


def _uniforms(key: Tensor, lengths: list[int], n: int) -> Tensor:
    """(B, n) fp64: column j of row b is number (lengths[b] + j) of the row's key, the position that it decides."""
    keys = [random.fold_in(key, i) for i in range(len(lengths))] if key.ndim == 1 else list(key)
    draws = [
        random.uniform(k, (n,), dtype=torch.float64, index=start) for k, start in zip(keys, lengths, strict=True)
    ]
    return torch.stack(draws)


def _logits(
    params: Any, rows: list[Tensor], cfg: Config, ops: Ops, n_new: int
) -> Generator[Tensor, tuple[Tensor, list[bool]] | None, None]:
    """Coroutine: send None for the logits after the prompts, then (next (B,), rows still open) for those after it."""
    weight = params["token_embeddings"]["weight"]
    longest = max(len(row) for row in rows)
    ragged = any(len(row) != longest for row in rows)
    lengths_B = torch.tensor([len(row) for row in rows], device=weight.device) if ragged else None
    padded = [torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows]
    tokens = torch.stack(padded).to(weight.device)
    size = longest + max(n_new - 1, 0)  # the last token that is generated is never read
    with torch.no_grad():
        cache = init_cache(cfg, len(rows), size, weight.dtype, weight.device)
        logits_BV, cache = prefill(
            params, tokens, cache, cfg, ops=ops, lengths=lengths_B, n_positions=cfg.context_length
        )
    for used in range(longest, size + 1):
        request = yield logits_BV
        if request is None or used == size:
            return
        next_B, open_rows = request
        if cache.start is not None and not all(open_rows):
            # A finished row goes on as a row of one token, so that its position never leaves the context.
            is_open = torch.tensor(open_rows, device=weight.device)
            cache = cache._replace(start=torch.where(is_open, cache.start, cache.length))
        logits_BV, cache = decode_(
            params, next_B, cache, cfg, ops=ops, used=used, n_positions=cfg.context_length
        )


def _stop_end(decode_fn: Decode, ids: list[int], stop_strings: Sequence[str]) -> int | None:
    """Where, in the text of `ids`, the first stop string ends that the last token completes; None if it does not."""
    before, text = decode_fn(ids[:-1]), decode_fn(ids)
    # Not len(before): the last token may complete a character whose first bytes were decoded as U+FFFD.
    old = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    ends = [at + len(s) for s in stop_strings if (at := text.find(s, max(0, old - len(s) + 1))) >= 0]
    return min(ends) if ends else None


def _stopped(decode_fn: Decode, ids: list[int], stop_strings: Sequence[str]) -> bool:
    """Whether the last token completes a stop string; decodes only as many tokens as that can depend on."""
    if not stop_strings:
        return False
    reach = max(len(s) for s in stop_strings) + 3  # 3: U+FFFD for bytes of a character that the window cuts
    window = 8
    while window < len(ids) and len(decode_fn(ids[-window:-1])) < reach:
        window *= 2
    return _stop_end(decode_fn, ids[-window:], stop_strings) is not None


def _text(decode_fn: Decode, ids: list[int], reason: str, stop_strings: Sequence[str]) -> str:
    if reason == STOP_ID:
        return decode_fn(ids[:-1])
    end = _stop_end(decode_fn, ids, stop_strings) if reason == STOP_STRING else None
    return decode_fn(ids)[:end]
