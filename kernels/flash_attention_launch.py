"""Launching the Triton kernels of flash attention: shapes, tiles, descriptors, and ranges of packed documents."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from purelm.kernels import flash_attention_triton as kernels
from purelm.kernels.flash_attention_tuned import Blocks, choose
from purelm.kernels.launch import all_aligned, device_number, device_of, launch, relaunch
from purelm.kernels.recipe import interpreted

__all__ = ["Request", "backward", "backward_of_bias", "forward"]

LOG2E = math.log2(math.e)
L2_BYTES = 32 << 20  # of keys and values that should stay in the L2 cache at a time (H100: 50 MB)


class Request(NamedTuple):
    """The arguments of the kernels that are not tensors; left and right are those of `purelm.ops.masks.span`."""

    left: int | None
    right: int | None
    scale: float
    softcap: float | None = None
    precision: str = "tf32x3"  # of products of fp32: "ieee", "tf32x3" or "tf32"


def forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    segments: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None,
    request: Request,
    blocks: Blocks | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    one_path: bool = False,
    last: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o (B, T, H, E), lse (B, H, T) fp32). bias and mask are (B, H, T, S), with 1 where an axis is broadcast.

    one_path: tiles of keys that need no masks are computed as if they did, so that equal scores give equal bits.
    last: (B,) int64, each row's last key, without segments, sinks, bias and mask; NaN where it is not below S.
    """
    B, T, H, _ = q_BTHK.shape
    S, G, E = v_BSGK.shape[1:]
    o = torch.empty(B, T, H, E, dtype=q_BTHK.dtype, device=q_BTHK.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q_BTHK.device)
    if not lse.numel():
        return o, lse
    if not S:
        at_most = torch.full_like(lse, -torch.inf) if sinks is None else sinks.float()[None, :, None].expand_as(lse)
        return o.zero_(), at_most.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    blocks, lo, hi = _cut("forward", blocks, q_BTHK, v_BSGK, segments, request)
    vis = None if mask is None else mask.view(torch.uint8)
    optional = (sinks, *(segments or ()), lo, hi, bias, vis, last)
    tensors = [q_BTHK, k_BSGK, v_BSGK, o, lse, *(x for x in optional if x is not None)]
    kinds = (None if sinks is None else sinks.dtype, segments is None, last is None)
    key = (_layout(*tensors[:3]), kinds, _form(bias), _form(vis), request, blocks, one_path, all_aligned(tensors))
    with device_of(o):
        if relaunch(kernels.forward, key, tensors):
            return o, lse
        blocks = blocks or _chosen("forward", q_BTHK, v_BSGK, request)
        tma, (q, k, v) = _prepared(q_BTHK, k_BSGK, v_BSGK)
        D, E, limits, scales, constants = _common(q, v, request)
        args = (
            _tile(q, blocks.m, D, tma), _tile(k, blocks.n, D, tma), _tile(v, blocks.n, E, tma),
            _tile(o, blocks.m, E, tma), lse, _or(sinks, lse), *_ids(segments, lse), _or(lo, lse), _or(hi, lse),
            *_stepped(bias, lse), *_stepped(vis, lse), _or(last, lse), B, H, H // G, T, S, q.shape[-1],
            v.shape[-1], _heads_at_once(k, v, H // G), *limits, *scales,
        )  # fmt: skip
        constants |= {"SINK": sinks is not None, "SEG": segments is not None, "TMA": tma}
        constants |= {"HAS_BIAS": bias is not None, "HAS_VIS": vis is not None}
        constants |= {"ONE_PATH": one_path, "HAS_LAST": last is not None}
        n = triton.cdiv(T, blocks.m) * B * H
        launch(kernels.forward, key, tensors, n, args, *_constants(constants, blocks))
    return o, lse


def backward(
    do_BTHE: Tensor,
    dlse_BHT: Tensor | None,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    o_BTHE: Tensor,
    lse_BHT: Tensor,
    segments: tuple[Tensor, Tensor] | None,
    request: Request,
    blocks_q: Blocks | None = None,
    blocks_kv: Blocks | None = None,
    *,
    only_q: bool = False,
    only_kv: bool = False,
    bias: Any = None,
    mask: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta (B, H, T) fp32); the gradients of sinks and of a bias need delta.

    only_q and only_kv launch one of the two passes, to time it; the results of the other are then uninitialised.
    """
    B, T, H, _ = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTHK, k_BSGK, v_BSGK))
    lse_BHT = lse_BHT.contiguous()  # under vmap one lse may be expanded to many samples
    delta = torch.zeros_like(lse_BHT) if not S else torch.empty_like(lse_BHT)
    if not delta.numel() or not S:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta
    dlse = None if dlse_BHT is None else dlse_BHT.to(torch.float32).contiguous()
    inputs = [do_BTHE, q_BTHK, k_BSGK, v_BSGK, o_BTHE, lse_BHT]
    vis = None if mask is None else mask.view(torch.uint8)
    shared = (_layout(do_BTHE, q_BTHK, k_BSGK, v_BSGK, o_BTHE), segments is None, dlse is None, _form(bias), _form(vis),
              request)  # fmt: skip
    with device_of(delta):
        if not only_kv:
            blocks_q, lo, hi = _cut("backward_q", blocks_q, q_BTHK, v_BSGK, segments, request)
            optional = (dlse, *(segments or ()), lo, hi, bias, vis)
            tensors = [*inputs, dq, delta, *(x for x in optional if x is not None)]
            key = (shared, blocks_q, all_aligned(tensors))
            if not relaunch(kernels.backward_q, key, tensors):
                blocks_q = blocks_q or _chosen("backward_q", q_BTHK, v_BSGK, request)
                m, n = blocks_q.m, blocks_q.n
                tma, (do, q, k, v, o) = _prepared(*inputs[:5])
                D, E, limits, scales, constants = _common(q, v, request)
                args = (
                    _tile(q, m, D, tma), _tile(k, n, D, tma), _tile(v, n, E, tma), _tile(o, m, E, tma),
                    _tile(do, m, E, tma), lse_BHT, _or(dlse, delta), delta, _tile(dq, m, D, tma),
                    *_ids(segments, delta), _or(lo, delta), _or(hi, delta), *_stepped(bias, delta),
                    *_stepped(vis, delta), B, H, H // G, T, S, q.shape[-1],
                    v.shape[-1], _heads_at_once(k, v, H // G), *limits, *scales, request.scale,
                )  # fmt: skip
                constants |= {"SEG": segments is not None, "HAS_DLSE": dlse is not None, "TMA": tma}
                constants |= {"HAS_BIAS": bias is not None, "HAS_VIS": vis is not None}
                n_programs = triton.cdiv(T, m) * B * H
                launch(kernels.backward_q, key, tensors, n_programs, args, *_constants(constants, blocks_q))
        if not only_q:
            blocks_kv, lo, hi = _cut("backward_kv", blocks_kv, q_BTHK, v_BSGK, segments, request)
            optional = (*(segments or ()), lo, hi, bias, vis)
            tensors = [*inputs[:4], lse_BHT, delta, dk, dv, *(x for x in optional if x is not None)]
            key = (shared, blocks_kv, all_aligned(tensors))
            if not relaunch(kernels.backward_kv, key, tensors):
                blocks_kv = blocks_kv or _chosen("backward_kv", q_BTHK, v_BSGK, request)
                m, n = blocks_kv.m, blocks_kv.n
                tma, (do, q, k, v) = _prepared(*inputs[:4])
                D, E, limits, scales, constants = _common(q, v, request)
                args = (
                    _tile(q, m, D, tma), _tile(k, n, D, tma), _tile(v, n, E, tma), _tile(do, m, E, tma), lse_BHT,
                    delta, _tile(dk, n, D, tma), _tile(dv, n, E, tma), *_ids(segments, delta), _or(lo, delta),
                    _or(hi, delta), *_stepped(bias, delta), *_stepped(vis, delta), B, H, H // G, T, S, q.shape[-1],
                    v.shape[-1],
                    max(_heads_at_once(k, v, H // G) * G // H, 1), *limits, *scales, request.scale,
                )  # fmt: skip
                constants |= {"SEG": segments is not None, "TMA": tma}
                constants |= {"HAS_BIAS": bias is not None, "HAS_VIS": vis is not None}
                n_programs = triton.cdiv(S, n) * B * G
                launch(kernels.backward_kv, key, tensors, n_programs, args, *_constants(constants, blocks_kv))
    return dq, dk, dv, delta


def backward_of_bias(
    do_BTHE: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    lse_BHT: Tensor,
    delta_BHT: Tensor,
    segments: tuple[Tensor, Tensor] | None,
    request: Request,
    bias: Tensor,
    mask: Tensor | None,
    blocks: Blocks | None = None,
) -> Tensor:
    """The gradient of the bias, in its shape and dtype; delta comes from `backward`."""
    B, T, H, _ = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    own_b, own_h, own_t, own_s = bias.shape
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if not dbias.numel() or not delta_BHT.numel() or not S:
        return dbias.zero_()
    lse_BHT, delta_BHT = lse_BHT.contiguous(), delta_BHT.contiguous()
    vis = None if mask is None else mask.view(torch.uint8)
    optional = [x for x in (*(segments or ()), vis) if x is not None]
    tensors = [do_BTHE, q_BTHK, k_BSGK, v_BSGK, lse_BHT, delta_BHT, dbias, bias, *optional]
    key = (_layout(do_BTHE, q_BTHK, k_BSGK, v_BSGK), segments is None, _form(bias), _form(vis), request, blocks,
           all_aligned(tensors))  # fmt: skip
    with device_of(dbias):
        if relaunch(kernels.backward_bias, key, tensors):
            return dbias
        blocks = blocks or _chosen("backward_q", q_BTHK, v_BSGK, request)
        m, n = blocks.m, blocks.n
        tma, (do, q, k, v) = _prepared(do_BTHE, q_BTHK, k_BSGK, v_BSGK)
        D, E, limits, scales, constants = _common(q, v, request)
        args = (
            _tile(q, m, D, tma), _tile(k, n, D, tma), _tile(v, n, E, tma), _tile(do, m, E, tma), lse_BHT, delta_BHT,
            dbias, *_ids(segments, delta_BHT), *_stepped(bias, delta_BHT), *_stepped(vis, delta_BHT), B, H, H // G, T,
            S, q.shape[-1], v.shape[-1], own_h, own_t, own_s, B if own_b == 1 else 1, H if own_h == 1 else 1,
            triton.cdiv(T, m) if own_t == 1 else 1, triton.cdiv(S, n) if own_s == 1 else 1, *limits, *scales,
        )  # fmt: skip
        constants |= {"SEG": segments is not None, "HAS_VIS": vis is not None, "TMA": tma}
        constants |= {"ONE_T": own_t == 1, "ONE_S": own_s == 1}
        n_programs = own_b * own_h * triton.cdiv(own_t, m) * triton.cdiv(own_s, n)
        launch(kernels.backward_bias, key, tensors, n_programs, args, *_constants(constants, blocks))
    return dbias


def _common(q: Tensor, v: Tensor, request: Request) -> tuple[int, int, tuple, tuple, dict[str, Any]]:
    """(D, E, window limits, scales, constants) of every launch."""
    D, E = _padded(q, v)
    capped = request.softcap is not None
    cap = request.softcap or 1.0
    constants: dict[str, Any] = {
        "D": D,
        "E": E,
        "LEFT": request.left is not None,
        "RIGHT": request.right is not None,
        "CAP": capped,
        "PRECISION": request.precision if q.dtype == torch.float32 else "tf32",  # unused for 16 bits
        "UPCAST": interpreted(),
    }
    scales = (request.scale / cap if capped else request.scale * LOG2E, cap * LOG2E)
    return D, E, (request.left or 0, request.right or 0), scales, constants


def _cut(
    which: str, blocks: Blocks | None, q: Tensor, v: Tensor, segments: tuple[Tensor, Tensor] | None, request: Request
) -> tuple[Blocks | None, Tensor | None, Tensor | None]:
    """(blocks, lo, hi). With segments, lo..hi-1 are the tiles of keys that each tile of queries needs (for
    "backward_kv", the tiles of queries for each tile of keys). They depend on tile sizes, so these are chosen here."""
    if segments is None:
        return blocks, None, None
    blocks = blocks or _chosen(which, q, v, request)
    return blocks, *_tile_ranges(segments, blocks.m, blocks.n, of_keys=which == "backward_kv")


def _chosen(which: str, q: Tensor, v: Tensor, request: Request) -> Blocks:
    length = (q if which == "backward_kv" else v).shape[1]
    return choose(which, *_padded(q, v), q.dtype, request.right is not None, length, q.device)


def _heads_at_once(k: Tensor, v: Tensor, n_shared: int) -> int:
    """Query heads to run at a time, so that their keys and values fit the cache; whole groups, which share these."""
    one = k[0, :, 0].numel() * k.element_size() + v[0, :, 0].numel() * v.element_size()
    return max(1, L2_BYTES // max(one, 1)) * n_shared


def _padded(q: Tensor, v: Tensor) -> tuple[int, int]:
    """Head dims padded to powers of two, at least 16."""
    return max(16, triton.next_power_of_2(q.shape[-1])), max(16, triton.next_power_of_2(v.shape[-1]))


def _layout(*tensors: Tensor) -> tuple[Any, ...]:
    """All that a launch depends on except addresses: shapes, strides, dtype and device."""
    first = tensors[0]
    return (*((x.shape, x.stride()) for x in tensors), first.dtype, device_number(first))


def _prepared(*tensors: Tensor) -> tuple[bool, tuple[Tensor, ...]]:
    """(whether TMA descriptors can read all of them, the tensors); if not, contiguous ones, for reads by pointers."""
    tma = all(map(_describable, tensors))
    return tma, tensors if tma else tuple(x.contiguous() for x in tensors)


def _describable(x: Tensor) -> bool:
    """Whether TMA can read x: a dense last axis; its size, the address and strides (none 0) multiples of 16 bytes."""
    size = x.element_size()
    steps = [stride * size for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    dense = x.stride(-1) == 1 and x.shape[-1] * size % 16 == 0
    return dense and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _tile(x: Tensor, rows: int, width: int, tma: bool) -> Any:
    """A descriptor of tiles (1, 1, rows, width) of x as (B, heads, time, width); x itself without TMA."""
    if not tma:
        return x
    y = x.transpose(1, 2)
    # The stride of an axis of size 1 is arbitrary: replace it by one that the hardware accepts.
    strides = [s if n > 1 else 16 * x.shape[-1] for n, s in zip(y.shape[:-1], y.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(y.shape), [*strides, 1], [1, 1, rows, width])


def _form(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def _stepped(x: Tensor | None, unused: Tensor) -> tuple[Any, ...]:
    """A bias or mask and its 4 strides, 0 along an axis that it is broadcast along."""
    if x is None:
        return unused, 0, 0, 0, 0
    return x, *(step if n > 1 else 0 for n, step in zip(x.shape, x.stride(), strict=True))


def _or(x: Tensor | None, unused: Tensor) -> Tensor:
    """x, or a placeholder for an argument that the kernel does not read."""
    return unused if x is None else x


def _ids(segments: tuple[Tensor, Tensor] | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    return (unused, unused) if segments is None else segments


def _constants(constants: dict[str, Any], blocks: Blocks) -> tuple[dict[str, Any], dict[str, int]]:
    options = {"num_warps": blocks.n_warps, "num_stages": blocks.n_stages}
    return {"BM": blocks.m, "BN": blocks.n, **constants}, options


def _tile_ranges(
    segments: tuple[Tensor, Tensor] | None, BM: int, BN: int, *, of_keys: bool
) -> tuple[Tensor | None, Tensor | None]:
    """For each tile of queries (of_keys: of keys) the first and one past the last tile of the other side whose range of
    ids, smallest to largest, overlaps its own. int32 (B, tiles); (0, 0) for a tile that overlaps none."""
    if segments is None:
        return None, None
    low_q, high_q = _extremes(segments[0], BM)
    low_k, high_k = _extremes(segments[1], BN)
    meet = (low_q.unsqueeze(2) <= high_k.unsqueeze(1)) & (low_k.unsqueeze(1) <= high_q.unsqueeze(2))
    if of_keys:
        meet = meet.transpose(1, 2)
    number = torch.arange(meet.shape[-1], device=meet.device, dtype=torch.int32)
    hi = torch.where(meet, number + 1, 0).amax(-1)
    lo = torch.where(meet, number, meet.shape[-1]).amin(-1)
    return torch.minimum(lo, hi).contiguous(), hi.contiguous()


def _extremes(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    n = ids.shape[1]
    padded = torch.cat([ids, ids[:, -1:].expand(-1, -n % size)], 1).unflatten(1, (-1, size))
    return padded.amin(-1), padded.amax(-1)
