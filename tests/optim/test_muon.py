"""Muon. Oracles: torch.optim.Muon, the singular value decomposition, the polynomial on numbers, AdamW for the rest."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import tree
from purelm.optim import adamw, apply_updates, hidden_matrix, is_matrix, muon, muon_adamw, orthogonalize
from purelm.optim.muon import QUINTIC


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def polynomial(s, n=5):
    a, b, c = QUINTIC
    for _ in range(n):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (7, 3), (3, 7), (123, 1), (1, 9), (40, 24)])
def test_orthogonalize_maps_singular_values(shape):
    """Oracle: U p(S / |S|_2) V^T from torch.linalg.svd in fp64, p being five times the quintic."""
    x = draw(*shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    expected = u @ torch.diag(polynomial(s / s.norm())) @ vh
    torch.testing.assert_close(orthogonalize(x, dtype=torch.float64), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(orthogonalize(x.float(), dtype=torch.float32), expected.float(), rtol=1e-4, atol=1e-4)
    # bf16 has 8 bits; five products with coefficients up to 4.8.
    narrow = orthogonalize(x, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and narrow.shape == x.shape
    torch.testing.assert_close(narrow.double(), expected, rtol=0, atol=0.06)


def test_singular_values_come_near_one():
    """The range that the post states for singular values above 0.003 of the norm, on numbers."""
    after = polynomial(torch.linspace(0.004, 1.0, 2000, dtype=torch.float64))
    assert 0.65 < float(after.min()) and float(after.max()) < 1.25


def test_orthogonalize_stacks():
    """Oracle: one matrix at a time."""
    x = draw(2, 3, 6, 4)
    stacked = orthogonalize(x, dtype=torch.float32)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(stacked[i, j], orthogonalize(x[i, j], dtype=torch.float32), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 100), st.sampled_from([1e-3, 0.5, 4.0, 1e4]))
def test_orthogonalize_laws(rows, columns, seed, scale):
    """Laws: scale does not matter, transposes and orthogonal changes of basis pass through."""
    x = draw(rows, columns, seed=seed, dtype=torch.float64)
    o = orthogonalize(x, dtype=torch.float64)
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(orthogonalize(scale * x, dtype=torch.float64), o, **close)
    torch.testing.assert_close(orthogonalize(x.mT, dtype=torch.float64), o.mT, **close)
    q = torch.linalg.qr(draw(rows, rows, seed=seed + 1, dtype=torch.float64))[0]
    torch.testing.assert_close(orthogonalize(q @ x, dtype=torch.float64), q @ o, **close)


def test_orthogonalize_of_nothing():
    """A zero matrix stays zero (eps), an empty one empty; a vector is an error."""
    assert torch.equal(orthogonalize(torch.zeros(3, 2), dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.bfloat16))
    assert orthogonalize(torch.zeros(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"x must have 2 or more dimensions, got shape \(3,\)"):
        orthogonalize(torch.ones(3))


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 5)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale,adjust", [("original", "original"), ("match_rms", "match_rms_adamw")])
def test_equals_torch(shape, nesterov, scale, adjust):
    """Oracle: torch.optim.Muon, 10 steps, decay 0.1: the same bf16 operations; torch rounds 1 - lr wd to fp32: 2e-6."""
    ours, theirs = {"w": draw(*shape)}, draw(*shape).requires_grad_()
    optimizer = muon(0.9, 0.1, nesterov=nesterov, update_scale=scale, iteration_dtype=torch.bfloat16)
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust)
    state = optimizer.init(ours)
    for i in range(10):
        g = draw(*shape, seed=i + 1)
        theirs.grad = g.clone()
        peer.step()
        updates, state = optimizer.update({"w": g}, state, ours, 0.02)
        ours = apply_updates(ours, updates)
    torch.testing.assert_close(ours["w"], theirs.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(state.m["w"], peer.state[theirs]["momentum_buffer"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("nesterov", [True, False])
def test_against_the_formulas(nesterov):
    """Oracle: the formulas written out in fp64 with an exact U V^T (the cubic iterated until it converges)."""
    p, m, lr, mu, wd = draw(4, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64), 0.1, 0.9, 0.2
    optimizer = muon(
        mu,
        wd,
        nesterov=nesterov,
        update_scale="match_rms",
        n_steps=60,
        coefficients=(1.5, -0.5, 0.0),
        iteration_dtype=torch.float64,
    )
    params = {"w": p}
    state = optimizer.init(params)
    for i in range(5):
        g = draw(4, 6, seed=i + 1, dtype=torch.float64)
        m = mu * m + (1 - mu) * g
        u, _, vh = torch.linalg.svd((1 - mu) * g + mu * m if nesterov else m, full_matrices=False)
        p = p - lr * (0.2 * math.sqrt(6) * u @ vh + wd * p)
        updates, state = optimizer.update({"w": g}, state, params, lr)
        params = apply_updates(params, updates)
    torch.testing.assert_close(params["w"], p, rtol=1e-9, atol=1e-9)
    assert int(state.step) == 5


def test_stacked_matrices_equal_single_ones():
    """Oracle: the same optimizer on each matrix; both scales take the last two dims."""
    for scale in ("original", "match_rms"):
        optimizer = muon(update_scale=scale, iteration_dtype=torch.float32)
        p, g = draw(3, 8, 2), draw(3, 8, 2, seed=1)
        stacked, _ = optimizer.update({"w": g}, optimizer.init({"w": p}), {"w": p}, 0.1)
        for i in range(3):
            one, _ = optimizer.update({"w": g[i]}, optimizer.init({"w": p[i]}), {"w": p[i]}, 0.1)
            torch.testing.assert_close(stacked["w"][i], one["w"], rtol=1e-5, atol=1e-6)


def test_update_sizes():
    """Closed forms for an orthogonal gradient: spectral norm sqrt(rows / columns); RMS 0.2 as AdamW's."""
    q = torch.linalg.qr(draw(32, 8, dtype=torch.float64))[0]
    exact = {"coefficients": (1.5, -0.5, 0.0), "n_steps": 60, "iteration_dtype": torch.float64, "weight_decay": 0.0}
    for scale, norm in [("original", math.sqrt(32 / 8)), ("match_rms", 0.2 * math.sqrt(32))]:
        optimizer = muon(update_scale=scale, **exact)
        updates, _ = optimizer.update({"w": q}, optimizer.init({"w": q}), {"w": q}, 1.0)
        assert float(torch.linalg.matrix_norm(updates["w"], 2)) == pytest.approx(norm, rel=1e-9)
    assert float(updates["w"].square().mean().sqrt()) == pytest.approx(0.2, rel=1e-9)


