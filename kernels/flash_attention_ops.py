"""The custom ops of flash attention, and their autograd and vmap rules. The maths is in flash_attention.py."""

from typing import Any

import torch
from torch import Tensor

from purelm.kernels.flash_attention_reference import tiled_backward, tiled_forward
from purelm.kernels.recipe import applier, backward_function, eager_or_op
from purelm.ops.precision import accumulator

__all__ = ["Tiled", "apply_flash", "backward", "plain_forward"]


# --- custom ops


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor | None, kv_ids: Tensor | None, sinks: Tensor | None,
    bias: Tensor | None, mask: Tensor | None, left: int | None, right: int | None, scale: float, softcap: float | None,
    precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from purelm.kernels import flash_attention_launch as kernels

    request = kernels.Request(left, right, scale, softcap, precision)
    return kernels.forward(q, k, v, _pair(q_ids, kv_ids), sinks, request, bias=bias, mask=mask)


_forward_op = torch.library.custom_op(
    "purelm::flash_attention_fwd", _forward_cuda, mutates_args=(), device_types="cuda"
)
_forward = eager_or_op(_forward_op, _forward_cuda)


@_forward_op.register_kernel("cpu")
def _(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap, precision):
    return tiled_forward(q, k, v, _pair(q_ids, kv_ids), sinks, left, right, scale, softcap, bias, mask)


@_forward_op.register_fake
def _(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap, precision):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=accumulator(q.dtype))


def _backward_cuda(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, q_ids: Tensor | None,
    kv_ids: Tensor | None, bias: Tensor | None, mask: Tensor | None, left: int | None, right: int | None, scale: float,
    softcap: float | None, precision: str, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, delta, dbias); dbias has no elements unless it is needed."""
    from purelm.kernels import flash_attention_launch as kernels

    request, pair = kernels.Request(left, right, scale, softcap, precision), _pair(q_ids, kv_ids)
    dq, dk, dv, delta = kernels.backward(do, dlse, q, k, v, o, lse, pair, request, bias=bias, mask=mask)
    if bias is None or not need_bias:
        return dq, dk, dv, delta, q.new_empty(0)
    return dq, dk, dv, delta, kernels.backward_of_bias(do, q, k, v, lse, delta, pair, request, bias, mask)


_backward_op = torch.library.custom_op(
    "purelm::flash_attention_bwd", _backward_cuda, mutates_args=(), device_types="cuda"
)


@_backward_op.register_kernel("cpu")
def _backward_plain(
    do, dlse, q, k, v, o, lse, q_ids, kv_ids, bias, mask, left, right, scale, softcap, precision, need_bias
):
    pair = _pair(q_ids, kv_ids)
    return tiled_backward(do, dlse, q, k, v, o, lse, pair, left, right, scale, softcap, bias, mask, need_bias)


@_backward_op.register_fake
def _(do, dlse, q, k, v, o, lse, q_ids, kv_ids, bias, mask, left, right, scale, softcap, precision, need_bias):
    dbias = bias.new_empty(bias.shape) if need_bias and bias is not None else q.new_empty(0)
    return (*(x.new_empty(x.shape) for x in (q, k, v)), lse.new_empty(lse.shape), dbias)


def _pair(q_ids: Tensor | None, kv_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if q_ids is None or kv_ids is None else (q_ids.contiguous(), kv_ids.contiguous())


# --- autograd and vmap


def _fold(info: Any, dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Each tensor with its mapped axis folded into its first one; an unmapped one is repeated for every sample."""
    out: list[Tensor | None] = []
    for x, dim in zip(tensors, dims, strict=True):
        if x is None:
            out.append(None)
            continue
        x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        out.append(x.flatten(0, 1))
    return out


