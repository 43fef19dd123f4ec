"""Cross-entropy of given logits: forward reads them once, backward reads and writes them once.

Legend: N tokens, V vocabulary. Per token, with l = softcap(x), c the cap:

    log Z = log sum_j exp(l_j)                                        (fp32, running maximum and sum)
    y     = log Z - l_target + z (log Z)^2
    dx_j  = dy ((1 + 2 z log Z) p_j - [j = target]) (1 - (l_j / c)^2)   p_j = exp(l_j - log Z)

Forward saves the logits and log Z (one number a token), and nothing else of size N x V. Weights, denominator and sum,
and their gradients, are plain torch on one number a token.

Online normaliser: Milakov and Gimelshein, arXiv:1805.02867. z: PaLM, arXiv:2204.02311, section 5.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.kernels.recipe import applier, backward_function
from purelm.ops.cross_entropy import check_z_loss, reduce_tokens, token_weights
from purelm.ops.cross_entropy import cross_entropy as reference
from purelm.ops.derivatives import in_forward_mode
from purelm.ops.precision import accumulator
from purelm.ops.softcap import check_softcap, soft_cap

__all__ = ["PLAIN", "Rows", "check_targets", "cross_entropy", "folded", "gradient_again", "rows_for"]


class Rows(NamedTuple):
    """The functions of a (N, V) block of logits; there is one set in Triton and one in plain torch.

    A token of weight 0 (a = b = e = 0 in `gradient`) is not read: its results are 0, whatever its logits and target.
    """

    # (logits, targets, weights | None, softcap, z_loss, temperature=1, entropy=False)
    # -> (loss, nll, log_z, entropy, which is empty unless asked for), per token and not multiplied by the weights
    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    # (logits, targets, log_z, a, b, softcap, temperature=1, e=None, entropy=None, out=None) -> out, where
    # out_j = (a p_j + b [j = target] - e p_j (log p_j + entropy)) dl_j/dx_j; out may be logits
    gradient: Callable[..., Tensor]
    # (logits, targets, weights | None, softcap, z_loss) -> (loss, nll); logits become the gradient of sum w loss
    loss_and_gradient_: Callable[..., tuple[Tensor, Tensor]]


def _scores(logits: Tensor, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor]:
    capped = soft_cap(logits.to(accumulator(logits.dtype)), softcap)
    return (capped if temperature == 1.0 else capped / temperature), capped


def _forward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    z_loss: float,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if weights is not None:
        dead = weights == 0
        targets = torch.where(dead, 0, targets)
    l, _ = _scores(logits, softcap, temperature)
    log_z = torch.logsumexp(l, -1)
    nll = log_z - l.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    loss = nll + z_loss * log_z.square() if z_loss else nll.clone()
    entropies = log_z.new_empty(0)
    if entropy:
        log_p = l - log_z.unsqueeze(-1)
        entropies = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
    if weights is not None:
        loss, nll, log_z = (torch.where(dead, 0.0, x) for x in (loss, nll, log_z))
        entropies = torch.where(dead, 0.0, entropies) if entropy else entropies
    return loss, nll, log_z, entropies


def _gradient(
    logits: Tensor,
    targets: Tensor,
    log_z: Tensor,
    a: Tensor,
    b: Tensor,
    softcap: float | None,
    temperature: float = 1.0,
    e: Tensor | None = None,
    entropy: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    live = (a != 0) | (b != 0) if e is None else (a != 0) | (b != 0) | (e != 0)
    l, capped = _scores(logits, softcap, temperature)
    log_p = l - log_z.unsqueeze(-1)
    p = log_p.exp()
    d = a.unsqueeze(-1) * p
    if e is not None and entropy is not None:
        d = d - torch.where(p == 0, 0.0, e.unsqueeze(-1) * p * (log_p + entropy.unsqueeze(-1)))
    d.scatter_add_(-1, torch.where(live, targets.long(), 0).unsqueeze(-1), b.to(d.dtype).unsqueeze(-1))
    d = d if temperature == 1.0 else d / temperature
    if softcap is not None:
        d = d * (1.0 - (capped / softcap).square())
    d = torch.where(live.unsqueeze(-1), d, 0.0)
    return d.to(logits.dtype) if out is None else out.copy_(d)


def gradient_again(
    logits: Tensor,
    targets: Tensor,
    log_z: Tensor,
    a: Tensor,
    b: Tensor,
    softcap: float | None,
    temperature: float = 1.0,
    e: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Tensor:
    """`Rows.gradient` in a form that can be differentiated: no writes, and tokens with a = b = 0 are not left out.

    A token of weight 0 has log_z 0 and any target. Its derivatives are later multiplied by 0, so they must be finite.
    """
    l, capped = _scores(logits, softcap, temperature)
    # Clamps tokens of weight 0 only: log_p of the others is at most 0, but for rounding.
    log_p = (l - log_z.unsqueeze(-1)).clamp(max=1.0)
    p = log_p.exp()
    d = a.unsqueeze(-1) * p
    if e is not None and entropy is not None:
        d = d - e.unsqueeze(-1) * p * (torch.where(p == 0, 0.0, log_p) + entropy.unsqueeze(-1))
    at = torch.where((targets >= 0) & (targets < logits.shape[-1]), targets.long(), 0)
    d = d.scatter_add(-1, at.unsqueeze(-1), b.to(d.dtype).unsqueeze(-1))
    d = d if temperature == 1.0 else d / temperature
    if softcap is not None:
        d = d * (1.0 - (capped / softcap).square())
    return d.to(logits.dtype)


def _loss_and_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    loss, nll, log_z, _ = _forward(logits, targets, weights, softcap, z_loss)
    w = torch.ones_like(log_z) if weights is None else weights.to(log_z.dtype)
    _gradient(logits, targets, log_z, w * (1.0 + 2.0 * z_loss * log_z), -w, softcap, out=logits)
    return loss, nll


PLAIN = Rows(_forward, _gradient, _loss_and_gradient_)


def rows_for(x: Tensor) -> Rows:
    """The `Rows` in Triton if x is on a GPU, else the ones in torch."""
    if not x.is_cuda:
        return PLAIN
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {x.dtype}: these kernels take float32, bfloat16 or float16; use purelm.ops for others")
    from purelm.kernels.cross_entropy_triton import TRITON

    return TRITON


def check_targets(targets: Tensor, weights: Tensor | None, batch: Sequence[int], device: torch.device) -> None:
    """ValueError unless both have the batch's shape and device, and targets are integers."""
    for name, x in (("targets", targets), ("weights", weights)):
        if x is None:
            continue
        if tuple(x.shape) != tuple(batch):
            raise ValueError(f"{name} must have the batch's shape {tuple(batch)}, got {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name} must be on {device} like the other tensors, got {x.device}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, got {targets.dtype}")


