"""Which number formats a device multiplies in hardware, found by measuring; and whether values can be read at once."""

import time

import torch
from torch import Tensor

from purelm.caches import memo

__all__ = ["at_hand", "multiplies_natively", "sent"]

# A format counts as native if a product takes at most this many times as long as in fp32. Measured: 0.6 or less with
# units for the format; 2.7 on a CPU that widens bf16 to fp32 (AVX-512 without bf16); 50 on one that uses scalar loops
# (AVX2). The gap is wide enough that noise does not change the answer.
SLOWEST = 1.5
N_ROUNDS = 6


def multiplies_natively(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether `device` multiplies matrices of `dtype` about as fast as fp32 ones, or faster.

    Measured once in a process, in 0.01 to 0.05 s on a CPU: products of 192 x 192 matrices (1,024 on a GPU) in `dtype`
    and in fp32 by turns; native means that the fastest takes at most 1.5 times as long as the fastest in fp32. On a CPU
    the thread's own time is counted, so that a busy machine gives the same answer. fp32 and fp64 count as native
    without a measurement. Limits on instruction sets (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA) are respected, since
    the machine is measured as it runs.

    >>> multiplies_natively(torch.float32, "cpu")
    True
    """
    return _measured(dtype, torch.device(device))


# torch.compile then treats the answer as a constant and does not trace the measurement. The same as
# torch.compiler.assume_constant_result, but that imports dynamo, which takes as long as importing torch.
multiplies_natively._dynamo_marked_constant = True  # type: ignore[attr-defined]


@memo(None)
def _measured(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype in (torch.float32, torch.float64) or device.type == "meta":
        return True
    n = 192 if device.type == "cpu" else 1024
    # Values of 1 to 1 + 1/64: denormals are slow and zeros fast on some units.
    wide = 1 + torch.linspace(0, 1, n * n, dtype=torch.float32, device=device).view(n, n) / 64
    narrow = wide.to(dtype)
    n_threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        with torch.no_grad():
            _seconds(wide, device), _seconds(narrow, device)  # the first products load libraries
            times = [(_seconds(narrow, device), _seconds(wide, device)) for _ in range(N_ROUNDS)]
    finally:
        torch.set_num_threads(n_threads)
    best, measure = map(min, zip(*times, strict=True))
    return best <= SLOWEST * measure


def _seconds(x: torch.Tensor, device: torch.device) -> float:
    """Time of one product."""
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


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x, which lies on the host, on `device`; where that is a GPU, without waiting for what it is busy with."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
