"""Cross-entropy of hidden states against an unembedding. Legend: N tokens, D d_model, V vocabulary."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from purelm.ops.cross_entropy import reduce_tokens, token_losses
from purelm.ops.linear import linear

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
) -> tuple[Float[Tensor, "*out"], Float[Tensor, "*out"]]:
    """`cross_entropy(hidden @ unembedding^T, targets, ...)`: the same arguments and the same two results.

    Args:
        chunk: tokens whose logits are held at a time. None holds all N x V of them. Otherwise each chunk's logits are
            formed again in backward (torch's checkpoint): a quarter more matrix products, memory of one chunk.
            Under torch.func transforms, where checkpoint does not exist, the result is the same and the saving is not.
    """
    if weights is not None:
        targets = torch.where(weights == 0, 0, targets)

    def losses(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        return token_losses(linear(h_ND, w_VD), targets_N, softcap, z_loss)

    if chunk is None:
        loss, nll = losses(hidden, unembedding_VD, targets)
    else:
        loss, nll = _by_chunks(losses, hidden, unembedding_VD, targets, chunk)
    return (
        reduce_tokens(loss, weights, denominator, reduction),
        reduce_tokens(nll, weights, denominator, reduction),
    )


def _by_chunks(
    losses: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    hidden: Tensor,
    unembedding_VD: Tensor,
    targets: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token or None, got {chunk}")
    if not torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        whole = losses

        def losses(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            # Nothing here is random, and saving the generator's state would read a global and wait for the device.
            return checkpoint(whole, h, w, t, use_reentrant=False, preserve_rng_state=False)

    h_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    parts = [
        losses(h, unembedding_VD, t)
        for h, t in zip(h_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    loss = torch.cat([p[0] for p in parts]).reshape(targets.shape)
    nll = torch.cat([p[1] for p in parts]).reshape(targets.shape)
    return loss, nll
