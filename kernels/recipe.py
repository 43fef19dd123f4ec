"""What all kernels here share: how their ops work under autograd, vmap and compile.

An op of this package is made of, in order:

1. `torch.library.custom_op("purelm::NAME_fwd", mutates_args=(), device_types="cuda")`, which imports NAME_triton (so
   triton is loaded at the first call on a GPU, never on import) and launches; `register_kernel("cpu")`, the reference
   of purelm.ops; `register_fake`, with the exact strides and dtypes. The same for `purelm::NAME_bwd`. Ops that a
   layer calls go through `eager_or_op`.
2. A `torch.autograd.Function` with `setup_context` and `vmap`, called through `applier`, whose backward calls
   `backward_function(...)`.

Why two layers. The Function that torch makes of a custom op's own autograd registration has no `setup_context`, which
torch.func needs. And inside torch.func.grad dynamo silently drops the backward of a Function, unless its forward calls
something that has an Autograd key, as custom ops do: then it raises. So never torch.compile(torch.func.grad(f)):
compile f, or use purelm.transforms.

Second derivatives and forward mode (jvp) are for the CPU, where an op is plain torch code anyway: `backward_function`
differentiates that code, and public functions call their reference in forward mode (`purelm.ops.derivatives`). On a
GPU a second derivative is an error that names the bundle to use, ops=REFERENCE.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["applier", "backward_function", "eager_or_op", "interpreted"]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1, set before its import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _transformed() -> bool:
    """Whether a torch.func transform or torch.compile is active: both need a Function with `setup_context`."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def applier(name: str, function: Any) -> Callable[..., Any]:
    """`function.apply` of a Function with `setup_context`; in plain eager code, of the same Function without it.

    With it, torch binds the arguments to the signature of forward at each call: 30 us, as much as a short kernel runs.
    Forward mode raises RuntimeError with the name of the op: public functions take another way on a CPU, and on a GPU
    there is none. Compiled code gets the Function as it is, since dynamo refuses one that has a jvp at all.
    """

    def no_jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{name}: forward mode (jvp) is not supported on a GPU: use ops=REFERENCE (purelm.ops)")

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return function.backward(ctx, *grads)

        jvp = staticmethod(no_jvp)

    class Transformed(function):
        jvp = staticmethod(no_jvp)

    def apply(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function.apply(*inputs)
        return Transformed.apply(*inputs) if _transformed() else Plain.apply(*inputs)

    return apply


def eager_or_op(op: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
    """The op, without torch's dispatcher where that is not needed: then `launch`, what the op does on CUDA, is called.

    The dispatcher takes 30 us for a custom op, as much as a short kernel runs. It is needed on other devices, while
    compiling, under torch.func, in a dispatch mode (selective checkpoint, fake tensors) and for subclasses.
    """

    def call(x: Tensor, *args: Any) -> Any:
        plain = type(x) in _PLAIN and _on_gpu(x) and not _transformed()
        if plain and not torch._C._len_torch_dispatch_stack():
            return launch(x, *args)
        return op(x, *args)

    return call


_HOLE = object()  # in place of a tensor that is saved for backward
_PLAIN = (Tensor, torch.nn.Parameter)


def backward_function(
    name: str, op: Callable[..., Any], vmap: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """The backward op as a Function that can be differentiated on a CPU, and raises RuntimeError on a GPU.

    `vmap(info, in_dims, *args) -> (outputs, out_dims)` is its batching rule. `plain` is the op in differentiable torch
    code, which second derivatives are computed from. While compiling, and where no graph is recorded, the op itself is
    called, which dynamo can trace (compiled code refuses double backward on its own).
    """

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            ctx.on_cpu = tensors[0].device.type == "cpu"
            if ctx.on_cpu:
                ctx.save_for_backward(*tensors)
                ctx.others = [_HOLE if isinstance(x, Tensor) else x for x in inputs]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if not ctx.on_cpu:
                raise RuntimeError(f"{name}: double backward is not supported on a GPU: use ops=REFERENCE (purelm.ops)")
            tensors = iter(ctx.saved_tensors)
            args = [next(tensors) if x is _HOLE else x for x in ctx.others]
            at = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]

            def of_floats(*xs: Tensor) -> Any:
                for i, x in zip(at, xs, strict=True):
                    args[i] = x
                return plain(*args)

            of_all: Any = torch.func.vjp(of_floats, *(args[i] for i in at))
            out, pull = of_all
            found: list[Any] = [None] * len(args)
            for i, g in zip(at, pull(grads[0] if isinstance(out, Tensor) else tuple(grads)), strict=True):
                found[i] = g
            return tuple(found)

    Backward.vmap = staticmethod(vmap)  # type: ignore[assignment]

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not (_transformed() or torch.is_grad_enabled()):
            return op(*args)
        return Backward.apply(*args)

    return call
