"""Scaled dot-product attention, written out.

Legend: B batch, T query positions, S key positions, H query heads, G key/value heads, R = H / G, K head dim,
E value head dim (usually K).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.ops.masks import Segments, Window, visible
from purelm.ops.precision import accumulator
from purelm.ops.softcap import check_positive, soft_cap
from purelm.ops.softmax import softmax

__all__ = ["attention", "check_heads", "check_scale"]


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q (B,T,H,K), k (B,S,G,K), v (B,S,G,E) fit together and G divides H."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k, v must have the 4 axes (batch, time, heads, head_dim), got {shapes}")
    if q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"q, k, v must be (B,T,H,K), (B,S,G,K), (B,S,G,E), got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"the {k.shape[2]} heads of k and v must divide the {q.shape[2]} of q")


def check_scale(scale: float | None) -> None:
    """ValueError unless the factor of the scores is above 0 and finite, or None for 1 / sqrt(K)."""
    check_positive("scale", scale, ": give None for 1 / sqrt(head_dim), or scale q yourself")


def attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BSGK: Float[Tensor, "b s g k"],
    v_BSGK: Float[Tensor, "b s g e"],
    *,
    causal: bool = True,
    window: Window = None,
    segment_ids: Segments = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b t h e"]:
    """o = softmax(scale q k^T) v over the keys that a query sees; a query that sees none gets zeros.

    Query head h reads key/value head h // (H/G), which is never repeated in memory. Scores are summed by the matrix
    product in its own precision and everything between the two products is fp32; q's dtype is returned. In fp16, whose
    largest number is 65504, the power of two in `scale` comes before the product, where it costs no digits.

    Args:
        causal: a query sees no key after its own position. The last query stands at the last key (bottom-right) when
            T != S, so with T > S the first T - S queries see nothing.
        window: (left, right), or left alone: a query sees this many keys to each side of its own position, itself
            always counted beside them (a "sliding window of n" elsewhere is often left = n - 1). None: unlimited.
        segment_ids: (B, T), or a pair for queries and keys: only equal ids see each other. Give padding the id 0.
        scale: above 0; 1 / sqrt(K) when absent.
        softcap: scores s become c tanh(s / c) before the mask (Gemma 2); above 0.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; shared heads from Ainslie et al. 2023
    (arXiv:2305.13245).

    >>> x = torch.ones(1, 3, 2, 4)
    >>> attention(x, x, x).shape
    torch.Size([1, 3, 2, 4])
    """
    check_heads(q_BTHK, k_BSGK, v_BSGK)
    check_scale(scale)
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    R = H // G
    # The R query heads of one key/value head are stacked along time: one product serves them all.
    q_BGMK = q_BTHK.reshape(B, T, G, R, K).permute(0, 2, 3, 1, 4).reshape(B, G, R * T, K)
    scale = 1.0 / math.sqrt(K) if scale is None else scale
    if q_BTHK.dtype == torch.float16 and scale < 1.0:
        before = 2.0 ** math.floor(math.log2(scale))
        q_BGMK, scale = q_BGMK * before, scale / before
    s_BGRTS = (q_BGMK @ k_BSGK.permute(0, 2, 3, 1)).reshape(B, G, R, T, S).to(accumulator(q_BTHK.dtype))
    s_BGRTS = soft_cap(s_BGRTS * scale, softcap)
    mask = visible(T, S, causal=causal, window=window, segment_ids=segment_ids, device=q_BTHK.device)
    if mask is not None:
        mask = mask if mask.ndim == 2 else mask.unsqueeze(1).unsqueeze(1)
        s_BGRTS = torch.where(mask, s_BGRTS, -torch.inf)
    p_BGMS = softmax(s_BGRTS).to(v_BSGK.dtype).reshape(B, G, R * T, S)
    o_BGRTE = (p_BGMS @ v_BSGK.permute(0, 2, 1, 3)).reshape(B, G, R, T, v_BSGK.shape[-1])
    return o_BGRTE.permute(0, 3, 1, 2, 4).reshape(B, T, H, v_BSGK.shape[-1])
