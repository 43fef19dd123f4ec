"""Cheap repeated launches of Triton kernels.

A launch through triton.jit inspects each argument's type and value: for those of flash attention this takes 100 us or
more, several times as long as a short kernel runs. Here the caller gives a key, made of everything that a launch
depends on except the tensors' addresses. For a key that was seen before, the compiled kernel is called with the
arguments of that earlier launch, in which only the tensors are replaced:

    if not relaunch(kernel, key, tensors):
        ... make descriptors, constants ...
        launch(kernel, key, tensors, n_programs, args, constants, options)
"""

import threading
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from purelm.kernels.recipe import interpreted

__all__ = ["all_aligned", "device_number", "device_of", "launch", "relaunch"]

MOST_PLANS = 4096  # at which all are dropped, so that ever new shapes do not fill the memory
_plans: dict[Hashable, "_Plan"] = {}
_ready = threading.local()  # .devices: numbers of those that this thread has used
_HERE = nullcontext()


class _Plan:
    """A compiled kernel, its grid, and its arguments with holes for tensors."""

    def __init__(self, kernel: Any, grid: tuple[int, int, int], args: list[Any], tensors: Sequence[Tensor]):
        self.run = kernel[grid]
        self.args = args
        self.holes: list[tuple[int, int]] = []  # place, number of the tensor
        self.descriptors: list[tuple[int, int, type, dict[str, Any]]] = []  # the same, class, attributes
        numbers = {id(x): i for i, x in enumerate(tensors)}
        for place, x in enumerate(args):
            if isinstance(x, Tensor):
                self.holes.append((place, numbers[id(x)]))
                args[place] = None
            elif hasattr(x, "block_shape"):
                self.descriptors.append((place, numbers[id(x.base)], type(x), {**vars(x), "base": None}))
                args[place] = None

    def launch(self, tensors: Sequence[Tensor]) -> None:
        args = self.args.copy()
        for place, number in self.holes:
            args[place] = tensors[number]
        for place, number, kind, attributes in self.descriptors:
            # Skips the checks of the constructor, which this shape has passed before.
            descriptor: Any = object.__new__(kind)
            args[place] = descriptor
            descriptor.__dict__.update(attributes)
            descriptor.base = tensors[number]
        self.run(*args)


def relaunch(kernel: Any, key: Hashable, tensors: Sequence[Tensor]) -> bool:
    """Repeat the launch that is remembered under `key`, with these tensors; False if there is none."""
    plan = _plans.get((id(kernel), key))
    if plan is None:
        return False
    plan.launch(tensors)
    return True


def launch(
    kernel: Any,
    key: Hashable,
    tensors: Sequence[Tensor],
    n_programs: int,
    args: Sequence[Any],
    constants: dict[str, Any],
    options: dict[str, int],
) -> None:
    """Launch `kernel` on the current device, and remember the launch if it can be repeated with other tensors.

    Args:
        key: launches of one kernel with equal keys must differ in the addresses of `tensors` only; `all_aligned` must
            be part of it.
        args: in the order of the kernel; tensors, descriptors of them, numbers.
        constants: by name. options: num_warps, num_stages.
    """
    compiled = kernel[(n_programs,)](*args, **constants, **options)
    if interpreted() or not hasattr(type(compiled), "__getitem__"):
        return
    known = {id(x) for x in tensors}
    # Not remembered: one tensor in two places, since the next call may have two; and addresses that are not aligned,
    # since the kernel was compiled for just these.
    if len(known) < len(tensors) or not all_aligned(tensors):
        return
    used = (x if isinstance(x, Tensor) else getattr(x, "base", None) for x in args)
    if any(x is not None and id(x) not in known for x in used):  # args have a copy of a tensor
        return
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    _plans[id(kernel), key] = _Plan(compiled, (n_programs, 1, 1), [values[name] for name in kernel.arg_names], tensors)


def all_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every address is a multiple of 16 bytes, as those of all but some slices are. Part of a key."""
    at = 0
    for x in tensors:
        at |= x.data_ptr()
    return at % 16 == 0


def device_number(x: Tensor) -> int:
    """The number of x's device, for keys; -1 is the CPU."""
    return x.get_device()


def device_of(x: Tensor) -> AbstractContextManager:
    """The context in which to launch on x's device, made ready for descriptors in this thread."""
    number = x.get_device()
    if number < 0:
        return _HERE
    devices = _ready.__dict__.setdefault("devices", set())
    if number not in devices:
        # Descriptors are made by functions of the driver that need a current context, which a new thread (autograd's,
        # say) has only after its first call of the CUDA runtime.
        torch.zeros((), device=x.device)
        devices.add(number)
    return _HERE if number == torch.cuda.current_device() else torch.cuda.device(number)
