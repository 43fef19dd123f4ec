"""Flash attention: exact attention without the (T, S) matrix of scores, as an op that every transform accepts.

    from purelm.kernels.flash_attention import flash_attention
    o_BTHE = flash_attention(q_BTHK, k_BSGK, v_BSGK, causal=True)

Dao 2023, "FlashAttention-2" (arXiv:2307.08691). Forward, with s = scale q k^T over the keys that a query sees:

    lse = log sum exp s,  p = exp(s - lse),  o = p v

Backward, from do and dlse, with delta = rowsum(o do) - dlse:

    ds = p (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T do

A bias is added to s, and its gradient is ds, summed over what it is broadcast over; a mask hides keys. p is formed
again from lse, the only thing saved besides inputs and output. On CUDA these are the Triton kernels of
flash_attention_triton.py, elsewhere the tiled torch code of flash_attention_reference.py. Both are deterministic.
Legend: B batch, T query positions, S key positions, H query heads, G key/value heads, K and E head dims.
"""

import itertools
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from purelm.devices import at_hand
from purelm.kernels.flash_attention_reference import tiled_backward, tiled_forward
from purelm.kernels.recipe import applier, backward_function, eager_or_op
from purelm.ops.attention import as_scores, check_heads, check_scale, over_leading_axes
from purelm.ops.derivatives import in_forward_mode
from purelm.ops.masks import Segments, Window, segment_pair, span
from purelm.ops.precision import accumulator
from purelm.ops.softcap import check_softcap

