"""Log-probabilities of pairs of answers, summed over their tokens. Legend: N pairs, T positions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.choices import Choice, batch_of_choices
from experiments.finetune.setup import tokens_at_a_time
from experiments.ops import evaluating_ops
from experiments.pairs import Example, batch_of
from purelm.align.answers import length_desensitized, sequence_log_probs
from purelm.models import transformer

__all__ = ["Scores", "evaluating", "pair_sums", "sums_of", "sums_of_pairs"]

Batch = dict[str, Any]


class Scores(NamedTuple):
    """Of some pairs, on the CPU."""

    sums: Tensor  # (N, 2), chosen and rejected
    others: Tensor  # (N,): of mismatched answers; 0 where none are asked for
    counts: Tensor  # (N, 2): tokens of the answers


def pair_sums(log_p_N2T: Tensor, weights_N2T: Tensor, ld_alpha: float) -> tuple[Tensor, Tensor]:
    """(sums, numbers of tokens), each (N, 2)."""
    n_N2 = weights_N2T.sum(-1)
    if ld_alpha == 1:
        return sequence_log_probs(log_p_N2T, weights_N2T), n_N2
    shared = n_N2.amin(-1, keepdim=True).expand_as(n_N2)
    return length_desensitized(log_p_N2T, weights_N2T, shared, alpha=ld_alpha), n_N2


def sums_of_pairs(
    model: transformer.Model, params: Any, batch: Batch, chunk: int | None, ld_alpha: float
) -> tuple[Tensor, Tensor]:
    """`pair_sums` of a batch of `choices.batch_of_choices`."""
    rows = {name: batch[name].flatten(0, 1) for name in ("tokens", "targets", "weights")}
    log_p_N2T = model.log_probs(params, rows, chunk=chunk)[0].unflatten(0, batch["tokens"].shape[:2])
    return pair_sums(log_p_N2T, batch["weights"], ld_alpha)


def sums_of(model: transformer.Model, params: Any, batch: Batch) -> Tensor:
    """The sum of each row of a batch of responses."""
    rows = {name: batch[name] for name in ("tokens", "targets", "weights")}
    chunk = tokens_at_a_time(model.vocab_size)
    return sequence_log_probs(model.log_probs(params, rows, chunk=chunk)[0], rows["weights"])


def evaluating(
    config: transformer.Config, pad: int, device: torch.device, *, ld_alpha: float, rows: int
) -> Callable[..., Scores]:
    """The function (params, choices, others=(), update=None) -> Scores, `rows` pairs at a time, without gradient.

    others: mismatched examples, one a pair. update: is told how many pairs are done.
    """
    model = transformer.make(config, evaluating_ops(config))
    chunk = tokens_at_a_time(config.vocab_size)

    @torch.no_grad()
    def scores(
        params: Any,
        choices: Sequence[Choice],
        others: Sequence[Example] = (),
        update: Callable[[int], None] | None = None,
    ) -> Scores:
        found = [Scores(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, 2))]
        for at in range(0, len(choices), rows):
            batch = batch_of_choices(choices[at : at + rows], pad, device)
            sums, counts = sums_of_pairs(model, params, batch, chunk, ld_alpha)
            apart = torch.zeros(len(sums))
            if others:
                apart = sums_of(model, params, batch_of(others[at : at + rows], pad, device)).cpu()
            found.append(Scores(sums.cpu(), apart, counts.cpu()))
            if update is not None:
                update(at + len(sums))
        return Scores(*(torch.cat(x) for x in zip(*found, strict=True)))

    return scores
