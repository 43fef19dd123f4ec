"""Passes over chunks of tokens, with the logits of one chunk at a time. Legend: N tokens, D d_model, V vocabulary.

Plain functions of tensors, without autograd. Matrix products are torch's (cuBLAS) in the dtype of the inputs; a chunk's
logits are processed by a `Rows` of kernels.cross_entropy. One buffer of logits serves all chunks.

The gradient of the unembedding is a sum over chunks in an fp32 accumulator of 4 V D bytes, which the matrix product
itself (addmm with out_dtype, only on CUDA) reads and writes once a chunk; so chunks should be few. A 16-bit result has
half as many bytes: half of the accumulator lies in the result's own storage, and is rounded in place at the end. So the
accumulator takes 2 V D bytes besides the result, not 4.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from purelm.caches import memo
from purelm.kernels.cross_entropy import Rows
from purelm.ops.precision import accumulator

__all__ = ["chunk_tokens", "gradients_again", "losses", "losses_and_gradients"]

LOGITS_BYTES = 512 * 2**20  # of one chunk
MIN_TOKENS = 2048  # below that the traffic of the accumulator outweighs the arithmetic


def chunk_tokens(N: int, V: int, itemsize: int) -> int:
    """Tokens of a chunk: 512 MiB of logits or 2048 tokens, whichever is more, and chunks of about equal size."""
    most = max(MIN_TOKENS, LOGITS_BYTES // (V * itemsize) // 128 * 128)
    n_chunks = -(-N // most)
    return min(most, -(-N // max(n_chunks, 1) // 128) * 128) if N else 1


def _chunks(hidden: Tensor, unembedding: Tensor, chunk: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk: (its tokens, their hidden states, their logits), the logits in one buffer that all chunks use."""
    N, V = hidden.shape[0], unembedding.shape[0]
    chunk = chunk or chunk_tokens(N, V, hidden.element_size())
    # Rows start at multiples of 128 bytes whatever V is: matrix products and vector loads need at least 16. Not on a
    # CPU, where torch's 16-bit product (2.13, oneDNN) reads beyond the rows of such a view.
    padded = -(-V // 64) * 64 if hidden.is_cuda else V
    buffer = hidden.new_empty(min(chunk, N), padded)
    for start in range(0, N, chunk):
        tokens = slice(start, min(start + chunk, N))
        x_ND = hidden[tokens]
        yield tokens, x_ND, torch.mm(x_ND, unembedding.t(), out=buffer[: x_ND.shape[0], :V])


@memo(None)
def _adds_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.addmm takes 16-bit factors and an fp32 sum here."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


class _Sum(NamedTuple):
    """A (V, D) sum under way: the result, and fp32 accumulators, each of a range of rows."""

    out: Tensor
    parts: list[tuple[slice, Tensor]]


def _start_sum(unembedding: Tensor, dtype: torch.dtype) -> _Sum:
    V, D = unembedding.shape
    out = unembedding.new_empty(V, D, dtype=dtype)
    if dtype == accumulator(dtype):
        return _Sum(out, [(slice(0, V), out)])
    half = V // 2
    inside = out.view(-1)[: 2 * half * D].view(torch.float32).view(half, D)
    beside = unembedding.new_empty(V - half, D, dtype=torch.float32)
    return _Sum(out, [(slice(0, half), inside), (slice(half, V), beside)])


def _add(total: _Sum, d_logits_NV: Tensor, x_ND: Tensor, first: bool) -> None:
    """total += d_logits^T x, or = for the first."""
    beta = 0 if first else 1
    for rows, part in total.parts:
        d_VN = d_logits_NV[:, rows].t()
        if part.dtype == x_ND.dtype:
            torch.addmm(part, d_VN, x_ND, beta=beta, out=part)
        elif x_ND.is_cuda and _adds_into_fp32(x_ND.device, x_ND.dtype):
            torch.addmm(part, d_VN, x_ND, out_dtype=torch.float32, beta=beta, out=part)
        else:  # in blocks of rows: factors and products are widened to fp32, a block at a time
            x_wide = x_ND.float()
            for block in range(0, part.shape[0], 8192):
                some = part[block : block + 8192]
                torch.addmm(some, d_VN[block : block + 8192].float(), x_wide, beta=beta, out=some)


def _finish(total: _Sum) -> Tensor:
    """The sum in its own dtype.

    The fp32 accumulator in the result's own storage is rounded in place. A rounded row takes half of the bytes, so
    rows [n, 2n) are written where the accumulator's rows [n / 2, n) were, which have been read by then: front first,
    twice as many rows at a time, no row is overwritten before it is read.
    """
    if len(total.parts) == 1:
        return total.out
    (front, inside), (back, beside) = total.parts
    half = front.stop
    done = min(64, half)
    total.out[:done] = inside[:done].to(total.out.dtype)  # through a copy: these overlap
    while done < half:
        stop = min(2 * done, half)
        total.out[done:stop] = inside[done:stop]
        done = stop
    total.out[back] = beside
    return total.out


def losses(
    rows: Rows,
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    z_loss: float,
    temperature: float,
    entropy: bool,
    chunk: int | None,
) -> tuple[Tensor, ...]:
    """(loss, nll, log_z, entropy) of each token, the last one empty unless asked for: 2 N V D FLOPs."""
    found = [
        rows.forward(logits, targets[n], None if weights is None else weights[n], softcap, z_loss, temperature, entropy)
        for n, _, logits in _chunks(hidden, unembedding, chunk)
    ]
    if not found:
        return tuple(hidden.new_empty(0, dtype=accumulator(hidden.dtype)) for _ in range(4))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def losses_and_gradients(
    rows: Rows,
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: float | None,
    z_loss: float,
    chunk: int | None,
    dtype: torch.dtype,
    need_hidden: bool,
    need_unembedding: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, nll) of each token and the gradients of sum w loss, from one pass: 6 N V D FLOPs.

    A gradient that is not asked for is an empty tensor; that of the unembedding comes in `dtype`.
    """
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    total = _start_sum(unembedding, dtype) if need_unembedding else None
    found = []
    for n, x_ND, logits in _chunks(hidden, unembedding, chunk):
        found.append(
            rows.loss_and_gradient_(logits, targets[n], None if weights is None else weights[n], softcap, z_loss)
        )
        if need_hidden:
            torch.mm(logits, unembedding, out=d_hidden[n])
        if total is not None:
            _add(total, logits, x_ND, first=n.start == 0)
    empty = hidden.new_empty(0, dtype=accumulator(hidden.dtype))
    loss, nll = (torch.cat(parts) for parts in zip(*found, strict=True)) if found else (empty, empty.clone())
    return loss, nll, d_hidden, _result(total, unembedding, bool(found))


def gradients_again(
    rows: Rows,
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    log_z: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor | None,
    entropy: Tensor | None,
    softcap: float | None,
    temperature: float,
    chunk: int | None,
    need_hidden: bool,
    need_unembedding: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of per-token results (`Rows.gradient`), from recomputed logits: 6 N V D FLOPs."""
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    total = _start_sum(unembedding, unembedding.dtype) if need_unembedding else None
    for n, x_ND, logits in _chunks(hidden, unembedding, chunk):
        rows.gradient(
            logits, targets[n], log_z[n], a[n], b[n], softcap, temperature, None if e is None else e[n],
            None if entropy is None else entropy[n], out=logits,
        )  # fmt: skip
        if need_hidden:
            torch.mm(logits, unembedding, out=d_hidden[n])
        if total is not None:
            _add(total, logits, x_ND, first=n.start == 0)
    return d_hidden, _result(total, unembedding, hidden.shape[0] > 0)


def _result(total: _Sum | None, unembedding: Tensor, any_tokens: bool) -> Tensor:
    if total is None:
        return unembedding.new_empty(0)
    return _finish(total) if any_tokens else total.out.zero_()
