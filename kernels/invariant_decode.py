"""Attention of one new token a row over a cache, with the bits that `invariant_attention` has in a whole sequence.

`decode_attention` is faster and sums in an order of its own. Here the rotation is that of all tokens, the write is a
kernel of its own, and attention is the flash kernel with the tiles and the path of `invariant_attention`, up to each
row's own last key.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.kernels.recipe import eager_or_op
from purelm.kernels.rope import rope
from purelm.ops.decode_attention import check_arguments
from purelm.ops.decode_attention import decode_attention_ as reference
from purelm.ops.rope import Layout

__all__ = ["invariant_decode_attention_"]


def invariant_decode_attention_(
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
    """`purelm.ops.decode_attention.decode_attention_`, which it is on a CPU; with a row's bits alike in all batches.

    On a GPU they are those of `invariant_attention` of the row's whole sequence, however many slots the cache has. keys
    and values are changed in place; without gradients. A row that is full (length_b = S) is left as it is, and gives
    NaN. Raises ValueError as the reference does, and, on a GPU, where cache and activations differ in dtype.
    """
    if not q_BHK.is_cuda:
        return reference(
            q_BHK, k_BGK, v_BGK, keys_BSGK, values_BSGK, length_B, cos_BJ=cos_BJ, sin_BJ=sin_BJ, layout=layout,
            window=window, scale=scale, softcap=softcap,
        )  # fmt: skip
    check_arguments(q_BHK, k_BGK, v_BGK, keys_BSGK, values_BSGK, length_B, cos_BJ, sin_BJ, window, scale, softcap)
    if not q_BHK.dtype == k_BGK.dtype == v_BGK.dtype == keys_BSGK.dtype == values_BSGK.dtype:
        raise ValueError(
            f"invariant_decode_attention_: q, k, v and the cache must have one dtype, got {q_BHK.dtype} and "
            f"{keys_BSGK.dtype}"
        )
    if keys_BSGK.stride(3) != 1 or values_BSGK.stride(3) != 1:
        raise ValueError("invariant_decode_attention_: the cache's last axis must be dense")
    with torch.no_grad():
        q, k = q_BHK.unsqueeze(1), k_BGK.unsqueeze(1)
        if cos_BJ is not None and sin_BJ is not None:
            cos, sin = (t.expand(len(q), -1).unsqueeze(1) for t in (cos_BJ, sin_BJ))
            q, k = rope(q, cos, sin, layout), rope(k, cos, sin, layout)
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        return _forward(q, k.squeeze(1), v_BGK, keys_BSGK, values_BSGK, length_B, window, scale, softcap).squeeze(1)


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, last: Tensor, window: int | None, scale: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    from purelm.kernels import flash_attention_launch as kernels
    from purelm.kernels.flash_attention_tuned import fallback
    from purelm.kernels.invariant_decode_triton import put_

    last = last.contiguous()
    put_(k, v, keys, values, last)
    blocks = fallback("forward", 1 << (q.shape[-1] - 1).bit_length(), q.element_size())
    request = kernels.Request(window, None, scale, softcap, "ieee")
    return kernels.forward(q, keys, values, None, None, request, blocks, one_path=True, last=last)[0]


_op = torch.library.custom_op(
    "purelm::invariant_decode_attention", _cuda, mutates_args=("keys", "values"), device_types="cuda"
)
_forward = eager_or_op(_op, _cuda)


@_op.register_fake
def _(q, k, v, keys, values, last, window, scale, softcap):
    return q.new_empty(q.shape)
