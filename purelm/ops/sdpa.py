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
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from purelm.ops.attention import attention, check_heads, check_scale
from purelm.ops.derivatives import in_forward_mode, in_two_grads
from purelm.ops.masks import Segments, Window, span, visible

__all__ = ["sdpa_attention"]

Op = Callable[..., Tensor]


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
    kernels. ValueError for a softcap, which PyTorch does not have.
    """
    if softcap is not None:
        raise ValueError(f"sdpa_attention: softcap must be None (PyTorch has none), got {softcap}; use the reference")
    check_heads(q_BTHK, k_BSGK, v_BSGK)
    check_scale(scale)
    options: dict[str, Any] = {"causal": causal, "window": window, "segment_ids": segment_ids, "scale": scale}
    if in_forward_mode(q_BTHK) or in_two_grads(q_BTHK):
        return attention(q_BTHK, k_BSGK, v_BSGK, **options)
    o_BTHE = _fused(q_BTHK, k_BSGK, v_BSGK, **options)
    if not o_BTHE.requires_grad or o_BTHE.is_cuda or _traced():
        return o_BTHE

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _fused(q, k, v, **options)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, **options)

    return _Recorded.apply(o_BTHE, fused, plain, q_BTHK, k_BSGK, v_BSGK)


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
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool, window: Window, segment_ids: Segments,
    scale: float | None,
) -> Tensor:  # fmt: skip
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
