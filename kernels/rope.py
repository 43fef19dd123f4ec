"""Rotary position embeddings in one pass, for one tensor or for q and k in one launch.

Legend: B batch, T positions, H heads, G key heads, K head dim, J = K / 2 pairs.

    (a', b') = (a cos - b sin, a sin + b cos)         for each pair (a, b) of a head
    (da, db) = (da' cos + db' sin, -da' sin + db' cos)

The gradient of a rotation is the rotation by the opposite angle: the backward pass is the same kernel with -sin, and
needs only the tables. Su et al. 2021 (arXiv:2104.09864), equation 34.

The tables have no gradient here, since positions are not trained: tables that require one are a ValueError (use
purelm.ops.rope for them).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.kernels.recipe import applier, backward_function, eager_or_op
from purelm.ops.derivatives import in_forward_mode
from purelm.ops.rope import LAYOUTS, Layout, check_tables
from purelm.ops.rope import rope as reference

__all__ = ["rope", "rope_qk"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels; the reference has float64, too


def rope(
    x_BTHK: Float[Tensor, "*axes k"],
    cos: Float[Tensor, "*bt j"],
    sin: Float[Tensor, "*bt j"],
    layout: Layout = "interleaved",
    *,
    heads: bool = True,
) -> Float[Tensor, "*axes k"]:
    """Rotates each pair of a head by its angle, in fp32; the kernel of `purelm.ops.rope.rope`, with its signature.

    x may be any view whose last axis is dense, such as the q part of a joint projection; the result is contiguous.
    Differentiable in x alone; on a GPU once, in reverse mode. On the CPU it is the reference.

    Args:
        cos, sin: (T, K/2) or (B, T, K/2), from `purelm.ops.rope.rope_tables`.
        layout: "interleaved" pairs 2j with 2j+1, "half" pairs j with j + K/2.
        heads: x is (..., T, H, K); False: (..., T, K).

    Raises ValueError for an odd K, tables that have another shape or device or require a gradient, another layout,
    and, on a GPU, dtypes other than fp32, bf16 and fp16.
    """
    if not heads or x_BTHK.ndim != 4:
        check_tables(x_BTHK, cos, sin, heads)
        x = x_BTHK if heads else x_BTHK.unsqueeze(-2)
        lead = x.shape[:-3]
        if cos.ndim > 2:
            cos, sin = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (cos, sin))
        return rope(x.reshape(lead.numel(), *x.shape[-3:]), cos, sin, layout).reshape(x_BTHK.shape)
    cos, sin = _check("rope", [("x", x_BTHK)], cos, sin, layout)
    if in_forward_mode(x_BTHK):
        return reference(x_BTHK, cos, sin, layout)
    return _turn(x_BTHK, cos, sin, layout == "interleaved")


def rope_qk(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTGK: Float[Tensor, "b t g k"],
    cos: Float[Tensor, "*bt j"],
    sin: Float[Tensor, "*bt j"],
    layout: Layout = "interleaved",
) -> tuple[Float[Tensor, "b t h k"], Float[Tensor, "b t g k"]]:
    """(rope(q), rope(k)) in one launch; q and k may differ only in their number of heads. Raises as `rope` does."""
    cos, sin = _check("rope_qk", [("q", q_BTHK), ("k", k_BTGK)], cos, sin, layout)
    if k_BTGK.shape[:2] != q_BTHK.shape[:2] or k_BTGK.shape[3] != q_BTHK.shape[3]:
        raise ValueError(
            f"rope_qk: k must have q's shape but for axis 2, {tuple(q_BTHK.shape)}, got {tuple(k_BTGK.shape)}"
        )
    if in_forward_mode(q_BTHK):
        return reference(q_BTHK, cos, sin, layout), reference(k_BTGK, cos, sin, layout)
    # With one tensor as two arguments dynamo cannot trace a Function (2.13), or its gradients are wrong (2.11).
    k = k_BTGK.view_as(k_BTGK) if k_BTGK is q_BTHK else k_BTGK
    return _turn_both(q_BTHK, k, cos, sin, layout == "interleaved")


def _check(
    name: str, xs: list[tuple[str, Tensor]], cos: Tensor, sin: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """The tables as (1 or B, T, J)."""
    if layout not in LAYOUTS:
        raise ValueError(f"{name}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    for label, x in xs:
        if x.ndim != 4 or x.shape[3] % 2 or not x.is_floating_point():
            raise ValueError(f"{name}: {label} must be floating (B, T, H, even K), got {x.dtype} {tuple(x.shape)}")
    B, T, _, K = xs[0][1].shape
    device = xs[0][1].device
    for label, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in ((T, K // 2), (B, T, K // 2), (1, T, K // 2)):
            raise ValueError(
                f"{name}: {label} must be ({T}, {K // 2}) or ({B}, {T}, {K // 2}), got {tuple(table.shape)}"
            )
        if table.requires_grad:
            raise ValueError(
                f"{name}: {label} requires a gradient, which the kernel does not give: detach it, or use the "
                "reference, purelm.ops.rope"
            )
    for label, x in (*xs, ("cos", cos), ("sin", sin)):
        if x.device != device:
            raise ValueError(f"{name}: {label} must be on {device}, as {xs[0][0]} is, got {x.device}")
        if x.is_cuda and x.dtype not in DTYPES:
            raise ValueError(
                f"{name}: {label} must be float32, bfloat16 or float16 on a GPU, got {x.dtype}: use the reference, "
                "purelm.ops.rope"
            )
    return cos if cos.ndim == 3 else cos.unsqueeze(0), sin if sin.ndim == 3 else sin.unsqueeze(0)


# The ops. Tables are (1 or B, T, J); inverse rotates by the opposite angle.


def _rope_cuda(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    from purelm.kernels import rope_triton

    return rope_triton.turn(x, None, cos, sin, interleaved, inverse)[0]


_rope_op = torch.library.custom_op("purelm::rope", _rope_cuda, mutates_args=(), device_types="cuda")
_rope = eager_or_op(_rope_op, _rope_cuda)


@_rope_op.register_kernel("cpu")
def _rope_plain(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return reference(x, cos, -sin if inverse else sin, LAYOUTS[not interleaved]).contiguous()


@_rope_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rope_qk_cuda(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    from purelm.kernels import rope_triton

    return rope_triton.turn(q, k, cos, sin, interleaved, inverse)


_rope_qk_op = torch.library.custom_op("purelm::rope_qk", _rope_qk_cuda, mutates_args=(), device_types="cuda")
_rope_qk = eager_or_op(_rope_qk_op, _rope_qk_cuda)


@_rope_qk_op.register_kernel("cpu")
def _rope_qk_plain(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return _rope_plain(q, cos, sin, interleaved, inverse), _rope_plain(k, cos, sin, interleaved, inverse)


@_rope_qk_op.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


# Autograd and vmap. A batch of vmap is folded into the batch axis of x.


def _fold(x: Tensor, dim: int | None, n: int) -> Tensor:
    return (x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _fold_table(table: Tensor, dim: int | None, n: int, B: int) -> Tensor:
    """A table that all rows share is not repeated; otherwise each row of the folded batch gets its own."""
    if dim is None and table.shape[0] == 1:
        return table
    table = table.expand(n, *table.shape) if dim is None else table.movedim(dim, 0)
    return table.expand(n, B, *table.shape[2:]).flatten(0, 1)


def _folded(info: Any, in_dims: Any, args: Any, n_xs: int) -> tuple[Any, ...]:
    """The arguments (n_xs tensors, cos, sin, flags) of one call for the whole batch of vmap."""
    n = info.batch_size
    xs = [_fold(x, dim, n) for x, dim in zip(args[:n_xs], in_dims, strict=False)]
    tables = [
        _fold_table(table, dim, n, xs[0].shape[0] // n)
        for table, dim in zip(args[n_xs : n_xs + 2], in_dims[n_xs : n_xs + 2], strict=True)
    ]
    return *xs, *tables, *args[n_xs + 2 :]


def _unfold(x: Tensor, n: int) -> Tensor:
    return x.unflatten(0, (n, x.shape[0] // n))


def _rope_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _unfold(_backward(*_folded(info, in_dims, args, 1)), info.batch_size), 0


def _rope_qk_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return tuple(_unfold(x, info.batch_size) for x in _backward_qk(*_folded(info, in_dims, args, 2))), (0, 0)


_backward = backward_function("rope", _rope, _rope_vmap, _rope_plain)
_backward_qk = backward_function("rope_qk", _rope_qk, _rope_qk_vmap, _rope_qk_plain)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return _rope(x, cos, sin, interleaved, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(grads[0], *ctx.saved_tensors, ctx.interleaved, True), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _unfold(_turn(*_folded(info, in_dims, args, 1)), info.batch_size), 0


class _RopeQK(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
        return _rope_qk(q, k, cos, sin, interleaved, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        back = *ctx.saved_tensors, ctx.interleaved, True
        dq = dk = None
        if all(ctx.needs_input_grad[:2]):
            dq, dk = _backward_qk(*grads, *back)
        elif ctx.needs_input_grad[0]:
            dq = _backward(grads[0], *back)
        else:
            dk = _backward(grads[1], *back)
        return dq, dk, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        q, k = _turn_both(*_folded(info, in_dims, args, 2))
        return (_unfold(q, info.batch_size), _unfold(k, info.batch_size)), (0, 0)


_turn, _turn_both = applier("rope", _Rope), applier("rope_qk", _RopeQK)