def _fold_scores(info: Any, dim: int | None, x: Tensor | None, B: int, own: bool = False) -> Tensor | None:
    """`_fold` of a bias or mask, whose first axis may be 1. One that samples share is not repeated, unless `own`."""
    if x is None or (dim is None and x.shape[0] == 1 and not own):
        return x
    x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(info.batch_size, B, *x.shape[2:]).flatten(0, 1)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
    folded = _fold(info, in_dims[:9], args[:9])
    bias, mask, *numbers, need_bias = args[9:]
    assert folded[2] is not None
    B = folded[2].shape[0] // info.batch_size
    grads = backward(
        *folded, _fold_scores(info, in_dims[9], bias, B, own=need_bias), _fold_scores(info, in_dims[10], mask, B),
        *numbers, need_bias,
    )  # fmt: skip
    *grads, dbias = (x.unflatten(0, (info.batch_size, -1)) if x.ndim > 1 else x for x in grads)
    if not need_bias:
        return (*grads, dbias), (0, 0, 0, 0, None)
    shared = (bias.shape[0] if in_dims[9] is None else bias.select(in_dims[9], 0).shape[0]) == 1
    return (*grads, dbias.sum(1, keepdim=True) if shared else dbias), (0, 0, 0, 0, 0)


backward = backward_function(
    "flash_attention", eager_or_op(_backward_op, _backward_cuda), _vmap_backward, _backward_plain
)
_NO_GRADS = (None,) * 6  # of the mask and of arguments that are not tensors


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap, precision):
        return _forward(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap, precision)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, q_ids, kv_ids, sinks, bias, mask, *numbers = inputs
        ctx.save_for_backward(q, k, v, *output, q_ids, kv_ids, sinks, bias, mask)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, q_ids, kv_ids, sinks, bias, mask = ctx.saved_tensors
        if do is None and dlse is None:
            return (None,) * 13
        do = torch.zeros_like(o) if do is None else do
        need_bias = bias is not None and ctx.needs_input_grad[6]
        dq, dk, dv, delta, dbias = backward(
            do, dlse, q, k, v, o, lse, q_ids, kv_ids, bias, mask, *ctx.numbers, need_bias
        )
        dsinks = _sink_gradient(sinks, lse, delta)
        return dq, dk, dv, None, None, dsinks, dbias if need_bias else None, *_NO_GRADS

    @staticmethod
    def vmap(info, in_dims, *args):
        if in_dims[5] is not None:  # each sample has its own sinks, and a launch takes one set
            rows = [_sample(i, in_dims, args) for i in range(info.batch_size)]
            outs = [apply_flash(*row) for row in rows]
            return tuple(torch.stack(x) for x in zip(*outs, strict=True)), (0, 0)
        folded = _fold(info, in_dims[:5], args[:5])
        assert folded[0] is not None
        B = folded[0].shape[0] // info.batch_size
        extra = [_fold_scores(info, dim, x, B) for dim, x in zip(in_dims[6:8], args[6:8], strict=True)]
        o, lse = apply_flash(*folded, args[5], *extra, *args[8:])
        return (o.unflatten(0, (info.batch_size, -1)), lse.unflatten(0, (info.batch_size, -1))), (0, 0)


apply_flash = applier("flash_attention", _FlashAttention)


def _sample(i: int, in_dims: Any, args: tuple[Any, ...]) -> list[Any]:
    return [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)]


def _sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)


def plain_forward(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap):
    """(o, lse) by differentiable torch code."""
    return tiled_forward(q, k, v, _pair(q_ids, kv_ids), sinks, left, right, scale, softcap, bias, mask)


class Tiled(torch.autograd.Function):
    """`_FlashAttention` by the tiled torch code, on every device."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap):
        return plain_forward(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, q_ids, kv_ids, sinks, bias, mask, ctx.left, ctx.right, ctx.scale, ctx.softcap = inputs
        ctx.save_for_backward(q, k, v, *output, q_ids, kv_ids, sinks, bias, mask)

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, q_ids, kv_ids, sinks, bias, mask = ctx.saved_tensors
        need_bias = bias is not None and ctx.needs_input_grad[6]
        dq, dk, dv, delta, dbias = tiled_backward(
            do, dlse, q, k, v, o, lse, _pair(q_ids, kv_ids), ctx.left, ctx.right, ctx.scale, ctx.softcap, bias, mask,
            need_bias,
        )  # fmt: skip
        dsinks = _sink_gradient(sinks, lse, delta)
        return dq, dk, dv, None, None, dsinks, dbias if need_bias else None, None, None, None, None, None
