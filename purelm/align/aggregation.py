"""From losses of tokens to one number, with a denominator that is an argument.

Each is `f(loss_BT, mask_BT, *, denominator=None, **options) -> 0-d`. A mean inside of a microbatch is not a part of the
batch's mean. So for each f there is `f_denominator(mask_BT, **options)`, the number by which f divides: compute it once
of the WHOLE batch of an optimizer step, over all microbatches and processes, pass it to each part, and ADD the parts,
losses and gradients alike; no division by the number of microbatches. Any split by rows then gives the full batch's
result (of groups, any split between groups). Where processes average gradients, multiply by their number.

The same names elsewhere:
    sequence_mean     verl seq-mean-token-mean; TRL `grpo`; the course's masked_mean of each row, then the mean
    token_mean        verl token-mean, TRL `dapo`: over the whole step. TRL `bnpo` is the same inside of each
                      microbatch, then divided by their number: it depends on the split
    group_token_mean  DAPO (arXiv:2503.14476 equation 8) and Olmo 3 (equation 1) as printed; their code is token_mean
    constant          TRL `dr_grpo`, the course's masked_normalize
    sequence_sum      verl seq-mean-token-sum; TRL `luspo` on GSPO's losses
    sum_norm          verl seq-mean-token-sum-norm as of January 2026: without 1/B (verl#3741)

Losses are read where the mask is not 0, and multiplied by the mask; T_i = sum_t m_it. A batch that is masked as a whole
gives 0. A sequence that is masked as a whole adds 0; whether it counts in B is `count_empty`: True as in TRL, which
keeps dropped sequences' weight out of the others' (their number depends on the policy), False as in verl and OpenRLHF.

Legend: B sequences, T positions, l = loss, m = mask.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.masked import masked_sum

__all__ = [
    "Aggregate",
    "constant",
    "constant_denominator",
    "group_token_mean",
    "group_token_mean_denominator",
    "length_weighted",
    "length_weighted_denominator",
    "sequence_mean",
    "sequence_mean_denominator",
    "sequence_sum",
    "sequence_sum_denominator",
    "sum_norm",
    "sum_norm_denominator",
    "token_mean",
    "token_mean_denominator",
]

Aggregate = Callable[..., Tensor]
Loss = Float[Tensor, "*b t"]
Number = Float[Tensor, ""]
Given = Tensor | float | None


def sequence_mean(loss_BT: Loss, mask_BT: Tensor, *, denominator: Given = None, count_empty: bool = True) -> Number:
    """(1/B) sum_i (1/T_i) sum_t m_it l_it: GRPO's (arXiv:2402.03300 equation 3), the course's, GSPO's.

    Each sequence has the same weight, so a token of a long one has less.

    >>> sequence_mean(torch.tensor([[1.0, 3.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]))
    tensor(3.)
    """
    loss_BT, mask_BT = _pair(loss_BT, mask_BT)
    rows = masked_sum(loss_BT, mask_BT, -1) / _or_one(mask_BT.sum(-1))
    return rows.sum() / _divisor(denominator, sequence_mean_denominator(mask_BT, count_empty=count_empty))


def sequence_mean_denominator(mask_BT: Tensor, *, count_empty: bool = True) -> Number:
    """B: rows, or with count_empty=False rows with an unmasked token."""
    rows = (mask_BT != 0).any(-1)
    return (torch.ones_like(rows) if count_empty else rows).to(torch.float32).sum()


def token_mean(loss_BT: Loss, mask_BT: Tensor, *, denominator: Given = None) -> Number:
    """sum_it m_it l_it / sum_it m_it: each token of the batch has the same weight (DAPO, arXiv:2503.14476, as run).

    >>> token_mean(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]))
    tensor(3.)
    """
    loss_BT, mask_BT = _pair(loss_BT, mask_BT)
    return masked_sum(loss_BT, mask_BT) / _divisor(denominator, token_mean_denominator(mask_BT))


def token_mean_denominator(mask_BT: Tensor) -> Number:
    """sum_it m_it."""
    return _wide(mask_BT).sum()


def group_token_mean(loss_BT: Loss, mask_BT: Tensor, *, group_size: int, denominator: Given = None) -> Number:
    """(1/P) sum_p [sum_(i in p) sum_t m_it l_it / sum_(i in p) sum_t m_it]: the token mean inside of each group.

    Groups are `group_size` rows each, one after the other. A microbatch must hold whole groups. A group that is masked
    as a whole adds 0 and counts in P.

    >>> group_token_mean(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]), group_size=1)
    tensor(3.5000)
    """
    loss_BT, mask_BT = _pair(loss_BT, mask_BT)
    count = group_token_mean_denominator(mask_BT, group_size=group_size)
    grouped = (-1, group_size, mask_BT.shape[-1])
    loss_PGT, mask_PGT = loss_BT.reshape(grouped), mask_BT.reshape(grouped)
    means = masked_sum(loss_PGT, mask_PGT, (-1, -2)) / _or_one(mask_PGT.sum((-1, -2)))
    return means.sum() / _divisor(denominator, count)


def group_token_mean_denominator(mask_BT: Tensor, *, group_size: int) -> Number:
    """P = B / group_size: groups. ValueError where rows are left over."""
    n_rows = mask_BT.shape[:-1].numel()
    if group_size < 1 or n_rows % group_size:
        raise ValueError(f"group_size must divide the number of sequences, {n_rows}, got {group_size}")
    return torch.full((), float(n_rows // group_size), device=mask_BT.device)


def constant(
    loss_BT: Loss, mask_BT: Tensor, *, length: float, denominator: Given = None, count_empty: bool = True
) -> Number:
    """(1/B) sum_i (1/L) sum_t m_it l_it with L = length, the longest response sampled (Dr. GRPO, arXiv:2503.20783).

    No bias to short right and long wrong responses. The denominator is B, without L. L has no default: it belongs to
    the sampler (3000 in that paper).

    >>> constant(torch.tensor([[1.0, 3.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]), length=2)
    tensor(2.)
    """
    loss_BT, mask_BT = _pair(loss_BT, mask_BT)
    count = constant_denominator(mask_BT, length=length, count_empty=count_empty)
    return masked_sum(loss_BT, mask_BT) / (_length(length) * _divisor(denominator, count))


def constant_denominator(mask_BT: Tensor, *, length: float, count_empty: bool = True) -> Number:
    """B, as of sequence_mean: `length` is no part of it."""
    _length(length)
    return sequence_mean_denominator(mask_BT, count_empty=count_empty)


def sequence_sum(loss_BT: Loss, mask_BT: Tensor, *, denominator: Given = None, count_empty: bool = True) -> Number:
    """(1/B) sum_i sum_t m_it l_it: the policy gradient of sequences, without any normalisation by length.

    >>> sequence_sum(torch.tensor([[1.0, 3.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]))
    tensor(4.)
    """
    loss_BT, mask_BT = _pair(loss_BT, mask_BT)
    count = sequence_sum_denominator(mask_BT, count_empty=count_empty)
    return masked_sum(loss_BT, mask_BT) / _divisor(denominator, count)


def sequence_sum_denominator(mask_BT: Tensor, *, count_empty: bool = True) -> Number:
    """B, as of sequence_mean."""
    return sequence_mean_denominator(mask_BT, count_empty=count_empty)


def length_weighted(loss_BT: Loss, mask_BT: Tensor, *, denominator: Given = None, count_empty: bool = True) -> Number:
    """(1/B) sum_i T_i l_i with l_i = (1/T_i) sum_t m_it l_it: LUSPO's (arXiv:2602.05261), on GSPO's losses.

    That is `sequence_sum`, under its name there; its clip is (2e-3, 2.5e-3).
    """
    return sequence_sum(loss_BT, mask_BT, denominator=denominator, count_empty=count_empty)


def length_weighted_denominator(mask_BT: Tensor, *, count_empty: bool = True) -> Number:
    """B, as of sequence_mean."""
    return sequence_mean_denominator(mask_BT, count_empty=count_empty)


def sum_norm(loss_BT: Loss, mask_BT: Tensor, *, length: float, denominator: Given = None) -> Number:
    """sum_it m_it l_it / L: grows with the number of sequences. The denominator is L.

    verl's seq-mean-token-sum-norm as of January 2026. It is not Dr. GRPO's, which is `constant`.
    """
    loss_BT, mask_BT = _pair(loss_BT, mask_BT)
    return masked_sum(loss_BT, mask_BT) / _divisor(denominator, sum_norm_denominator(mask_BT, length=length))


def sum_norm_denominator(mask_BT: Tensor, *, length: float) -> Number:
    """L: the same for a part and for the whole."""
    return torch.full((), _length(length), device=mask_BT.device)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pair(loss_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the loss's dtype, at least fp32: in bf16 a count of tokens above 256 is rounded."""
    if loss_BT.ndim < 1 or loss_BT.shape != mask_BT.shape:
        raise ValueError(f"loss and mask must have one shape (B, T), got {tuple(loss_BT.shape)} and "
                         f"{tuple(mask_BT.shape)}")  # fmt: skip
    loss_BT = _wide(loss_BT)
    return loss_BT, mask_BT.to(loss_BT.dtype)


def _or_one(count: Tensor) -> Tensor:
    return torch.where(count == 0, torch.ones_like(count), count)


def _length(length: float) -> float:
    if not 0 < length < float("inf"):
        raise ValueError(f"length must be above 0 and finite, got {length}")
    return float(length)


def _divisor(given: Given, counted: Tensor) -> Tensor | float:
    """The denominator given, or the one counted; 1 in place of 0, where all is masked and the sum is 0."""
    if given is None:
        return _or_one(counted)
    if isinstance(given, Tensor):
        if given.ndim:
            raise ValueError(f"denominator must be one number, got the shape {tuple(given.shape)}")
        return _or_one(given)
    if not 0 < given < float("inf"):
        raise ValueError(f"denominator must be above 0 and finite, got {given}")
    return given
