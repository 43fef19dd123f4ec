"""Rotary position embeddings. Legend: B batch, T positions, H heads, K head dim, J = K / 2 pairs.

Tables are functions of positions: `rope_tables` once for a model, `rope` for each q and k.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "Kind",
    "Layout",
    "RopeScaling",
    "attention_factor",
    "check_tables",
    "frequencies",
    "rope",
    "rope_tables",
]

Kind = Literal["linear", "ntk", "dynamic_ntk", "llama3", "yarn"]
Layout = Literal["interleaved", "half"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies change for contexts longer than those trained on; s is `factor`, L `original_length`.

    linear: w / s (position interpolation; Chen et al. 2023, arXiv:2306.15595).
    ntk: theta becomes theta s^(K/(K-2)): the slowest pair is slowed by s, the fastest not at all.
    dynamic_ntk: as ntk with s n/L - (s - 1) in place of s when n tokens exceed L, else unchanged. n is the `length`
        given to `frequencies`, one for all keys that a query sees: a model takes its number of positions, or those of
        the document where segment_ids divide a row, a cache its size, and generation the model's context_length.
    llama3: wavelengths over L/low_freq_factor are slowed by s, those under L/high_freq_factor are kept, and between
        them the two are mixed linearly in L/wavelength (Llama 3.1, arXiv:2407.21783).
    yarn: pairs that turn more than beta_fast times in L positions are kept, those that turn less than beta_slow times
        are slowed by s, mixed linearly in the pair's number between them; tables are multiplied by
        `attention_factor`, or 0.1 ln s + 1 when None (Peng et al. 2023, arXiv:2309.00071, sections 3.2-3.4; the
        paper mixes linearly in the number of turns, released models in the number of the pair, as here).
        truncate rounds the two ends of that range outward to whole pairs.
    """

    kind: Kind
    factor: float
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"RopeScaling.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number and not (name == "attention_factor" and value is None):
                raise ValueError(f"RopeScaling.{name} must be a number, got {value!r}")
        length = self.original_length
        if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
            raise ValueError(f"RopeScaling.original_length must be an int or None, got {length!r}")
        if not 1.0 <= self.factor < math.inf:
            raise ValueError(f"RopeScaling.factor must be at least 1 and finite, got {self.factor}")
        if self.attention_factor is not None and not 0.0 < self.attention_factor < math.inf:
            raise ValueError(
                f"RopeScaling.attention_factor must be above 0 and finite, or None, got {self.attention_factor}"
            )
        if self.kind in ("dynamic_ntk", "llama3", "yarn") and not (self.original_length or 0) > 0:
            raise ValueError(
                f"RopeScaling.original_length must be the positive trained length for kind {self.kind!r}, "
                f"got {self.original_length}"
            )
        if not 0.0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                "RopeScaling.low_freq_factor must be above 0 and below high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if not 0.0 < self.beta_slow < self.beta_fast < math.inf:
            raise ValueError(
                f"RopeScaling.beta_slow must be above 0 and below beta_fast, got {self.beta_slow} and {self.beta_fast}"
            )


def attention_factor(scaling: RopeScaling | None) -> float:
    """What the tables are multiplied by: 1 but for yarn (so scores are multiplied by its square)."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.attention_factor is None else scaling.attention_factor


def frequencies(
    head_dim: int,
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
    *,
    length: int | Int[Tensor, "*p"] | None = None,
    device: torch.device | None = None,
) -> Float[Tensor, "*p j"]:
    """w_j = theta^(-2j/K) radians per position for j = 0..K/2-1, changed by `scaling`; float64.

    length: of what the position belongs to, which dynamic_ntk alone looks at; a tensor gives each position its own.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive for rotary embeddings, got {head_dim}")
    if not 0.0 < theta < math.inf:
        raise ValueError(f"theta must be above 0 and finite, got {theta}")
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    exponent = -2.0 * pair / head_dim
    if scaling is None:
        return theta**exponent
    s: Any = scaling.factor
    if scaling.kind in ("ntk", "dynamic_ntk"):
        if scaling.kind == "dynamic_ntk":
            if isinstance(length, Tensor):
                s = (s * length.to(torch.float64) / _original(scaling) - (s - 1.0)).clamp(min=1.0).unsqueeze(-1)
            else:
                s = max(1.0, s * (length or 0) / _original(scaling) - (s - 1.0))
        # With one pair there is no slower one to slow: the exponent K/(K-2) has no meaning and w_0 = 1 stays.
        try:
            return (theta * s ** (head_dim / (head_dim - 2)) if head_dim > 2 else theta) ** exponent
        except OverflowError:
            raise ValueError(f"theta {theta:g} times factor {s:g}^(K/(K-2)) is not finite") from None
    if scaling.kind == "yarn" and theta <= 1.0:
        raise ValueError(f"theta must be above 1 for yarn, which goes by the logarithm to this base, got {theta}")
    w = theta**exponent
    if scaling.kind == "linear":
        return w / s
    if scaling.kind == "llama3":
        turns = w * (_original(scaling) / (2.0 * math.pi))  # L / wavelength
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        first, last = _pair_of(scaling.beta_fast, head_dim, theta, scaling), _pair_of(
            scaling.beta_slow, head_dim, theta, scaling
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0.0), min(last, head_dim - 1.0)
        keep = 1.0 - (pair - first) / max(last - first, 0.001)  # 0.001: a step where the range is empty
    keep = keep.clamp(0.0, 1.0)
    return w * keep + w / s * (1.0 - keep)


