"""Flash attention tile by tile in plain torch: the algorithm of the kernels, on any device and in any dtype.

Dao 2023, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2: keys in tiles, a running maximum and sum for the
softmax, and a backward pass that recomputes the probabilities from the log-sum-exp. Memory grows with the length, not
with its square. The op runs this on a CPU, and the Triton kernels are tested against it.

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
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """(o (B, T, H, E) in q's dtype, lse (B, H, T) in fp32 or fp64); bias and mask (B, H, T, S), or 1 for an axis."""
    q = _grouped(q_BTHK, k_BSGK.shape[2])
    B, G, R, T, _ = q.shape
    m = q.new_full((B, G, R, T), -torch.inf)
    total = torch.zeros_like(m)
    acc = q.new_zeros((B, G, R, T, v_BSGK.shape[-1]))
    extra = _per_group(bias, G), _per_group(mask, G)
    for at, k, v in _tiles(k_BSGK, v_BSGK, tile):
        s, _ = _scores(q, k, at, k_BSGK.shape[1], segments, left, right, scale, softcap, *extra)
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
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    need_bias: bool = False,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta (B, H, T), dbias): with p = exp(s - lse), dp = do v^T and delta = rowsum(o do) - dlse,

    ds = p (dp - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T do;

    dbias is ds, summed over the axes that the bias is broadcast along (an empty tensor unless need_bias). A softcap
    then multiplies ds by 1 - (s / c)^2. The share of a sink is exp(sink - lse), its gradient -share delta.
    """
    G = k_BSGK.shape[2]
    q, do, o = (_grouped(x, G) for x in (q_BTHK, do_BTHE, o_BTHE))
    # lse is -inf for a query that sees nothing, which would make second derivatives NaN. Its scores are -inf as well,
    # so its p is 0 with any lse.
    lse = torch.where(lse_BHT == -torch.inf, 0.0, lse_BHT).unflatten(1, (G, -1)).unsqueeze(-1)
    delta = (do * o).sum(-1, keepdim=True)
    if dlse_BHT is not None:
        delta = delta - dlse_BHT.unflatten(1, (G, -1)).unsqueeze(-1)
    dq = torch.zeros_like(q)
    dks, dvs = [k_BSGK.new_zeros(k_BSGK.shape[0], 0, *k_BSGK.shape[2:])], [v_BSGK.new_zeros(v_BSGK[:, :0].shape)]
    extra = _per_group(bias, G), _per_group(mask, G)
    dbiases: list[Tensor] = []
    for at, k, v in _tiles(k_BSGK, v_BSGK, tile):
        s, slope = _scores(q, k, at, k_BSGK.shape[1], segments, left, right, scale, softcap, *extra)
        p = torch.where(s == -torch.inf, 0.0, torch.exp(s - lse))
        dvs.append((p.to(do_BTHE.dtype).to(p.dtype).mT @ do).sum(2).movedim(1, 2).to(v_BSGK.dtype))
        ds = p * (do @ v.mT - delta)
        if need_bias:
            dbiases.append(_summed_to(ds, extra[0]))
        if slope is not None:
            ds = ds * slope
        ds = ds.to(q_BTHK.dtype).to(p.dtype)
        dq = dq + ds @ k
        dks.append(((ds.mT @ q).sum(2).movedim(1, 2) * scale).to(k_BSGK.dtype))
    dq = _ungrouped(dq * scale).to(q_BTHK.dtype)
    dbias = q_BTHK.new_empty(0)
    if need_bias and bias is not None:
        if bias.shape[-1] == 1:
            dbias = sum(dbiases, torch.zeros_like(bias, dtype=q.dtype).unflatten(1, extra[0].shape[1:3]))
        else:
            dbias = torch.cat(dbiases, -1) if dbiases else torch.zeros_like(extra[0], dtype=q.dtype)
        dbias = dbias.flatten(1, 2).to(bias.dtype)
    return dq, torch.cat(dks, 1), torch.cat(dvs, 1), delta.squeeze(-1).flatten(1, 2), dbias


def _per_group(x_BHTS: Tensor | None, G: int) -> Any:
    """(B, G, R, T, S), with 1 for both G and R where all heads share it."""
    if x_BHTS is None:
        return None
    return x_BHTS.unsqueeze(2) if x_BHTS.shape[1] == 1 else x_BHTS.unflatten(1, (G, -1))


def _summed_to(ds_BGRTN: Tensor, bias_BGRTS: Tensor) -> Tensor:
    """ds of one tile of keys, summed over the axes that the bias is broadcast along."""
    over = [i for i in range(5) if bias_BGRTS.shape[i] == 1]
    return ds_BGRTN.sum(over, keepdim=True) if over else ds_BGRTN


def _grouped(x_BTHK: Tensor, G: int) -> Tensor:
    """(B, G, R, T, K) in the accumulator's dtype."""
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
    bias: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Any]:
    """Scores (B, G, R, T, N), -inf where hidden, and d score / d (scale q k) under a softcap."""
    s = (q @ k.mT) * scale
    slope = None
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    if bias is not None:
        s = s + (bias if bias.shape[-1] == 1 else bias[..., at]).to(s.dtype)
    ahead = at - torch.arange(S - q.shape[3], S, device=at.device).unsqueeze(-1)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if right is not None:
        seen = seen & (ahead <= right)
    if left is not None:
        seen = seen & (ahead >= -left)
    if segments is not None:
        seen = seen & (segments[0].unsqueeze(-1) == segments[1][:, at].unsqueeze(-2))[:, None, None]
    if mask is not None:
        seen = seen & (mask if mask.shape[-1] == 1 else mask[..., at])
    return torch.where(seen, s, -torch.inf), slope
