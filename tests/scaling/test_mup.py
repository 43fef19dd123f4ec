"""muP.

Oracles: table 3 of Yang et al. 2022 in powers of the width; plain optimizers leaf by leaf; the first values and steps
of the base model; sizes of activations over widths while models train.
"""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.scaling.mup_check import coordinates, made, slope
from purelm import random, tree
from purelm.models import transformer
from purelm.models.leaves import Fill, Leaf
from purelm.models.transformer import Config
from purelm.optim import adamw, chain, clip_by_global_norm, sgd, step_of
from purelm.scaling import mup
from purelm.train import init_state, make_step
from tests.programs import run_here

BASE = Config(vocab_size=64, context_length=16, d_model=64, n_layers=2, n_heads=4, d_ff=256, ffn="silu")


def wider(base, m, heads="more", **more):
    n = base.n_heads * (m if heads == "more" else 1)
    return dataclasses.replace(base, d_model=m * base.d_model, n_heads=n, d_ff=m * base.d_ff, **more)


@settings(max_examples=20)
@given(st.sampled_from([1, 2, 3, 8]), st.sampled_from(["more", "wider"]), st.sampled_from(["rope", "learned"]))
def test_table_3(m, heads, position):
    """Oracle: the table, by the kind of leaf: powers of m, which is how many times wider the model is."""
    base = dataclasses.replace(BASE, norm="layer", biases="all", qk_norm="head", position=position)
    cfg = mup.config(wider(base, m, heads), base)
    assert cfg.attention_scale == pytest.approx(0.25 if heads == "more" else 0.25 / m)
    small = transformer.leaves(base)
    table = transformer.leaves(cfg, mup.std(small))
    adam, by_sgd = mup.rates(table, small), mup.rates(table, small, "sgd")
    assert set(adam) == set(by_sgd) == set(table)
    for path, leaf in table.items():
        kind = leaf.kind
        widens = not (heads == "more" and "_norm" in path)  # norms of q and k are as wide as a head
        assert adam[path] == pytest.approx({"matrix": 1 / m, "head": 1 / m}.get(kind, 1.0)), path
        wanted = {"matrix": 1.0, "head": 1 / m}.get(kind, float(m) if widens else 1.0)
        assert by_sgd[path] == pytest.approx(wanted), path
        if kind in ("norm", "bias"):
            assert leaf.init == small[path].init and isinstance(leaf.init, Fill)
        else:
            power = {"matrix": -0.5, "head": -1.0, "embedding": 0.0}[kind]
            assert leaf.init.std == pytest.approx(small[path].init.std * m**power), path
    assert transformer.leaves(cfg, mup.std(small, head=0.0))["lm_head.weight"].init.std == 0


def test_matrices_that_widen_on_one_side():
    """The spectral condition: std fan_in^-1/2 min(1, (fan_out / fan_in)^1/2); key heads that stay are such."""
    base = dataclasses.replace(BASE, n_kv_heads=2, head_dim=16)
    cfg = dataclasses.replace(base, d_model=256, n_heads=16, d_ff=512)
    small = transformer.leaves(base)
    table = transformer.leaves(mup.config(cfg, base), mup.std(small))
    for name, m_in, m_out in (("attn.k_proj", 4, 1), ("attn.q_proj", 4, 4), ("ffn.w1", 4, 2), ("ffn.w2", 2, 4)):
        path = f"layers.1.{name}.weight"
        ratio = table[path].init.std / small[path].init.std
        assert ratio == pytest.approx(m_in**-0.5 * min(1, (m_out / m_in) ** 0.5)), path
        assert mup.rates(table, small, "sgd")[path] == m_out / m_in and mup.rates(table, small)[path] == 1 / m_in


def batch_of(cfg, key=1, rows=4):
    start, stride = random.randint(random.key(key), (2, rows, 1), 1, cfg.vocab_size)
    tokens = (start + stride * torch.arange(17)) % cfg.vocab_size
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def test_the_base_is_trained_as_without_mup():
    """Exact: the first values and two steps of the model and optimizer that muP leaves alone."""
    small = transformer.leaves(BASE)
    plain = transformer.make(BASE)
    model = transformer.make(mup.config(BASE, BASE), std=mup.std(small))
    one, other = plain.init(random.key(0)), model.init(random.key(0))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(one), tree.leaves(other), strict=True))
    ends = []
    for m, o in ((plain, adamw(weight_decay=0.1)), (model, mup.optimizer(adamw_with_decay, model.leaves, small))):
        state = init_state(one, o)
        step = make_step(m.loss, o, lambda t: torch.tensor(0.01))
        for i in range(2):
            state, _ = step(state, batch_of(BASE, i))
        ends.append(tree.leaves(state.params))
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def adamw_with_decay(f):
    return adamw(weight_decay=0.1 / f)