def _original(scaling: RopeScaling) -> int:
    assert scaling.original_length is not None  # checked by RopeScaling
    return scaling.original_length


def _pair_of(turns: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """The (fractional) number of the pair that turns this often in the original length."""
    return head_dim * math.log(_original(scaling) / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))


def rope_tables(
    positions: Int[Tensor, "*p"],
    head_dim: int,
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
    *,
    length: int | Int[Tensor, "*q"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "*t j"], Float[Tensor, "*t j"]]:
    """cos and sin of position * w_j, for positions (T,), shared by all rows, or (B, T).

    Angles are formed in float64, because in float32 they are off by 0.06 radians at position 10^6.

    Args:
        length: number of positions, which dynamic_ntk alone looks at; a tensor (B, T) gives each its own.
    """
    w_J = frequencies(head_dim, theta, scaling, length=length, device=positions.device)
    angle = positions.to(torch.float64).unsqueeze(-1) * w_J
    factor = attention_factor(scaling)
    cos, sin = torch.cos(angle), torch.sin(angle)
    if factor != 1.0:
        cos, sin = factor * cos, factor * sin
    return _held(cos.to(dtype)), _held(sin.to(dtype))


def _held(x: Tensor) -> Tensor:
    """x itself; under torch.compile, x computed once and stored.

    Inductor copies elementwise code into everything that reads its result: here 64-bit pow, sin and cos would run
    again for each element of each head of each layer. The result of a scatter it always stores.
    """
    if not torch.compiler.is_compiling():
        return x
    return torch.zeros_like(x).index_copy(0, torch.arange(x.shape[0], device=x.device), x)


def check_tables(x: Tensor, cos: Tensor, sin: Tensor, heads: bool) -> None:
    """ValueError unless x is (..., T, H, K), or without heads (..., T, K), for tables (..., T, K/2)."""
    form = "(..., T, H, K)" if heads else "(..., T, K)"
    wanted = None if x.ndim < 2 + heads else (x.shape[-2 - heads], x.shape[-1])
    if any((t.shape[-2], 2 * t.shape[-1]) != wanted for t in (cos, sin)):
        raise ValueError(
            f"x must be {form} for cos and sin (..., T, K/2) with heads={heads}, got x {tuple(x.shape)}, "
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )


def rope(
    x_BTHK: Float[Tensor, "*axes k"],
    cos: Float[Tensor, "*bt j"],
    sin: Float[Tensor, "*bt j"],
    layout: Layout = "interleaved",
    *,
    heads: bool = True,
) -> Float[Tensor, "*axes k"]:
    """Turns each pair (a, b) of a head by its angle: (a cos - b sin, a sin + b cos).

    Computed in the wider dtype of x and tables, returned in x's dtype. The product of a turned q and a turned k
    depends on the difference of their positions alone.

    Args:
        cos, sin: (T, K/2) or (B, T, K/2), from `rope_tables`; B may be any number of axes.
        heads: x is (..., T, H, K). False: x has no axis of heads and is (..., T, K). ValueError where the position axis
            that this names has not T positions, so that one is not taken for the other.
        layout: "interleaved" pairs 2j with 2j+1 (the paper, the course, Llama's own weights); "half" pairs j with
            j + K/2 (GPT-NeoX, Hugging Face). Permuting the rows of the q and k projections turns one into the other.
    Source: Su et al. 2021 (arXiv:2104.09864), equation 34.
    """
    check_tables(x_BTHK, cos, sin, heads)
    if heads:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if layout == "interleaved":
        a, b = x_BTHK.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    elif layout == "half":
        a, b = x_BTHK.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return turned.to(x_BTHK.dtype)
