"""Linear layers of a block: their leaves, and their application.

Legend: D d_model, F features inside a sublayer (heads times head dim, or the ffn width).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from purelm.models.joined import side_by_side
from purelm.models.leaves import Cut, Fill, Leaf, Params, with_prefix
from purelm.ops import Ops

__all__ = ["apply_linear", "apply_linear_out", "apply_linears", "linear_in", "linear_out"]


def linear_in(name: str, F: int, D: int, part: str, cut: tuple[int, str], *, bias: bool) -> dict[str, Leaf]:
    """Leaves of a layer from the residual stream into a sublayer: weight (F, D), bias (F,).

    Tensor parallelism cuts both along F (Megatron's column parallel). cut: (units, what a unit is), as in `Cut`.
    """
    by_rows = Cut(0, *cut)
    leaves = {"weight": Leaf((F, D), "matrix", part, cut=by_rows, place="sublayer")}
    if bias:
        leaves["bias"] = Leaf((F,), "bias", part, Fill(0.0), cut=by_rows, place="sublayer")
    return with_prefix(name, leaves)


def linear_out(name: str, D: int, F: int, part: str, cut: tuple[int, str], *, bias: bool) -> dict[str, Leaf]:
    """Leaves of the last layer of a sublayer: weight (D, F), bias (D,).

    Tensor parallelism cuts the weight along F (Megatron's row parallel). Every process has the whole bias; it is added
    once, after the sum over processes. cut: (units, what a unit is), as in `Cut`.
    """
    leaves = {"weight": Leaf((D, F), "matrix", part, cut=Cut(1, *cut), place="sublayer", residual=True)}
    if bias:
        leaves["bias"] = Leaf((D,), "bias", part, Fill(0.0))
    return with_prefix(name, leaves)


def apply_linear(params: Params, x: Tensor, ops: Ops) -> Tensor:
    """x W^T + b by `ops.linear`, with params {"weight": W} or {"weight": W, "bias": b}."""
    return ops.linear(x, params["weight"], params.get("bias"))


def apply_linears(layers: Sequence[Params], x: Tensor, ops: Ops) -> tuple[Tensor, ...]:
    """`apply_linear` of each layer to one x; by one product where the weights lie side by side (`joined.join_weights`).

    Where a gradient is recorded, and under torch.func or torch.compile, there is a product for each.
    """
    if not torch.is_grad_enabled() and len({"bias" in layer for layer in layers}) == 1:
        weight = side_by_side([layer["weight"] for layer in layers])
        if weight is not None:
            y = ops.linear(x, weight, None).split([layer["weight"].shape[0] for layer in layers], -1)
            if "bias" not in layers[0]:
                return y
            return tuple(part + layer["bias"] for part, layer in zip(y, layers, strict=True))
    return tuple(apply_linear(layer, x, ops) for layer in layers)


def apply_linear_out(params: Params, x: Tensor, ops: Ops) -> Tensor:
    """x W^T + b by `ops.linear_out`, for the last linear layer of a sublayer; params as for `apply_linear`."""
    return ops.linear_out(x, params["weight"], params.get("bias"))
