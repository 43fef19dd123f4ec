"""Root-mean-square normalisation in one pass over the rows, alone or with the residual sum before it.

Legend: R rows, D width, G groups of rows that have weights of their own (one, unless vmap folds its batch in).

    rstd_r  = 1 / sqrt(mean_d x_rd^2 + eps)                   one fp32 number a row, kept for the backward pass
    n_rd    = x_rd rstd_r
    y_rd    = w_d n_rd
    h_rd    = w_d dy_rd
    dx_rd   = rstd_r (h_rd - n_rd mean_e(h_re n_re))
    dw_d    = sum_r dy_rd n_rd

Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4, with eps inside the root. All sums are in fp32. The forward
pass reads x once; the backward pass reads x and dy once and gives dx and dw together: each program adds its rows'
part of dw in registers, and the parts are summed in a fixed order, so results are the same bits run after run.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.kernels.recipe import applier, backward_function, eager_or_op
from purelm.ops.derivatives import in_forward_mode
from purelm.ops.precision import accumulator
from purelm.ops.rms_norm import rms_norm as reference

__all__ = ["add_rms_norm", "rms_norm"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels; the reference has float64, too


def rms_norm(
    x: Float[Tensor, "*batch d"], weight_D: Float[Tensor, " d"] | None = None, eps: float = 1e-5
) -> Float[Tensor, "*batch d"]:
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis; computed in fp32, returned in x's dtype.

    The kernel of `purelm.ops.rms_norm.rms_norm`, with its signature and dtypes; on the CPU it is that function.
    Differentiable in x and weight; on a GPU once, in reverse mode. Rows may have any stride (a slice of a wider
    tensor); for other layouts x is copied.

    Raises ValueError for a weight that is not (D,), tensors on two devices, and, on a GPU, dtypes other than fp32,
    bf16 and fp16.
    """
    _check("rms_norm", x, weight_D, eps)
    if in_forward_mode(x):
        return reference(x, weight_D, eps)
    y, _ = _rms_norm(_grouped(x), _grouped_weight(weight_D), float(eps))
    return y.reshape(x.shape)


def add_rms_norm(
    x: Float[Tensor, "*batch d"],
    residual: Float[Tensor, "*batch d"],
    weight_D: Float[Tensor, " d"] | None = None,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d"]]:
    """(rms_norm(x + residual), x + residual): a block's residual sum and the next norm in one pass.

    The sum is rounded to x's dtype before it is normalised, as in two separate steps. Raises as `rms_norm` does, and
    for a residual that has not the shape, dtype and device of x.
    """
    _check("add_rms_norm", x, weight_D, eps)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(f"add_rms_norm: residual must be like x, {_like(x)}, got {_like(residual)}")
    if in_forward_mode(x):
        return reference(x + residual, weight_D, eps), x + residual
    y, total, _ = _add_rms_norm(_grouped(x), _grouped(residual), _grouped_weight(weight_D), float(eps))
    return y.reshape(x.shape), total.reshape(x.shape)


def _like(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _check(name: str, x: Tensor, weight: Tensor | None, eps: float) -> None:
    if not eps >= 0.0:
        raise ValueError(f"{name}: eps must be at least 0, got {eps}")
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"{name}: x must be floating with at least one axis, got {_like(x)}")
    if weight is not None and (weight.shape != x.shape[-1:] or weight.device != x.device):
        raise ValueError(f"{name}: weight must be ({x.shape[-1]},) on {x.device}, got {_like(weight)}")
    for label, tensor in (("x", x), ("weight", weight)):
        if tensor is not None and tensor.is_cuda and tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name}: {label} must be float32, bfloat16 or float16 on a GPU, got {tensor.dtype}: use the "
                "reference, purelm.ops.rms_norm"
            )


def _grouped(x: Tensor) -> Tensor:
    """(*batch, D) as (G=1, R, D)."""
    return x.reshape(1, x.shape[:-1].numel(), x.shape[-1])


def _grouped_weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.unsqueeze(0)


# The ops. Tensors are (G, R, D), weights (G, D), rstd (G, R).