def folded(info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> list[Any]:
    """The arguments of a call under vmap, for one call on a larger batch: the mapped axis is folded into the first."""

    def fold(x: Any, d: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
        return x.reshape(-1, *x.shape[2:])

    return [fold(x, d) for x, d in zip(args, in_dims, strict=True)]


@torch.library.custom_op("purelm::cross_entropy_fwd", mutates_args=(), device_types="cuda")
def _fwd_op(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float | None, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    return rows_for(logits).forward(logits, targets, weights, softcap, z_loss)[:3]


@_fwd_op.register_kernel("cpu")
def _(logits, targets, weights, softcap, z_loss):
    return _forward(logits, targets, weights, softcap, z_loss)[:3]


@_fwd_op.register_fake
def _(logits, targets, weights, softcap, z_loss):
    per_token = logits.new_empty(logits.shape[0], dtype=accumulator(logits.dtype))
    return per_token, torch.empty_like(per_token), torch.empty_like(per_token)


@torch.library.custom_op("purelm::cross_entropy_bwd", mutates_args=(), device_types="cuda")
def _bwd_op(logits: Tensor, targets: Tensor, log_z: Tensor, a: Tensor, b: Tensor, softcap: float | None) -> Tensor:
    return rows_for(logits).gradient(logits, targets, log_z, a, b, softcap)


@_bwd_op.register_kernel("cpu")
def _(logits, targets, log_z, a, b, softcap):
    return _gradient(logits, targets, log_z, a, b, softcap)


@_bwd_op.register_fake
def _(logits, targets, log_z, a, b, softcap):
    return logits.new_empty(logits.shape)


def _bwd_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    return _bwd(*folded(info, in_dims, args)).unflatten(0, (info.batch_size, -1)), 0


_bwd = backward_function("cross_entropy", _bwd_op, _bwd_vmap, gradient_again)


class _CrossEntropy(torch.autograd.Function):
    """(logits_NV, targets_N, weights_N, softcap, z_loss) -> loss_N, nll_N, log_z_N.

    The loss is differentiable, and so is log_z: backward is a function of it, so second derivatives pass through it.
    """

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float | None, z_loss: float) -> Any:
        return _fwd_op(logits, targets, weights, softcap, z_loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, targets, _, ctx.softcap, ctx.z_loss = inputs
        ctx.save_for_backward(logits, targets, output[2])
        ctx.mark_non_differentiable(*(output[1:] if torch.compiler.is_compiling() else output[1:2]))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _nll: Any, g_log_z: Tensor | None) -> Any:
        logits, targets, log_z = ctx.saved_tensors
        if torch.compiler.is_compiling():
            g_log_z = None
        if g is None and g_log_z is None:
            return None, None, None, None, None
        g = torch.zeros_like(log_z) if g is None else g
        a = g * (1.0 + 2.0 * ctx.z_loss * log_z)
        a = a if g_log_z is None else a + g_log_z
        return _bwd(logits, targets, log_z, a, -g, ctx.softcap), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        found = _apply(*folded(info, in_dims, args))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0, 0, 0)


_apply = applier("cross_entropy", _CrossEntropy)


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
    """`purelm.ops.cross_entropy`: sum_i w_i (-log p_i[target_i] + z_loss (log Z_i)^2) / denominator; nats.

    Args:
        weights: 1 for each token when absent. Where the weight is 0 the token is not read, and its target may be
            anything. Elsewhere a target outside of 0..V-1 raises on a CPU; on a GPU, where a check would wait for the
            device, its loss and its gradient are NaN.
        reduction: "sum", "none" for the summands, or "mean": the sum divided by the sum of weights.
        ignore_index: tokens with this target get weight 0.
    Returns:
        (loss, nll): the loss, and the same without the z term, detached. Both fp32 (fp64 for fp64 logits, CPU only).

    >>> loss, nll = cross_entropy(torch.zeros(3, 8), torch.tensor([1, 2, 3]), reduction="mean")
    >>> loss  # log 8
    tensor(2.0794)
    """
    if logits.ndim < 1 or not logits.is_floating_point() or logits.shape[-1] < 1:
        raise ValueError(f"logits must be floating point, (*batch, V >= 1), got {logits.dtype} {tuple(logits.shape)}")
    check_softcap(softcap)
    check_z_loss(z_loss)
    batch = logits.shape[:-1]
    check_targets(targets, weights, batch, logits.device)
    if in_forward_mode(logits):
        return reference(
            logits, targets, weights=weights, denominator=denominator, reduction=reduction, softcap=softcap,
            z_loss=z_loss, ignore_index=ignore_index,
        )  # fmt: skip
    weights, denominator, reduction = token_weights(
        targets, weights, denominator, reduction, ignore_index, accumulator(logits.dtype)
    )
    loss, nll, _ = _apply(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        None if weights is None else weights.detach().reshape(-1),
        softcap,
        z_loss,
    )
    return (
        reduce_tokens(loss.reshape(batch), weights, denominator, reduction),
        reduce_tokens(nll.reshape(batch), weights, denominator, reduction).detach(),
    )
