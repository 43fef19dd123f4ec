"""Rows under way, and the step that gives each one more token: shapes never change, and the host is never waited for.

    step = make_step(model, sampling, stop)
    rows, cache = step(params, rows, cache)      # as often as one likes, then read rows.tokens_BN, rows.open_B, ...

A row that is finished is a row of the same shape whose tokens stay as they are. So one compiled function or one CUDA
graph serves all lengths of rows, and rows that are exchanged for others.
Legend: B rows, N the most new tokens of any, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import random
from purelm.devices import sent
from purelm.generate.sampling import Sampling, choose
from purelm.generate.stops import Stop
from purelm.models.cache_rows import keep
from purelm.models.model import Model

__all__ = ["Draw", "Rows", "StepFn", "begin", "draw", "make_step", "uniforms"]

# (logits_BV, rows, sampling, stop, stops_V) -> rows: what `draw` does. It may write into the memory of `rows`.
Draw = Callable[[Tensor, "Rows", Sampling, Stop, Tensor], "Rows"]
StepFn = Callable[..., tuple["Rows", Any]]  # (params, rows, cache, *, used=None) -> (rows, cache)


class Rows(NamedTuple):
    """What is known of each row; tensors on the model's device."""

    token_B: Tensor  # int64: the row's last token, which the next step puts into the cache
    n_B: Tensor  # int64: new tokens so far
    limit_B: Tensor  # int64: the most new tokens
    open_B: Tensor  # bool: not finished
    stopped_B: Tensor  # bool: finished by a stop id
    bad_B: Tensor  # bool: the logits after n_B new tokens are not finite
    uniforms_BN: Tensor  # fp64 in [0, 1): the random number that decides each new token
    tokens_BN: Tensor  # int64: the first n_B are the new tokens
    logprobs_BN: Tensor  # fp64: of these under the distribution sampled from
    model_logprobs_BN: Tensor  # fp64: and under the model itself, softmax(logits)


def begin(limits: list[int], uniforms_BN: Tensor) -> Rows:
    """Rows without a new token, on the device of uniforms_BN."""
    device, (B, N) = uniforms_BN.device, uniforms_BN.shape
    limit_B = sent(torch.tensor(limits, dtype=torch.int64), device)
    zero, false = torch.zeros_like(limit_B), torch.zeros(B, dtype=torch.bool, device=device)
    tokens_BN, logprobs_BN = uniforms_BN.new_zeros(B, N, dtype=torch.int64), torch.zeros_like(uniforms_BN)
    return Rows(
        zero, zero.clone(), limit_B, limit_B > 0, false, false.clone(), uniforms_BN, tokens_BN, logprobs_BN,
        logprobs_BN.clone(),
    )  # fmt: skip


def uniforms(keys_B2: Tensor, starts: list[int], n: int) -> Tensor:
    """(B, n) fp64: entry (b, j) is random number starts[b] + j of row b's key, for the token at that position."""

    def one(key: Tensor, start: Tensor) -> Tensor:
        return random.uniform(key, (n,), dtype=torch.float64, index=start)

    return torch.func.vmap(one)(keys_B2, sent(torch.tensor(starts), keys_B2.device))


def draw(logits_BV: Tensor, rows: Rows, sampling: Sampling, stop: Stop, stops_V: Tensor) -> Rows:
    """The rows after one more token each, drawn with the row's next random number.

    stops_V: bool, True at stop ids.
    """
    early_BV = None
    if stop.min_new_tokens and stop.ids:
        early_BV = stops_V & (rows.n_B < stop.min_new_tokens).unsqueeze(-1)
    at_B1 = rows.n_B.clamp(max=rows.tokens_BN.shape[1] - 1).unsqueeze(-1)
    uniform_B = rows.uniforms_BN.gather(1, at_B1).squeeze(-1)
    next_B, logprob_B, model_logprob_B, finite_B = choose(logits_BV, uniform_B, sampling, early_BV)
    gets_B = rows.open_B & finite_B

    def put(x_BN: Tensor, new_B: Tensor) -> Tensor:
        new_B1 = new_B.unsqueeze(-1).to(x_BN.dtype)
        return x_BN.scatter(1, at_B1, torch.where(gets_B.unsqueeze(-1), new_B1, x_BN.gather(1, at_B1)))

    n_B = rows.n_B + gets_B
    hit_B = gets_B & stops_V[next_B]
    return Rows(  # not _replace(), of which dynamo (2.11) makes an empty tuple
        token_B=torch.where(gets_B, next_B, rows.token_B),
        n_B=n_B,
        limit_B=rows.limit_B,
        open_B=gets_B & ~hit_B & (n_B < rows.limit_B),
        stopped_B=rows.stopped_B | hit_B,
        bad_B=rows.bad_B | (rows.open_B & ~finite_B),
        uniforms_BN=rows.uniforms_BN,
        tokens_BN=put(rows.tokens_BN, next_B),
        logprobs_BN=put(rows.logprobs_BN, logprob_B),
        model_logprobs_BN=put(rows.model_logprobs_BN, model_logprob_B),
    )


@dataclass(frozen=True)
class _Step:
    """`make_step`'s function; two are equal where they compute the same."""

    model: Model
    sampling: Sampling
    stop: Stop
    draw: Draw
    device: torch.device
    stops_V: Tensor = field(compare=False)  # made from stop

    def __call__(self, params: Any, rows: Rows, cache: Any, *, used: int | None = None) -> tuple[Rows, Any]:
        model = self.model
        cache = keep(cache, rows.open_B)  # a finished row would run out of slots
        logits_BV, cache = model.decode_(params, rows.token_B, cache, used=used, n_positions=model.context_length)
        return self.draw(logits_BV, rows, self.sampling, self.stop, self.stops_V), cache


def make_step(model: Model, sampling: Sampling, stop: Stop, stops_V: Tensor, draw: Draw = draw) -> StepFn:
    """(params, rows, cache, *, used=None) -> (rows, cache): `decode_` of each row's last token, and `draw`.

    The cache is written in place, and the rows where `draw` does so. used: as for `decode_`.
    """
    return _Step(model, sampling, stop, draw, stops_V.device, stops_V)