def _fwd_cuda(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    from purelm.kernels import rms_norm_triton

    y, _, rstd = rms_norm_triton.forward(x, None, weight, eps)
    return y, rstd


_fwd_op = torch.library.custom_op("purelm::rms_norm_fwd", _fwd_cuda, mutates_args=(), device_types="cuda")
_fwd = eager_or_op(_fwd_op, _fwd_cuda)


@_fwd_op.register_kernel("cpu")
def _(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(accumulator(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    # The public reference for each group: the weight gets an axis for the rows.
    y = reference(x, None if weight is None else weight.unsqueeze(1), eps)
    return y.contiguous(), rstd


@_fwd_op.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))


def _add_fwd_cuda(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from purelm.kernels import rms_norm_triton

    return rms_norm_triton.forward(x, residual, weight, eps)


_add_fwd_op = torch.library.custom_op("purelm::add_rms_norm_fwd", _add_fwd_cuda, mutates_args=(), device_types="cuda")
_add_fwd = eager_or_op(_add_fwd_op, _add_fwd_cuda)


@_add_fwd_op.register_kernel("cpu")
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    y, rstd = _fwd_op(total, weight, eps)
    return y, total, rstd


@_add_fwd_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))


def _bwd_cuda(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """dx (plus dsum, the gradient of the sum x + residual itself) and dw; what is not needed is an empty tensor."""
    from purelm.kernels import rms_norm_triton

    return rms_norm_triton.backward(dy, dsum, x, weight, rstd, need_dx, need_dw)


_bwd_op = torch.library.custom_op("purelm::rms_norm_bwd", _bwd_cuda, mutates_args=(), device_types="cuda")


@_bwd_op.register_kernel("cpu")
def _bwd_plain(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    dx, dw = x.new_empty(0), (x if weight is None else weight).new_empty(0)
    wide, n = dy.to(rstd.dtype), x.to(rstd.dtype) * rstd.unsqueeze(-1)
    if need_dx:
        h = wide if weight is None else wide * weight.unsqueeze(1)
        dx = rstd.unsqueeze(-1) * (h - n * (h * n).mean(-1, keepdim=True))
        dx = (dx if dsum is None else dx + dsum).to(x.dtype).contiguous()
    if need_dw and weight is not None:
        dw = (wide * n).sum(1).to(weight.dtype)
    return dx, dw


@_bwd_op.register_fake
def _(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    if weight is None:
        return dx, x.new_empty(0)
    return dx, weight.new_empty(weight.shape if need_dw else (0,))


# Autograd and vmap. A batch of vmap becomes groups: each sample has its own gradient of the weight.


def _fold(x: Tensor | None, dim: int | None, n: int) -> Tensor | None:
    """(G, ...) with a batch axis at `dim`, or shared by the batch, as (n G, ...)."""
    if x is None:
        return None
    return (x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _unfold(x: Tensor, n: int) -> Tensor:
    return x.unflatten(0, (n, x.shape[0] // n))


def _bwd_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    n = info.batch_size
    tensors = [_fold(x, dim, n) for x, dim in zip(args[:5], in_dims[:5], strict=True)]
    need_dx, need_dw = args[5:]
    dx, dw = _backward(*tensors, need_dx, need_dw)
    need_dw = need_dw and tensors[3] is not None
    return (
        (_unfold(dx, n) if need_dx else dx, _unfold(dw, n) if need_dw else dw),
        (0 if need_dx else None, 0 if need_dw else None),
    )


def _bwd_again(dy: Tensor, dsum: Any, x: Tensor, weight: Any, rstd: Tensor, need_dx: bool, need_dw: bool) -> Any:
    """`_bwd_plain` with rstd as a function of x, to be differentiated; eps is recovered from rstd and x."""
    mean = x.to(rstd.dtype).square().mean(-1)
    eps = (rstd**-2 - mean).detach()
    return _bwd_plain(dy, dsum, x, weight, torch.rsqrt(mean + eps), need_dx, need_dw)


_backward = backward_function("rms_norm", eager_or_op(_bwd_op, _bwd_cuda), _bwd_vmap, _bwd_again)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        return _fwd(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], inputs[1], output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx, dw = _backward(grads[0], None, *ctx.saved_tensors, need_dx, need_dw)
        return dx if need_dx else None, dw if need_dw else None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor | None, eps: float) -> Any:
        n = info.batch_size
        y, rstd = _rms_norm(_fold(x, in_dims[0], n), _fold(weight, in_dims[1], n), eps)
        return (_unfold(y, n), _unfold(rstd, n)), (0, 0)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return _add_fwd(x, residual, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, total, rstd = output
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(total, inputs[2], rstd)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        need_x, need_residual, need_dw = ctx.needs_input_grad[:3]
        need_dx = need_x or need_residual
        dx, dw = _backward(grads[0], grads[1], *ctx.saved_tensors, need_dx, need_dw)
        return dx if need_x else None, dx if need_residual else None, dw if need_dw else None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> Any:
        n = info.batch_size
        folded = [_fold(t, dim, n) for t, dim in zip((x, residual, weight), in_dims[:3], strict=True)]
        outputs = _add_rms_norm(*folded, eps)
        return tuple(_unfold(t, n) for t in outputs), (0, 0, 0)


_rms_norm, _add_rms_norm = applier("rms_norm", _RMSNorm), applier("add_rms_norm", _AddRMSNorm)
