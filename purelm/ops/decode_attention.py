"""Attention of one new token a row over a cache, into which its key and value are put first.

Legend: B rows, S slots of the cache, H query heads, G key/value heads, K head dim, J = K / 2.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.ops.attention import attention, check_heads, check_scale
from purelm.ops.rope import Layout, rope
from purelm.ops.softcap import check_positive

__all__ = ["check_arguments", "decode_attention_"]


def decode_attention_(
    q_BHK: Float[Tensor, "b h k"],
    k_BGK: Float[Tensor, "b g k"],
    v_BGK: Float[Tensor, "b g k"],
    keys_BSGK: Float[Tensor, "b s g k"],
    values_BSGK: Float[Tensor, "b s g k"],
    length_B: Int[Tensor, " b"],
    *,
    cos_BJ: Float[Tensor, "#b j"] | None = None,
    sin_BJ: Float[Tensor, "#b j"] | None = None,
    layout: Layout = "interleaved",
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b h k"]:
    """o_bh = sum_s p_bhs values_bsg, p = softmax over s of scale rope(q_bh) . keys_bsg, s <= length_b, g = h G // H.

    Before that, rope(k) and v are written into slot length_b of row b, in the dtype of the cache: keys and values are
    changed in place. No gradients.

    Args:
        length_B: tokens of each row before the new one, int64 on the device of the cache, below S.
        cos_BJ, sin_BJ: rotary tables of the new tokens' positions, or both None: q and k are taken as they are.
        window: a token sees this many before its own; None: all.
        scale: None: 1 / sqrt(K). softcap: scores become softcap tanh(score / softcap).
    Raises:
        ValueError: shapes, dtypes or numbers that do not go together. A row that is full is an index error from the
            write (on a GPU, of the kernel in purelm.kernels, an output of NaN, since nothing waits for the device).
    """
    check_arguments(q_BHK, k_BGK, v_BGK, keys_BSGK, values_BSGK, length_B, cos_BJ, sin_BJ, window, scale, softcap)
    with torch.no_grad():
        if cos_BJ is not None and sin_BJ is not None:
            cos, sin = (t.expand(len(q_BHK), -1).unsqueeze(1) for t in (cos_BJ, sin_BJ))  # a row has one position
            q_BHK, k_BGK = (rope(x.unsqueeze(1), cos, sin, layout).squeeze(1) for x in (q_BHK, k_BGK))
        B, S = keys_BSGK.shape[:2]
        at = torch.arange(B, device=length_B.device), length_B
        keys_BSGK.index_put_(at, k_BGK.to(keys_BSGK.dtype))
        values_BSGK.index_put_(at, v_BGK.to(values_BSGK.dtype))
        if B and length_B.device.type == "cpu" and not torch.compiler.is_compiling():
            S = int(length_B.max()) + 1
        slots_S, last_B1 = torch.arange(S, device=length_B.device), length_B.unsqueeze(-1)
        seen_BS = slots_S <= last_B1
        if window is not None:
            seen_BS = seen_BS & (slots_S >= last_B1 - window)
        keys, values = (x[:, :S].to(q_BHK.dtype) for x in (keys_BSGK, values_BSGK))
        mask = seen_BS[:, None, None, :]
        o = attention(q_BHK.unsqueeze(1), keys, values, causal=False, mask=mask, scale=scale, softcap=softcap)
        return o.squeeze(1)


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor, cos: Tensor | None,
    sin: Tensor | None, window: int | None, scale: float | None, softcap: float | None,
) -> None:  # fmt: skip
    """ValueError unless the arguments of `decode_attention_` go together."""
    name = "decode_attention_"
    if q.ndim != 3 or keys.ndim != 4:
        shapes = f"{tuple(q.shape)} and {tuple(keys.shape)}"
        raise ValueError(f"{name}: q must be (B, H, K) and keys (B, S, G, K), got {shapes}")
    check_heads(q.unsqueeze(1), keys, values)
    B, _, G, K = keys.shape
    if keys.shape != values.shape or k.shape != (B, G, K) or v.shape != (B, G, K):
        raise ValueError(
            f"{name}: k and v must be {(B, G, K)} for a cache of {tuple(keys.shape)} keys, got {tuple(k.shape)}, "
            f"{tuple(v.shape)} and {tuple(values.shape)} values"
        )
    if length.shape != (B,) or length.dtype != torch.int64:
        raise ValueError(f"{name}: length must be ({B},) int64, got {tuple(length.shape)} {length.dtype}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{name}: cos and sin must be given both, or neither")
    if cos is not None and sin is not None and (cos.shape not in ((1, K // 2), (B, K // 2)) or sin.shape != cos.shape):
        raise ValueError(
            f"{name}: cos and sin must be (1 or {B}, {K // 2}), got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if window is not None and window < 0:
        raise ValueError(f"{name}: window must be at least 0, got {window}")
    check_scale(scale)
    check_positive("softcap", softcap, "")
