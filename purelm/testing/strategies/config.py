"""Strategies of the Transformer's configurations.

    @given(configs(causal=True, n_layers=st.integers(1, 2)))
    def test_my_model(cfg): ...

What names can stand in a field comes from `models.config`, so that a name added there is drawn here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from purelm.data.checks import check_int
from purelm.models.config import AXES, Config
from purelm.models.feed_forward import gated, plain
from purelm.models.mixers.attention import attention
from purelm.models.norms import layer_norm, rms_norm
from purelm.ops.rope import Kind, RopeScaling
from purelm.testing.strategies.choices import chosen

__all__ = ["configs", "rope_scalings"]

KINDS: tuple[Kind, ...] = get_args(Kind)
LONGEST = 16  # most positions of training
# Fields whose values are numbers above 0, and some that are used or are far from these; the first is the default.
NUMBERS: dict[str, tuple[float | None, ...]] = {
    "norm_eps": (1e-5, 1e-6, 1e-12, 0.1),
    "rope_theta": (10000.0, 2.0, 100.0, 5e5, 1e7),
    "attention_scale": (None, 0.1, 0.5, 2.0),
    "attention_softcap": (None, 1.0, 50.0),
    "logit_softcap": (None, 1.0, 30.0),
}
OPTIONAL = ("n_kv_heads", "head_dim", "d_ff")
SIZES = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", *OPTIONAL)
FLAGS = {"gelu_tanh": False, "causal": True, "tie_embeddings": False}  # and their defaults


def rope_scalings(kinds: Kind | Sequence[Kind] = KINDS) -> SearchStrategy[RopeScaling]:
    """RopeScalings of these kinds, with every field drawn; those that the kind does not read have their defaults.

    Shrinks to the first kind, factor 1.
    """
    return _rope_scalings(chosen("kinds", kinds, KINDS))


@st.composite
def _rope_scalings(draw: DrawFn, kinds: Sequence[Kind]) -> RopeScaling:
    kind = draw(st.sampled_from(kinds))
    fields: dict[str, Any] = {}
    if kind in ("dynamic_ntk", "llama3", "yarn"):
        fields["original_length"] = draw(st.integers(1, 2 * LONGEST))
    if kind == "llama3":
        fields["low_freq_factor"], fields["high_freq_factor"] = draw(st.sampled_from([(1.0, 4.0), (0.25, 0.5)]))
    if kind == "yarn":
        fields["beta_fast"], fields["beta_slow"] = draw(st.sampled_from([(32.0, 1.0), (2.0, 0.125)]))
        fields["attention_factor"] = draw(st.sampled_from([None, 0.5, 1.0]))
        fields["truncate"] = draw(st.sampled_from([True, False]))
    return RopeScaling(kind, draw(st.sampled_from([1.0, 1.5, 4.0, 32.0])), **fields)


def configs(*, own_parts: bool = False, **fields: Any) -> SearchStrategy[Config]:
    """Configs over every axis, all of which can be made into a model and run; no draw is thrown away.

    Args:
        own_parts: norm, ffn and mixer may also be values (`models.norms.rms_norm`, `feed_forward.gated(torch.relu)`,
            `mixers.attention`): what JSON cannot hold.
        fields: of Config, each one value or a strategy. The others are drawn so that they go with these; a drawn
            Config raises Config's ValueError where no others do.

    Sizes are small unless given: up to 32 tokens in the vocabulary, 16 positions, 3 layers, 4 heads of up to 8
    features, 24 features of the model. Shrinks to sizes of 1 (2 for d_model, with rope) and to Config's defaults.

    >>> from hypothesis import find
    >>> find(configs(), lambda cfg: cfg.position == "learned") == Config(1, 1, 1, 1, 1, position="learned")
    True
    """
    known = [f.name for f in dataclasses.fields(Config)]
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"configs: Config has no fields {', '.join(unknown)}; it has {', '.join(known)}")
    for name, value in fields.items():  # sizes are computed with before Config can refuse them
        if name in SIZES and not isinstance(value, SearchStrategy) and not (value is None and name in OPTIONAL):
            check_int(f"configs: {name}", value, 1)
    return _configs(own_parts, fields)


@st.composite
def _configs(draw: DrawFn, own_parts: bool, given: Mapping[str, Any]) -> Config:
    # What is given comes first: the rest is drawn to go with it. Everything is drawn, also what is then not needed, so
    # that each field shrinks by itself.
    f = {name: draw(x) if isinstance(x, SearchStrategy) else x for name, x in given.items()}

    def put(name: str, strategy: SearchStrategy[Any]) -> None:
        if name not in given:
            f[name] = draw(strategy)

    put("vocab_size", st.integers(1, 32))
    put("context_length", st.integers(1, LONGEST))
    put("n_layers", st.integers(1, 3))
    put("position", st.sampled_from(_positions(f)))
    scaling = st.none() | rope_scalings()
    put("rope_scaling", scaling | st.lists(scaling, min_size=1, max_size=4).map(tuple))
    if f["position"] != "rope" and "rope_scaling" not in given:
        f["rope_scaling"] = None
    _put_heads(draw, put, f)
    put("d_ff", st.none() | st.integers(1, 24))

    norms: list[Any] = [*AXES["norm"]]
    ffns: list[Any] = [*AXES["ffn"]]
    if own_parts:
        norms += [rms_norm(0.1), layer_norm(1e-6, bias=False), layer_norm(0.1)]
        ffns += [gated(torch.relu), plain(torch.tanh)]
    if f.get("norm_position", "pre") != "pre":
        norms.remove("none")
    put("norm", st.sampled_from(norms))
    put("ffn", st.sampled_from(ffns))
    for name, names in AXES.items():
        if name not in ("position", "norm", "ffn", "mixer"):
            put(name, st.sampled_from(names))
    if f["norm"] == "none" and "norm_position" not in given:
        f["norm_position"] = "pre"
    for name, numbers in NUMBERS.items():
        number = st.sampled_from(numbers)
        by_layer = st.lists(number, min_size=1, max_size=4).map(tuple)
        put(name, number | by_layer if name == "rope_theta" else number)
    for name, default in FLAGS.items():
        put(name, st.sampled_from([default, not default]))
    window = st.none() | st.integers(0, f["context_length"] + 1)
    put("window", window | st.lists(window, min_size=1, max_size=4).map(tuple))
    mixer: SearchStrategy[Any] = st.sampled_from(AXES["mixer"])
    if own_parts:
        mixer = mixer | st.sampled_from(_own_mixers(f))
    put("mixer", mixer | st.lists(mixer, min_size=1, max_size=4).map(tuple))
    return Config(**f)


def _positions(f: Mapping[str, Any]) -> Sequence[str]:
    """Positions that go with the fields already there."""
    if f.get("rope_scaling") is not None:
        return ("rope",)
    width = f.get("head_dim")
    if "head_dim" in f and width is None and "d_model" in f:
        # Rope if any number of heads, or the number given, leaves an even width.
        heads = [f["n_heads"]] if "n_heads" in f else _divisors(f["d_model"])
        even = any(f["d_model"] // n % 2 == 0 for n in heads)
    else:
        even = width is None or width % 2 == 0
    return AXES["position"] if even else tuple(x for x in AXES["position"] if x != "rope")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _put_heads(draw: DrawFn, put: Callable[[str, SearchStrategy[Any]], None], f: dict[str, Any]) -> None:
    """n_heads, n_kv_heads, head_dim and d_model: heads share d_model or have a head_dim, which is even for rope."""
    step = 2 if f["position"] == "rope" else 1
    least = f.get("n_kv_heads") or 1
    heads = [n for n in range(least, 5) if n % least == 0] or [least]
    if "d_model" in f and "head_dim" in f and f["head_dim"] is None:  # they share a given width
        heads = [n for n in _divisors(f["d_model"]) if n % least == 0 and f["d_model"] // n % step == 0] or heads
    put("n_heads", st.sampled_from(heads))
    H = f["n_heads"]
    put("n_kv_heads", st.none() | st.sampled_from(_divisors(H)))
    width, own, free = step * draw(st.integers(1, 8 // step)), draw(st.booleans()), draw(st.integers(1, 24))
    if "d_model" in f:
        shared = not own and f["d_model"] % H == 0 and f["d_model"] // H % step == 0
        f.setdefault("head_dim", None if shared else width)
    else:
        f.setdefault("head_dim", width if own else None)
        f["d_model"] = H * width if f["head_dim"] is None else free


def _own_mixers(f: Mapping[str, Any]) -> list[Any]:
    """Mixers as values, with the heads of the fields drawn."""
    d_model, H, G, K = f["d_model"], f["n_heads"], f["n_kv_heads"], f["head_dim"]
    shape = (d_model, H, G, K)
    return [attention(*shape, causal=f["causal"]), attention(*shape, causal=f["causal"], window=1, qk_norm="head")]
