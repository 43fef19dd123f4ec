"""Feed-forward layers as values: W2 (act(W1 x) * W3 x) if gated, else W2 act(W1 x). Config(ffn=...) takes any.

    ffn = gated(torch.relu)               # any activation
    cfg = Config(..., ffn=ffn)

Legend: B batch, T positions, D d_model, F ffn width.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from purelm.models.leaves import Leaf, Params
from purelm.models.linear import apply_linear_out, apply_linears, linear_in, linear_out
from purelm.models.mixers import Cost
from purelm.ops import Ops

__all__ = ["CostOfFeedForward", "FeedForward", "Inner", "built_in", "gated", "plain"]

# (ops, W1 x, W3 x or None without a gate) -> the input of W2
Inner = Callable[[Ops, Tensor, Tensor | None], Tensor]


class CostOfFeedForward(Protocol):
    """The function (config, d_model, width, batch, length) -> Cost of one layer for `batch` sequences of `length`.

    bytes_per_element: of activations.
    """

    def __call__(
        self, config: Any, d_model: int, width: int, batch: int, length: int, /, *, bytes_per_element: int = 4
    ) -> Cost: ...


class FeedForward(NamedTuple):
    """A layer applied to every position separately: functions, and the `config` that each takes as first argument."""

    config: Hashable
    is_gated: bool  # default width (d_ff None) is 8/3 d_model, else 4 d_model: three matrices then cost as much as two
    leaves: Callable[[Any, int, int, bool], dict[str, Leaf]]  # (config, d_model, width, biases) -> table
    apply: Callable[[Any, Params, Tensor, Ops], Tensor]  # (config, params, x_BTD, ops) -> y_BTD
    cost: CostOfFeedForward


def gated(activation: Callable[[Tensor], Tensor]) -> FeedForward:
    """The layer W2 (activation(W1 x) * W3 x); W1, W3 (F, D), W2 (D, F)."""
    return FeedForward(_Gated(activation), True, _leaves, _apply, _cost)


def plain(activation: Callable[[Tensor], Tensor]) -> FeedForward:
    """The layer W2 activation(W1 x); W1 (F, D), W2 (D, F)."""
    return FeedForward(_Plain(activation), False, _leaves, _apply, _cost)


def built_in(name: str, *, gelu_tanh: bool = False) -> FeedForward:
    """The layer `name`: swiglu or geglu (gated), silu, gelu or relu2, computed by the op of that name in `Ops`.

    gelu_tanh: gelu and geglu by their tanh approximation.
    """
    is_gated = name in GATED
    return FeedForward(_BuiltIn(name, is_gated, gelu_tanh), is_gated, _leaves, _apply, _cost)


GATED = ("swiglu", "geglu")


class _Gated(NamedTuple):
    activation: Callable[[Tensor], Tensor]
    is_gated: bool = True

    def inner(self, ops: Ops, gate: Tensor, up: Tensor | None) -> Tensor:
        assert up is not None
        return self.activation(gate) * up


class _Plain(NamedTuple):
    activation: Callable[[Tensor], Tensor]
    is_gated: bool = False

    def inner(self, ops: Ops, gate: Tensor, up: Tensor | None) -> Tensor:
        return self.activation(gate)


class _BuiltIn(NamedTuple):
    name: str
    is_gated: bool
    gelu_tanh: bool

    def inner(self, ops: Ops, gate: Tensor, up: Tensor | None) -> Tensor:
        if self.is_gated:
            assert up is not None
            return ops.swiglu(gate, up) if self.name == "swiglu" else ops.geglu(gate, up, self.gelu_tanh)
        if self.name == "gelu":
            return ops.gelu(gate, self.gelu_tanh)
        return ops.silu(gate) if self.name == "silu" else ops.relu2(gate)


def _leaves(c: Any, d_model: int, width: int, biases: bool) -> dict[str, Leaf]:
    cut, part = (width, "d_ff"), "ffn"
    leaves = {
        **linear_in("w1", width, d_model, part, cut, bias=biases),
        **linear_out("w2", d_model, width, part, cut, bias=biases),
    }
    return {**leaves, **linear_in("w3", width, d_model, part, cut, bias=biases)} if c.is_gated else leaves


def _apply(c: Any, params: Params, x_BTD: Tensor, ops: Ops) -> Tensor:
    h_BTD = ops.enter(x_BTD)
    names = ("w1", "w3") if c.is_gated else ("w1",)
    gate, *up = apply_linears([params[name] for name in names], h_BTD, ops)
    return apply_linear_out(params["w2"], c.inner(ops, gate, up[0] if up else None), ops)


def _cost(c: Any, d_model: int, width: int, batch: int, length: int, *, bytes_per_element: int = 4) -> Cost:
    N = batch * length
    product = 2 * N * d_model * width
    flops = {"ffn_w1": product, "ffn_w3": product if c.is_gated else 0, "ffn_w2": product}
    kept = N * (width * (4 if c.is_gated else 2) + d_model) * bytes_per_element  # W1, activation, W3, product, W2
    return Cost(flops, {"ffn": kept}, 0)
