"""Which derivatives are being taken around a call: for ops whose fast form has first ones, backwards, alone."""

import torch
from torch import Tensor

__all__ = ["in_forward_mode", "in_two_grads"]


def in_forward_mode(x: Tensor) -> bool:
    """Whether x is not a GPU's and something around is differentiated forwards (torch.func.jvp, jacfwd, forward_ad)."""
    if torch.compiler.is_compiling() or x.is_cuda:
        return False
    return torch.autograd.forward_ad._current_level >= 0


def in_two_grads(x: Tensor) -> bool:
    """Whether x is not a GPU's and two or more of torch.func's grad, vjp or jacrev are around, one in the other."""
    if torch.compiler.is_compiling() or x.is_cuda:
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()  # type: ignore[attr-defined]
    return sum(level.key() == torch._C._functorch.TransformType.Grad for level in levels) > 1  # type: ignore[attr-defined]
