"""Cross-entropy of hidden states against an unembedding, whose logits are never held whole.

Legend: N tokens, D d_model, V vocabulary. With x the logits h W^T of a chunk of tokens, computed in the dtype of h and
W, and y_i and dx_i of kernels.cross_entropy:

    y  = sum_i w_i y_i
    dh = dx W            dW = sum over chunks dx^T h   (held in fp32)

Three ways, by what is asked for:
- "sum" and "mean", differentiated: gradients in forward. Each chunk's logits are overwritten by dx, and dh and dW are
  formed at once; backward multiplies them by the upstream scalar. 6 N V D FLOPs, as with materialised logits.
  Under `remat` all of it is done twice, so leave the loss out of it.
- nothing differentiated (no_grad, or neither h nor W requires it): losses alone, 2 N V D FLOPs.
- "none" and `log_probs_and_entropy`, where the upstream gradient is a vector: log Z of each token is saved, and
  backward recomputes the logits, 8 N V D FLOPs.

Per token, with l = cap(x) / T, p = softmax(l), t the target:

    log p_t        d/dl_j = [j = t] - p_j
    H = -sum p log p     d/dl_j = -p_j (log p_j + H)

Memory besides inputs and gradients: a chunk's logits (512 MiB or 2048 tokens, see `chunk`), and half of dW in fp32. For
fp16, whose range is small, dW is kept in fp32 until backward multiplies dh and dW by the upstream scalar (with the
denominator and a loss scale in it).

Gradients in forward: Liger-Kernel, arXiv:2410.10989, section 3.2. Recomputation: Cut Cross-Entropy, arXiv:2411.09009.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.kernels.cross_entropy import check_targets
from purelm.kernels.linear_cross_entropy_ops import apply_sum, apply_tokens, scaled
from purelm.ops.cross_entropy import check_z_loss, reduce_tokens, token_weights
from purelm.ops.derivatives import in_forward_mode
from purelm.ops.linear_cross_entropy import linear_cross_entropy as reference
from purelm.ops.log_probs import log_probs
from purelm.ops.precision import accumulator
from purelm.ops.softcap import check_positive, check_softcap

__all__ = ["linear_cross_entropy", "linear_cross_entropy_value_and_grad", "log_probs_and_entropy"]


def _anchor(hidden_ND: Tensor, unembedding: Tensor) -> Tensor:
    """An empty tensor that depends on both in autograd's graph; a copy, so it keeps neither's memory alive."""
    return torch.cat([hidden_ND[:0], unembedding[:0]])


def _differentiated(x: Tensor) -> bool:
    """Whether a gradient of x may be asked for: by autograd, or by any of the torch.func transforms around the call."""
    if not torch.is_grad_enabled():
        return False
    if not torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        return x.requires_grad
    if torch.compiler.is_compiling():
        return True
    while not x.requires_grad:
        if not (torch._C._functorch.is_gradtrackingtensor(x) or torch._C._functorch.is_batchedtensor(x)):  # type: ignore[attr-defined]
            return False
        x = torch._C._functorch.get_unwrapped(x)  # type: ignore[attr-defined]
    return True


def _checked(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    chunk: int | None,
    softcap: float | None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, int]:
    """(hidden_ND, targets_N, chunk or 0), or ValueError."""
    check_softcap(softcap)
    check_z_loss(z_loss)
    if unembedding.ndim != 2 or unembedding.shape[0] < 1:
        raise ValueError(f"unembedding must be (V >= 1, D), got {tuple(unembedding.shape)}")
    if hidden.ndim < 1 or hidden.shape[-1] != unembedding.shape[1]:
        raise ValueError(f"hidden must be (*batch, {unembedding.shape[1]}), got {tuple(hidden.shape)}")
    if hidden.dtype != unembedding.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and unembedding must have one float dtype, got {hidden.dtype}, {unembedding.dtype}")
    if hidden.device != unembedding.device:
        raise ValueError(f"unembedding must be on {hidden.device} like hidden, got {unembedding.device}")
    check_targets(targets, weights, hidden.shape[:-1], hidden.device)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token or None, got {chunk}")
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), chunk or 0


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
    """`purelm.ops.linear_cross_entropy`: equal to `purelm.kernels.cross_entropy(hidden @ unembedding^T, ...)`.

    The same arguments and the same two results (loss, nll). Gradients are computed in forward where they are needed
    (top of this file); not under no_grad, and not if neither hidden nor unembedding is differentiated.

    Args:
        chunk: tokens whose logits are held at a time; None for 512 MiB of logits, but no less than 2048 tokens.
        reduction, ignore_index, and targets outside of 0..V-1: as in `purelm.kernels.cross_entropy`.

    >>> loss, nll = linear_cross_entropy(torch.zeros(3, 4), torch.ones(8, 4), torch.tensor([1, 2, 3]), denominator=3.0)
    >>> loss  # log 8
    tensor(2.0794)
    """
    hidden_ND, targets_N, n = _checked(hidden, unembedding_VD, targets, weights, chunk, softcap, z_loss)
    if in_forward_mode(hidden):
        return reference(
            hidden, unembedding_VD, targets, weights=weights, denominator=denominator, reduction=reduction,
            softcap=softcap, z_loss=z_loss, chunk=chunk, ignore_index=ignore_index,
        )  # fmt: skip
    weights, denominator, reduction = token_weights(
        targets, weights, denominator, reduction, ignore_index, accumulator(hidden.dtype)
    )
    weights_N = None if weights is None else weights.reshape(-1)
    need_hidden, need_unembedding = _differentiated(hidden), _differentiated(unembedding_VD)
    if reduction == "sum" and (need_hidden or need_unembedding):
        loss, _, nll, _, _ = apply_sum(
            _anchor(hidden_ND, unembedding_VD), hidden_ND, unembedding_VD, targets_N, weights_N, softcap, z_loss, n,
            need_hidden, need_unembedding,
        )  # fmt: skip
        loss = loss if denominator is None else loss / denominator
        return loss, reduce_tokens(nll, weights_N, denominator, reduction).detach()
    loss, nll, _, _ = apply_tokens(
        hidden_ND, unembedding_VD, targets_N, None if weights_N is None else weights_N.detach(), softcap, z_loss, 1.0,
        False, n,
    )  # fmt: skip
    batch = targets.shape
    return (
        reduce_tokens(loss.reshape(batch), weights, denominator, reduction),
        reduce_tokens(nll.reshape(batch), weights, denominator, reduction).detach(),
    )


def linear_cross_entropy_value_and_grad(
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
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "*batch d"], Float[Tensor, "v d"]]:
    """(loss, nll, d loss / d hidden, d loss / d unembedding) of `linear_cross_entropy`, in one call without autograd.

    For steps that are written out by hand; none of the four can be differentiated further. reduction is "sum" or
    "mean".
    """
    if reduction == "none":
        raise ValueError('reduction must be "sum" or "mean" for a gradient, got "none"')
    hidden_ND, targets_N, chunk = _checked(hidden, unembedding_VD, targets, weights, chunk, softcap, z_loss)
    weights, denominator, reduction = token_weights(
        targets, weights, denominator, reduction, ignore_index, accumulator(hidden.dtype)
    )
    weights_N = None if weights is None else weights.reshape(-1)
    with torch.no_grad():
        anchor = _anchor(hidden_ND, unembedding_VD)
        loss, _, nll, d_hidden, d_unembedding = apply_sum(
            anchor, hidden_ND, unembedding_VD, targets_N, weights_N, softcap, z_loss, chunk, True, True
        )
        factor = torch.ones_like(loss) if denominator is None else torch.ones_like(loss) / denominator
        return (
            loss * factor,
            reduce_tokens(nll, weights_N, denominator, reduction),
            scaled(d_hidden, factor, hidden.dtype, anchor).reshape(hidden.shape),
            scaled(d_unembedding, factor, hidden.dtype, anchor),
        )


def log_probs_and_entropy(
    hidden: Float[Tensor, "*batch d"],
    unembedding_VD: Float[Tensor, "v d"],
    targets: Int[Tensor, "*batch"],
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    ignore_index: int | None = None,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """`purelm.ops.log_probs.log_probs`: (log p_i[target_i], H(p_i)) per token; nats, fp32.

    p = softmax(cap(hidden @ unembedding^T) / temperature). Both are differentiable; backward recomputes the logits.
    Both are 0 for a token whose target is ignore_index.

    Args:
        chunk: tokens whose logits are held at a time; None for 512 MiB of logits, but no less than 2048 tokens.
    """
    hidden_ND, targets_N, n = _checked(hidden, unembedding_VD, targets, None, chunk, softcap)
    check_positive("temperature", temperature)
    if in_forward_mode(hidden):
        return log_probs(
            hidden, unembedding_VD, targets, softcap=softcap, temperature=temperature, chunk=chunk,
            ignore_index=ignore_index,
        )  # fmt: skip
    wide = accumulator(hidden.dtype)
    live = None if ignore_index is None else (targets_N != ignore_index).to(wide)
    loss, _, _, entropy = apply_tokens(
        hidden_ND, unembedding_VD, targets_N, live, softcap, 0.0, temperature, True, n
    )
    log_prob = -loss
    if live is not None:  # these tokens get no gradient either
        log_prob, entropy = (torch.where(live == 0, 0.0, x) for x in (log_prob, entropy))
    return log_prob.reshape(targets.shape), entropy.reshape(targets.shape)
