"""Embedding and cross-entropy over a vocabulary whose rows are sharded over N ranks; logits are never gathered.

Rank r has rows r M to (r + 1) M of the (V, D) matrix, M = ceil(V / N), padded with zeros after row V. Padding takes no
part: its logits count as -inf. Legend: N tokens (in suffixes), D d_model, V vocabulary, M rows of one rank.

For one token with logits x = cap(W h), target t, weight w, and Z = sum_j exp x_j over the rows of all ranks:

    y = log Z - x_t + z_loss (log Z)^2
    dx_j = dy (exp(x_j - log Z) (1 + 2 z_loss log Z) - [j = t])

A rank knows log Z_r of its own rows; log Z = m + log sum_r exp(log Z_r - m) with m = max_r log Z_r.
Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3; there each rank sends the maximum and the sum of its logits.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from purelm.devices import at_hand
from purelm.dist.conjugates import enter, leave
from purelm.dist.world import Group, rank_of, size_of
from purelm.ops import REFERENCE
from purelm.ops.chunks import by_chunks
from purelm.ops.cross_entropy import check_z_loss, reduce_tokens, token_weights
from purelm.ops.linear import linear
from purelm.ops.precision import accumulator
from purelm.ops.softcap import check_positive, check_softcap, soft_cap

__all__ = ["embedding", "linear_cross_entropy", "log_probs"]


def embedding(
    ids: Int[Tensor, "*batch"],
    part_MD: Float[Tensor, "m d"],
    vocab_size: int,
    group: Group = None,
    lookup: Callable[[Tensor, Tensor], Tensor] = REFERENCE.embedding,
) -> Float[Tensor, "*batch d"]:
    """W[id] on the rank that has this row, zeros on the others: the sum over ranks is W[ids]. No message.

    For an id outside of 0..V-1 `lookup` raises on every rank.
    """
    row, mine = _local_rows(ids, part_MD.shape[0], vocab_size, group)
    return torch.where(mine.unsqueeze(-1), lookup(row, part_MD), 0.0)


def linear_cross_entropy(
    hidden: Float[Tensor, "*batch d"],
    part_MD: Float[Tensor, "m d"],
    targets: Int[Tensor, "*batch"],
    vocab_size: int,
    group: Group = None,
    *,
    weights: Float[Tensor, "*batch"] | None = None,
    denominator: Float[Tensor, ""] | float | None = None,
    reduction: str = "sum",
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    ignore_index: int | None = None,
) -> tuple[Float[Tensor, "*out"], Float[Tensor, "*out"]]:
    """`purelm.ops.linear_cross_entropy` over all ranks' rows: its arguments and its two results, on every rank.

    hidden, targets and weights are the same on all ranks, and so is the denominator of "mean", which therefore needs no
    message. The gradient of part_MD is complete; that of hidden is this rank's share, to be summed over ranks
    (`conjugates.enter` does).

    Two messages in forward, none in backward: an all_reduce (max) of one fp32 number a token, and one (sum) of two.
    A target outside of 0..V-1, where the weight is not 0, is a ValueError on every rank if targets are on a CPU;
    elsewhere the loss and the gradient are NaN.

    Args:
        chunk: tokens whose logits are held at a time, and recomputed in backward; None keeps all N x M logits for
            backward. The number of messages does not depend on it.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token or None, got {chunk}")
    check_softcap(softcap)
    check_z_loss(z_loss)
    if ignore_index is not None or reduction not in ("none", "sum"):
        weights, denominator, reduction = token_weights(
            targets, weights, denominator, reduction, ignore_index, accumulator(hidden.dtype)
        )
    if weights is not None:
        targets = torch.where(weights == 0, 0, targets)
    M = part_MD.shape[0]
    real_MD = part_MD[: max(0, min(M, vocab_size - rank_of(group) * M))]
    targets, nan_or_1 = _real_targets(targets, vocab_size)
    row_N, mine_N = _local_rows(targets.reshape(-1), M, vocab_size, group)
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    loss, nll, _, _ = _TokenLosses.apply(hidden_ND, real_MD, row_N, mine_N, softcap, z_loss, chunk, group)
    loss, nll = loss * nan_or_1.reshape(-1), nll * nan_or_1.reshape(-1)
    return (
        reduce_tokens(loss.reshape(targets.shape), weights, denominator, reduction),
        reduce_tokens(nll.reshape(targets.shape), weights, denominator, reduction),
    )


