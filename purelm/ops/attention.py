"""Scaled dot-product attention, written out.

Legend: B batch, T query positions, S key positions, H query heads, G key/value heads, R = H / G, K head dim,
E value head dim (usually K).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from purelm.ops.masks import Segments, Window, visible
from purelm.ops.precision import accumulator
from purelm.ops.softcap import check_positive, soft_cap
from purelm.ops.softmax import softmax

__all__ = ["as_scores", "attention", "attention_with_lse", "check_heads", "check_scale", "over_leading_axes"]


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q (..., T, H, K), k (..., S, G, K), v (..., S, G, E) fit together and G divides H."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim < 3 or not q.ndim == k.ndim == v.ndim:
        raise ValueError(f"q, k, v must have equally many axes, (..., time, heads, head_dim), got {shapes}")
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.shape[:-3] != k.shape[:-3]:
        raise ValueError(f"q, k, v must be (..., T, H, K), (..., S, G, K), (..., S, G, E), got {shapes}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"the {k.shape[-2]} heads of k and v must divide the {q.shape[-2]} of q")


def check_scale(scale: float | None) -> None:
    """ValueError unless the factor of the scores is above 0 and finite, or None for 1 / sqrt(K)."""
    check_positive("scale", scale, ": give None for 1 / sqrt(head_dim), or scale q yourself")


def as_scores(name: str, x: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A bias or mask as (B or 1, H or 1, T or 1, S or 1), all leading axes in one; None stays None.

    ValueError unless it broadcasts to (..., H, T, S) and is floating ("bias") or boolean ("mask").
    """
    if x is None:
        return None
    if name == "bias" and not x.is_floating_point():
        raise ValueError(f"bias must be floating, got {x.dtype}: a boolean tensor is a mask, True where a key is seen")
    if name == "mask" and x.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, True where a key is seen, got {x.dtype}: what is added is a bias")
    lead = q.shape[:-3]
    wanted = (*lead, q.shape[-2], q.shape[-3], k.shape[-3])
    if x.ndim > len(wanted) or any(n not in (1, m) for n, m in zip(x.shape[::-1], wanted[::-1], strict=False)):
        raise ValueError(f"{name} must broadcast to (..., heads, queries, keys) {wanted}, got {tuple(x.shape)}")
    x = x.reshape((1,) * (len(wanted) - x.ndim) + tuple(x.shape))
    if len(lead) != 1:
        shared = all(n == 1 for n in x.shape[:-3])
        x = x.reshape(1, *x.shape[-3:]) if shared else x.expand(*lead, *x.shape[-3:]).flatten(0, -4)
    return x


def over_leading_axes(
    f: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, segment_ids: Segments, **options: Any
) -> Any:
    """f, an attention of one batch axis, for any number of them; options are f's, bias and mask among them.

    Each of f's results has the batch in front, where the leading axes come back.
    """
    check_heads(q, k, v)
    lead = q.shape[:-3]
    n = math.prod(lead)
    for name in ("bias", "mask"):
        options[name] = as_scores(name, options[name], q, k)

    def flat(ids: Tensor) -> Tensor:
        return ids.expand(*lead, ids.shape[-1]).reshape(n, ids.shape[-1])

    if isinstance(segment_ids, tuple):
        segment_ids = flat(segment_ids[0]), flat(segment_ids[1])
    elif segment_ids is not None:
        segment_ids = flat(segment_ids)
    out = f(*(x.reshape(n, *x.shape[-3:]) for x in (q, k, v)), segment_ids=segment_ids, **options)
    if isinstance(out, Tensor):
        return out.reshape(*lead, *out.shape[1:])
    return tuple(x.reshape(*lead, *x.shape[1:]) for x in out)


def attention(
    q_BTHK: Float[Tensor, "*batch t h k"],
    k_BSGK: Float[Tensor, "*batch s g k"],
    v_BSGK: Float[Tensor, "*batch s g e"],
    *,
    causal: bool = True,
    window: Window = None,
    segment_ids: Segments = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Tensor, "..."] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "*batch t h e"]:
    """o = softmax(scale q k^T + bias) v over the keys that a query sees; a query that sees none gets zeros.

    Query head h reads key/value head h // (H/G), which is never repeated in memory. Scores are summed by the matrix
    product in its own precision and everything between the two products is fp32; q's dtype is returned. In fp16, whose
    largest number is 65504, the power of two in `scale` comes before the product, where it costs no digits.

    Args:
        q_BTHK, k_BSGK, v_BSGK: any number of batch axes, the same for all three, then time, heads, features.
        causal: a query sees no key after its own position. The last query stands at the last key (bottom-right) when
            T != S, so with T > S the first T - S queries see nothing. True unless you say otherwise, also with a mask.
        window: (left, right), or left alone: a query sees this many keys to each side of its own position, itself
            always counted beside them (a "sliding window of n" elsewhere is often left = n - 1). None: unlimited.
        segment_ids: (B, T), or a pair for queries and keys: only equal ids see each other. Give padding the id 0.
        scale: above 0; 1 / sqrt(K) when absent.
        softcap: scores s become c tanh(s / c) before the bias and the mask (Gemma 2); above 0.
        bias: added to the scaled scores, in fp32; broadcastable to (B, H, T, S), heads before time as scores have them.
            Differentiable. -inf hides a key. `purelm.ops.attention_bias` has ALiBi and T5's.
        mask: True where a query sees a key; broadcastable to (B, H, T, S). What causal, window or segment_ids hide
            stays hidden.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; shared heads from Ainslie et al. 2023
    (arXiv:2305.13245).

    >>> x = torch.ones(1, 3, 2, 4)
    >>> attention(x, x, x).shape
    torch.Size([1, 3, 2, 4])
    """
    options: dict[str, Any] = {
        "causal": causal, "window": window, "scale": scale, "softcap": softcap, "bias": bias, "mask": mask,
    }  # fmt: skip
    if q_BTHK.ndim != 4:
        return over_leading_axes(attention, q_BTHK, k_BSGK, v_BSGK, segment_ids, **options)
    return _weighted(softmax(_scores(q_BTHK, k_BSGK, v_BSGK, segment_ids, **options)), v_BSGK)


