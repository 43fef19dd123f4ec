"""Flash attention: exact attention without the (T, S) matrix of scores, as an op that every transform accepts.

    from purelm.kernels.flash_attention import flash_attention
    o_BTHE = flash_attention(q_BTHK, k_BSGK, v_BSGK, causal=True)

Dao 2023, "FlashAttention-2" (arXiv:2307.08691). Forward, with s = scale q k^T over the keys that a query sees:

    lse = log sum exp s,  p = exp(s - lse),  o = p v

Backward, from do and dlse, with delta = rowsum(o do) - dlse:

    ds = p (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T do

A bias is added to s, and its gradient is ds, summed over the axes that it is broadcast along; a mask hides keys.
Backward recomputes p from lse, the only tensor saved besides inputs and output. On CUDA these are the Triton kernels of
flash_attention_triton.py, elsewhere the tiled torch code of flash_attention_reference.py. Both are deterministic.
Legend: B batch, T query positions, S key positions, H query heads, G key/value heads, K and E head dims.
"""

import itertools
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from purelm.devices import at_hand
from purelm.kernels.flash_attention_ops import Tiled, apply_flash, plain_forward
from purelm.ops.attention import as_scores, check_heads, check_scale, over_leading_axes
from purelm.ops.derivatives import in_forward_mode
from purelm.ops.masks import Segments, Window, segment_pair, span
from purelm.ops.softcap import check_softcap

__all__ = [
    "bidirectional_flash_attention",
    "flash_attention",
    "flash_attention_reference",
    "flash_attention_with_lse",
    "segment_ids_from_cu_seqlens",
]

Precision = Literal["ieee", "tf32x3", "tf32"]
MAX_HEAD_DIM = 256


def flash_attention(
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
    cu_seqlens: Int[Tensor, " n"] | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    return_lse: bool = False,
    precision: Precision = "tf32x3",
) -> Any:
    """o = softmax(scale q k^T) v over the keys that a query sees: `purelm.ops.attention.attention`, and more.

    Args:
        causal, window, segment_ids, scale, softcap, bias, mask: as there. A tile of queries skips the tiles of keys
            whose range of segment ids, smallest to largest, does not overlap its own: packed documents cost about as
            much as separate ones. A mask skips no tiles, so give windows and segments as such. A bias that requires
            grad costs a third backward pass.
        cu_seqlens: instead of segment_ids: the ends of documents packed into one row, [0, n1, n1 + n2, ..., T], the
            same for queries and keys; B must be 1.
        sinks: a learned score for each query head, which enters the softmax like one more key, without a value.
        return_lse: also return lse_BHT, as `flash_attention_with_lse` does.
        precision: of products of fp32 on a GPU: "ieee", "tf32x3" (near fp32, on the tensor cores) or "tf32".

    On CUDA: fp32, bf16 or fp16, the same for q, k and v, and head dims up to 256; differentiable once, in reverse mode.
    """
    if q_BTHK.ndim != 4:
        return over_leading_axes(
            flash_attention, q_BTHK, k_BSGK, v_BSGK, segment_ids, causal=causal, window=window, scale=scale,
            softcap=softcap, bias=bias, mask=mask, cu_seqlens=cu_seqlens, sinks=sinks, return_lse=return_lse,
            precision=precision,
        )  # fmt: skip
    if cu_seqlens is not None:
        if segment_ids is not None:
            raise ValueError("give segment_ids or cu_seqlens, not both")
        if q_BTHK.shape[0] != 1 or q_BTHK.shape[1] != k_BSGK.shape[1]:
            raise ValueError(
                f"cu_seqlens needs batch 1 and as many queries as keys, got q {tuple(q_BTHK.shape)} and "
                f"k {tuple(k_BSGK.shape)}"
            )
        segment_ids = segment_ids_from_cu_seqlens(cu_seqlens, q_BTHK.shape[1])
    args = checked_arguments(
        q_BTHK, k_BSGK, v_BSGK, causal, window, segment_ids, scale, softcap, sinks, precision, bias, mask
    )
    if in_forward_mode(q_BTHK):
        o, lse = plain_forward(q_BTHK, k_BSGK, v_BSGK, *args[:-1])
    else:
        o, lse = apply_flash(q_BTHK, k_BSGK, v_BSGK, *args)
    return (o, lse) if return_lse else o


def flash_attention_with_lse(
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
    cu_seqlens: Int[Tensor, " n"] | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    precision: Precision = "tf32x3",
) -> tuple[Float[Tensor, "*batch t h e"], Float[Tensor, "*batch h t"]]:
    """(o, lse): `flash_attention`, and the log-sum-exp of each query's scores (its sink included), in nats.

    lse (B, H, T) is fp32 (fp64 for fp64, on a CPU), -inf for a query that sees nothing. Both are differentiable: the
    gradient of lse only changes delta, by -dlse, and costs nothing. With lse, attention over parts of the keys can be
    merged, as the reference `purelm.ops.attention.attention_with_lse` shows.
    """
    o, lse = flash_attention(
        q_BTHK, k_BSGK, v_BSGK, causal=causal, window=window, segment_ids=segment_ids, scale=scale, softcap=softcap,
        bias=bias, mask=mask, cu_seqlens=cu_seqlens, sinks=sinks, return_lse=True, precision=precision,
    )  # fmt: skip
    return o, lse


