"""Biases of attention scores that depend on positions: ALiBi and T5's buckets.

    attention(q, k, v, bias=alibi_bias(H, T, S))
    attention(q, k, v, bias=t5_bias(weight_NH, T, S), scale=1.0, causal=False)

Both are (H, T, S), broadcast over the batch. Query t of T stands at key position t + S - T (bottom-right, as in
`purelm.ops.masks`), so that the last queries of a row with a cache get the rows that they would get without one.
Legend: H heads, T query positions, S key positions, N buckets.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["alibi_bias", "alibi_slopes", "t5_bias", "t5_buckets"]


def alibi_slopes(
    n_heads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Float[Tensor, " h"]:
    """The slopes of ALiBi: 2^(-8/H), 2^(-16/H), ..., 2^-8 for a power of two.

    For any other H those of the next smaller power of two P, and then every other one of 2 P, as the authors' code
    does. Press et al. 2021 (arXiv:2108.12409), section 3.

    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    power = 1 << (n_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return torch.tensor(slopes, dtype=dtype, device=device)


def alibi_bias(
    n_heads: int,
    n_queries: int,
    n_keys: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, "h t s"]:
    """bias_hts = -slope_h |own position of t - s|: scores fall with distance, at another rate for each head.

    Press et al. 2021 (arXiv:2108.12409), "Train Short, Test Long", section 3, who use it with causal attention; the
    absolute value is its usual form for attention to both sides.

    >>> alibi_bias(2, 1, 3)
    tensor([[[-0.1250, -0.0625, -0.0000]],
    <BLANKLINE>
            [[-0.0078, -0.0039, -0.0000]]])
    """
    distance = _ahead(n_queries, n_keys, device).abs().to(dtype)
    return -alibi_slopes(n_heads, dtype=dtype, device=device)[:, None, None] * distance


def t5_buckets(
    n_queries: int,
    n_keys: int,
    *,
    n_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
    device: torch.device | None = None,
) -> Int[Tensor, "t s"]:
    """The number of the bucket of each distance, 0..N-1.

    Half of the buckets are one distance each, the others grow by a constant factor up to max_distance, and the last
    one has all that is farther. bidirectional: the upper half of the buckets is for keys after the query; otherwise
    those are all in bucket 0. Raffel et al. 2019 (arXiv:1910.10683), section 2.1; the numbers are those of the
    authors' code (mesh_tensorflow, `_relative_position_bucket`), in float32 as there.

    >>> t5_buckets(1, 9, n_buckets=8, max_distance=8, bidirectional=False)
    tensor([[7, 7, 6, 5, 4, 3, 2, 1, 0]])
    """
    least = 4 if bidirectional else 2
    if n_buckets < least or n_buckets % (2 if bidirectional else 1):
        kind = "an even number of at least 4" if bidirectional else "at least 2"
        raise ValueError(f"n_buckets must be {kind} with bidirectional={bidirectional}, got {n_buckets}")
    n = n_buckets // 2 if bidirectional else n_buckets
    exact = n // 2
    if max_distance <= exact:
        raise ValueError(f"max_distance must be above {exact}, the buckets of one distance each, got {max_distance}")
    ahead = _ahead(n_queries, n_keys, device)
    first = torch.where(ahead > 0, n, 0) if bidirectional else torch.zeros_like(ahead)
    distance = ahead.abs() if bidirectional else (-ahead).clamp(min=0)
    part = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (part * (n - exact)).long()).clamp(max=n - 1)
    return first + torch.where(distance < exact, distance, far)


def t5_bias(
    weight_NH: Float[Tensor, "n h"],
    n_queries: int,
    n_keys: int,
    *,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> Float[Tensor, "h t s"]:
    """bias_hts = weight[bucket of (t, s), h], a learned number for each bucket and head; differentiable in them.

    T5 has one weight for all layers of a stack and no factor on its scores: scale=1.0. Raffel et al. 2019
    (arXiv:1910.10683), section 2.1.

    >>> t5_bias(torch.arange(32.0).view(32, 1), 1, 3, bidirectional=False)
    tensor([[[2., 1., 0.]]])
    """
    buckets = t5_buckets(
        n_queries, n_keys, n_buckets=weight_NH.shape[0], max_distance=max_distance, bidirectional=bidirectional,
        device=weight_NH.device,
    )  # fmt: skip
    return torch.embedding(weight_NH, buckets).movedim(-1, 0)


def _ahead(n_queries: int, n_keys: int, device: torch.device | None) -> Int[Tensor, "t s"]:
    """How far each key lies after each query."""
    own = torch.arange(n_keys - n_queries, n_keys, device=device)
    return torch.arange(n_keys, device=device) - own.unsqueeze(-1)
