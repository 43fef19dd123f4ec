"""The configuration of a Transformer: every choice that shapes its parameters or its maths."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from purelm.ops.rope import Layout, RopeScaling

NormName = Literal["rms", "layer", "none"]
NormPlace = Literal["pre", "post", "output", "sandwich"]
Position = Literal["rope", "learned", "none"]
FfnName = Literal["swiglu", "geglu", "silu", "gelu", "relu2"]
QKNorm = Literal["none", "head", "full"]
Biases = Literal["none", "qkv", "all"]
MixerName = Literal["attention"]

if TYPE_CHECKING:
    from purelm.models.feed_forward import FeedForward
    from purelm.models.mixers import Mixer
    from purelm.models.norms import Norm

    NormChoice: TypeAlias = NormName | Norm
    FfnChoice: TypeAlias = FfnName | FeedForward
    MixerChoice: TypeAlias = MixerName | Mixer | tuple[MixerName | Mixer, ...]
else:  # at run time the types name only what a command line or a JSON file can give: strings
    NormChoice, FfnChoice = NormName, FfnName
    MixerChoice = MixerName | tuple[MixerName, ...]

__all__ = [
    "Biases",
    "Config",
    "FfnName",
    "MixerName",
    "NormName",
    "NormPlace",
    "Position",
    "QKNorm",
    "RopeScaling",
    "config_from_dict",
]

GATED = ("swiglu", "geglu")
# Fields whose values are names, and the names allowed, taken from the Literal types above.
AXES: dict[str, tuple[str, ...]] = {
    "norm": get_args(NormName),
    "norm_position": get_args(NormPlace),
    "position": get_args(Position),
    "rope_layout": get_args(Layout),
    "ffn": get_args(FfnName),
    "qk_norm": get_args(QKNorm),
    "biases": get_args(Biases),
    "mixer": get_args(MixerName),
}
OWN = ("norm", "ffn", "mixer")  # fields that also accept a user's own Norm, FeedForward or Mixer


@dataclass(frozen=True)
class Config:
    """A decoder-only (or, with causal=False, encoder-only) Transformer; the defaults are those of CS336.

    n_kv_heads, head_dim and d_ff may be None; the sizes that then apply are `kv_heads`, `head_width` and `ff_width`.
    """

    vocab_size: int
    context_length: int  # positions in training; longer inputs are errors with learned positions and in generation
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None  # n_heads when None; fewer than n_heads: grouped-query attention
    head_dim: int | None = None  # d_model / n_heads when None
    d_ff: int | None = None  # None: 8/3 d_model rounded up to a multiple of 64 for a gated ffn, else 4 d_model
    norm: NormChoice = "rms"  # rms, layer or none; or a `models.norms.Norm`
    # pre: x + f(n(x)); post: n(x + f(x)); output: x + n(f(x)); sandwich: x + n'(f(n(x)))
    norm_position: NormPlace = "pre"
    norm_eps: float = 1e-5
    position: Position = "rope"  # rope, learned (a vector for each position, added to the token's) or none
    # One for all layers, or a tuple of which layer i has entry i mod len: local layers may turn at another rate.
    rope_theta: float | tuple[float, ...] = 10000.0
    rope_layout: Layout = "interleaved"  # interleaved or half
    rope_scaling: RopeScaling | tuple[RopeScaling | None, ...] | None = None  # as rope_theta
    # swiglu and geglu: W2 (act(W1 x) * W3 x); silu, gelu and relu2: W2 act(W1 x); or a `feed_forward.FeedForward`
    ffn: FfnChoice = "swiglu"
    gelu_tanh: bool = False  # gelu and geglu use the tanh approximation (GPT-2, Gemma)
    qk_norm: QKNorm = "none"  # RMS norm of q and k over each head's features (head) or over all heads' together (full)
    biases: Biases = "none"  # none, qkv (q, k and v projections) or all (every linear layer in a block, layer norms)
    # A position sees this many keys before its own (and after it if not causal); None: all. Layer i has entry
    # i mod len of a tuple.
    window: int | tuple[int | None, ...] | None = None
    causal: bool = True
    attention_scale: float | None = None  # 1 / sqrt(head_dim) when None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tie_embeddings: bool = False  # logits = h E^T with the token embeddings E; there is no lm_head
    # "attention" or a `models.mixers.Mixer`; layer i has entry i mod len of a tuple.
    mixer: MixerChoice = "attention"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads"):
            _check_size(name, getattr(self, name))
        for name in ("n_kv_heads", "head_dim", "d_ff"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        for name, allowed in AXES.items():
            given = getattr(self, name)
            for value in self.mixers if name == "mixer" else (given,):
                if name in OWN and callable(getattr(value, "leaves", None)) and callable(getattr(value, "apply", None)):
                    continue
                if not isinstance(value, str) or value not in allowed:
                    raise ValueError(f"Config.{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.mixer == ():
            raise ValueError("Config.mixer must name at least one layer's mixer, got ()")
        if self.window == ():
            raise ValueError("Config.window must be None, a number of keys or a non-empty tuple of these, got ()")
        for w in self.window if isinstance(self.window, tuple) else (self.window,):
            if w is not None and (not isinstance(w, int) or isinstance(w, bool) or w < 0):
                raise ValueError(f"Config.window must be None or at least 0 keys, got {self.window}")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"Config.n_heads must divide d_model {self.d_model} unless head_dim is given, got {self.n_heads}"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"Config.n_kv_heads must divide n_heads {self.n_heads}, got {self.n_kv_heads}")
        if self.position == "rope" and self.head_width % 2:
            raise ValueError(f"Config.head_dim must be even for rope, got {self.head_width}")
        odd = [x for x in _every(self.rope_scaling) if x is not None and not isinstance(x, RopeScaling)]
        if odd:
            raise ValueError(f"Config.rope_scaling must be a RopeScaling, None, or a tuple of these, got {odd[0]!r}")
        if any(x is not None for x in _every(self.rope_scaling)) and self.position != "rope":
            raise ValueError(f'Config.rope_scaling needs position "rope", got position {self.position!r}')
        if self.norm == "none" and self.norm_position != "pre":
            raise ValueError(f'Config.norm_position must stay "pre" without a norm, got {self.norm_position!r}')
        for name in ("norm_eps", "rope_theta", "attention_scale", "attention_softcap", "logit_softcap"):
            given = getattr(self, name)
            for value in _every(given) if name == "rope_theta" else (given,):
                if value is None and name not in ("norm_eps", "rope_theta"):
                    continue
                if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 < value < math.inf:
                    raise ValueError(f"Config.{name} must be above 0 and finite, got {given!r}")
        for name in ("gelu_tanh", "causal", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Config.{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("rope_theta", "rope_scaling"):
            if getattr(self, name) == ():
                raise ValueError(f"Config.{name} must have an entry for at least one layer, got ()")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def ff_width(self) -> int:
        """Features inside the feed-forward layer."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // (3 * 64)) * 64 if self.gated else 4 * self.d_model

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer is gated: W2 (act(W1 x) * W3 x) instead of W2 act(W1 x)."""
        return self.ffn in GATED if isinstance(self.ffn, str) else self.ffn.is_gated

    @property
    def mixers(self) -> tuple[Any, ...]:
        """Mixers as a tuple: layer i has entry i mod len."""
        # A Mixer is a NamedTuple, so isinstance(mixer, tuple) alone does not tell it from a tuple of mixers.
        return self.mixer if isinstance(self.mixer, tuple) and not hasattr(self.mixer, "_fields") else (self.mixer,)

    def window_of(self, layer: int) -> int | None:
        """The window of layer number `layer`; None: unlimited."""
        return self.window[layer % len(self.window)] if isinstance(self.window, tuple) else self.window

    def rope_of(self, layer: int) -> tuple[float, RopeScaling | None]:
        """(theta, scaling) of the rotary tables of layer number `layer`."""
        thetas, scalings = _every(self.rope_theta), _every(self.rope_scaling)
        return thetas[layer % len(thetas)], scalings[layer % len(scalings)]


def _every(value: Any) -> tuple[Any, ...]:
    """A value of all layers, or the values of some in turn, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Config.{name} must be a positive int, got {value!r}")


