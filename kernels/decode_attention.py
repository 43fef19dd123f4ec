"""Attention of one new token a row over a cache of keys and values, which are read once.

Legend: B rows, S slots, H query heads, G key/value heads, K head dim.

    keys_b,n = rope(k_b), values_b,n = v_b                       n = length_b, the slot of the new token
    o_bh = sum_{s <= n} p_bhs values_bsg                         p = softmax over s of scale rope(q_bh) . keys_bsg

Decoding is bound by memory: a step must read each row's keys and values once, 4 n G K bytes in bf16. One kernel does
all between the projections and the output projection: rotation of q and k, the write into the cache, and attention over
the slots that a row has, and no others. Long rows are divided into chunks of 512 slots, whose results are combined
(flash decoding; Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Chunks do not depend on B
and S, so a row's result is the same bits in every batch.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.kernels.recipe import eager_or_op
from purelm.ops.decode_attention import check_arguments
from purelm.ops.decode_attention import decode_attention_ as reference
from purelm.ops.rope import LAYOUTS, Layout

__all__ = ["decode_attention_"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels; the reference has float64, too


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
    """The kernel of `purelm.ops.decode_attention.decode_attention_`, with its signature; that function on a CPU.

    keys and values are changed in place: the new token's stand in slot length_b afterwards. Without gradients. A row
    that is full (length_b = S) gives NaN, since nothing waits for the device.

    Raises ValueError as the reference does, for a cache whose last axis is not dense, and, on a GPU, for dtypes other
    than fp32, bf16 and fp16.
    """
    args = q_BHK, k_BGK, v_BGK, keys_BSGK, values_BSGK, length_B, cos_BJ, sin_BJ
    check_arguments(*args, window, scale, softcap)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    floating = [x for x in args if x is not None and x.is_floating_point()]
    if any(x.device != q_BHK.device for x in args if x is not None):
        raise ValueError("decode_attention_: all tensors must be on one device")
    if q_BHK.is_cuda and (bad := [x.dtype for x in floating if x.dtype not in DTYPES]):
        raise ValueError(
            f"decode_attention_: tensors must be float32, bfloat16 or float16 on a GPU, got {bad[0]}: use the "
            "reference, purelm.ops.decode_attention"
        )
    scale = 1.0 / math.sqrt(q_BHK.shape[-1]) if scale is None else float(scale)
    with torch.no_grad():
        return _forward(*args, layout == "interleaved", window, scale, softcap)


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, window: int | None, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    from purelm.kernels import decode_attention_triton as kernels

    return kernels.forward_(q, k, v, keys, values, length, cos, sin, interleaved, window, scale, softcap)


_op = torch.library.custom_op(
    "purelm::decode_attention", _forward_cuda, mutates_args=("keys", "values"), device_types="cuda"
)
_forward = eager_or_op(_op, _forward_cuda)


@_op.register_kernel("cpu")
def _(q, k, v, keys, values, length, cos, sin, interleaved, window, scale, softcap):
    layout: Layout = "interleaved" if interleaved else "half"
    return reference(
        q, k, v, keys, values, length, cos_BJ=cos, sin_BJ=sin, layout=layout, window=window, scale=scale,
        softcap=softcap,
    )  # fmt: skip


@_op.register_fake
def _(q, k, v, keys, values, length, cos, sin, interleaved, window, scale, softcap):
    return q.new_empty(q.shape)
