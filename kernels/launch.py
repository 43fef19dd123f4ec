"""Launching Triton kernels again without paying for the first time again.

A launch through triton.jit looks at each argument's type and value anew: for the 50 arguments of flash attention 100 us
and more, several times what a short kernel runs. Here the caller gives a key of all that decides about a launch but the
tensors' addresses, and of a key seen before the compiled kernel is called with the arguments as they were then, new
tensors put in their places.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from purelm.kernels.recipe import interpreted

__all__ = ["all_aligned", "current_device", "launch"]

MOST_PLANS = 4096  # then all are forgotten: shapes that change forever must not fill the memory
_plans: dict[Hashable, "_Plan"] = {}


class _Plan:
    """A compiled kernel, its grid, and its arguments with holes for tensors."""

    def __init__(self, kernel: Any, grid: tuple[int, int, int], args: list[Any], tensors: Sequence[Tensor]):
        self.run = kernel[grid]
        self.args = args
        self.holes: list[tuple[int, int, Any]] = []  # place, number of the tensor, attributes of its descriptor
        numbers = {id(x): i for i, x in enumerate(tensors)}
        for place, x in enumerate(args):
            if isinstance(x, Tensor):
                self.holes.append((place, numbers[id(x)], None))
                args[place] = None
            elif hasattr(x, "block_shape"):
                self.holes.append((place, numbers[id(x.base)], {**vars(x), "base": None}))
                args[place] = type(x)

    def launch(self, tensors: Sequence[Tensor]) -> None:
        args = self.args.copy()
        for place, number, attributes in self.holes:
            if attributes is None:
                args[place] = tensors[number]
            else:  # a descriptor, without the checks of its constructor: its shape is one that has passed them
                descriptor = object.__new__(args[place])
                descriptor.__dict__.update(attributes)
                descriptor.base = tensors[number]
                args[place] = descriptor
        self.run(*args)


def launch(
    key: Hashable,
    kernel: Any,
    tensors: Sequence[Tensor],
    plan: Callable[[], tuple[int, Sequence[Any], dict[str, Any], dict[str, int]]],
) -> None:
    """Launch `kernel` on the current device.

    Args:
        key: two launches of equal keys differ in the addresses of `tensors` alone, and these are aligned alike.
        tensors: all that the arguments are made of.
        plan: makes (number of programs, arguments in order, constants by name, num_warps and num_stages); called
            only if the key is new. Its tensors, and bases of its descriptors, must be of `tensors`.
    """
    known = _plans.get((kernel, key))
    if known is not None:
        known.launch(tensors)
        return
    n_programs, args, constants, options = plan()
    compiled = kernel[(n_programs,)](*args, **constants, **options)
    if interpreted() or not hasattr(type(compiled), "__getitem__"):
        return
    if len({id(x) for x in tensors}) < len(tensors):  # one tensor in two roles: the next call may have two
        return
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    _plans[(kernel, key)] = _Plan(compiled, (n_programs, 1, 1), [values[n] for n in kernel.arg_names], tensors)


def all_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every address is a multiple of 16 bytes, as those of whole tensors are: part of a key."""
    at = 0
    for x in tensors:
        at |= x.data_ptr()
    return at % 16 == 0


def current_device(x: Tensor) -> int:
    """The number of x's device, for keys."""
    return -1 if x.device.index is None else x.device.index


