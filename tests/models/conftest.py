"""Fixtures of the models' tests."""

import zlib

import pytest
import torch

from purelm import random, tree
from purelm.models import transformer
from purelm.models.transformer import Config, RopeScaling
from purelm.testing.model_cache_laws import CACHE_LAWS


@pytest.fixture
def unchecked(request):
    """For tests that pass wrong shapes on purpose: skipped where jaxtyping checks signatures at run time."""
    if request.config.getoption("--jaxtyping-packages", None):
        pytest.skip("jaxtyping refuses these arguments before the function can")


def pytest_ignore_collect(collection_path, config):
    """At run time Config's annotations list what a command line can say; parts of one's own are for type checkers."""
    if collection_path.name == "test_own_parts.py" and config.getoption("--jaxtyping-packages", None):
        return True


SIZES = dict(vocab_size=29, context_length=16, d_model=24, n_layers=3, n_heads=4, d_ff=40)
LONG = dict(factor=2.0, original_length=8)

# One model for each value of each axis, and a few that combine many.
AXES = {
    "default": {},
    "norm layer": dict(norm="layer"),
    "norm layer with biases": dict(norm="layer", biases="all"),
    "norm none": dict(norm="none"),
    "post": dict(norm_position="post"),
    "output": dict(norm_position="output"),
    "sandwich": dict(norm_position="sandwich"),
    "learned": dict(position="learned"),
    "no position": dict(position="none"),
    "rope half": dict(rope_layout="half", rope_theta=100.0),
    "rope linear": dict(rope_scaling=RopeScaling("linear", **LONG)),
    "rope ntk": dict(rope_scaling=RopeScaling("ntk", **LONG)),
    "rope dynamic ntk": dict(rope_scaling=RopeScaling("dynamic_ntk", **LONG)),
    "rope llama3": dict(rope_scaling=RopeScaling("llama3", **LONG)),
    "rope yarn": dict(rope_scaling=RopeScaling("yarn", **LONG)),
    "ropes by layer": dict(
        rope_theta=(10000.0, 100.0), rope_scaling=(None, RopeScaling("yarn", **LONG), None), window=(3, None)
    ),
    "geglu": dict(ffn="geglu"),
    "geglu tanh": dict(ffn="geglu", gelu_tanh=True),
    "silu": dict(ffn="silu"),
    "gelu": dict(ffn="gelu", gelu_tanh=True),
    "relu2": dict(ffn="relu2"),
    "grouped heads": dict(n_kv_heads=2),
    "one kv head": dict(n_kv_heads=1),
    "head dim": dict(head_dim=10),
    "qk norm head": dict(qk_norm="head"),
    "qk norm full": dict(qk_norm="full", n_kv_heads=2),
    "qkv biases": dict(biases="qkv"),
    "window": dict(window=3),
    "window pattern": dict(window=(2, None)),
    "bidirectional": dict(causal=False),
    "bidirectional window": dict(causal=False, window=2),
    "softcaps": dict(attention_softcap=2.0, logit_softcap=3.0),
    "scale": dict(attention_scale=0.3),
    "tied": dict(tie_embeddings=True),
    "like gpt2": dict(norm="layer", biases="all", position="learned", ffn="gelu", gelu_tanh=True, tie_embeddings=True),
    "like gemma2": dict(
        norm_position="sandwich", ffn="geglu", gelu_tanh=True, n_kv_heads=2, head_dim=8, window=(3, None),
        attention_softcap=5.0, logit_softcap=3.0, tie_embeddings=True, rope_layout="half",
    ),
    "like qwen3": dict(qk_norm="head", n_kv_heads=2, head_dim=8, rope_layout="half", rope_theta=1e6),
    "like olmo2": dict(norm_position="output", qk_norm="full", rope_layout="half"),
}  # fmt: skip


# Laws of purelm.testing.check_model that a model of an axis is not made for: a bidirectional one has no cache and sees
# the padding, and dynamic_ntk's positions scale with the length of the row.
LEFT_OUT = {
    "bidirectional": ("causality", "padding", *CACHE_LAWS),
    "bidirectional window": ("causality", "padding", *CACHE_LAWS),
    "rope dynamic ntk": ("padding",),
}


@pytest.fixture(params=AXES.values(), ids=AXES.keys())
def axis(request) -> Config:
    """A small Config for each axis."""
    return Config(**{**SIZES, **request.param})


@pytest.fixture
def small() -> Config:
    return Config(**SIZES)


@pytest.fixture
def make():
    """Parameters in float64 with every leaf random, norms and biases too: a wrong place shows."""

    def make(cfg: Config, seed: int = 0, dtype: torch.dtype = torch.float64):
        params = transformer.init(random.key(seed), cfg, dtype=dtype)

        def shaken(path, x):
            noise = random.normal(random.fold_in(random.key(seed + 1), zlib.crc32(path.encode())), x.shape)
            return x + 0.3 * noise.to(x.dtype) if x.ndim == 1 else x

        return tree.map_with_path(shaken, params)

    return make
