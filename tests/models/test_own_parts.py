"""A mixer, a feed-forward layer and a norm from outside of the library, passed as values: tests/own_parts.py."""

from dataclasses import replace

import pytest
import torch

from purelm import accounting, random, tree
from purelm.generate import Sampling, generate
from purelm.models import transformer
from purelm.models.feed_forward import gated, plain
from purelm.models.leaves import of_kind
from purelm.ops import REFERENCE
from purelm.optim import muon_adamw, schedules
from purelm.testing.models import check_model
from purelm.train import init_state, make_step
from tests import own_parts

CFG = own_parts.config()
TOKENS = torch.randint(0, 19, (2, 8), generator=torch.Generator().manual_seed(0))


def params_of(cfg, seed=0):
    return transformer.make(cfg).init(random.key(seed), dtype=torch.float64)


def test_differential_attention_is_the_papers():
    """Oracle: equation 1, written out with softmax and loops over heads."""
    c = own_parts.Differential(12, 2, 6)
    params = params_of(CFG)["layers"][0]["attn"]
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ctx = transformer.Context(None, None, None)
    found = own_parts.apply(c, params, x, ctx, REFERENCE)
    q, k, v = (x @ params[name]["weight"].T for name in "qkv")
    lam = (params["lambda_q1"] @ params["lambda_k1"]).exp() - (params["lambda_q2"] @ params["lambda_k2"]).exp() + 0.8
    hidden = torch.ones(5, 5).triu(1).bool()
    heads = []
    for i in range(2):
        maps = []
        for j in (2 * i, 2 * i + 1):
            scores = q[..., 6 * j : 6 * j + 6] @ k[..., 6 * j : 6 * j + 6].mT / 6**0.5
            maps.append(scores.masked_fill(hidden, -torch.inf).softmax(-1))
        o = (maps[0] - lam * maps[1]) @ v[..., 6 * i : 6 * i + 6]
        heads.append(0.2 * o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * params["norm"]["weight"])
    torch.testing.assert_close(found, torch.cat(heads, -1) @ params["out"]["weight"].T, rtol=1e-10, atol=1e-12)


SANDWICH = dict(norm=own_parts.centred(0.1), norm_position="sandwich")  # at a smaller eps attention is saturated


@pytest.mark.parametrize("norm", [{}, SANDWICH], ids=["mixer", "norm"])
def test_laws_of_a_model(norm):
    """Laws: those of check_model; cached decoding among them, with padded rows."""
    check_model(transformer.make(replace(CFG, **norm)))


def test_trains_by_muon_on_what_the_table_calls_matrices():
    model = transformer.make(CFG)
    hidden = of_kind(model.leaves, "matrix")
    optimizer = muon_adamw(predicate=hidden)
    chosen, _ = tree.partition(hidden, model.init(random.key(0)))
    paths = set(tree.paths(chosen))
    assert "layers.0.attn.q.weight" in paths and not paths & {"lm_head.weight", "token_embeddings.weight"}
    step = make_step(model.loss, optimizer, schedules.constant(2e-2), max_norm=1.0)
    state = init_state(model.init(random.key(0)), optimizer)
    batch = {"tokens": TOKENS, "targets": TOKENS.roll(-1, 1)}
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    out = generate(model, state.params, [[1, 2]], random.key(1), max_new_tokens=3, sampling=Sampling(temperature=0.0))
    assert len(out.tokens[0]) == 3


def test_activations_of_ones_own():
    """Oracle: the built-in silu and relu2, given as functions."""
    for name, mine in (("swiglu", gated(torch.nn.functional.silu)), ("relu2", plain(lambda x: x.relu().square()))):
        cfg = replace(CFG, mixer="attention", ffn=name, d_ff=None)
        own = replace(cfg, ffn=mine)
        assert own.ff_width == cfg.ff_width and list(transformer.leaves(own)) == list(transformer.leaves(cfg))
        params = params_of(cfg)
        torch.testing.assert_close(transformer.apply(params, TOKENS, own), transformer.apply(params, TOKENS, cfg))


def test_accounting_counts_it():
    """Oracle: the parameters that init makes, and the state that init_cache makes."""
    model = transformer.make(CFG)
    parts = accounting.params(CFG)
    assert sum(parts.values()) == tree.n_params(model.init(random.key(0)))
    assert parts["differential"] == 2 * (5 * 12 * 12 + 12 * 12 + 5 * 6)
    assert accounting.forward_flops(CFG, 2)["differential"] == 2 * (6 * 2 * 16 * 144 + 6 * 2 * 64 * 12)
    assert accounting.kv_cache_bytes(CFG, 2, 8, bytes_per_element=4) == tree.n_bytes(model.init_cache(2, 8).layers)


def test_what_is_no_part_is_refused():
    with pytest.raises(ValueError, match=r"Config\.mixer must be one of attention"):
        replace(CFG, mixer=object())
    with pytest.raises(ValueError, match=r"Config\.ffn must be one of swiglu"):
        replace(CFG, ffn=torch.relu)
