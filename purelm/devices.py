"""What a device computes with units of its own, found by measuring; and whether its values can be read at once."""

import functools
import time

import torch
from torch import Tensor

__all__ = ["at_hand", "multiplies_natively"]

# Time of a product relative to fp32's at which a format counts as native. With units for it a device takes 0.6 of
# fp32's time or less; a CPU that widens bf16 to fp32 on the way 2.7 (AVX-512 without bf16), one that falls back to
# scalar loops 50 (AVX2). So the answer does not hang on a measurement's noise.
SLOWEST = 1.5
N_ROUNDS = 6


def multiplies_natively(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether `device` multiplies matrices of `dtype` about as fast as fp32 ones, or faster.

    Measured once in a process, in 0.01 to 0.05 s on a CPU: products of 192 x 192 (1,024 on a GPU) in `dtype` and in
    fp32 by turns, the best of which may take 1.5 times as long as fp32's. On a CPU it is one thread's own time that
    counts, so that a busy machine gives the same answer. fp32 is the measure, and so native;
    so is fp64, which a CPU has. What decides is the machine as it runs now: a limit on instruction sets
    (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA) counts.

    >>> multiplies_natively(torch.float32, "cpu")
    True
    """
    return _measured(dtype, torch.device(device))


# torch.compile takes the answer for a constant, where it would otherwise trace the stop-watch. This is what
# torch.compiler.assume_constant_result does, which imports dynamo: as much again as torch itself.
multiplies_natively._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _measured(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype in (torch.float32, torch.float64) or device.type == "meta":
        return True
    n = 192 if device.type == "cpu" else 1024
    # 1 + small numbers: no denormals, and no zeros, which some units pass over faster.
    wide = 1 + torch.linspace(0, 1, n * n, dtype=torch.float32, device=device).view(n, n) / 64
    narrow = wide.to(dtype)
    n_threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        with torch.no_grad():
            _seconds(wide, device), _seconds(narrow, device)  # libraries make their handles
            times = [(_seconds(narrow, device), _seconds(wide, device)) for _ in range(N_ROUNDS)]
    finally:
        torch.set_num_threads(n_threads)
    best, measure = map(min, zip(*times, strict=True))
    return best <= SLOWEST * measure


def _seconds(x: torch.Tensor, device: torch.device) -> float:
    """Of one product."""
    if device.type == "cpu":
        begin = time.thread_time()
        x @ x
        return time.thread_time() - begin
    torch.accelerator.synchronize(device)
    begin = time.perf_counter()
    x @ x
    torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


_PLAIN = (Tensor, torch.nn.Parameter)


def at_hand(x: Tensor) -> bool:
    """Whether the host can read x at once: on a CPU, in plain eager code.

    On a GPU to look means to wait for it. While compiling, under torch.func and in fake tensors there is no value yet.
    """
    plain = type(x) in _PLAIN and x.device.type == "cpu"
    return plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
