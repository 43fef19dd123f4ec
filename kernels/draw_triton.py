"""The Triton kernel of draw_. Legend: B rows, V vocabulary, M random numbers a row, N logits of a tile."""

import triton
import triton.language as tl
from torch import Tensor

from purelm.generate.rows import Rows
from purelm.kernels.launch import all_aligned, device_number, device_of, launch, relaunch
from purelm.kernels.log_prob_rows_triton import lanes, log_prob, sums

__all__ = ["draw_"]


@triton.jit
def _draw(
    logits_ptr, uniforms_ptr, stops_ptr, token_ptr, n_ptr, limit_ptr, open_ptr, stopped_ptr, bad_ptr, tokens_ptr,
    logprobs_ptr, model_ptr,
    V, M, logits_b, temperature,
    GREEDY: tl.constexpr, TEMPERED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, N)
    row = logits_ptr + b * logits_b

    m, total, mass, first, finite = sums(row, V, temperature, TEMPERED, N)
    n = tl.load(n_ptr + b)
    slot = b * M + tl.minimum(n, M - 1)

    token = tl.zeros((), tl.int32)
    if GREEDY:
        token = first
    elif finite:
        # The first token at which the sum of probabilities exceeds the target; of rounding is left the last possible.
        target = tl.load(uniforms_ptr + slot).to(tl.float64) * mass
        before = tl.zeros((), tl.float64)
        found = 0
        start = 0
        while (start < V) & (found == 0):
            x = tl.load(row + start + at, mask=start + at < V, other=float("-inf")).to(tl.float32)
            if TEMPERED:
                w = tl.exp((x - m) / temperature)
            else:
                w = tl.exp(x - m)
            w = w.to(tl.float64)
            possible = w > 0.0
            here = tl.sum(w, 0)
            last = tl.max(tl.where(possible, start + at, -1), 0)
            token = tl.where(last >= 0, last, token)
            if before + here > target:
                over = (before + tl.cumsum(w, 0) > target) & possible
                first = tl.min(tl.where(over, start + at, V), 0)
                token = tl.where(first < V, first, token)
                found = 1
            before += here
            start += N
    x = tl.load(row + tl.minimum(token, V - 1)).to(tl.float32)  # of a row that is not finite, any
    chosen, model = log_prob(x, m, total, mass, temperature, TEMPERED)
    if GREEDY:
        chosen = 0.0 * chosen
    is_open = tl.load(open_ptr + b) != 0
    if is_open & finite:
        stop = tl.load(stops_ptr + token) != 0
        tl.store(token_ptr + b, token.to(tl.int64))
        tl.store(n_ptr + b, n + 1)
        tl.store(tokens_ptr + slot, token.to(tl.int64))
        tl.store(logprobs_ptr + slot, chosen.to(tl.float64))
        tl.store(model_ptr + slot, model.to(tl.float64))
        tl.store(open_ptr + b, (stop == 0) & (n + 1 < tl.load(limit_ptr + b)))
        if stop:
            tl.store(stopped_ptr + b, stop)
    elif is_open:
        tl.store(bad_ptr + b, is_open)
        tl.store(open_ptr + b, finite)


def draw_(logits: Tensor, rows: Rows, temperature: float, stops: Tensor) -> None:
    """One more token for each open row, written into the tensors of `rows`."""
    B, V = logits.shape
    if B == 0:
        return
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    tensors = (
        logits, rows.uniforms_BN, stops, rows.token_B, rows.n_B, rows.limit_B, rows.open_B, rows.stopped_B, rows.bad_B,
        rows.tokens_BN, rows.logprobs_BN, rows.model_logprobs_BN,
    )  # fmt: skip
    M = rows.uniforms_BN.shape[1]
    shape = logits.dtype, tuple(logits.shape), M, logits.stride(0)
    key = device_number(logits), shape, temperature, all_aligned(tensors)
    with device_of(logits):
        if not relaunch(_draw, key, tensors):
            constants = {
                "GREEDY": temperature == 0.0, "TEMPERED": temperature not in (0.0, 1.0),
                "N": lanes(V),
            }  # fmt: skip
            args = *tensors, V, M, logits.stride(0), temperature or 1.0
            launch(_draw, key, tensors, B, args, constants, {"num_warps": 8})
