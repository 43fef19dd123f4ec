"""A linear layer in which a row's result does not depend on the rows beside it, to the last bit.

    y_mn = sum_k x_mk w_nk + b_n              dx = dy W    dW = dy^T x    db = sum_m dy_m

A library's product of matrices is computed in another order for each shape: the same token gives other bits in a batch
of 8 than in one of 256, and another log-probability when it is sampled than when it is trained on. Here every element
is one sum in the order of k (batch invariance; He et al. 2025, "Defeating Nondeterminism in LLM Inference",
https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference). The backward pass is the library's.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.kernels.recipe import eager_or_op
from purelm.ops.linear import linear as reference

__all__ = ["invariant_linear"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def invariant_linear(
    x: Float[Tensor, "*batch i"], weight_OI: Float[Tensor, "o i"], bias_O: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*batch o"]:
    """y = x W^T + b, with sums in fp32; the signature of `purelm.ops.linear.linear`, which it is on a CPU.

    On a GPU a row of y has the same bits in every batch. Differentiable once there, in reverse mode.

    Raises ValueError on a GPU for shapes that do not go together, and dtypes that differ or are not fp32, bf16 or fp16.
    """
    if not x.is_cuda:
        return reference(x, weight_OI, bias_O)
    if weight_OI.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight_OI.shape[1]:
        raise ValueError(f"invariant_linear: x must be (*batch, I) for (O, I), got {x.shape} and {weight_OI.shape}")
    given = (x, weight_OI) if bias_O is None else (x, weight_OI, bias_O)
    if len({t.dtype for t in given}) > 1 or x.dtype not in DTYPES:
        raise ValueError(
            f"invariant_linear: x, weight and bias must be all float32, bfloat16 or float16, got "
            f"{', '.join(str(t.dtype) for t in given)}"
        )
    y = _InvariantLinear.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O)
    return y.reshape(*x.shape[:-1], -1)


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from purelm.kernels import invariant_linear_triton as kernels

    return kernels.linear(x, weight, bias)


_op = torch.library.custom_op("purelm::invariant_linear", _cuda, mutates_args=(), device_types="cuda")
_forward = eager_or_op(_op, _cuda)


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class _InvariantLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,), (x, weight) = grads, ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dw = dy.mT @ x if ctx.needs_input_grad[1] else None
        db = dy.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, dw, db
