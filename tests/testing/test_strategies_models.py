"""Configurations and batches that the strategies draw. Oracles: the model that takes them, `data.pack`, counts.

Coverage is exact: every choice that a strategy lists is drawn, which many derandomised draws show.
"""

import dataclasses
import itertools
import json
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm import random
from purelm.data import pack
from purelm.models import transformer
from purelm.models.config import AXES
from purelm.models.transformer import Config, RopeScaling
from purelm.ops.rope import Kind
from purelm.testing import strategies as plm
from purelm.testing.laws import assert_trees_equal
from tests.testing.drawing import draws, reached, simplest

# ---- Configurations


def values_of(cfg):
    """(field, value) of each field, and (field, value, field, value) of the pairs that must go together."""
    for f in dataclasses.fields(Config):
        value = getattr(cfg, f.name)
        yield f.name, value
        if isinstance(value, tuple):
            yield f"length of {f.name}", len(value)
            yield from ((f"entry of {f.name}", x) for x in value)
        if f.name == "rope_scaling":
            yield from (("kind", x.kind) for x in (value if isinstance(value, tuple) else (value,)) if x is not None)
    yield "head_width", cfg.head_width
    yield "heads", (cfg.n_heads, cfg.kv_heads)
    for a, b in itertools.combinations(PAIRED, 2):
        yield a, getattr(cfg, a), b, getattr(cfg, b)


LAYERED = ("window", "mixer", "rope_theta", "rope_scaling")
FLAGS = {name: (True, False) for name in ("causal", "gelu_tanh", "tie_embeddings")}
PAIRED = {name: names for name, names in AXES.items() if name != "mixer"} | FLAGS


def test_configs_reach_every_value_of_every_axis():
    """Oracles: the Literal types of the fields; that every field varies; Config, for what does not go together."""
    expected = {(name, value) for name, values in (AXES | FLAGS).items() for value in values}
    for (a, xs), (b, ys) in itertools.combinations(PAIRED.items(), 2):
        expected |= {(a, x, b, y) for x in xs for y in ys}
    expected -= {("norm", "none", "norm_position", place) for place in AXES["norm_position"] if place != "pre"}
    expected |= {("kind", kind) for kind in typing.get_args(Kind)} | {("rope_scaling", None)}
    expected |= {("heads", (h, g)) for h in (1, 2, 3, 4) for g in range(1, h + 1) if h % g == 0}
    for name, sizes in {"vocab_size": 32, "context_length": 16, "n_layers": 3, "head_width": 8, "d_model": 24}.items():
        expected |= {(name, n) for n in range(1, sizes + 1)}
    expected |= {("window", None), ("window", 0), ("window", 1), ("entry of window", None), ("entry of window", 0)}
    expected |= {(f"length of {name}", n) for name in LAYERED for n in (1, 2, 3, 4)}
    expected |= {("entry of rope_scaling", None), ("entry of rope_theta", 10000.0), ("entry of rope_theta", 2.0)}
    for name in ("n_kv_heads", "head_dim", "d_ff", "attention_scale", "attention_softcap", "logit_softcap"):
        expected.add((name, None))
    seen = reached(plm.configs(), values_of, expected)
    refused = {x for x in seen if x[0] == "norm" and x[1] == "none" and "norm_position" in x} - expected
    assert not refused
    for f in dataclasses.fields(Config):
        assert len({x[1] for x in seen if len(x) == 2 and x[0] == f.name}) > 1, f"{f.name} never changes"


def test_rope_scalings_have_every_field():
    read = {"llama3": {"original_length", "low_freq_factor", "high_freq_factor"}, "dynamic_ntk": {"original_length"}}
    read["yarn"] = {"original_length", "beta_fast", "beta_slow", "attention_factor", "truncate"}
    found = draws(plm.rope_scalings())
    for kind in typing.get_args(Kind):
        some = [s for s in found if s.kind == kind]
        for f in dataclasses.fields(RopeScaling):
            many = f.name == "factor" or f.name in read.get(kind, ())
            assert (len({getattr(s, f.name) for s in some}) > 1) == many, (kind, f.name)
    assert {s.kind for s in draws(plm.rope_scalings("yarn"), 20)} == {"yarn"}
    assert simplest(plm.rope_scalings()) == RopeScaling("linear", 1.0)


