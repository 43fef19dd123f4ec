"""The Triton kernel that puts new keys and values into a cache. Legend: B rows, S slots, G heads, K head dim."""

import triton
import triton.language as tl
from torch import Tensor

from purelm.kernels.launch import all_aligned, device_number, device_of, launch, relaunch

__all__ = ["put_"]


@triton.jit
def _put(k_ptr, v_ptr, keys_ptr, values_ptr, last_ptr, S, K, k_b, v_b, keys_b, keys_s, keys_g, values_b, values_s,
         values_g, N, BLOCK: tl.constexpr):  # fmt: skip
    """One row: N = G K numbers of k and of v into slot last[b], where that is one of the S."""
    b = tl.program_id(0).to(tl.int64)
    slot = tl.load(last_ptr + b)
    i = tl.arange(0, BLOCK)
    inside = (i < N) & (slot < S)
    g, e = (i // K).to(tl.int64), i % K
    k = tl.load(k_ptr + b * k_b + i, mask=inside)
    v = tl.load(v_ptr + b * v_b + i, mask=inside)
    tl.store(keys_ptr + b * keys_b + slot * keys_s + g * keys_g + e, k, mask=inside)
    tl.store(values_ptr + b * values_b + slot * values_s + g * values_g + e, v, mask=inside)


def put_(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, last: Tensor) -> None:
    """keys[b, last_b] = k[b], values[b, last_b] = v[b]; k and v (B, G, K), the cache (B, S, G, K) with dense heads.

    A row whose last_b is not below S is left as it is.
    """
    B, G, K = k.shape
    if not B * G * K:
        return
    k, v = (x if x.stride(2) == 1 and (x.stride(1) == K or G == 1) else x.contiguous() for x in (k, v))
    tensors = k, v, keys, values, last
    strides = k.stride(0), v.stride(0), *keys.stride()[:3], *values.stride()[:3]
    key = device_number(k), k.dtype, keys.dtype, (B, G, K), keys.shape[1], strides, all_aligned(tensors)
    with device_of(k):
        if not relaunch(_put, key, tensors):
            args = *tensors, keys.shape[1], K, *strides, G * K
            launch(_put, key, tensors, B, args, {"BLOCK": triton.next_power_of_2(G * K)}, {"num_warps": 1})
