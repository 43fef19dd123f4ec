"""Attention over PyTorch's own fused kernels: the same function as `purelm.ops.attention`, with fewer options.

Use it as one op of the bundle: REFERENCE._replace(attention=sdpa_attention).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from purelm.ops.attention import check_heads, check_scale
from purelm.ops.masks import Segments, Window, span, visible

__all__ = ["sdpa_attention"]


def sdpa_attention(
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
    """`purelm.ops.attention.attention` by torch.nn.functional.scaled_dot_product_attention.

    Causal attention with T = S takes PyTorch's causal path, and no mask is built where nothing is hidden; any other
    window, alignment or segment is a boolean mask (T, S) or (B, 1, T, S), which keeps PyTorch off its fastest
    kernels. ValueError for a softcap, which PyTorch does not have. Not for torch.func.jvp.
    """
    if softcap is not None:
        raise ValueError(f"sdpa_attention: softcap must be None (PyTorch has none), got {softcap}; use the reference")
    check_heads(q_BTHK, k_BSGK, v_BSGK)
    check_scale(scale)
    T, H = q_BTHK.shape[1:3]
    S, G = k_BSGK.shape[1:3]
    q, k, v = q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2)
    gqa = H != G
    if segment_ids is None and T == S and span(T, S, causal, window) == (None, 0):
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        return o.transpose(1, 2)
    mask = visible(T, S, causal=causal, window=window, segment_ids=segment_ids, device=q.device)
    if mask is None:
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa).transpose(1, 2)
    mask = mask if mask.ndim == 2 else mask.unsqueeze(1)
    if T == S and not isinstance(segment_ids, tuple):
        # Each query sees itself, so no row is empty.
        o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
        return o.transpose(1, 2)
    # PyTorch promises nothing for a query that sees no key: let it see all of them, and put zeros there afterwards.
    some = mask.any(-1, keepdim=True)
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some, scale=scale, enable_gqa=gqa)
    return torch.where(some, o, 0.0).transpose(1, 2)
