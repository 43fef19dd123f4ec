"""Triton kernels of the cross-entropy's rows. Legend: N tokens (one program each), V vocabulary.

A row is read in blocks. The forward pass keeps a running maximum m (one number) and, lane by lane, the running sum of
exp(l - m): one exponential an element, one reduction over the block for m, and one over the lanes at the end.
All arithmetic is fp32. Memory traffic decides the time: forward reads the logits once; `gradient` reads and writes
them once; `loss_and_gradient_` reads them twice and writes them once, the second time from the end of the row to its
start, since the end is still in the caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.cross_entropy import Rows
from purelm.kernels.launch import device_of

__all__ = ["TRITON"]


def config(V: int) -> tuple[int, int]:
    """(elements of a block, warps) for rows of V logits."""
    block = min(triton.next_power_of_2(max(V, 16)), 8192)
    return block, 16 if block >= 8192 else 8 if block >= 2048 else 4


@triton.jit
def _tanh(u):
    # The quotient loses digits near 0, where the series (to u^9) is exact to fp32.
    t = tl.exp(-2.0 * tl.abs(u))
    far = tl.where(u < 0.0, t - 1.0, 1.0 - t) / (1.0 + t)
    v = u * u
    series = 1.0 + v * (-0.33333333 + v * (0.13333333 + v * (-0.053968254 + v * 0.021869489)))
    return tl.where(tl.abs(u) < 0.25, u * series, far)


@triton.jit
def _scores(x, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """(l, cap(x) / c): the logits that enter the softmax, and the tanh that their derivative needs."""
    if HAS_SOFTCAP:
        unit = _tanh(x / softcap)
        return softcap * unit * inv_temperature, unit
    return x * inv_temperature, x


@triton.jit
def _log_normaliser(
    row, softcap, inv_temperature,
    V: tl.constexpr, BLOCK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """(log Z, H) of a row; H = log sum e^d - sum e^d d / sum e^d with d = l - max, and 0 when it is not asked for."""
    lanes = tl.arange(0, BLOCK)
    # Finite, so that a row that starts with -inf gives exp(-inf) and not exp(-inf + inf).
    m = tl.full([], -3.0e38, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    moments = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lanes < V
        x = tl.load(row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        l, _ = _scores(x, softcap, inv_temperature, HAS_SOFTCAP)
        l = tl.where(inside, l, float("-inf"))
        new = tl.maximum(m, tl.max(l, 0))
        shrink = tl.exp(m - new)
        e = tl.exp(l - new)
        if ENTROPY:
            moments = shrink * (moments + sums * tl.maximum(m - new, -1.0e30)) + tl.where(e > 0.0, e * (l - new), 0.0)
        sums = sums * shrink + e
        m = new
    total = tl.sum(sums, 0)
    log_sum = tl.log(total)
    entropy = 0.0
    if ENTROPY:
        entropy = log_sum - tl.sum(moments, 0) / total
    return m + log_sum, entropy


@triton.jit
def _target_score(row, target, softcap, inv_temperature, V: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """l of the target; NaN, without a memory access, for a target outside of 0..V-1."""
    valid = (target >= 0) & (target < V)
    x = tl.load(row + target, mask=valid, other=0.0).to(tl.float32)
    l, _ = _scores(x, softcap, inv_temperature, HAS_SOFTCAP)
    return tl.where(valid, l, float("nan"))


@triton.jit
def _store_gradient(
    row, out, target, log_z, a, b, e, entropy, softcap, inv_temperature,
    V: tl.constexpr, BLOCK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """out_j = (a p_j + b [j = target] - e p_j (log p_j + H)) dl_j/dx_j; out may be row itself."""
    lanes = tl.arange(0, BLOCK)
    last: tl.constexpr = (V - 1) // BLOCK * BLOCK
    for back in range(0, V, BLOCK):
        columns = last - back + lanes
        inside = columns < V
        x = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
        l, unit = _scores(x, softcap, inv_temperature, HAS_SOFTCAP)
        p = tl.exp(l - log_z)
        if ENTROPY:
            d = a * p - tl.where(p > 0.0, e * p * (l - log_z + entropy), 0.0)
        else:
            d = a * p
        d = tl.where(columns == target, d + b, d) * inv_temperature
        if HAS_SOFTCAP:
            d = d * (1.0 - unit * unit)
        tl.store(out + columns, d.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_zeros(out, V: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        zeros = tl.zeros([BLOCK], tl.float32)
        tl.store(out + start + lanes, zeros.to(out.dtype.element_ty), mask=start + lanes < V)


@triton.jit
def _forward_kernel(
    logits, stride_n, targets, weights, loss, nll, log_normaliser, entropies, softcap, inv_temperature, z_loss,
    V: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride_n
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights + n).to(tl.float32)
    if weight != 0.0:
        at_target = _target_score(row, tl.load(targets + n).to(tl.int64), softcap, inv_temperature, V, HAS_SOFTCAP)
        log_z, entropy = _log_normaliser(row, softcap, inv_temperature, V, BLOCK, HAS_SOFTCAP, ENTROPY)
        tl.store(nll + n, log_z - at_target)
        tl.store(loss + n, log_z - at_target + z_loss * log_z * log_z)
        tl.store(log_normaliser + n, log_z)
        if ENTROPY:
            tl.store(entropies + n, entropy)
    else:
        tl.store(nll + n, 0.0)
        tl.store(loss + n, 0.0)
        tl.store(log_normaliser + n, 0.0)
        if ENTROPY:
            tl.store(entropies + n, 0.0)


@triton.jit
def _gradient_kernel(
    logits, stride_n, out, out_stride_n, targets, log_normaliser, a_N, b_N, e_N, entropies, softcap, inv_temperature,
    V: tl.constexpr, BLOCK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    a = tl.load(a_N + n)
    b = tl.load(b_N + n)
    e = 0.0
    entropy = 0.0
    live = (a != 0.0) | (b != 0.0)
    if ENTROPY:
        e = tl.load(e_N + n)
        entropy = tl.load(entropies + n)
        live = live | (e != 0.0)
    if live:
        target = tl.load(targets + n).to(tl.int64)
        a = tl.where((target >= 0) & (target < V), a, float("nan"))
        _store_gradient(
            logits + n * stride_n, out + n * out_stride_n, target, tl.load(log_normaliser + n), a, b, e, entropy,
            softcap, inv_temperature, V, BLOCK, HAS_SOFTCAP, ENTROPY,
        )  # fmt: skip
    else:
        _store_zeros(out + n * out_stride_n, V, BLOCK)


@triton.jit
def _loss_and_gradient_kernel(
    logits, stride_n, targets, weights, loss, nll, softcap, z_loss,
    V: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride_n
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights + n).to(tl.float32)
    if weight != 0.0:
        target = tl.load(targets + n).to(tl.int64)
        # Read before anything is overwritten: the reductions below are barriers for the whole program.
        at_target = _target_score(row, target, softcap, 1.0, V, HAS_SOFTCAP)
        log_z, entropy = _log_normaliser(row, softcap, 1.0, V, BLOCK, HAS_SOFTCAP, False)
        tl.store(nll + n, log_z - at_target)
        tl.store(loss + n, log_z - at_target + z_loss * log_z * log_z)
        weight = tl.where((target >= 0) & (target < V), weight, float("nan"))
        a = weight * (1.0 + 2.0 * z_loss * log_z)
        _store_gradient(
            row, row, target, log_z, a, -weight, 0.0, entropy, softcap, 1.0, V, BLOCK, HAS_SOFTCAP, False
        )  # fmt: skip
    else:
        tl.store(nll + n, 0.0)
        tl.store(loss + n, 0.0)
        _store_zeros(row, V, BLOCK)


def _rows(logits: Tensor) -> Tensor:
    """The logits if elements of a row are neighbours, as the kernels need, else a copy; rows may have any stride."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def forward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    z_loss: float,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Rows.forward` of purelm.kernels.cross_entropy."""
    logits, targets = _rows(logits), targets.contiguous()
    N, V = logits.shape
    loss, nll, log_z = (logits.new_empty(N, dtype=torch.float32) for _ in range(3))
    entropies = logits.new_empty(N if entropy else 0, dtype=torch.float32)
    BLOCK, num_warps = config(V)
    if N:
        with device_of(logits):
            _forward_kernel[(N,)](
                logits, logits.stride(0), targets, targets if weights is None else weights.contiguous(), loss, nll,
                log_z, entropies, softcap or 1.0, 1.0 / temperature, z_loss, V, BLOCK, weights is not None,
                softcap is not None, entropy, num_warps=num_warps,
            )  # fmt: skip
    return loss, nll, log_z, entropies


