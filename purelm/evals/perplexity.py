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
    """What was measured over a stream."""

    nats: float  # sum of -log p(token | context)
    n_tokens: float  # targets scored (sum of their weights)
    n_bytes: int  # UTF-8 bytes of the text that the tokens stand for

    @property
    def nats_per_token(self) -> float:
        """Mean of -log p over the targets; nan where there are none."""
        return self.nats / self.n_tokens if self.n_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats per token); inf where that is too large for a float."""
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
    """Sum the loss over batches that cover each target once (`purelm.data.eval_windows`).

    loss_fn is given each batch with "denominator" 1, so its scalar is the batch's sum of weighted nats. Sums are kept
    in float64, because a float32 running sum over millions of tokens drifts. ValueError where no batch has a target of
    weight above 0.
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
