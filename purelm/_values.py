"""Whether a tensor's values can be looked at without a cost."""

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def at_hand(x: Tensor) -> bool:
    """Whether the host can read x at once: on a CPU, in plain eager code.

    On a GPU to look means to wait for it. While compiling, under torch.func and in fake tensors there is no value yet.
    """
    plain = type(x) in _PLAIN and x.device.type == "cpu"
    return plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
