"""What generation takes and gives."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from purelm.generate.sampling import Sampling
from purelm.generate.stops import Stop

__all__ = ["NEVER", "PLAIN", "Generation", "Progress", "Prompts", "Sample", "Step"]

PLAIN, NEVER = Sampling(), Stop()

Prompts = Iterable[Sequence[int] | Tensor] | Tensor


class Step(NamedTuple):
    """One new token of each row; entries are None for rows that have finished or not begun."""

    tokens: list[int | None]
    logprobs: list[float | None]  # log-probabilities under the distribution sampled from (after temperature, filters)
    finish_reasons: list[str | None]  # stop_id, stop_string or length if the row ends with this token, else None
    model_logprobs: list[float | None]  # log-probabilities under the model: temperature 1, nothing excluded


class Generation(NamedTuple):
    """What was generated, without the prompts: sample j of prompt i is row i * n_samples + j."""

    tokens: list[Tensor]  # one (n,) int64 a row, including the stop id or the token that completes the stop string
    logprobs: list[Tensor]  # one (n,) fp32 a row: as in `Step`
    finish_reasons: list[str]  # stop_id, stop_string or length
    texts: list[str] | None  # decoded without the stop id, up to the end of the stop string; None without decode_fn
    model_logprobs: list[Tensor]  # one (n,) fp32 a row: as in `Step`


class Progress(NamedTuple):
    """What has been generated since the call began."""

    tokens: int
    seconds: float
    tokens_per_second: float
    rows_done: int
    rows: int  # in all


class Sample(Protocol):
    """Continuations of prompts under these parameters: what another engine offers in place of `generate`.

    functools.partial(generate, model) is one. Of n prompts it returns n * n_samples rows, in the order of the prompts;
    what depends on chance depends on the key alone.
    """

    def __call__(
        self,
        params: Any,
        prompts: Prompts,
        key: Tensor,
        /,
        *,
        max_new_tokens: int,
        n_samples: int = 1,
        sampling: Sampling = PLAIN,
        stop: Stop = NEVER,
    ) -> Generation: ...
