"""Cross-entropy of given logits. Legend: V vocabulary."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.ops.precision import accumulator
from purelm.ops.softcap import soft_cap

__all__ = [
    "check_z_loss",
    "cross_entropy",
    "mean_cross_entropy",
    "nonzero",
    "reduce_tokens",
    "token_losses",
    "token_weights",
]


def check_z_loss(z_loss: float) -> None:
    """ValueError unless the coefficient is finite and not negative: a negative one rewards a log Z without bound."""
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")


def nonzero(denominator: Float[Tensor, ""] | float) -> Float[Tensor, ""] | float:
    """The denominator, or 1 where it is 0: so the mean over no token is 0 / 1, and its gradient 0, instead of NaN.

    >>> nonzero(torch.tensor(0.0)), nonzero(3.0)
    (tensor(1.), 3.0)
    """
    if isinstance(denominator, Tensor):
        return torch.where(denominator == 0, 1.0, denominator)
    return 1.0 if denominator == 0 else denominator


def token_losses(
    logits: Float[Tensor, "*batch v"], targets: Int[Tensor, "*batch"], softcap: float | None, z_loss: float
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Per token: nll + z_loss log(Z)^2, and the detached nll alone. Computed and returned in fp32.

    A target outside of 0..V-1 raises in eager code (on a GPU as a device-side assertion); in compiled code, which
    cannot raise, its loss and its gradient are NaN.
    """
    check_z_loss(z_loss)
    wide = soft_cap(logits.to(accumulator(logits.dtype)), softcap)
    # logsumexp keeps only its input for backward; exp, sum and log written one by one would keep a second (.., V).
    log_z = torch.logsumexp(wide, -1)
    nll = log_z - _at_targets(wide, targets)
    loss = nll if z_loss == 0.0 else nll + z_loss * log_z.square()
    if torch.compiler.is_compiling():
        # A factor of 1, or NaN for a bad target. As a factor it reaches the gradient too.
        real = torch.where((targets >= 0) & (targets < logits.shape[-1]), 1.0, torch.nan).to(loss.dtype)
        loss, nll = loss * real, nll * real
    return loss, nll.detach()


def _at_targets(logits: Float[Tensor, "*batch v"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """logits[..., targets].

    Gather's backward fills a (.., V) of zeros and scatters into it. Compiled code does without: a comparison with the
    index is fused into the passes that logsumexp makes anyway, forward and backward.
    """
    if not torch.compiler.is_compiling():
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    index_V = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(index_V == targets.unsqueeze(-1), logits, 0.0).sum(-1)


def reduce_tokens(
    loss: Float[Tensor, "*batch"],
    weights: Float[Tensor, "*batch"] | None,
    denominator: Float[Tensor, ""] | float | None,
    reduction: str,
) -> Float[Tensor, "*batch"] | Float[Tensor, ""]:
    """weights * loss / denominator, summed when reduction is "sum"; a token of weight 0 adds 0, whatever its loss.

    A denominator of 0 counts as 1: a batch without targets has the loss 0.
    """
    if reduction not in ("none", "sum"):
        raise ValueError(f'reduction must be "none" or "sum", got {reduction!r}')
    if weights is not None:
        loss = torch.where(weights == 0, 0.0, loss * weights)
    if reduction == "sum":
        loss = loss.sum()
    return loss if denominator is None else loss / nonzero(denominator)


def token_weights(
    targets: Int[Tensor, "*batch"],
    weights: Float[Tensor, "*batch"] | None,
    denominator: Float[Tensor, ""] | float | None,
    reduction: str,
    ignore_index: int | None,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "*batch"] | None, Float[Tensor, ""] | float | None, str]:
    """(weights, denominator, reduction) that say the same without ignore_index and without "mean".

    ignore_index becomes weights of 0, and "mean" a "sum" divided by the sum of the weights; the mean over no token at
    all is 0, as in the models' loss. Nothing waits for the device.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f'reduction must be "none", "sum" or "mean", got {reduction!r}')
    if weights is not None:
        weights = weights.to(dtype)
    if ignore_index is not None:
        weights = torch.where(targets == ignore_index, 0.0, 1.0 if weights is None else weights).to(dtype)
    if reduction == "mean":
        if denominator is not None:
            raise ValueError(f'denominator must be None with reduction="mean", got {denominator!r}')
        denominator = float(max(targets.numel(), 1)) if weights is None else weights.sum()
        reduction = "sum"
    denominator = None if denominator is None else nonzero(denominator)
    return weights, denominator, reduction


def cross_entropy(
    logits: Float[Tensor, "*batch v"],
    targets: Int[Tensor, "*batch"],
    *,
    weights: Float[Tensor, "*batch"] | None = None,
    denominator: Float[Tensor, ""] | float | None = None,
    reduction: str = "sum",
    softcap: float | None = None,
    z_loss: float = 0.0,
    ignore_index: int | None = None,
) -> tuple[Float[Tensor, "*out"], Float[Tensor, "*out"]]:
    """sum_i w_i (-log p_i[target_i] + z_loss (log Z_i)^2) / denominator, p = softmax(logits), Z its normaliser; nats.

    Args:
        weights: 1 for each token when absent. Where the weight is 0 the target may be anything (-100 say).
        denominator: what the sum is divided by, 1 when absent or 0. A mean over any split into microbatches or ranks
            is right when each part divides by the whole's count.
        reduction: "sum", "none" for the summands, or "mean": the sum divided by the sum of weights, 0 over no token.
        softcap: bounds the logits first, as `purelm.ops.softcap`.
        z_loss: coefficient that keeps log Z near 0 (PaLM, arXiv:2204.02311, section 5: 1e-4).
        ignore_index: tokens with this target get weight 0.
    Returns:
        (loss, nll): the loss, and the same without the z term, detached. Both fp32 (fp64 for fp64 logits).

    A target outside of 0..V-1 is an index error in eager code (on a GPU a device-side assertion), and compiled a loss
    and a gradient of NaN.

    >>> loss, nll = cross_entropy(torch.zeros(3, 8), torch.tensor([1, 2, 3]), denominator=3.0)
    >>> loss  # log 8
    tensor(2.0794)
    """
    if ignore_index is not None or reduction not in ("none", "sum"):
        weights, denominator, reduction = token_weights(
            targets, weights, denominator, reduction, ignore_index, accumulator(logits.dtype)
        )
    if weights is not None:
        targets = torch.where(weights == 0, 0, targets)
    loss, nll = token_losses(logits, targets, softcap, z_loss)
    return (
        reduce_tokens(loss, weights, denominator, reduction),
        reduce_tokens(nll, weights, denominator, reduction),
    )


def mean_cross_entropy(
    logits: Float[Tensor, "*batch v"],
    targets: Int[Tensor, "*batch"],
    *,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """The mean of -log softmax(logits)[target] over the tokens whose target is not ignore_index: one tensor, in nats.

    PyTorch's F.cross_entropy(logits, targets), with its default for ignore_index; but the vocabulary is the last axis,
    16-bit logits give an fp32 loss, and the mean over no token is 0 and not NaN. softcap and z_loss are as in
    `cross_entropy`. The means of parts of a batch do not add up to that of the batch: there give `cross_entropy` the
    whole's denominator.

    >>> mean_cross_entropy(torch.zeros(3, 8), torch.tensor([1, 2, -100]))  # log 8
    tensor(2.0794)
    """
    return cross_entropy(
        logits, targets, reduction="mean", ignore_index=ignore_index, softcap=softcap, z_loss=z_loss
    )[0]
