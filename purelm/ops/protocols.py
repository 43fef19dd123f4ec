"""What each op of the bundle is called with, and what it returns: one Protocol for each field of `Ops`.

    def mine(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: Window = None,
             segment_ids: Segments = None, scale: float | None = None, softcap: float | None = None) -> Tensor: ...

    attention: Attention = mine                    # a type checker compares the signatures here
    ops = REFERENCE._replace(attention=attention)  # mypy does so here too; pyright does not check _replace

Arguments before `/` are given by position, so an op may name them as it likes. An op may take more than is listed, if
the rest has defaults. What the numbers are is said by the reference function of the same name.
Legend: B batch, T query positions, S key positions, H query heads, G key/value heads, K and E head dims.
"""

from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from purelm.ops.masks import Segments, Window
from purelm.ops.rope import Layout

__all__ = [
    "Activation",
    "AddRMSNorm",
    "Attention",
    "Boundary",
    "DecodeAttention",
    "Embedding",
    "Gate",
    "GeluActivation",
    "GeluGate",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropy",
    "LogProbs",
    "RMSNorm",
    "Rope",
    "Unembed",
]


class Linear(Protocol):
    """x W^T + b."""

    def __call__(
        self,
        x: Float[Tensor, "*batch i"],
        weight_OI: Float[Tensor, "o i"],
        bias_O: Float[Tensor, " o"] | None = None,
        /,
    ) -> Float[Tensor, "*batch o"]: ...


class Embedding(Protocol):
    """Rows of a table by number: of tokens, or of positions."""

    def __call__(
        self, ids: Int[Tensor, "*batch"], weight_VD: Float[Tensor, "v d"], /
    ) -> Float[Tensor, "*batch d"]: ...


class Unembed(Protocol):
    """Logits of states."""

    def __call__(
        self, x: Float[Tensor, "*batch d"], weight_VD: Float[Tensor, "v d"], /
    ) -> Float[Tensor, "*batch v"]: ...


class RMSNorm(Protocol):
    """w x / sqrt(mean(x^2) + eps)."""

    def __call__(
        self, x: Float[Tensor, "*batch d"], weight_D: Float[Tensor, " d"] | None = None, eps: float = 1e-5, /
    ) -> Float[Tensor, "*batch d"]: ...


class AddRMSNorm(Protocol):
    """(the RMS norm of x + residual, x + residual)."""

    def __call__(
        self,
        x: Float[Tensor, "*batch d"],
        residual: Float[Tensor, "*batch d"],
        weight_D: Float[Tensor, " d"] | None = None,
        eps: float = 1e-5,
        /,
    ) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d"]]: ...


class LayerNorm(Protocol):
    """w (x - mean(x)) / sqrt(var(x) + eps) + b."""

    def __call__(
        self,
        x: Float[Tensor, "*batch d"],
        weight_D: Float[Tensor, " d"] | None = None,
        bias_D: Float[Tensor, " d"] | None = None,
        eps: float = 1e-5,
        /,
    ) -> Float[Tensor, "*batch d"]: ...


class Rope(Protocol):
    """Turns each pair of a head's features by the angle of its position."""

    def __call__(
        self,
        x_BTHK: Float[Tensor, "b t h k"],
        cos: Float[Tensor, "*bt j"],
        sin: Float[Tensor, "*bt j"],
        layout: Layout = "interleaved",
        /,
    ) -> Float[Tensor, "b t h k"]: ...


class Attention(Protocol):
    """softmax(scale q k^T) v over the keys that a query sees."""

    def __call__(
        self,
        q_BTHK: Float[Tensor, "b t h k"],
        k_BSGK: Float[Tensor, "b s g k"],
        v_BSGE: Float[Tensor, "b s g e"],
        /,
        *,
        causal: bool = True,
        window: Window = None,
        segment_ids: Segments = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "b t h e"]: ...


class Gate(Protocol):
    """act(gate) * up."""

    def __call__(self, gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"], /) -> Float[Tensor, "*shape"]: ...


class GeluGate(Protocol):
    """gelu(gate) * up."""

    def __call__(
        self, gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"], tanh: bool = False, /
    ) -> Float[Tensor, "*shape"]: ...


class Activation(Protocol):
    """act(x), element by element."""

    def __call__(self, x: Float[Tensor, "*shape"], /) -> Float[Tensor, "*shape"]: ...


class GeluActivation(Protocol):
    """gelu(x); tanh: by its approximation."""

    def __call__(self, x: Float[Tensor, "*shape"], tanh: bool = False, /) -> Float[Tensor, "*shape"]: ...


class LinearCrossEntropy(Protocol):
    """(loss, nll) of hidden states against an unembedding: scalars, or one a token with reduction "none"."""

    def __call__(
        self,
        hidden: Float[Tensor, "*batch d"],
        unembedding_VD: Float[Tensor, "v d"],
        targets: Int[Tensor, "*batch"],
        /,
        *,
        weights: Float[Tensor, "*batch"] | None = None,
        denominator: Float[Tensor, ""] | float | None = None,
        reduction: str = "sum",
        softcap: float | None = None,
        z_loss: float = 0.0,
        chunk: int | None = None,
    ) -> tuple[Float[Tensor, "*out"], Float[Tensor, "*out"]]: ...


class LogProbs(Protocol):
    """(log p of each target, entropy) of hidden states against an unembedding."""

    def __call__(
        self,
        hidden: Float[Tensor, "*batch d"],
        unembedding_VD: Float[Tensor, "v d"],
        targets: Int[Tensor, "*batch"],
        /,
        *,
        softcap: float | None = None,
        temperature: float = 1.0,
        chunk: int | None = None,
        ignore_index: int | None = None,
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]: ...


class Boundary(Protocol):
    """Where a sublayer begins, or the stream ends: the states, as those of one process or gathered from several."""

    def __call__(self, x_BTD: Float[Tensor, "b t d"], /) -> Float[Tensor, "b u d"]: ...


class DecodeAttention(Protocol):
    """Attention of one new token a row over a cache, into which its key and value are written first."""

    def __call__(
        self,
        q_BHK: Float[Tensor, "b h k"],
        k_BGK: Float[Tensor, "b g k"],
        v_BGK: Float[Tensor, "b g k"],
        keys_BSGK: Float[Tensor, "b s g k"],
        values_BSGK: Float[Tensor, "b s g k"],
        length_B: Int[Tensor, " b"],
        /,
        *,
        cos_BJ: Float[Tensor, "#b j"] | None = None,
        sin_BJ: Float[Tensor, "#b j"] | None = None,
        layout: Layout = "interleaved",
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "b h k"]: ...