__all__ = [
    "bidirectional_flash_attention",
    "flash_attention",
    "flash_attention_reference",
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
        causal, window, segment_ids, scale, softcap, bias, mask: as there. Tiles whose segment ids cannot meet (their
            ranges from smallest to largest are apart) are skipped, so documents packed one after another cost what
            they are. A mask skips none: what is hidden in whole tiles costs less as a window or as segments. A bias
            that requires grad costs a third backward pass.
        cu_seqlens: instead of segment_ids: the ends of documents packed into one row, [0, n1, n1 + n2, ..., T], the
            same for queries and keys; B must be 1.
        sinks: a learned score for each query head, which takes its share of the softmax and gives no value.
        return_lse: also return lse_BHT, the natural log of the sum of exp of a query's scores (and sink), fp32,
            -inf for a query that sees nothing. It is differentiable, so partial attentions can be merged.
        precision: of products of fp32 on a GPU: "ieee", "tf32x3" (near fp32, on the tensor cores) or "tf32".

    On CUDA: fp32, bf16 or fp16, the same for q, k and v, and head dims up to 256; differentiable once, and backwards.
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
    args = _arguments(
        q_BTHK, k_BSGK, v_BSGK, causal, window, segment_ids, scale, softcap, sinks, precision, bias, mask
    )
    if in_forward_mode(q_BTHK):
        o, lse = _plain_forward(q_BTHK, k_BSGK, v_BSGK, *args[:-1])
    else:
        o, lse = _apply(q_BTHK, k_BSGK, v_BSGK, *args)
    return (o, lse) if return_lse else o


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
    """`flash_attention` by the tiled torch code, on any device and in any dtype: what to read, and to check by."""
    if q_BTHK.ndim != 4:
        return over_leading_axes(
            flash_attention_reference, q_BTHK, k_BSGK, v_BSGK, segment_ids, causal=causal, window=window, scale=scale,
            softcap=softcap, bias=bias, mask=mask, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    args = _arguments(q_BTHK, k_BSGK, v_BSGK, causal, window, segment_ids, scale, softcap, sinks, None, bias, mask)
    apply = _plain_forward if in_forward_mode(q_BTHK) else _Tiled.apply
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

    lengths: the number of true positions of each row, whose others are padding on the right: it is seen by none, and
    its own outputs are zeros.
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

    ValueError unless cu_seqlens is [0, n1, n1 + n2, ..., length]; the numbers themselves are looked at on a CPU, since
    on a GPU that would mean to wait for it (and neither while compiling, nor under torch.func).

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


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: Window, segment_ids: Segments, scale: float | None,
    softcap: float | None, sinks: Tensor | None, precision: str | None, bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Checked arguments of the ops after q, k and v."""
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


# --- custom ops


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor | None, kv_ids: Tensor | None, sinks: Tensor | None,
    bias: Tensor | None, mask: Tensor | None, left: int | None, right: int | None, scale: float, softcap: float | None,
    precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from purelm.kernels import flash_attention_launch as kernels

    request = kernels.Request(left, right, scale, softcap, precision)
    return kernels.forward(q, k, v, _pair(q_ids, kv_ids), sinks, request, bias=bias, mask=mask)


_forward_op = torch.library.custom_op(
    "purelm::flash_attention_fwd", _forward_cuda, mutates_args=(), device_types="cuda"
)
_forward = eager_or_op(_forward_op, _forward_cuda)


@_forward_op.register_kernel("cpu")
def _(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap, precision):
    return tiled_forward(q, k, v, _pair(q_ids, kv_ids), sinks, left, right, scale, softcap, bias, mask)


@_forward_op.register_fake
def _(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap, precision):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=accumulator(q.dtype))


def _backward_cuda(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, q_ids: Tensor | None,
    kv_ids: Tensor | None, bias: Tensor | None, mask: Tensor | None, left: int | None, right: int | None, scale: float,
    softcap: float | None, precision: str, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, delta, dbias); dbias has no elements unless it is needed."""
    from purelm.kernels import flash_attention_launch as kernels

    request, pair = kernels.Request(left, right, scale, softcap, precision), _pair(q_ids, kv_ids)
    dq, dk, dv, delta = kernels.backward(do, dlse, q, k, v, o, lse, pair, request, bias=bias, mask=mask)
    if bias is None or not need_bias:
        return dq, dk, dv, delta, q.new_empty(0)
    return dq, dk, dv, delta, kernels.backward_of_bias(do, q, k, v, lse, delta, pair, request, bias, mask)


_backward_op = torch.library.custom_op(
    "purelm::flash_attention_bwd", _backward_cuda, mutates_args=(), device_types="cuda"
)


@_backward_op.register_kernel("cpu")
def _backward_plain(
    do, dlse, q, k, v, o, lse, q_ids, kv_ids, bias, mask, left, right, scale, softcap, precision, need_bias
):
    pair = _pair(q_ids, kv_ids)
    return tiled_backward(do, dlse, q, k, v, o, lse, pair, left, right, scale, softcap, bias, mask, need_bias)


@_backward_op.register_fake
def _(do, dlse, q, k, v, o, lse, q_ids, kv_ids, bias, mask, left, right, scale, softcap, precision, need_bias):
    dbias = bias.new_empty(bias.shape) if need_bias and bias is not None else q.new_empty(0)
    return (*(x.new_empty(x.shape) for x in (q, k, v)), lse.new_empty(lse.shape), dbias)


def _pair(q_ids: Tensor | None, kv_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if q_ids is None or kv_ids is None else (q_ids.contiguous(), kv_ids.contiguous())


# --- autograd and vmap


def _fold(info: Any, dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Each tensor with its mapped axis folded into its first one; an unmapped one is repeated for every sample."""
    out: list[Tensor | None] = []
    for x, dim in zip(tensors, dims, strict=True):
        if x is None:
            out.append(None)
            continue
        x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        out.append(x.flatten(0, 1))
    return out


def _fold_scores(info: Any, dim: int | None, x: Tensor | None, B: int, own: bool = False) -> Tensor | None:
    """The same for a bias or mask, whose first axis may be 1. One that all share stays one, unless `own`."""
    if x is None or (dim is None and x.shape[0] == 1 and not own):
        return x
    x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(info.batch_size, B, *x.shape[2:]).flatten(0, 1)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
    folded = _fold(info, in_dims[:9], args[:9])
    bias, mask, *numbers, need_bias = args[9:]
    assert folded[2] is not None
    B = folded[2].shape[0] // info.batch_size
    grads = _backward(
        *folded, _fold_scores(info, in_dims[9], bias, B, own=need_bias), _fold_scores(info, in_dims[10], mask, B),
        *numbers, need_bias,
    )  # fmt: skip
    *grads, dbias = (x.unflatten(0, (info.batch_size, -1)) if x.ndim > 1 else x for x in grads)
    if not need_bias:
        return (*grads, dbias), (0, 0, 0, 0, None)
    shared = (bias.shape[0] if in_dims[9] is None else bias.select(in_dims[9], 0).shape[0]) == 1
    return (*grads, dbias.sum(1, keepdim=True) if shared else dbias), (0, 0, 0, 0, 0)


_backward = backward_function(
    "flash_attention", eager_or_op(_backward_op, _backward_cuda), _vmap_backward, _backward_plain
)
_NO_GRADS = (None,) * 6  # of the mask, of limits and numbers


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap, precision):
        return _forward(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap, precision)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, q_ids, kv_ids, sinks, bias, mask, *numbers = inputs
        ctx.save_for_backward(q, k, v, *output, q_ids, kv_ids, sinks, bias, mask)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, q_ids, kv_ids, sinks, bias, mask = ctx.saved_tensors
        if do is None and dlse is None:
            return (None,) * 13
        do = torch.zeros_like(o) if do is None else do
        need_bias = bias is not None and ctx.needs_input_grad[6]
        dq, dk, dv, delta, dbias = _backward(
            do, dlse, q, k, v, o, lse, q_ids, kv_ids, bias, mask, *ctx.numbers, need_bias
        )
        dsinks = _sink_gradient(sinks, lse, delta)
        return dq, dk, dv, None, None, dsinks, dbias if need_bias else None, *_NO_GRADS

    @staticmethod
    def vmap(info, in_dims, *args):
        if in_dims[5] is not None:  # sinks of each sample: their heads cannot share a launch
            rows = [_sample(i, in_dims, args) for i in range(info.batch_size)]
            outs = [_FlashAttention.apply(*row) for row in rows]
            return tuple(torch.stack(x) for x in zip(*outs, strict=True)), (0, 0)
        folded = _fold(info, in_dims[:5], args[:5])
        assert folded[0] is not None
        B = folded[0].shape[0] // info.batch_size
        extra = [_fold_scores(info, dim, x, B) for dim, x in zip(in_dims[6:8], args[6:8], strict=True)]
        o, lse = _FlashAttention.apply(*folded, args[5], *extra, *args[8:])
        return (o.unflatten(0, (info.batch_size, -1)), lse.unflatten(0, (info.batch_size, -1))), (0, 0)


_apply = applier(_FlashAttention)


def _sample(i: int, in_dims: Any, args: tuple[Any, ...]) -> list[Any]:
    return [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)]


def _sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)


def _plain_forward(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap):
    return tiled_forward(q, k, v, _pair(q_ids, kv_ids), sinks, left, right, scale, softcap, bias, mask)


class _Tiled(torch.autograd.Function):
    """The same with torch code on every device."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap):
        return _plain_forward(q, k, v, q_ids, kv_ids, sinks, bias, mask, left, right, scale, softcap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, q_ids, kv_ids, sinks, bias, mask, ctx.left, ctx.right, ctx.scale, ctx.softcap = inputs
        ctx.save_for_backward(q, k, v, *output, q_ids, kv_ids, sinks, bias, mask)

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, q_ids, kv_ids, sinks, bias, mask = ctx.saved_tensors
        need_bias = bias is not None and ctx.needs_input_grad[6]
        dq, dk, dv, delta, dbias = tiled_backward(
            do, dlse, q, k, v, o, lse, _pair(q_ids, kv_ids), ctx.left, ctx.right, ctx.scale, ctx.softcap, bias, mask,
            need_bias,
        )  # fmt: skip
        dsinks = _sink_gradient(sinks, lse, delta)
        return dq, dk, dv, None, None, dsinks, dbias if need_bias else None, None, None, None, None, None
