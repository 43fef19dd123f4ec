"""Flash attention tile by tile in plain torch: the algorithm of the kernels, on any device and in any dtype.

Dao 2023, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2: keys in tiles, a running maximum and sum for the
softmax, and a backward pass that forms the probabilities again from the log-sum-exp. Memory grows with the length, not
with its square. It is what the op runs on a CPU and the oracle of the Triton kernels.

Legend: B batch, T query positions, S key positions, H query heads, G key/value heads, R = H / G, K and E head dims,
N keys of a tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from purelm.ops.precision import accumulator

__all__ = ["tiled_backward", "tiled_forward"]

TILE = 512  # keys


def tiled_forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    segments: tuple[Tensor, Tensor] | None,
    sinks_H: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """(o (B, T, H, E) in q's dtype, lse (B, H, T) in fp32 or fp64)."""
    q = _grouped(q_BTHK, k_BSGK.shape[2])
    B, G, R, T, _ = q.shape
    m = q.new_full((B, G, R, T), -torch.inf)
    total = torch.zeros_like(m)
    acc = q.new_zeros((B, G, R, T, v_BSGK.shape[-1]))
    for at, k, v in _tiles(k_BSGK, v_BSGK, tile):
        s, _ = _scores(q, k, at, k_BSGK.shape[1], segments, left, right, scale, softcap)
        m_new = torch.maximum(m, s.amax(-1))
        base = torch.where(m_new == -torch.inf, 0.0, m_new)  # a query that has seen no key yet
        p = torch.exp(s - base.unsqueeze(-1))
        alpha = torch.exp(m - base)
        total = total * alpha + p.sum(-1)
        acc = acc * alpha.unsqueeze(-1) + p.to(v_BSGK.dtype).to(acc.dtype) @ v
        m = m_new
    if sinks_H is not None:
        sink = sinks_H.to(q.dtype).view(1, G, R, 1)
        m_new = torch.maximum(m, sink)
        alpha = torch.exp(m - m_new)
        total = total * alpha + torch.exp(sink - m_new)
        acc, m = acc * alpha.unsqueeze(-1), m_new
    some = total > 0
    safe = torch.where(some, total, 1.0)
    lse = torch.where(some, m + safe.log(), -torch.inf)
    return _ungrouped(acc / safe.unsqueeze(-1)).to(q_BTHK.dtype), lse.flatten(1, 2)


def tiled_backward(
    do_BTHE: Tensor,
    dlse_BHT: Tensor | None,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    o_BTHE: Tensor,
    lse_BHT: Tensor,
    segments: tuple[Tensor, Tensor] | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta (B, H, T)): with p = exp(s - lse), dp = do v^T and delta = rowsum(o do) - dlse,

    ds = p (dp - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T do;

    a softcap multiplies ds by 1 - (s / c)^2. The share of a sink is exp(sink - lse), its gradient -share delta.
    """
    G = k_BSGK.shape[2]
    q, do, o = (_grouped(x, G) for x in (q_BTHK, do_BTHE, o_BTHE))
    # A query that sees nothing has -inf, which would make NaN of second derivatives. All its scores are -inf as well.
    lse = torch.where(lse_BHT == -torch.inf, 0.0, lse_BHT).unflatten(1, (G, -1)).unsqueeze(-1)
    delta = (do * o).sum(-1, keepdim=True)
    if dlse_BHT is not None:
        delta = delta - dlse_BHT.unflatten(1, (G, -1)).unsqueeze(-1)
    dq = torch.zeros_like(q)
    dks, dvs = [k_BSGK.new_zeros(k_BSGK.shape[0], 0, *k_BSGK.shape[2:])], [v_BSGK.new_zeros(v_BSGK[:, :0].shape)]
    for at, k, v in _tiles(k_BSGK, v_BSGK, tile):
        s, slope = _scores(q, k, at, k_BSGK.shape[1], segments, left, right, scale, softcap)
        p = torch.where(s == -torch.inf, 0.0, torch.exp(s - lse))
        dvs.append((p.to(do_BTHE.dtype).to(p.dtype).mT @ do).sum(2).movedim(1, 2).to(v_BSGK.dtype))
        ds = p * (do @ v.mT - delta)
        if slope is not None:
            ds = ds * slope
        ds = ds.to(q_BTHK.dtype).to(p.dtype)
        dq = dq + ds @ k
        dks.append(((ds.mT @ q).sum(2).movedim(1, 2) * scale).to(k_BSGK.dtype))
    dq = _ungrouped(dq * scale).to(q_BTHK.dtype)
    return dq, torch.cat(dks, 1), torch.cat(dvs, 1), delta.squeeze(-1).flatten(1, 2)


def _grouped(x_BTHK: Tensor, G: int) -> Tensor:
    """(B, G, R, T, K) in the dtype of sums."""
    return x_BTHK.to(accumulator(x_BTHK.dtype)).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)


def _ungrouped(x_BGRTK: Tensor) -> Tensor:
    return x_BGRTK.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def _tiles(k_BSGK: Tensor, v_BSGK: Tensor, tile: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(positions (N,), k (B, G, 1, N, K), v (B, G, 1, N, E)) of each tile of keys."""
    wide = accumulator(k_BSGK.dtype)
    for first in range(0, k_BSGK.shape[1], tile):
        k, v = (x[:, first : first + tile].to(wide).movedim(1, 2).unsqueeze(2) for x in (k_BSGK, v_BSGK))
        yield torch.arange(first, first + k.shape[3], device=k.device), k, v


def _scores(
    q: Tensor,
    k: Tensor,
    at: Tensor,
    S: int,
    segments: tuple[Tensor, Tensor] | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Any]:
    """Scores (B, G, R, T, N), -inf where hidden, and d score / d (scale q k) under a softcap."""
    s = (q @ k.mT) * scale
    slope = None
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    ahead = at - torch.arange(S - q.shape[3], S, device=at.device).unsqueeze(-1)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if right is not None:
        seen = seen & (ahead <= right)
    if left is not None:
        seen = seen & (ahead >= -left)
    if segments is not None:
        seen = seen & (segments[0].unsqueeze(-1) == segments[1][:, at].unsqueeze(-2))[:, None, None]
    return torch.where(seen, s, -torch.inf), slope