def config_from_dict(fields: Mapping[str, Any]) -> Config:
    """The Config of dataclasses.asdict(cfg), also after a round trip through JSON.

    ValueError names fields that Config does not have, and fields without a default that are missing.

    >>> cfg = Config(vocab_size=8, context_length=4, d_model=4, n_layers=1, n_heads=2)
    >>> config_from_dict(dataclasses.asdict(cfg)) == cfg
    True
    """
    known = {f.name: f for f in dataclasses.fields(Config)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"Config has no fields {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    absent = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
    if absent:
        raise ValueError(f"Config needs fields {', '.join(absent)}, got only {', '.join(sorted(fields))}")
    # JSON turns tuples into lists.
    given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    if "rope_scaling" in given:
        scaling = given["rope_scaling"]
        several = isinstance(scaling, tuple)
        given["rope_scaling"] = tuple(map(_scaling, scaling)) if several else _scaling(scaling)
    return Config(**given)


def _scaling(given: Any) -> Any:
    """The RopeScaling that a mapping has the fields of; anything else as it is."""
    if not isinstance(given, Mapping):
        return given
    names = [f.name for f in dataclasses.fields(RopeScaling)]
    if odd := sorted(set(given) - set(names)) or [n for n in names[:2] if n not in given]:
        raise ValueError(
            f"Config.rope_scaling: unknown or missing fields {', '.join(odd)}; the fields are {', '.join(names)}"
        )
    return RopeScaling(**given)
