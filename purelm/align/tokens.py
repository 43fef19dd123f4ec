"""What the functions of policies' log-probabilities share: masking, sums of rows, shares.

Legend: B sequences, T positions of targets, as in purelm.align.responses. A token counts where its mask is not 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "like_tokens",
    "log_ratio_and_advantages",
    "mean",
    "ratio_of",
    "region_aux",
    "row_count",
    "row_sum",
    "same_shape",
    "share",
    "unmasked",
]

# exp of this is finite in fp32, which ends at e^88.7, and so is its product with an advantage of up to 1000.
LARGEST_LOG_RATIO = 80.0


def unmasked(x: Float[Tensor, "*b t"], mask_BT: Tensor) -> Float[Tensor, "*b t"]:
    """x where the mask is not 0, else 0, in fp32 or wider: what is masked, even nan, has no influence and gradient 0.

    >>> unmasked(torch.tensor([1.0, float("nan")]), torch.tensor([1, 0]))
    tensor([1., 0.])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask_BT == 0, torch.zeros((), dtype=wide.dtype, device=wide.device), wide)


def same_shape(mask_BT: Tensor, **others: Tensor) -> None:
    """ValueError unless each tensor, named by its keyword, is floating and of the mask's shape."""
    for name, x in others.items():
        if x.shape != mask_BT.shape:
            raise ValueError(f"{name} must have the mask's shape {tuple(mask_BT.shape)}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating, got {x.dtype}")
    if mask_BT.ndim < 1:
        raise ValueError("the mask must have an axis of tokens, got a number")


def like_tokens(advantages: Tensor, mask_BT: Tensor) -> Float[Tensor, "*b t"]:
    """Advantages per token: detached, 0 where masked; of (B, 1), (B, T) or one number.

    Not of (B,): where B equals T, that would be taken for an advantage per position.
    """
    shape, wanted = tuple(advantages.shape), tuple(mask_BT.shape)
    fits = len(shape) == len(wanted) and all(a in (1, b) for a, b in zip(shape, wanted, strict=True))
    if shape and not fits:
        one = (*wanted[:-1], 1)
        raise ValueError(f"advantages must have the shape {one}, one a sequence, or {wanted}, one a token, got {shape}")
    return unmasked(advantages.detach().expand(wanted), mask_BT)


def log_ratio_and_advantages(
    log_probs_BT: Tensor, log_ratio_BT: Tensor, advantages: Tensor, mask_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """A region's log w and A per token, both 0 where masked, after a look at all shapes."""
    same_shape(mask_BT, log_probs=log_probs_BT, log_ratio=log_ratio_BT)
    return unmasked(log_ratio_BT, mask_BT), like_tokens(advantages, mask_BT)


def ratio_of(log_ratio_BT: Float[Tensor, "*b t"]) -> Float[Tensor, "*b t"]:
    """w = exp(log w), finite: above log w = 80 it is e^80, with gradient 0."""
    return log_ratio_BT.clamp(max=LARGEST_LOG_RATIO).exp()


def row_count(mask_BT: Tensor, dtype: torch.dtype) -> Float[Tensor, "*b 1"]:
    """Tokens of each row that count, at least 1: what a row's sum is divided by."""
    return (mask_BT != 0).to(dtype).sum(-1, keepdim=True).clamp(min=1.0)


def row_sum(x_BT: Float[Tensor, "*b t"], mask_BT: Tensor) -> Float[Tensor, "*b t"]:
    """Each row's sum over tokens that count, at each of them; 0 at the others."""
    return unmasked(unmasked(x_BT, mask_BT).sum(-1, keepdim=True).expand_as(x_BT), mask_BT)


def mean(x_BT: Float[Tensor, "*b t"], mask_BT: Tensor) -> Float[Tensor, ""]:
    """Mean over all tokens that count, detached; 0 of none."""
    count = (mask_BT != 0).sum().clamp(min=1)
    return unmasked(x_BT.detach(), mask_BT).sum() / count


def share(condition_BT: Tensor, mask_BT: Tensor) -> Float[Tensor, ""]:
    """Share of the tokens that count for which the condition holds, detached; 0 of none."""
    return mean(condition_BT.to(torch.float32), mask_BT)


def region_aux(ratio_BT: Tensor, below_BT: Tensor, above_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """What every region reports: shares held back from below and from above, and the mean ratio."""
    return {
        "clipped_low": share(below_BT, mask_BT),
        "clipped_high": share(above_BT, mask_BT),
        "ratio_mean": mean(ratio_BT, mask_BT),
    }
