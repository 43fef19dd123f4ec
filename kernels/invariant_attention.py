"""Flash attention with one set of tiles for all shapes, so that a query's result does not depend on the others.

`flash_attention` takes tiles by length and mask. With fixed ones a query adds up the same tiles of keys in the same
order, whether it stands among all queries of a sequence or alone before a cache. And all tiles take the path of those
with masks: below the diagonal a sequence's tiles need none, a cache's may, and the two paths differ by a rounding.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.kernels.flash_attention import checked_arguments
from purelm.kernels.flash_attention_ops import backward
from purelm.kernels.recipe import eager_or_op
from purelm.ops.attention import attention as reference
from purelm.ops.masks import Segments, Window

__all__ = ["invariant_attention"]


def invariant_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BSGK: Float[Tensor, "b s g k"],
    v_BSGK: Float[Tensor, "b s g k"],
    *,
    causal: bool = True,
    window: Window = None,
    segment_ids: Segments = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b t h k"]:
    """`purelm.ops.attention.attention`, which it is on a CPU, with the same bits for a query in every batch on a GPU.

    fp32 is multiplied as "ieee". Raises as `flash_attention` does; differentiable once on a GPU, in reverse mode.
    """
    if not q_BTHK.is_cuda:
        return reference(
            q_BTHK, k_BSGK, v_BSGK, causal=causal, window=window, segment_ids=segment_ids, scale=scale, softcap=softcap
        )
    args = checked_arguments(
        q_BTHK, k_BSGK, v_BSGK, causal, window, segment_ids, scale, softcap, None, "ieee", None, None
    )
    q_ids, kv_ids, _, _, _, left, right, number, cap, _ = args
    return _InvariantAttention.apply(q_BTHK, k_BSGK, v_BSGK, q_ids, kv_ids, left, right, number, cap)[0]


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor | None, kv_ids: Tensor | None, left: int | None, right: int | None,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from purelm.kernels import flash_attention_launch as kernels
    from purelm.kernels.flash_attention_tuned import fallback

    width = 1 << (q.shape[-1] - 1).bit_length()
    blocks = fallback("forward", width, q.element_size())
    segments = None if q_ids is None or kv_ids is None else (q_ids.contiguous(), kv_ids.contiguous())
    request = kernels.Request(left, right, scale, softcap, "ieee")
    return kernels.forward(q, k, v, segments, None, request, blocks, one_path=True)


_op = torch.library.custom_op("purelm::invariant_attention", _cuda, mutates_args=(), device_types="cuda")
_forward = eager_or_op(_op, _cuda)


@_op.register_fake
def _(q, k, v, q_ids, kv_ids, left, right, scale, softcap):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)


class _InvariantAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, q_ids, kv_ids, left, right, scale, softcap):
        return _forward(q, k, v, q_ids, kv_ids, left, right, scale, softcap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, q_ids, kv_ids, *ctx.numbers = inputs
        ctx.save_for_backward(q, k, v, *output, q_ids, kv_ids)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        do, dlse = grads
        q, k, v, o, lse, q_ids, kv_ids = ctx.saved_tensors
        if do is None:
            return (None,) * 9
        left, right, scale, softcap = ctx.numbers
        dq, dk, dv, _, _ = backward(
            do, dlse, q, k, v, o, lse, q_ids, kv_ids, None, None, left, right, scale, softcap, "tf32x3", False
        )
        return dq, dk, dv, *(None,) * 6