def flash_attention_reference(
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
    sinks: Float[Tensor, " h"] | None = None,
    return_lse: bool = False,
) -> Any:
    """`flash_attention` by the tiled torch code, on any device and in any dtype: to read, and to test against."""
    if q_BTHK.ndim != 4:
        return over_leading_axes(
            flash_attention_reference, q_BTHK, k_BSGK, v_BSGK, segment_ids, causal=causal, window=window, scale=scale,
            softcap=softcap, bias=bias, mask=mask, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    args = checked_arguments(
        q_BTHK, k_BSGK, v_BSGK, causal, window, segment_ids, scale, softcap, sinks, None, bias, mask
    )
    apply = plain_forward if in_forward_mode(q_BTHK) else Tiled.apply
    o, lse = apply(q_BTHK, k_BSGK, v_BSGK, *args[:-1])
    return (o, lse) if return_lse else o


def bidirectional_flash_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BSGK: Float[Tensor, "b s g k"],
    v_BSGK: Float[Tensor, "b s g e"],
    *,
    lengths: Int[Tensor, " b"] | None = None,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b t h e"]:
    """Every position sees every other: the attention of encoders, classifiers and regressors.

    lengths: the number of real positions in each row. Those to the right of them are padding, which no query sees and
    whose outputs are zeros.
    """
    segments: Segments = None
    if lengths is not None:
        if lengths.shape != (q_BTHK.shape[0],) or lengths.is_floating_point():
            raise ValueError(
                f"lengths must be one integer for each of {q_BTHK.shape[0]} rows, got {lengths.dtype} of shape "
                f"{tuple(lengths.shape)}"
            )
        if at_hand(lengths) and not bool(((lengths >= 0) & (lengths <= q_BTHK.shape[1])).all()):
            raise ValueError(f"lengths must be in 0..{q_BTHK.shape[1]}, got {lengths.tolist()}")
        here, there = (torch.arange(x.shape[1], device=x.device) < lengths[:, None] for x in (q_BTHK, k_BSGK))
        segments = (torch.where(here, 1, 0), torch.where(there, 1, -1))
    return flash_attention(
        q_BTHK, k_BSGK, v_BSGK, causal=False, window=window, segment_ids=segments, scale=scale, softcap=softcap
    )


def segment_ids_from_cu_seqlens(cu_seqlens: Int[Tensor, " n"], length: int) -> Int[Tensor, "1 t"]:
    """The number of the document at each position of a packed row.

    ValueError unless cu_seqlens is [0, n1, n1 + n2, ..., length]. The values are checked only on a CPU, where that does
    not wait for the device, and neither while compiling nor under torch.func.

    >>> segment_ids_from_cu_seqlens(torch.tensor([0, 2, 5]), 5)
    tensor([[0, 0, 1, 1, 1]])
    """
    _check_ends(cu_seqlens, length)
    at = torch.arange(length, device=cu_seqlens.device)
    return (torch.searchsorted(cu_seqlens.long(), at, right=True) - 1).unsqueeze(0)


def _check_ends(cu_seqlens: Tensor, length: int) -> None:
    form = f"cu_seqlens must be the ends of documents, integers [0, n1, n1 + n2, ..., {length}]"
    if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool or cu_seqlens.ndim != 1:
        raise ValueError(f"{form}, got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}")
    if len(cu_seqlens) < 2:
        raise ValueError(f"{form}, got {len(cu_seqlens)} numbers")
    if not at_hand(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in itertools.pairwise(ends)):
        shown = f"{ends[:8]}"[:-1] + (", ...]" if len(ends) > 8 else "]")
        raise ValueError(f"{form}, got {shown}")


def checked_arguments(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: Window, segment_ids: Segments, scale: float | None,
    softcap: float | None, sinks: Tensor | None, precision: str | None, bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the custom ops after q, k and v, checked."""
    check_heads(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if precision not in (None, "ieee", "tf32x3", "tf32"):
        raise ValueError(f'precision must be "ieee", "tf32x3" or "tf32", got {precision!r}')
    check_softcap(softcap)
    check_scale(scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks must have one score a query head, ({q.shape[2]},), got {tuple(sinks.shape)}")
    bias, mask = as_scores("bias", bias, q, k), as_scores("mask", mask, q, k)
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {x.device}")
    if q.is_cuda and precision is not None:
        if bias is not None and bias.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"bias must be fp32, bf16 or fp16 on CUDA, got {bias.dtype}: use ops=REFERENCE")
        if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"flash_attention on CUDA takes fp32, bf16 or fp16, got {q.dtype}: use flash_attention_reference"
            )
        if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
            raise ValueError(
                f"flash_attention on CUDA takes head dims up to {MAX_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}: "
                "use purelm.ops.attention"
            )
    left, right = span(q.shape[1], k.shape[1], causal, window)
    pair = segment_pair(segment_ids, q.shape[1], k.shape[1])
    ids = (None, None) if pair is None else tuple(x.to(torch.int32).expand(q.shape[0], -1) for x in pair)
    return (*ids, sinks, bias, mask, left, right, scale, softcap, precision)
