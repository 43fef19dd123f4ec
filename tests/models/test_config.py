"""Config: resolved sizes, validation that names the argument, round trip through JSON."""

import dataclasses
import json

import pytest

from purelm.models.transformer import Config, RopeScaling, config_from_dict

BASE = dict(vocab_size=29, context_length=16, d_model=24, n_layers=2, n_heads=4)


def test_resolved_sizes():
    """Closed forms; the course's GPT-2 sizes."""
    cfg = Config(**BASE)
    assert (cfg.kv_heads, cfg.head_width, cfg.ff_width, cfg.gated) == (4, 6, 64, True)
    assert Config(**{**BASE, "d_model": 512}).ff_width == 1408  # 8/3 * 512 = 1365.3, up to a multiple of 64
    assert Config(**{**BASE, "d_model": 768}).ff_width == 2048  # exactly 8/3
    assert Config(**BASE, ffn="relu2").ff_width == 96
    assert Config(**BASE, d_ff=7, n_kv_heads=2, head_dim=8).ff_width == 7
    assert [Config(**BASE, window=(3, None)).window_of(i) for i in range(3)] == [3, None, 3]
    assert hash(Config(**BASE)) == hash(Config(**BASE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vocab_size=0), "Config.vocab_size must be a positive int, got 0"),
        (dict(d_ff=-1), "Config.d_ff must be a positive int, got -1"),
        (dict(norm="batch"), "Config.norm must be one of rms, layer, none, got 'batch'"),
        (dict(norm_position="middle"), "Config.norm_position must be one of pre, post, output, sandwich"),
        (dict(position="alibi"), "Config.position must be one of rope, learned, none, got 'alibi'"),
        (dict(rope_layout="x"), "Config.rope_layout must be one of interleaved, half, got 'x'"),
        (dict(ffn="relu"), "Config.ffn must be one of swiglu, geglu, silu, gelu, relu2, got 'relu'"),
        (dict(qk_norm="yes"), "Config.qk_norm must be one of none, head, full, got 'yes'"),
        (dict(biases="yes"), "Config.biases must be one of none, qkv, all, got 'yes'"),
        (dict(mixer="delta"), "Config.mixer must be one of attention, got 'delta'"),
        (dict(mixer=("attention", "gated_delta")), "Config.mixer must be one of attention, got 'gated_delta'"),
        (dict(mixer=()), "Config.mixer must name at least one"),
        (dict(window=-1), "Config.window must be None or at least 0 keys, got -1"),
        (dict(window=(1, -2)), r"Config.window must be None or at least 0 keys, got \(1, -2\)"),
        (dict(window=()), r"Config.window must be None, a number of keys or a non-empty tuple"),
        (dict(n_heads=5), "Config.n_heads must divide d_model 24 unless head_dim is given, got 5"),
        (dict(n_kv_heads=3), "Config.n_kv_heads must divide n_heads 4, got 3"),
        (dict(head_dim=5), "Config.head_dim must be even for rope, got 5"),
        (dict(position="none", rope_scaling=RopeScaling("ntk", 2.0)), 'Config.rope_scaling needs position "rope"'),
        (dict(norm="none", norm_position="post"), 'Config.norm_position must stay "pre" without a norm'),
        (dict(norm_eps=0.0), "Config.norm_eps must be above 0 and finite, got 0.0"),
        (dict(rope_theta=-1.0), "Config.rope_theta must be above 0 and finite, got -1.0"),
        (dict(rope_theta=(1e4, 0.0)), r"Config.rope_theta must be above 0 and finite, got \(10000.0, 0.0\)"),
        (dict(rope_theta=()), r"Config.rope_theta must have an entry for at least one layer, got \(\)"),
        (dict(rope_theta=None), "Config.rope_theta must be above 0 and finite, got None"),
        (dict(norm_eps=None), "Config.norm_eps must be above 0 and finite, got None"),
        (dict(attention_scale=True), "Config.attention_scale must be above 0 and finite, got True"),
        (dict(window=True), "Config.window must be None or at least 0 keys, got True"),
        (dict(causal=3), "Config.causal must be True or False, got 3"),
        (dict(gelu_tanh=None), "Config.gelu_tanh must be True or False, got None"),
        (dict(tie_embeddings="x"), "Config.tie_embeddings must be True or False, got 'x'"),
        (dict(rope_scaling="linear"), "Config.rope_scaling must be a RopeScaling, None, or a tuple of these, got 'lin"),
        (dict(rope_scaling=(None, 2.0)), "Config.rope_scaling must be a RopeScaling, None, or a tuple of these, got 2"),
        (dict(logit_softcap=float("inf")), "Config.logit_softcap must be above 0 and finite, got inf"),
        (dict(attention_scale=float("nan")), "Config.attention_scale must be above 0 and finite, got nan"),
        (dict(logit_softcap=0.0), "Config.logit_softcap must be above 0 and finite, got 0.0"),
    ],
)
def test_each_bad_value_is_named(change, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Config(**{**BASE, **change})


def test_a_size_that_is_no_int(unchecked):
    with pytest.raises(ValueError, match=r"Config.n_layers must be a positive int, got 1.5"):
        Config(**{**BASE, "n_layers": 1.5})


@pytest.mark.parametrize(
    "change",
    [{}, dict(window=(3, None), mixer=("attention",)), dict(rope_scaling=RopeScaling("yarn", 4.0, 64, truncate=False))],
)
def test_round_trip_through_json(change):
    """Law: config_from_dict(asdict(cfg)) is cfg, also after JSON has made lists of tuples."""
    cfg = Config(**BASE, **change)
    assert config_from_dict(dataclasses.asdict(cfg)) == cfg
    again = config_from_dict(json.loads(json.dumps(dataclasses.asdict(cfg))))
    assert again == cfg
    assert hash(again) == hash(cfg)


def test_fields_of_another_config_are_named():
    with pytest.raises(ValueError, match="Config has no fields depth; it has "):
        config_from_dict({**BASE, "depth": 3})
    with pytest.raises(ValueError, match="Config needs fields d_model, got only context_length, "):
        config_from_dict({k: v for k, v in BASE.items() if k != "d_model"})


def test_rope_scaling_of_a_dict_with_other_fields():
    given = {"vocab_size": 8, "context_length": 4, "d_model": 4, "n_layers": 1, "n_heads": 2}
    for scaling in ({"kind": "linear", "factor": 2.0, "type": "x"}, {"factor": 2.0}):
        with pytest.raises(ValueError, match=r"Config.rope_scaling: unknown or missing fields (type|kind); "):
            config_from_dict({**given, "rope_scaling": scaling})