def gradient(
    logits: Tensor,
    targets: Tensor,
    log_z: Tensor,
    a: Tensor,
    b: Tensor,
    softcap: float | None,
    temperature: float = 1.0,
    e: Tensor | None = None,
    entropy: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`Rows.gradient` of purelm.kernels.cross_entropy."""
    logits, targets = _rows(logits), targets.contiguous()
    N, V = logits.shape
    out = logits.new_empty(N, V) if out is None else out
    BLOCK, num_warps = config(V)
    a, b, log_z = a.contiguous(), b.contiguous(), log_z.contiguous()
    if N:
        with device_of(logits):
            _gradient_kernel[(N,)](
                logits, logits.stride(0), out, out.stride(0), targets, log_z, a, b, a if e is None else e.contiguous(),
                a if entropy is None else entropy.contiguous(), softcap or 1.0, 1.0 / temperature, V, BLOCK,
                softcap is not None, e is not None, num_warps=num_warps,
            )  # fmt: skip
    return out


def loss_and_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    """`Rows.loss_and_gradient_` of purelm.kernels.cross_entropy: logits become their gradient."""
    N, V = logits.shape
    assert logits.stride(1) == 1 or V == 1
    targets = targets.contiguous()
    loss, nll = (logits.new_empty(N, dtype=torch.float32) for _ in range(2))
    BLOCK, num_warps = config(V)
    if N:
        with device_of(logits):
            _loss_and_gradient_kernel[(N,)](
                logits, logits.stride(0), targets, targets if weights is None else weights.contiguous(), loss, nll,
                softcap or 1.0, z_loss, V, BLOCK, weights is not None, softcap is not None, num_warps=num_warps,
            )  # fmt: skip
    return loss, nll


TRITON = Rows(forward, gradient, loss_and_gradient_)