def plain_sgd(f):
    return sgd()


@pytest.mark.parametrize(("make", "rule"), [(adamw_with_decay, "adam"), (plain_sgd, "sgd")])
def test_optimizer_is_the_plain_one_leaf_by_leaf(make, rule):
    """Oracle: the optimizer of each leaf alone at its own learning rate; decay is lr w everywhere; pickles."""
    cfg, small = mup.config(wider(BASE, 4), BASE), transformer.leaves(BASE)
    model = transformer.make(cfg, std=mup.std(small))
    params = model.init(random.key(0))
    grads = tree.map_with_path(lambda p, x: random.normal(random.key(len(p)), x.shape), params)
    of, lr = mup.rates(model.leaves, small, rule), 0.02
    optimizer = mup.optimizer(make, model.leaves, small, rule)
    state = optimizer.init(params)
    updates, _ = optimizer.update(grads, state, params, lr)
    again = pickle.loads(pickle.dumps(optimizer)).update(grads, state, params, lr)[0]
    for path, p, g, u, v in zip(tree.paths(params), *map(tree.leaves, (params, grads, updates, again)), strict=True):
        alone = make(of[path])
        wanted = alone.update(g, alone.init(p), p, lr * of[path])[0]
        assert torch.equal(u, wanted) and torch.equal(v, wanted), path
        if rule == "adam":
            drop = adamw(weight_decay=0.0).update(g, adamw().init(p), p, lr * of[path])[0] - u
            torch.testing.assert_close(drop, lr * 0.1 * p, rtol=1e-3, atol=1e-6)
    assert step_of(optimizer) is not None  # so that jit need not compile the walk over leaves
    clipped = chain(clip_by_global_norm(1.0), optimizer)
    assert len(tree.leaves(clipped.update(grads, clipped.init(params), params, lr)[0])) == len(of)


@pytest.mark.parametrize(
    ("heads", "rule", "lr"), [("more", "adam", 2**-7), ("wider", "adam", 2**-7), ("more", "sgd", 0.3)]
)
def test_coordinates(heads, rule, lr):
    """Sizes of what was learned in 4 steps settle over widths 64 to 512 with muP, and grow nearly as width without.

    From narrow models they fall a little towards their limit: from 256 to 512 by 1 to 14 %, to 1024 by 1 to 8 %.
    """
    make = (lambda f: adamw(weight_decay=0.0)) if rule == "adam" else plain_sgd
    batches = [batch_of(BASE, i, 8) for i in range(4)]
    found, last = {}, {}
    for way in ("muP", "standard"):
        rows = []
        for m in (1, 2, 4, 8):
            cfg = wider(BASE, m, heads)
            rows.append(coordinates(*made(cfg, BASE, way, make, rule), batches, lr, random.key(0)))
        found[way] = {k: slope([1, 2, 4, 8], [r[k] for r in rows]) for k in rows[0]}
        last[way] = {k: rows[3][k] / rows[2][k] for k in rows[0]}
    assert all(-0.25 < x < 0.05 for x in found["muP"].values()), found
    assert all(0.8 < x < 1.05 for x in last["muP"].values()), last
    # Without muP the final norm hides in its states how the stream grows.
    assert all(found["standard"][k] > 0.7 and last["standard"][k] > 1.5 for k in ("stream", "logits")), (found, last)