def log_probs(
    hidden: Float[Tensor, "*batch d"],
    part_MD: Float[Tensor, "m d"],
    targets: Int[Tensor, "*batch"],
    vocab_size: int,
    group: Group = None,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    ignore_index: int | None = None,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """`purelm.ops.log_probs` over all ranks' rows: its arguments and its two results, on every rank.

    With log p_j = cap(x_j) / temperature - log Z, H = -sum_j p_j log p_j is a sum over ranks. hidden is the same on all
    ranks, and its gradient this rank's share, as for `linear_cross_entropy`. Messages for each chunk, all_reduces of
    fp32 numbers a token: in forward one (max), one and two (sums); in backward one (sum).
    """
    check_positive("temperature", temperature)
    check_softcap(softcap)
    live = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    M = part_MD.shape[0]
    real_MD = part_MD[: max(0, min(M, vocab_size - rank_of(group) * M))]
    given, nan_or_1 = _real_targets(torch.where(live, targets, 0), vocab_size)

    def of_tokens(h_ND: Tensor, w_MD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        row_N, mine_N = _local_rows(targets_N, M, vocab_size, group)
        x_NM = linear(h_ND, w_MD)
        l_NM = soft_cap(x_NM.to(accumulator(x_NM.dtype)), softcap) / temperature
        most_N = _largest(l_NM.detach(), group)
        log_z_N = most_N + torch.log(leave(torch.exp(l_NM - most_N[:, None]).sum(-1), group))
        # enter: this rank's rows give log Z a share of its gradient only.
        log_p_NM = l_NM - enter(log_z_N, group)[:, None]
        sums = leave(torch.stack([_at(log_p_NM, row_N, mine_N), -(log_p_NM.exp() * log_p_NM).sum(-1)]), group)
        return sums[0], sums[1]

    hidden_ND, given_N = hidden.reshape(-1, hidden.shape[-1]), given.reshape(-1)
    if chunk is None:
        log_p, entropy = of_tokens(hidden_ND, real_MD, given_N)
    else:
        log_p, entropy = by_chunks(of_tokens, hidden_ND, real_MD, given_N, chunk)
    log_p, entropy = log_p.reshape(targets.shape) * nan_or_1, entropy.reshape(targets.shape)
    return torch.where(live, log_p, 0.0), torch.where(live, entropy, 0.0)


def _largest(x_NM: Tensor, group: Group) -> Tensor:
    """The largest logit of each token over all ranks; a rank that has only padding counts as -inf."""
    most = x_NM.amax(-1) if x_NM.shape[1] else x_NM.new_full((len(x_NM),), -torch.inf)
    if size_of(group) > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return most


def _real_targets(targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(targets, 1) for targets in 0..V-1; for others a ValueError on a CPU, and (0, NaN) where a check would wait.

    All ranks do the same: one that raised alone would leave the others waiting for its message.
    """
    real = (targets >= 0) & (targets < vocab_size)
    if at_hand(targets) and not bool(real.all()):
        first = int(targets[~real][0])
        raise ValueError(f"targets must be in 0..{vocab_size - 1} where weights are not 0, got {first}")
    return torch.where(real, targets, 0), torch.where(real, 1.0, torch.nan)


def _local_rows(ids: Tensor, M: int, vocab_size: int, group: Group) -> tuple[Tensor, Tensor]:
    """(row, whether this rank has it); row is 0 for ids of other ranks, and M, out of range, for ids outside 0..V-1."""
    row = ids - rank_of(group) * M
    real = (ids >= 0) & (ids < vocab_size)
    mine = real & (row >= 0) & (row < M)
    return torch.where(mine, row, torch.where(real, 0, M)), mine


class _TokenLosses(torch.autograd.Function):
    """Per token (loss, nll), and what backward needs: log Z, and the logits unless chunks are recomputed."""

    @staticmethod
    def forward(
        hidden_ND: Tensor, part_MD: Tensor, row_N: Tensor, mine_N: Tensor,
        softcap: float | None, z_loss: float, chunk: int | None, group: Group,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        log_z, at_target, kept = [], [], hidden_ND.new_empty(0)
        for h_ND, row, mine in _chunks(chunk, hidden_ND, row_N, mine_N):
            x_NM = linear(h_ND, part_MD)
            kept = x_NM if chunk is None else kept
            wide_NM = soft_cap(x_NM.to(accumulator(x_NM.dtype)), softcap)
            log_z.append(torch.logsumexp(wide_NM, -1))  # -inf on a rank that has only padding
            at_target.append(_at(wide_NM, row, mine))
        log_z_N, at_target_N = _over_ranks(torch.cat(log_z), torch.cat(at_target), group)
        nll = log_z_N - at_target_N
        return nll if z_loss == 0.0 else nll + z_loss * log_z_N.square(), nll.clone(), log_z_N, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        hidden_ND, part_MD, row_N, mine_N, ctx.softcap, ctx.z_loss, ctx.chunk, _ = inputs
        _, nll, log_z_N, kept = output
        ctx.mark_non_differentiable(nll, log_z_N, kept)
        ctx.save_for_backward(hidden_ND, part_MD, row_N, mine_N, log_z_N, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_N: Tensor, *_: Any) -> Any:
        hidden_ND, part_MD, row_N, mine_N, log_z_N, kept = ctx.saved_tensors
        need_hidden, need_part = ctx.needs_input_grad[:2]
        d_hidden: list[Tensor] = []
        d_part = part_MD.new_zeros(part_MD.shape, dtype=log_z_N.dtype) if need_part else None
        for h_ND, row, mine, log_z, dy in _chunks(ctx.chunk, hidden_ND, row_N, mine_N, log_z_N, dy_N):
            x_NM = kept if ctx.chunk is None else linear(h_ND, part_MD)
            capped_NM = soft_cap(x_NM.to(log_z_N.dtype), ctx.softcap)
            d_NM = torch.exp(capped_NM - log_z[:, None]) * (dy * (1.0 + 2.0 * ctx.z_loss * log_z))[:, None]
            if d_NM.shape[1]:
                d_NM.scatter_add_(1, row[:, None], torch.where(mine, -dy, 0.0)[:, None])
            if ctx.softcap is not None:
                d_NM *= 1.0 - (capped_NM / ctx.softcap).square()
            d_NM = d_NM.to(h_ND.dtype)
            if need_hidden:
                d_hidden.append(d_NM @ part_MD)
            if d_part is not None:
                d_part += d_NM.mT @ h_ND
        return (
            torch.cat(d_hidden) if need_hidden else None,
            None if d_part is None else d_part.to(part_MD.dtype),
            *(None,) * 6,
        )


def _chunks(chunk: int | None, *per_token: Tensor) -> Any:
    """The tensors' chunks of `chunk` tokens, zipped."""
    return zip(*(x.split(chunk or max(1, len(x))) for x in per_token), strict=True)


def _at(x_NM: Tensor, row_N: Tensor, mine_N: Tensor) -> Tensor:
    """x[row], 0 where another rank has the row."""
    if x_NM.shape[1] == 0:
        return x_NM.new_zeros(len(x_NM))
    return torch.where(mine_N, x_NM.gather(-1, row_N[:, None]).squeeze(-1), 0.0)


def _over_ranks(log_z_N: Tensor, at_target_N: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """log sum_r exp log_z_r, and sum_r at_target_r."""
    if size_of(group) == 1:
        return log_z_N, at_target_N
    most = log_z_N.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([torch.exp(log_z_N - most), at_target_N])
    dist.all_reduce(sums, group=group)
    return most + torch.log(sums[0]), sums[1]