def attention_with_lse(
    q_BTHK: Float[Tensor, "*batch t h k"],
    k_BSGK: Float[Tensor, "*batch s g k"],
    v_BSGK: Float[Tensor, "*batch s g e"],
    *,
    causal: bool = True,
    window: Window = None,
    segment_ids: Segments = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Tensor, "..."] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "*batch t h e"], Float[Tensor, "*batch h t"]]:
    """(o, lse): `attention`, and the natural log of the sum of exp of each query's scores; both differentiable.

    lse (B, H, T) is fp32 (fp64 for fp64), -inf for a query that sees no key. It is what attention over parts of the
    keys needs to become attention over all of them (ring attention, a cache in pieces):

        lse = log(exp(lse_1) + exp(lse_2)),   o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2

    >>> q, k, v = (torch.arange(8.0 * i, 8.0 * i + 8).sin().view(1, 4, 1, 2) for i in range(3))
    >>> (a, lse_a), (b, lse_b) = (attention_with_lse(q, k[:, at], v[:, at], causal=False) for at in ([0], [1, 2, 3]))
    >>> share = torch.sigmoid(lse_a - lse_b).transpose(1, 2).unsqueeze(-1)
    >>> torch.allclose(share * a + (1 - share) * b, attention(q, k, v, causal=False))
    True
    """
    options: dict[str, Any] = {
        "causal": causal, "window": window, "scale": scale, "softcap": softcap, "bias": bias, "mask": mask,
    }  # fmt: skip
    if q_BTHK.ndim != 4:
        return over_leading_axes(attention_with_lse, q_BTHK, k_BSGK, v_BSGK, segment_ids, **options)
    s_BGRTS = _scores(q_BTHK, k_BSGK, v_BSGK, segment_ids, **options)
    return _weighted(softmax(s_BGRTS), v_BSGK), _log_sum_exp(s_BGRTS).flatten(1, 2)


def _scores(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, segment_ids: Segments, *, causal: bool, window: Window,
    scale: float | None, softcap: float | None, bias: Tensor | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """(B, G, R, T, S) in fp32 (fp64 for fp64), -inf where hidden."""
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
    if bias is not None:
        s_BGRTS = s_BGRTS + _by_groups(as_scores("bias", bias, q_BTHK, k_BSGK), G).to(s_BGRTS.dtype)
    seen = visible(T, S, causal=causal, window=window, segment_ids=segment_ids, device=q_BTHK.device)
    if seen is not None:
        seen = seen if seen.ndim == 2 else seen.unsqueeze(1).unsqueeze(1)
    if mask is not None:
        also = _by_groups(as_scores("mask", mask, q_BTHK, k_BSGK), G)
        seen = also if seen is None else seen & also
    return s_BGRTS if seen is None else torch.where(seen, s_BGRTS, -torch.inf)


def _by_groups(x_BHTS: Any, G: int) -> Tensor:
    """(B, G, R, T, S), with 1 for both G and R where all heads share it."""
    return x_BHTS.unsqueeze(2) if x_BHTS.shape[1] == 1 else x_BHTS.unflatten(1, (G, -1))


def _weighted(p_BGRTS: Tensor, v_BSGK: Tensor) -> Tensor:
    """o = p v, (B, T, H, E)."""
    B, G, R, T, S = p_BGRTS.shape
    p_BGMS = p_BGRTS.to(v_BSGK.dtype).reshape(B, G, R * T, S)
    o_BGRTE = (p_BGMS @ v_BSGK.permute(0, 2, 1, 3)).reshape(B, G, R, T, v_BSGK.shape[-1])
    return o_BGRTE.permute(0, 3, 1, 2, 4).reshape(B, T, G * R, v_BSGK.shape[-1])


def _log_sum_exp(s: Tensor) -> Tensor:
    """log sum exp over the last axis; -inf, with a gradient of zeros, where all of it is."""
    if s.shape[-1] == 0:
        return s.new_full(s.shape[:-1], -torch.inf)
    m = s.detach().amax(-1)
    m = torch.where(m == -torch.inf, 0.0, m)
    total = torch.exp(s - m.unsqueeze(-1)).sum(-1)
    some = total > 0
    return torch.where(some, m + torch.log(torch.where(some, total, 1.0)), -torch.inf)
