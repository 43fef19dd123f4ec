"""Cross-entropy of hidden states against an unembedding. Legend: N tokens, D d_model, V vocabulary."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.ops.chunks import by_chunks
from purelm.ops.cross_entropy import reduce_tokens, token_losses, token_weights
from purelm.ops.linear import linear
from purelm.ops.precision import accumulator

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Float[Tensor, "*batch d"],
    unembedding_VD: Float[Tensor, "v d"],
    targets: Int[Tensor, "*batch"],
    *,
    weights: Float[Tensor, "*batch"] | None = None,
    denominator: Float[Tensor, ""] | float | None = None,
    reduction: str = "sum",
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    ignore_index: int | None = None,
) -> tuple[Float[Tensor, "*out"], Float[Tensor, "*out"]]:
    """`cross_entropy(hidden @ unembedding^T, targets, ...)`: the same arguments and the same two results.

    Args:
        chunk: tokens whose logits are held at a time. None holds all N x V of them. Otherwise each chunk's logits are
            formed again in backward (torch's checkpoint): a quarter more matrix products, memory of one chunk.
            Under torch.func transforms, where checkpoint does not exist, the result is the same and the saving is not.
    """
    if ignore_index is not None or reduction not in ("none", "sum"):
        weights, denominator, reduction = token_weights(
            targets, weights, denominator, reduction, ignore_index, accumulator(hidden.dtype)
        )
    if weights is not None:
        targets = torch.where(weights == 0, 0, targets)

    def losses(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        return token_losses(linear(h_ND, w_VD), targets_N, softcap, z_loss)

    if chunk is None:
        loss, nll = losses(hidden, unembedding_VD, targets)
    else:
        loss, nll = by_chunks(losses, hidden, unembedding_VD, targets, chunk)
    return (
        reduce_tokens(loss, weights, denominator, reduction),
        reduce_tokens(nll, weights, denominator, reduction),
    )
