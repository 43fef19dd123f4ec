"""A weighted sum over the last axis: the smallest kernel that has every part, to learn from (see README.md).

Legend: R rows, D width, G groups of rows that have weights of their own (one, unless vmap folds its batch in).

    y_r   = sum_d x_rd w_d
    dx_rd = dy_r w_d
    dw_d  = sum_r dy_r x_rd

Sums are in fp32. It is the first kernel of the course (CS336, assignment 2). It is here to learn from: a model has no
use for it, and torch's matrix-vector product does the same.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.kernels.recipe import applier, backward_function
from purelm.ops.derivatives import in_forward_mode
from purelm.ops.precision import accumulator

__all__ = ["reference", "weighted_sum"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels; the reference has float64, too


def reference(x: Float[Tensor, "*batch d"], weight_D: Float[Tensor, " d"]) -> Float[Tensor, "*batch"]:
    """y = sum_d x_d w_d in plain torch: what the kernel must equal, and what runs on a CPU."""
    wide = accumulator(x.dtype)
    return (x.to(wide) * weight_D).sum(-1).to(x.dtype)


def weighted_sum(x: Float[Tensor, "*batch d"], weight_D: Float[Tensor, " d"]) -> Float[Tensor, "*batch"]:
    """y = sum_d x_d w_d over the last axis; summed in fp32, returned in x's dtype.

    On a GPU differentiable once, in reverse mode.

    Raises ValueError for a weight that is not (D,), tensors on two devices, and, on a GPU, dtypes other than fp32,
    bf16 and fp16.

    >>> weighted_sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 1.0]))
    tensor([12., 34.])
    """
    # Checks are here, in the public function: the op below relies on them, and errors name the caller's arguments.
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"weighted_sum: x must be floating with at least one axis, got {x.dtype} {tuple(x.shape)}")
    if weight_D.shape != x.shape[-1:] or weight_D.device != x.device:
        raise ValueError(
            f"weighted_sum: weight must be ({x.shape[-1]},) on {x.device}, got {tuple(weight_D.shape)} on "
            f"{weight_D.device}"
        )
    for label, tensor in (("x", x), ("weight", weight_D)):
        if tensor.is_cuda and tensor.dtype not in DTYPES:
            raise ValueError(
                f"weighted_sum: {label} must be float32, bfloat16 or float16 on a GPU, got {tensor.dtype}: use the "
                "reference"
            )
    if in_forward_mode(x):
        return reference(x, weight_D)
    # The op takes one form only, (G, R, D). Reshaping is left to torch, which can differentiate and batch it.
    x_GRD = x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
    return _weighted_sum(x_GRD, weight_D.unsqueeze(0)).reshape(x.shape[:-1])


# 1. The custom op of the forward pass. torch.compile does not look inside; it knows what register_fake says.


@torch.library.custom_op("purelm::weighted_sum_fwd", mutates_args=(), device_types="cuda")
def _fwd(x: Tensor, weight: Tensor) -> Tensor:
    # Imported at the first call on a GPU: `import purelm` and a CPU-only machine never need triton.
    from purelm.kernels import weighted_sum_triton

    return weighted_sum_triton.forward(x, weight)


@_fwd.register_kernel("cpu")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, weight.unsqueeze(1)).contiguous()


@_fwd.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    # Dtype and strides must be those of the real result exactly: compiled code addresses the result by them.
    return x.new_empty(x.shape[:-1])


# 2. The same for the backward pass. An op may not return None, so what is not needed is an empty tensor.


@torch.library.custom_op("purelm::weighted_sum_bwd", mutates_args=(), device_types="cuda")
def _bwd(dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor]:
    from purelm.kernels import weighted_sum_triton

    return weighted_sum_triton.backward(dy, x, weight, need_dx, need_dw)


@_bwd.register_kernel("cpu")
def _bwd_plain(dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor]:
    wide = accumulator(x.dtype)
    dy_ = dy.to(wide).unsqueeze(-1)
    dx = (dy_ * weight.unsqueeze(1)).to(x.dtype) if need_dx else x.new_empty(0)
    dw = (dy_ * x.to(wide)).sum(1).to(weight.dtype) if need_dw else weight.new_empty(0)
    return dx.contiguous(), dw


@_bwd.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_dx else (0,)), weight.new_empty(weight.shape if need_dw else (0,))


# 3. vmap. The batch becomes groups. It may not become rows: with per-sample gradients each sample has its own dw.


def _fold(x: Tensor, dim: int | None, n: int) -> Tensor:
    """(G, ...) with a batch axis at `dim`, or shared by the whole batch (dim None), as (n G, ...)."""
    return (x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _unfold(x: Tensor, n: int) -> Tensor:
    return x.unflatten(0, (n, x.shape[0] // n))


def _bwd_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    n = info.batch_size
    tensors = [_fold(x, dim, n) for x, dim in zip(args[:3], in_dims[:3], strict=True)]
    outs = _backward(*tensors, *args[3:])  # through the Function again, since another vmap or grad may be active
    return tuple(_unfold(x, n) if need else x for x, need in zip(outs, args[3:], strict=True)), tuple(
        0 if need else None for need in args[3:]
    )


# 4. Autograd. recipe.py says why the ops are called through `backward_function` and `applier`.

_backward = backward_function("weighted_sum", _bwd, _bwd_vmap, _bwd_plain)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _fwd(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # Separate from forward, as torch.func requires. What is saved must be an input or an output.
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        need_dx, need_dw = ctx.needs_input_grad
        dx, dw = _backward(grads[0], *ctx.saved_tensors, need_dx, need_dw)
        return dx if need_dx else None, dw if need_dw else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        n = info.batch_size
        return _unfold(_weighted_sum(*[_fold(x, d, n) for x, d in zip(args, in_dims, strict=True)]), n), 0


_weighted_sum = applier("weighted_sum", _WeightedSum)
