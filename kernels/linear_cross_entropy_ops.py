"""The custom ops of linear_cross_entropy.py, which has the maths, and their autograd and vmap rules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from purelm.kernels import linear_cross_entropy_chunks as passes
from purelm.kernels.cross_entropy import folded, gradient_again, rows_for
from purelm.kernels.recipe import applier, backward_function
from purelm.ops.cross_entropy import token_losses
from purelm.ops.linear import linear
from purelm.ops.precision import accumulator

__all__ = ["apply_sum", "apply_tokens", "scaled"]


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that dW is kept in between forward and backward: fp32 for fp16, which lacks the range for it."""
    return torch.float32 if dtype == torch.float16 else dtype


# The ops. chunk=0 means the default size.


@torch.library.custom_op("purelm::linear_cross_entropy_sum", mutates_args=(), device_types=("cpu", "cuda"))
def _sum_op(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    z_loss: float,
    chunk: int,
    need_hidden: bool,
    need_unembedding: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return passes.losses_and_gradients(
        rows_for(hidden), hidden, unembedding, targets, weights, softcap, z_loss, chunk,
        _kept_dtype(unembedding.dtype), need_hidden, need_unembedding,
    )  # fmt: skip


@_sum_op.register_fake
def _(hidden, unembedding, targets, weights, softcap, z_loss, chunk, need_hidden, need_unembedding):
    per_token = hidden.new_empty(hidden.shape[0], dtype=accumulator(hidden.dtype))
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    shape, dtype = (unembedding.shape, _kept_dtype(unembedding.dtype)) if need_unembedding else ((0,), hidden.dtype)
    return per_token, torch.empty_like(per_token), d_hidden, unembedding.new_empty(shape, dtype=dtype)


@torch.library.custom_op("purelm::linear_cross_entropy_scale", mutates_args=(), device_types="cuda")
def _scale_op(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    from purelm.kernels.linear_cross_entropy_triton import scale

    return scale(x, factor, dtype)


@_scale_op.register_kernel("cpu")
def _scale_plain(x, factor, dtype):
    return (x.to(accumulator(x.dtype)) * factor).to(dtype, copy=True).contiguous()


@_scale_op.register_fake
def _(x, factor, dtype):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("purelm::linear_cross_entropy_tokens", mutates_args=(), device_types=("cpu", "cuda"))
def _tokens_op(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    z_loss: float,
    temperature: float,
    entropy: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = passes.losses(
        rows_for(hidden), hidden, unembedding, targets, weights, softcap, z_loss, temperature, entropy, chunk
    )
    return found[0], found[1], found[2], found[3]


@_tokens_op.register_fake
def _(hidden, unembedding, targets, weights, softcap, z_loss, temperature, entropy, chunk):
    per_token = hidden.new_empty(hidden.shape[0], dtype=accumulator(hidden.dtype))
    entropies = per_token.new_empty(per_token.shape if entropy else (0,))
    return per_token, torch.empty_like(per_token), torch.empty_like(per_token), entropies


@torch.library.custom_op("purelm::linear_cross_entropy_tokens_bwd", mutates_args=(), device_types=("cpu", "cuda"))
def _tokens_bwd_op(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    log_z: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor | None,
    entropy: Tensor | None,
    softcap: float | None,
    temperature: float,
    chunk: int,
    need_hidden: bool,
    need_unembedding: bool,
) -> tuple[Tensor, Tensor]:
    return passes.gradients_again(
        rows_for(hidden), hidden, unembedding, targets, log_z, a, b, e, entropy, softcap, temperature, chunk,
        need_hidden, need_unembedding,
    )  # fmt: skip


@_tokens_bwd_op.register_fake
def _(hidden, unembedding, targets, log_z, a, b, e, entropy, softcap, t, chunk, need_hidden, need_unembedding):
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    return d_hidden, unembedding.new_empty(unembedding.shape if need_unembedding else (0,))


# Autograd and vmap.


def _one_by_one(call: Callable[..., Any], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """A call under vmap as a loop over samples, for calls in which each has its own W, or its own gradient of W."""
    found = [
        call(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])


def _scale_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _one_by_one(scaled, info, in_dims, args)


def _tokens_bwd_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _one_by_one(_tokens_bwd, info, in_dims, args)


def _scale_without_anchor(x: Tensor, factor: Tensor, dtype: torch.dtype, anchor: Tensor) -> Tensor:
    return _scale_op(x, factor, dtype)


def _scale_again(x: Tensor, factor: Tensor, dtype: torch.dtype, anchor: Tensor) -> Tensor:
    return _scale_plain(x, factor, dtype)


def _tokens_bwd_again(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, log_z: Tensor, a: Tensor, b: Tensor, e: Tensor | None,
    entropy: Tensor | None, softcap: float | None, temperature: float, chunk: int, need_hidden: bool,
    need_unembedding: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`_tokens_bwd_op` in torch code that can be differentiated, all logits at once."""
    d_NV = gradient_again(linear(hidden, unembedding), targets, log_z, a, b, softcap, temperature, e, entropy)
    wide = accumulator(d_NV.dtype)
    d_hidden = d_NV @ unembedding if need_hidden else hidden.new_empty(0)
    if not need_unembedding:
        return d_hidden, unembedding.new_empty(0)
    return d_hidden, (d_NV.to(wide).mT @ hidden.to(wide)).to(unembedding.dtype)


scaled = backward_function("linear_cross_entropy", _scale_without_anchor, _scale_vmap, _scale_again)
_tokens_bwd = backward_function("linear_cross_entropy", _tokens_bwd_op, _tokens_bwd_vmap, _tokens_bwd_again)


class _Sum(torch.autograd.Function):
    """(anchor, arguments of the op) -> sum_i w_i y_i, and the op's results, which backward needs (except nll).

    Backward uses neither hidden nor unembedding, so autograd would not know that its results depend on them, and would
    silently leave out a second derivative. So backward is given the anchor, an empty tensor that depends on both in
    autograd's graph; saving the two themselves would keep hidden's memory alive. On a CPU, where second derivatives
    exist, the two are saved: there the loss of each token and the two gradients are differentiable outputs, which
    `_second` differentiates.
    """

    @staticmethod
    def forward(
        anchor: Tensor,
        hidden: Tensor,
        unembedding: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        softcap: float | None,
        z_loss: float,
        chunk: int,
        need_hidden: bool,
        need_unembedding: bool,
    ) -> Any:
        loss, nll, d_hidden, d_unembedding = _sum_op(
            hidden, unembedding, targets, weights, softcap, z_loss, chunk, need_hidden, need_unembedding
        )
        total = (loss if weights is None else weights * loss).sum()  # loss is 0 where the weight is
        return total, loss, nll, d_hidden, d_unembedding

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        anchor, hidden, unembedding, targets, weights, *numbers = inputs
        _, loss, nll, d_hidden, d_unembedding = output
        ctx.dtypes = hidden.dtype, unembedding.dtype
        ctx.weighted = weights is not None
        ctx.twice = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
        ctx.set_materialize_grads(False)
        if ctx.twice:
            ctx.numbers = numbers
            ctx.save_for_backward(d_hidden, d_unembedding, loss, anchor, hidden, unembedding, targets, weights)
            ctx.mark_non_differentiable(nll)
        else:
            ctx.save_for_backward(d_hidden, d_unembedding, loss, anchor)
            ctx.mark_non_differentiable(loss, nll, d_hidden, d_unembedding)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_loss: Any, _nll: Any, g_hidden: Any, g_unembedding: Any) -> Any:
        none = (None,) * 10
        d_hidden, d_unembedding, loss, anchor, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad
        found: list[Any] = [None, None, None]  # gradients of hidden, unembedding, weights
        if g is not None:
            found = [
                scaled(d_hidden, g, ctx.dtypes[0], anchor) if needs[1] else None,
                scaled(d_unembedding, g, ctx.dtypes[1], anchor) if needs[2] else None,
                scaled(loss, g, loss.dtype, anchor) if needs[4] and ctx.weighted else None,
            ]
        if ctx.twice and not (g_loss is None and g_hidden is None and g_unembedding is None):
            second = _second(inputs, ctx.numbers, (g_loss, g_hidden, g_unembedding), (loss, d_hidden, d_unembedding))
            found = [y if x is None else x if y is None else x + y for x, y in zip(found, second, strict=True)]
        return None, found[0], found[1], None, found[2], *none[5:]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _one_by_one(apply_sum, info, in_dims, args)


def _second(
    inputs: Sequence[Any], numbers: Sequence[Any], grads: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of hidden, unembedding and weights, from those of (loss of each token, d_hidden, d_unembedding)."""
    hidden, unembedding, targets, weights = inputs
    softcap, z_loss, _, need_hidden, need_unembedding = numbers
    dead = torch.zeros_like(targets, dtype=torch.bool) if weights is None else weights == 0
    targets = torch.where(dead, 0, targets)

    def results(h: Tensor, w: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        def total(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            loss = torch.where(dead, 0.0, token_losses(linear(h, w), targets, softcap, z_loss)[0])
            return (loss if s is None else s * loss).sum(), loss

        (d_h, d_w), loss = torch.func.grad(total, (0, 1), has_aux=True)(h, w)
        # The op returns an empty tensor for a gradient that is not needed.
        d_h, d_w = d_h if need_hidden else h.new_empty(0), d_w if need_unembedding else w.new_empty(0)
        return loss, d_h.to(outputs[1].dtype), d_w.to(outputs[2].dtype)

    pull: Any = torch.func.vjp(results, hidden, unembedding, *([] if weights is None else [weights]))[1]
    found = pull(tuple(torch.zeros_like(y) if g is None else g for g, y in zip(grads, outputs, strict=True)))
    return [*found, None] if weights is None else list(found)


class _Tokens(torch.autograd.Function):
    """Arguments of the op -> its results, of which the loss and the entropy (where asked for) are differentiable.

    log_z is differentiable too: backward is a function of it, so second derivatives pass through it.
    """

    @staticmethod
    def forward(  # no *rest: dynamo (2.13) tells the two forms of Function apart by the number of parameters
        hidden: Tensor,
        unembedding: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        softcap: float | None,
        z_loss: float,
        temperature: float,
        entropy: bool,
        chunk: int,
    ) -> Any:
        return _tokens_op(hidden, unembedding, targets, weights, softcap, z_loss, temperature, entropy, chunk)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, unembedding, targets, _, ctx.softcap, ctx.z_loss, ctx.temperature, ctx.entropy, ctx.chunk = inputs
        _, nll, log_z, entropies = output
        ctx.save_for_backward(hidden, unembedding, targets, log_z, entropies)
        constant = [nll] if ctx.entropy else [nll, entropies]
        ctx.mark_non_differentiable(*constant, *([log_z] if torch.compiler.is_compiling() else []))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _nll: Any, g_log_z: Tensor | None, g_entropy: Tensor | None) -> Any:
        none = (None,) * 9
        hidden, unembedding, targets, log_z, entropies = ctx.saved_tensors
        e = g_entropy if ctx.entropy else None
        if torch.compiler.is_compiling():
            g_log_z = None
        if g is None and e is None and g_log_z is None:
            return none
        g = torch.zeros_like(log_z) if g is None else g
        a = g * (1.0 + 2.0 * ctx.z_loss * log_z)
        a = a if g_log_z is None else a + g_log_z
        needs = ctx.needs_input_grad
        d_hidden, d_unembedding = _tokens_bwd(
            hidden, unembedding, targets, log_z, a, -g, e,
            None if e is None else entropies, ctx.softcap, ctx.temperature, ctx.chunk, needs[0], needs[1],
        )  # fmt: skip
        return d_hidden if needs[0] else None, d_unembedding if needs[1] else None, *none[2:]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if in_dims[1] is not None:
            return _one_by_one(apply_tokens, info, in_dims, args)
        hidden, targets, weights = folded(info, (in_dims[0], *in_dims[2:4]), (args[0], *args[2:4]))
        found = apply_tokens(hidden, args[1], targets, weights, *args[4:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0,) * 4


apply_sum, apply_tokens = (applier("linear_cross_entropy", function) for function in (_Sum, _Tokens))