def test_first_logits_fall_with_width():
    """Oracle: m^-1/2, from m m^-2 independent terms; with head=0 they are 0."""
    small, sizes = transformer.leaves(BASE), []
    tokens = batch_of(BASE)["tokens"]
    for m in (1, 4, 16):
        cfg = mup.config(wider(dataclasses.replace(BASE, n_layers=1), m), dataclasses.replace(BASE, n_layers=1))
        base = transformer.leaves(dataclasses.replace(BASE, n_layers=1))
        model = transformer.make(cfg, std=mup.std(base))
        sizes.append(float(model.apply(model.init(random.key(0)), tokens).square().mean().sqrt()))
    assert slope([1, 4, 16], sizes) == pytest.approx(-0.5, abs=0.05)
    model = transformer.make(BASE, std=mup.std(small, head=0.0))
    assert not model.apply(model.init(random.key(0)), tokens).any()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tie_embeddings": True}, "tie_embeddings"),
        ({"n_layers": 3}, "n_layers"),
        ({"vocab_size": 65}, "vocab_size"),
        ({"qk_norm": "head"}, "qk_norm"),
        ({"attention_scale": 0.2}, "attention_scale"),
    ],
)
def test_refused_configurations(more, says):
    cfg = dataclasses.replace(wider(BASE, 2), **more)
    base = dataclasses.replace(BASE, tie_embeddings=cfg.tie_embeddings)
    with pytest.raises(ValueError, match=f"Config.{says}"):
        mup.config(cfg, base)


def test_refused_tables():
    small, deep = transformer.leaves(BASE), transformer.leaves(dataclasses.replace(BASE, n_layers=3))
    with pytest.raises(ValueError, match=r"layers\.2"):
        mup.rates(deep, small)
    with pytest.raises(ValueError, match="differ in depth"):
        mup.rates(small, deep)
    with pytest.raises(ValueError, match="vocabularies"):
        mup.rates({**small, "lm_head.weight": Leaf((65, 64), "head", "lm_head")}, small)
    with pytest.raises(ValueError, match="no rule for w"):
        mup.rates({"w": Leaf((4, 4, 4), "matrix", "ffn")}, {"w": Leaf((2, 2, 2), "matrix", "ffn")})
    with pytest.raises(ValueError, match="rows"):
        mup.rates({"e": Leaf((5, 4), "embedding", "x")}, {"e": Leaf((4, 4), "embedding", "x")})
    with pytest.raises(ValueError, match="is matrix"):
        mup.rates({"w": Leaf((4, 4), "matrix", "ffn")}, {"w": Leaf((4, 4), "head", "ffn")})
    with pytest.raises(ValueError, match="a std is needed"):
        mup.std({"w": Leaf((2, 2), "matrix", "ffn", Fill(1.0))})("w", Leaf((4, 4), "matrix", "ffn"))
    with pytest.raises(ValueError, match="rule must be"):
        mup.rates(small, small, "lion")
    with pytest.raises(ValueError, match="head must be"):
        mup.std(small, head=-1.0)
    optimizer = mup.optimizer(plain_sgd, small, small)
    with pytest.raises(ValueError, match="not in the model's leaf table"):
        optimizer.init({"other": torch.ones(2)})


def test_program(tmp_path):
    """The best of each width is the least of the table, and both ways are one at the base's width."""
    small = ("--widths", 16, 32, "--base", 16, "--head-dim", 8, "--check-widths", 16, 32, "--layers", 1,
             "--context", 16, "--batch", 4, "--steps", 4, "--stories", 50, "--device", "cpu",
             "--lrs", 1e30, 0.1, 0.01, 0.001)  # fmt: skip
    done = run_here("experiments.scaling.mup_check", "--out", tmp_path, *small)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "mup.json").read_text())
    by = {(r["way"], r["width"], r["lr"]): r["loss"] for r in found["losses"]}
    assert len(by) == 16 and by["muP", 32, 1e30] is None
    for lr in (0.1, 0.01, 0.001):
        assert by["muP", 16, lr] == by["standard", 16, lr]
    for row in found["best"]:
        of_width = [y for (way, width, _), y in by.items() if (way, width) == (row["way"], row["width"]) and y]
        assert row["loss"] == min(of_width) == by[row["way"], row["width"], row["lr"]]
    assert (tmp_path / "mup.png").stat().st_size > 10_000 and "exponent" in (tmp_path / "mup.md").read_text()
    for flags, says in ((("--base", 64), "widths must contain"), (("--lrs", 0), "lrs"), (("--stories", 1), "stories")):
        done = run_here("experiments.scaling.mup_check", "--out", tmp_path / "no", *small, *flags)
        assert done.returncode == 2 and says in done.stderr and not (tmp_path / "no").exists()


def test_slope():
    assert slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2) and np.isfinite(slope([1, 2], [0.0, 0.0]))
