"""Linear layers of a block: their leaves, and their application.

Legend: D d_model, F features that a sublayer has of its own.
"""

from torch import Tensor

from purelm.models.leaves import Cut, Fill, Leaf, Params, with_prefix
from purelm.ops import Ops

__all__ = ["apply_linear", "apply_linear_out", "linear_in", "linear_out"]


def linear_in(name: str, F: int, D: int, part: str, cut: tuple[int, str], *, bias: bool) -> dict[str, Leaf]:
    """Weight (F, D) and bias (F,) of a layer that reads the stream, cut by outputs; cut: (units, their name)."""
    by_rows = Cut(0, *cut)
    leaves = {"weight": Leaf((F, D), "matrix", part, cut=by_rows, place="sublayer")}
    if bias:
        leaves["bias"] = Leaf((F,), "bias", part, Fill(0.0), cut=by_rows, place="sublayer")
    return with_prefix(name, leaves)


def linear_out(name: str, D: int, F: int, part: str, cut: tuple[int, str], *, bias: bool) -> dict[str, Leaf]:
    """Weight (D, F) and bias (D,) of the layer that a sublayer ends with, cut by inputs; the bias is added once."""
    leaves = {"weight": Leaf((D, F), "matrix", part, cut=Cut(1, *cut), place="sublayer", residual=True)}
    if bias:
        leaves["bias"] = Leaf((D,), "bias", part, Fill(0.0))
    return with_prefix(name, leaves)


def apply_linear(params: Params, x: Tensor, ops: Ops) -> Tensor:
    """x W^T + b, of {"weight", and perhaps "bias"}."""
    return ops.linear(x, params["weight"], params.get("bias"))


def apply_linear_out(params: Params, x: Tensor, ops: Ops) -> Tensor:
    """The same at the end of a sublayer."""
    return ops.linear_out(x, params["weight"], params.get("bias"))
