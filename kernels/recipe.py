"""What every kernel here shares: how its op meets autograd, vmap and compile, and how it is launched.

An op of this package is made of, in order:

1. `torch.library.custom_op("purelm::NAME_fwd", mutates_args=(), device_types="cuda")`, which imports NAME_triton (so
   triton is loaded at the first call on a GPU, never on import) and launches; `register_kernel("cpu")`, the reference
   of purelm.ops; `register_fake`, with the exact strides and dtypes. The same for `purelm::NAME_bwd`.
2. A `torch.autograd.Function` with `setup_context` and `vmap`, whose backward calls `backward_function(...)`.

Why two layers. A custom op's own autograd registration has no `setup_context`, which torch.func needs; and dynamo drops
a Function's backward inside torch.func.grad, silently, unless what it calls has an Autograd key, as custom ops do: then
it fails loudly. So never torch.compile(torch.func.grad(f)): compile f, or use purelm.transforms.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["backward_function", "device_of", "interpreted"]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1, set before its import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def device_of(x: Tensor) -> AbstractContextManager:
    """The context in which to launch on x's device: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def backward_function(name: str, op: Callable[..., Any], vmap: Callable[..., Any]) -> Callable[..., Any]:
    """The backward op as a Function that says so when it is differentiated, instead of giving zeros.

    `vmap(info, in_dims, *args) -> (outputs, out_dims)` is its batching rule. While compiling it is the op itself,
    which dynamo can trace; compiled code refuses double backward on its own.
    """

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"{name}: double backward is not supported: use the reference of purelm.ops")

    Backward.vmap = staticmethod(vmap)  # type: ignore[assignment]

    def call(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_compiling() else Backward.apply(*args)

    return call
