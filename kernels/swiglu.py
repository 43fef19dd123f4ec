"""The gated linear unit of SwiGLU in one pass, which keeps nothing but its inputs for the backward pass.

    s = 1 / (1 + exp(-gate))
    y = gate s up
    dgate = dy up s (1 + gate (1 - s))
    dup = dy gate s

Shazeer 2020 (arXiv:2002.05202). Computed in fp32 and rounded once. The forward pass reads or writes 3 tensors and the
backward pass 5; the reference's backward pass in eager mode moves 14, and keeps silu(gate) besides.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.kernels.recipe import applier, backward_function, eager_or_op
from purelm.ops.derivatives import in_forward_mode
from purelm.ops.glu import swiglu as reference
from purelm.ops.precision import accumulator

__all__ = ["swiglu"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels; the reference has float64, too


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """y = silu(gate) * up; the layer is W2 swiglu(W1 x, W3 x). The kernel of `purelm.ops.glu.swiglu`.

    On a GPU differentiable once, in reverse mode. Halves of a joint projection are read where they are in the forward
    pass, and copied in the backward pass; so in training compute gate and up by two projections. On the CPU it is the
    reference.

    Raises ValueError where gate and up differ in shape, dtype or device, and, on a GPU, for dtypes other than fp32,
    bf16 and fp16.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"swiglu: up must be like gate, {tuple(gate.shape)} {gate.dtype} on {gate.device}, got {tuple(up.shape)} "
            f"{up.dtype} on {up.device}"
        )
    if not gate.is_floating_point():
        raise ValueError(f"swiglu: gate must be floating, got {gate.dtype}")
    if gate.is_cuda and gate.dtype not in DTYPES:
        raise ValueError(
            f"swiglu: gate must be float32, bfloat16 or float16 on a GPU, got {gate.dtype}: use the reference, "
            "purelm.ops.glu"
        )
    if in_forward_mode(gate):
        return reference(gate, up)
    # With one tensor as two arguments dynamo cannot trace a Function (2.13), or its gradients are wrong (2.11).
    return _swiglu(gate, up.view_as(up) if up is gate else up)


def _fwd_cuda(gate: Tensor, up: Tensor) -> Tensor:
    from purelm.kernels import swiglu_triton

    return swiglu_triton.forward(gate, up)


_fwd_op = torch.library.custom_op("purelm::swiglu_fwd", _fwd_cuda, mutates_args=(), device_types="cuda")
_fwd = eager_or_op(_fwd_op, _fwd_cuda)


@_fwd_op.register_kernel("cpu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return reference(gate, up).contiguous()


@_fwd_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _bwd_cuda(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from purelm.kernels import swiglu_triton

    return swiglu_triton.backward(dy, gate, up)


_bwd_op = torch.library.custom_op("purelm::swiglu_bwd", _bwd_cuda, mutates_args=(), device_types="cuda")


@_bwd_op.register_kernel("cpu")
def _bwd_plain(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide = accumulator(gate.dtype)
    dy_, gate_, up_ = dy.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(gate_)
    dgate = dy_ * up_ * s * (1 + gate_ * (1 - s))
    return dgate.to(gate.dtype).contiguous(), (dy_ * gate_ * s).to(up.dtype).contiguous()


@_bwd_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _batched(xs: Any, in_dims: Any, n: int) -> list[Tensor]:
    """The tensors with the batch axis in front, which is all that an element-wise op needs."""
    return [
        x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(xs, in_dims, strict=True)
    ]


def _bwd_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _backward(*_batched(args, in_dims, info.batch_size)), (0, 0)


_backward = backward_function("swiglu", eager_or_op(_bwd_op, _bwd_cuda), _bwd_vmap, _bwd_plain)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return _fwd(gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Both in one launch, even if only one is needed: that one takes the same three reads.
        dgate, dup = _backward(grads[0], *ctx.saved_tensors)
        return dgate if ctx.needs_input_grad[0] else None, dup if ctx.needs_input_grad[1] else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _swiglu(*_batched(args, in_dims, info.batch_size)), 0


_swiglu = applier("swiglu", _SwiGLU)
