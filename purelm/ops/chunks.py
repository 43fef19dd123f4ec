"""A function of each token's logits, by chunks of tokens. Legend: N tokens, D d_model, V vocabulary."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["by_chunks"]


def by_chunks(
    f: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    hidden: Float[Tensor, "*batch d"],
    unembedding_VD: Float[Tensor, "v d"],
    targets: Int[Tensor, "*batch"],
    chunk: int,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """f(hidden_ND, unembedding_VD, targets_N) -> two numbers a token, called on `chunk` tokens at a time.

    Each call is computed again in backward (torch's checkpoint), so that what one chunk needs is held and not more.
    Under torch.func transforms, where checkpoint does not exist, the result is the same and the saving is not.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token or None, got {chunk}")
    if not torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        whole = f

        def f(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            # Nothing here is random, and saving the generator's state would read a global and wait for the device.
            return checkpoint(whole, h, w, t, use_reentrant=False, preserve_rng_state=False)

    h_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    parts = [f(h, unembedding_VD, t) for h, t in zip(h_ND.split(chunk), targets_N.split(chunk), strict=True)]
    first, second = (torch.cat(xs).reshape(targets.shape) for xs in zip(*parts, strict=True))
    return first, second