@settings(max_examples=100)
@given(plm.configs(), plm.keys())
def test_models_of_configs_run(cfg, key):
    """All that is drawn can be made, run, and written as JSON."""
    model = transformer.make(cfg)
    params = model.init(key)
    logits = model.apply(params, torch.zeros(2, cfg.context_length, dtype=torch.int64))
    assert logits.shape == (2, cfg.context_length, cfg.vocab_size) and bool(torch.isfinite(logits).all())
    assert transformer.config_from_dict(json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg


def test_own_parts(request):
    if request.config.getoption("--jaxtyping-packages", None):
        pytest.skip("at run time Config's annotations list what a command line can say")
    found = draws(plm.configs(own_parts=True), 100)
    for name in ("norm", "ffn", "mixer"):
        values = [x for cfg in found for x in (cfg.mixers if name == "mixer" else (getattr(cfg, name),))]
        assert {isinstance(x, str) for x in values} == {True, False}, name
    for cfg in found[:50]:
        model = transformer.make(cfg)
        logits = model.apply(model.init(random.key(0)), torch.zeros(1, cfg.context_length, dtype=torch.int64))
        assert bool(torch.isfinite(logits).all())


def test_configs_shrink_to_the_defaults():
    assert simplest(plm.configs()) == Config(1, 1, 2, 1, 1)
    for name, value in [("norm_position", "post"), ("rope_scaling", RopeScaling("linear", 1.0))]:  # fmt: skip
        cfg = simplest(plm.configs(), lambda cfg, name=name, value=value: getattr(cfg, name) == value)
        assert cfg == Config(1, 1, 2, 1, 1, **{name: value}), name
    assert simplest(plm.configs(), lambda cfg: cfg.n_layers > 1 and cfg.vocab_size > 6) == Config(7, 1, 2, 2, 1)


FIXED = [
    dict(norm="none"), dict(norm_position="sandwich"), dict(norm_position="post", position="none"),
    dict(rope_scaling=RopeScaling("ntk", 2.0)), dict(position="learned"), dict(position="rope"),
    dict(head_dim=7), dict(head_dim=6, position="rope"), dict(head_dim=None), dict(head_dim=None, d_model=7),
    dict(head_dim=None, d_model=24, position="rope"), dict(head_dim=None, d_model=6, position="rope"),
    dict(d_model=24), dict(d_model=7, n_heads=2), dict(d_model=7, n_heads=7), dict(d_model=64, n_heads=8),
    dict(n_heads=6), dict(n_heads=12, head_dim=None), dict(n_kv_heads=3), dict(n_kv_heads=8), dict(n_kv_heads=None),
    dict(n_heads=6, n_kv_heads=3), dict(n_kv_heads=2, d_model=12, head_dim=None, position="rope"),
    dict(n_kv_heads=5, d_model=50, head_dim=None), dict(d_model=1), dict(d_ff=5), dict(window=(2, None)),
    dict(mixer="attention"), dict(causal=True, n_layers=5, vocab_size=1000, context_length=100),
    dict(**Config(8, 4, 4, 1, 2, ffn="gelu", window=(1, None)).__dict__),
]  # fmt: skip


@pytest.mark.parametrize("fields", FIXED, ids=str)
def test_fields_of_configs_are_kept(fields):
    found = draws(plm.configs(**fields), 60)
    assert found and all(getattr(cfg, name) == value for cfg in found for name, value in fields.items())
    assert len({*found}) > 1 or len(fields) == len(dataclasses.fields(Config))


def test_fields_of_configs_may_be_strategies():
    strategy = plm.configs(n_layers=st.integers(4, 6), norm=st.sampled_from(["none", "layer"]), n_heads=st.just(2))
    found = draws(strategy, 200)
    assert {cfg.n_layers for cfg in found} == {4, 5, 6} and {cfg.norm for cfg in found} == {"none", "layer"}
    assert {cfg.norm_position for cfg in found if cfg.norm == "layer"} == {*AXES["norm_position"]}
    assert {cfg.position for cfg in draws(plm.configs(head_dim=st.just(3)), 100)} == {"learned", "none"}


# ---- Batches

CFG = Config(vocab_size=11, context_length=9, d_model=8, n_layers=1, n_heads=2, position="learned")
PARAMS = transformer.init(random.key(0), CFG)


def features(batch):
    """What a batch shows, by name."""
    tokens, ids, weights = batch["tokens"], batch.get("segment_ids"), batch.get("weights")
    B, T = tokens.shape
    yield from (f"{B} rows", f"length {T}", *sorted(batch))
    yield from (f"no {name}" for name in ("weights", "segment_ids", "denominator") if name not in batch)
    if "denominator" in batch:
        total = float(B * T if weights is None else weights.sum())
        known = {1.0: "denominator of one", 64.0: "denominator of a larger batch"}
        yield "own denominator" if float(batch["denominator"]) == total else known[float(batch["denominator"])]
    if weights is None:
        yield "full with ids" if ids is not None else "full"
        return
    yield from (f"weight {w}" for w in weights.unique().tolist())
    ignored = batch["targets"][weights == 0].unique().tolist()
    yield from (f"ignored {t}" if t < 0 else "ignored id" for t in ignored)
    for b, row in enumerate(weights):
        yield "row that counts" if row.any() else f"masked row {b} of {B}"
    if ids is None:
        return
    for b, row in enumerate(ids):
        lengths = [int((row == i).sum()) for i in range(1, int(row.max()) + 1)]
        padding = int((row == 0).sum())
        yield from (f"document of {min(n, 3)}" for n in lengths)
        yield f"{len(lengths)} documents, {'padding' if padding else 'no padding'}"
        if padding == T:
            yield "row of padding"
        elif not weights[b].any():
            yield "masked text"
    inside = (weights[:, 1:-1] == 0) & (weights[:, :-2] > 0) & (weights[:, 2:] > 0)
    if inside.any():
        yield "hole"


EXPECTED = {
    *(f"{n} rows" for n in (1, 2, 3, 4)), *(f"length {n}" for n in range(1, 10)),
    "tokens", "targets", "weights", "segment_ids", "denominator", "no weights", "no segment_ids", "no denominator",
    "own denominator", "denominator of one", "denominator of a larger batch", "full", "full with ids",
    *(f"weight {w}" for w in (0.0, 0.25, 0.5, 1.0, 2.0)), "ignored -1", "ignored -100", "ignored id", "row that counts",
    *(f"masked row {b} of {n}" for n in (2, 3, 4) for b in range(n)), "row of padding", "masked text", "hole",
    "document of 1", "document of 2", "document of 3", "0 documents, padding",
    *(f"{n} documents, {padding}" for n in (1, 2, 3, 4) for padding in ("padding", "no padding")),
}  # fmt: skip


def test_batches_have_every_feature():
    assert reached(plm.batches(CFG), features, EXPECTED) == EXPECTED
    reached(plm.batches(CFG, "masked", nothing=True), features, {f"masked row {b} of 4" for b in range(4)})
    reached(plm.batches(CFG, nothing=True), features, EXPECTED | {"masked row 0 of 1"})


def test_kinds_of_batches():
    """Oracle: the promises of the docstring."""
    for batch in draws(plm.batches(CFG, "full"), 200):
        assert "weights" not in batch or batch["weights"].any()
        assert bool((batch.get("segment_ids", torch.ones(1)) == 1).all())
        assert torch.equal(batch["targets"][:, :-1], batch["tokens"][:, 1:]) or "weights" in batch
    padded = draws(plm.batches(CFG, "padded"), 200)
    for batch in padded:
        ends_early = batch["weights"][:, -1] == 0
        assert bool(ends_early.any()) and bool((batch.get("segment_ids", torch.ones(1)) <= 1).all())
    assert {bool((b["weights"][0] > 0).all()) for b in padded} == {True, False}, "any row may be the full one"
    for batch in draws(plm.batches(CFG, "packed"), 200):
        assert int(batch["segment_ids"].max()) > 1
    for batch in draws(plm.batches(CFG, "masked"), 200):
        assert {*(batch["weights"] > 0).any(1).tolist()} == {True, False}
    for batch in draws(plm.batches(CFG, "masked", max_rows=1, nothing=True), 50):
        assert not batch["weights"].any()


def test_packed_rows_are_those_of_pack():
    """Oracle: data.pack of each row's documents."""
    n = 0
    for batch in draws(plm.batches(13, "packed"), 300):
        for row in range(len(batch["tokens"])):
            tokens, targets, ids = (batch[name][row] for name in ("tokens", "targets", "segment_ids"))
            if bool((batch["weights"][row] != (ids > 0)).any()):
                continue  # graded: some targets are gone
            documents = [[*tokens[ids == i].tolist(), int(targets[ids == i][-1])] for i in range(1, int(ids.max()) + 1)]
            packed = pack(documents, len(tokens), method="sequential")
            real = ids > 0
            assert torch.equal(packed["segment_ids"][0], ids) and torch.equal(packed["weights"][0], real.float())
            assert torch.equal(packed["tokens"][0][real], tokens[real])
            assert torch.equal(packed["targets"][0][real], targets[real])
            n += len(documents) > 1
    assert n > 100


@settings(max_examples=100)
@given(plm.batches(CFG), plm.batches(CFG, nothing=True))
def test_losses_of_batches_are_finite(batch, any_batch):
    loss, metrics = transformer.loss(PARAMS, batch, CFG)
    assert bool(torch.isfinite(loss)) and float(loss) > 0.0 and float(metrics["n_targets"]) > 0.0
    loss, _ = transformer.loss(PARAMS, any_batch, CFG)
    assert bool(torch.isfinite(loss))
    for name, x in batch.items():
        assert x.dtype == (torch.int64 if name in ("tokens", "targets", "segment_ids") else torch.float32)
    transformer.check_tokens(batch["tokens"], CFG)
    counted = batch["targets"][batch.get("weights", torch.ones(batch["targets"].shape)) > 0]
    transformer.check_tokens(counted, CFG, "targets")


@settings(max_examples=100)
@given(plm.configs().flatmap(lambda cfg: st.tuples(st.just(cfg), plm.batches(cfg))))
def test_batches_of_any_config(case):
    """What goes with a configuration goes with its model."""
    cfg, batch = case
    model = transformer.make(cfg)
    assert batch["tokens"].shape[1] <= cfg.context_length
    loss, _ = model.loss(model.init(random.key(0)), batch)
    assert bool(torch.isfinite(loss))


def test_options_of_batches():
    model = transformer.make(CFG)
    assert max(b["tokens"].shape[1] for b in draws(plm.batches(model), 50)) == 9
    for b in draws(plm.batches(5, fields=()), 200):
        assert {*b} == {"tokens", "targets"}
    for b in draws(plm.batches(5, fields="weights", max_rows=2, max_length=3), 200):
        assert {*b} <= {"tokens", "targets", "weights"} and b["tokens"].shape[0] <= 2 and b["tokens"].shape[1] <= 3
    found = draws(plm.batches(5, max_length=40), 100)
    assert max(b["tokens"].shape[1] for b in found) > 30
    assert {*torch.cat([b["tokens"].flatten() for b in found]).tolist()} == {*range(5)}
    (b,) = draws(plm.batches(5, "packed", device="meta"), 1)
    assert {x.device.type for x in b.values()} == {"meta"}


def test_batches_shrink():
    assert_trees_equal(simplest(plm.batches(CFG)), dict.fromkeys(("tokens", "targets"), torch.tensor([[0]])))
    packed = simplest(plm.batches(CFG, "packed"))
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    ids = torch.tensor([[1, 2]])
    assert_trees_equal(packed, {"tokens": zeros, "targets": zeros, "weights": torch.ones(1, 2), "segment_ids": ids})