def transformer_like():
    return {
        "token_embeddings": {"weight": draw(9, 4)},
        "position_embeddings": {"weight": draw(5, 4)},
        "layers": [{"attn": {"q_proj": {"weight": draw(4, 4), "bias": draw(4)}}, "ln1": {"weight": draw(4)}}],
        "ln_final": {"weight": draw(4)},
        "lm_head": {"weight": draw(9, 4)},
    }


def test_hidden_matrix():
    chosen, _ = tree.partition(hidden_matrix, transformer_like())
    assert tree.paths(chosen) == ["layers.0.attn.q_proj.weight"]


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("h.0.attn.c_attn.weight", True), ("transformer.wte.weight", False), ("transformer.wpe.weight", False),
        ("model.embed_tokens.weight", False), ("lm_head.weight", False), ("model.layers.0.mlp.gate_proj.weight", True),
        ("gpt_neox.embed_in.weight", False), ("embed_out.weight", False), ("output.weight", False),
        ("layers.0.attn.output_proj.weight", True), ("head.weight", False), ("classifier.weight", False),
        ("layers.0.heads.weight", True),
    ],
)  # fmt: skip
def test_names_of_other_models(path, hidden):
    """Oracle: what these leaves are in the models that have them; a vector never is."""
    assert hidden_matrix(path, torch.zeros(2, 2)) is hidden and not hidden_matrix(path, torch.zeros(2))


def test_muon_adamw_is_its_parts():
    """Oracle: muon and adamw alone, each on its leaves, with its own factor on lr; decay on matrices of both."""
    params, grads = transformer_like(), tree.map(lambda p: p.flip(0), transformer_like())
    optimizer = muon_adamw(muon_lr_scale=3.0, adamw_lr_scale=0.5, weight_decay=0.2)
    updates, state = optimizer.update(grads, optimizer.init(params), params, 0.1)
    by_path = dict(zip(tree.paths(updates), tree.leaves(updates), strict=True))
    hidden, rest = tree.partition(hidden_matrix, params)
    g_hidden, g_rest = tree.partition(hidden_matrix, grads)
    m = muon(0.95, 0.2, update_scale="match_rms")
    a = adamw((0.9, 0.95), weight_decay=0.2, mask=is_matrix)
    expected = tree.combine(
        m.update(g_hidden, m.init(hidden), hidden, 0.1 * 3.0)[0], a.update(g_rest, a.init(rest), rest, 0.1 * 0.5)[0]
    )
    assert len(by_path) == 7
    for path, e in zip(tree.paths(expected), tree.leaves(expected), strict=True):
        assert torch.equal(by_path[path], e), path
    assert tree.paths(state.yes) == ["step", "m.layers.0.attn.q_proj.weight"]
    everything = muon_adamw(predicate=is_matrix)
    assert len(tree.leaves(everything.init(params).yes.m)) == 4


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"momentum": 1.0}, "momentum must be in"),
        ({"weight_decay": -1.0}, "weight_decay must be in"),
        ({"update_scale": "rms"}, "update_scale must be one of 'original', 'match_rms', got 'rms'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        muon(**arguments)
