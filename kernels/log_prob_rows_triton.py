"""The row kernels of draw_ and of invariant_log_probs: maximum and sum of a row of logits, in one order.

Legend: N rows, V vocabulary, L logits of a tile. Lane i has maximum and sums of logits i, i + L, ... to itself, so that
lanes meet only at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.launch import all_aligned, device_number, device_of, launch, relaunch

__all__ = ["lanes", "log_prob", "log_probs", "sums"]


def lanes(V: int) -> int:
    """Logits of a tile."""
    return min(4096, max(16, triton.next_power_of_2(V)))


@triton.jit
def sums(row, V, temperature, TEMPERED: tl.constexpr, L: tl.constexpr):
    """(maximum m, sum of exp(x - m), sum of exp((x - m) / temperature), first place of m, whether m is a number and
    nothing is NaN or inf) of the logits at `row`; sums in fp64."""
    at = tl.arange(0, L)
    m_L = tl.full((L,), float("-inf"), tl.float32)
    l_L = tl.zeros((L,), tl.float64)
    t_L = tl.zeros((L,), tl.float64)
    bad_L = tl.zeros((L,), tl.int32)
    best_L = tl.zeros((L,), tl.int32)
    for start in range(0, V, L):
        x = tl.load(row + start + at, mask=start + at < V, other=float("-inf")).to(tl.float32)
        bad_L |= ((x != x) | (x == float("inf"))).to(tl.int32)
        best_L = tl.where(x > m_L, start + at, best_L)
        m_new = tl.maximum(m_L, x)
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_L = l_L * tl.exp(m_L - safe).to(tl.float64) + tl.exp(x - safe).to(tl.float64)
        if TEMPERED:
            scaled = tl.exp((x - safe) / temperature)
            t_L = t_L * tl.exp((m_L - safe) / temperature).to(tl.float64) + scaled.to(tl.float64)
        m_L = m_new
    m = tl.max(m_L, 0)
    finite = (tl.max(bad_L, 0) == 0) & (m > float("-inf"))
    safe = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(l_L * tl.exp(m_L - safe).to(tl.float64), 0)
    mass = total
    if TEMPERED:
        mass = tl.sum(t_L * tl.exp((m_L - safe) / temperature).to(tl.float64), 0)
    first = tl.min(tl.where(m_L == m, best_L, V), 0)
    return m, total, mass, first, finite


@triton.jit
def log_prob(x, m, total, mass, temperature, TEMPERED: tl.constexpr):
    """(log-probability of logit x under softmax(logits / temperature), and under softmax(logits)), fp32."""
    model = (x - m) - tl.log(total).to(tl.float32)
    if TEMPERED:
        chosen = (x - m) / temperature - tl.log(mass).to(tl.float32)
    else:
        chosen = model
    return chosen, model


@triton.jit
def _log_probs(logits_ptr, target_ptr, out_ptr, V, logits_n, temperature, TEMPERED: tl.constexpr, L: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    row = logits_ptr + n * logits_n
    m, total, mass, _, _ = sums(row, V, temperature, TEMPERED, L)
    x = tl.load(row + tl.load(target_ptr + n)).to(tl.float32)
    chosen, _ = log_prob(x, m, total, mass, temperature, TEMPERED)
    tl.store(out_ptr + n, chosen)


def log_probs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """(N,) fp32: log softmax(logits / temperature) at the targets, which are in 0..V-1."""
    N, V = logits.shape
    out = torch.empty(N, dtype=torch.float32, device=logits.device)
    if N == 0:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tensors = logits, targets.contiguous(), out
    key = device_number(logits), logits.dtype, (N, V), logits.stride(0), temperature, all_aligned(tensors)
    with device_of(logits):
        if not relaunch(_log_probs, key, tensors):
            args = *tensors, V, logits.stride(0), temperature
            constants = {"TEMPERED": temperature != 1.0, "L": lanes(V)}
            launch(_log_probs, key, tensors, N, args, constants, {"num_warps": 8})
    return out
