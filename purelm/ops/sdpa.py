"""Attention over PyTorch's own fused kernels: the same function as `purelm.ops.attention`, with fewer options.

Use it as one op of the bundle: REFERENCE._replace(attention=sdpa_attention).

PyTorch's fused kernels have first derivatives, backwards. On a CPU the reference gives the others: it takes the place
of the kernels in forward mode and where torch.func's grad stands in another one, and a backward pass that is itself
recorded (create_graph=True) is differentiated as the reference's. On a GPU such derivatives are PyTorch's own errors:
use ops=REFERENCE there.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from purelm.ops.attention import as_scores, attention, check_heads, check_scale, over_leading_axes
from purelm.ops.derivatives import in_forward_mode, in_two_grads
from purelm.ops.masks import Segments, Window, span, visible

__all__ = ["sdpa_attention"]

Op = Callable[..., Tensor]


def sdpa_attention(
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
    """`purelm.ops.attention.attention` by torch.nn.functional.scaled_dot_product_attention.

    Causal attention with T = S takes PyTorch's causal path, and no mask is built where nothing is hidden; any other
    window, alignment or segment is a boolean mask (T, S) or (B, 1, T, S), which keeps PyTorch off its fastest
    kernels; a bias is a floating one. ValueError for a softcap, which PyTorch does not have, and for a bias of another
    dtype than q's, which PyTorch would round.
    """
    if softcap is not None:
        raise ValueError(f"sdpa_attention: softcap must be None (PyTorch has none), got {softcap}; use the reference")
    if q_BTHK.ndim != 4:
        return over_leading_axes(
            sdpa_attention, q_BTHK, k_BSGK, v_BSGK, segment_ids, causal=causal, window=window, scale=scale, bias=bias,
            mask=mask,
        )  # fmt: skip
    check_heads(q_BTHK, k_BSGK, v_BSGK)
    check_scale(scale)
    bias, mask = as_scores("bias", bias, q_BTHK, k_BSGK), as_scores("mask", mask, q_BTHK, k_BSGK)
    if bias is not None and bias.dtype != q_BTHK.dtype:
        raise ValueError(
            f"sdpa_attention: bias must have q's dtype {q_BTHK.dtype}, got {bias.dtype}: cast it, or use "
            "ops=REFERENCE, which adds it in fp32"
        )
    options: dict[str, Any] = {
        "causal": causal, "window": window, "segment_ids": segment_ids, "scale": scale, "mask": mask,
    }  # fmt: skip
    if in_forward_mode(q_BTHK) or in_two_grads(q_BTHK):
        return attention(q_BTHK, k_BSGK, v_BSGK, bias=bias, **options)
    o_BTHE = _fused(q_BTHK, k_BSGK, v_BSGK, bias, **options)
    if not o_BTHE.requires_grad or o_BTHE.is_cuda or _traced():
        return o_BTHE

    def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return _fused(q, k, v, bias, **options)

    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return attention(q, k, v, bias=bias, **options)

    return _Recorded.apply(o_BTHE, fused, plain, q_BTHK, k_BSGK, v_BSGK, *([] if bias is None else [bias]))


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]


class _Recorded(torch.autograd.Function):
    """o = fused(*inputs) as it is; a backward pass that is recorded goes to the inputs by `_Gradient`."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, fused: Op, plain: Op, *inputs: Tensor) -> Any:
        ctx.functions = fused, plain
        ctx.save_for_backward(*inputs)
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        none = (None,) * len(ctx.saved_tensors)
        if not torch.is_grad_enabled():
            return grads[0], None, None, *none
        return None, None, None, *_Gradient.apply(*ctx.functions, grads[0], *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """The gradients of fused(*inputs), whose own are those of plain(*inputs)."""

    @staticmethod
    def forward(ctx: Any, fused: Op, plain: Op, do: Tensor, *inputs: Tensor) -> Any:
        ctx.plain = plain
        ctx.save_for_backward(do, *inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            return torch.autograd.grad(fused(*leaves), leaves, do)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        def gradient(do: Tensor, *inputs: Tensor) -> Any:
            return torch.func.vjp(ctx.plain, *inputs)[1](do)

        pull: Any = torch.func.vjp(gradient, *ctx.saved_tensors)[1]
        return None, None, *pull(grads)


def _fused(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, bias: Tensor | None, causal: bool, window: Window,
    segment_ids: Segments, scale: float | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    T, H = q_BTHK.shape[1:3]
    S, G = k_BSGK.shape[1:3]
    q, k, v = q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2)
    gqa = H != G
    plain = bias is None and mask is None
    if plain and segment_ids is None and T == S and span(T, S, causal, window) == (None, 0):
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        return o.transpose(1, 2)
    seen = visible(T, S, causal=causal, window=window, segment_ids=segment_ids, device=q.device)
    seen = seen.unsqueeze(1) if seen is not None and seen.ndim == 3 else seen
    if plain and seen is None:
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa).transpose(1, 2)
    if plain and T == S and not isinstance(segment_ids, tuple):
        # Each query sees itself, so no row is empty.
        o = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=gqa)
        return o.transpose(1, 2)
    for hidden_by in (mask, None if bias is None else bias != -torch.inf):
        if hidden_by is not None:
            seen = hidden_by if seen is None else seen & hidden_by
    assert seen is not None
    # PyTorch promises nothing for a query that sees no key: let it see all of them, and put zeros there afterwards.
    some = seen.any(-1, keepdim=True)
    attn_mask = seen | ~some
    if bias is not None:
        attn_mask = torch.where(attn_mask, torch.where(seen, bias, 0.0), -torch.inf)
    o = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale, enable_gqa=gqa)
    return torch.where(some, o, 0.0).transpose(1, 2)
