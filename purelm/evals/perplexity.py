"""Perplexity and bits per byte of a token stream.

bits_per_byte = (sum of nats over all tokens) / (ln 2 * UTF-8 bytes of the text): unlike loss per token it does not
depend on the tokenizer, so models with different vocabularies, and a source of known entropy, can be compared.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Score", "bits_per_byte", "score"]


class Score(NamedTuple):
    """The loss of a model over a token stream, and the sizes by which it is divided."""

    nats: float  # sum of -log p(token | context)
    n_tokens: float  # targets scored (sum of their weights)
    n_bytes: int  # UTF-8 bytes of the text, without special tokens

    @property
    def nats_per_token(self) -> float:
        """Mean of -log p over the targets; nan where there are none."""
        return self.nats / self.n_tokens if self.n_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats per token); inf above e^700, near the largest float."""
        return math.exp(self.nats_per_token) if not self.nats_per_token > 700.0 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 * n_bytes)."""
        return bits_per_byte(self.nats, self.n_bytes)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """nats / (ln 2 * n_bytes); n_bytes counts the text without special tokens, nats counts every target."""
    if not n_bytes > 0:
        raise ValueError(f"n_bytes must be positive, got {n_bytes}")
    return nats / (math.log(2.0) * n_bytes)


def score(
    loss_fn: Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]],
    params: Any,
    batches: Iterable[dict[str, Tensor]],
    n_bytes: int,
    *,
    device: str | torch.device | None = None,
) -> Score:
    """Sum of the loss over batches in which each target occurs once (`purelm.data.eval_windows` makes them).

    loss_fn, (params, batch) -> (scalar, metrics), is called with batch["denominator"] = 1, so that the scalar is the
    batch's sum of weighted nats. Sums are fp64, because rounding errors of an fp32 sum over millions of tokens add up.
    ValueError if no batch has a target of weight above 0.

    Args:
        n_bytes: UTF-8 bytes of the text that all targets together stand for.
        device: where the sums are kept; None: on the CPU, waiting for each batch.
    """
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in batches:
            targets, weights = batch["targets"], batch.get("weights")
            one = torch.ones((), dtype=torch.float32, device=targets.device)
            total, _ = loss_fn(params, {**batch, "denominator": one})
            nats = nats + total.double().to(nats.device)
            count = float(targets.numel()) if weights is None else weights.sum(dtype=torch.float64).to(tokens.device)
            tokens = tokens + count
    if not tokens.item() > 0:
        raise ValueError("batches must have targets of weights above 0, got none")
    return Score(nats.item(), tokens.item(), n_bytes)
