"""Laws of the model: those of every Model, for each axis of Config; and windows, packing, positions, derivatives."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random, tree
from purelm.models import transformer
from purelm.models.context import segment_positions
from purelm.models.transformer import Config, RopeScaling, apply, hidden
from purelm.ops import REFERENCE
from purelm.ops.sdpa import sdpa_attention
from purelm.testing.laws import without
from purelm.testing.models import MODEL_LAWS, check_model
from tests.models.conftest import AXES, LEFT_OUT, SIZES

CFG = Config(vocab_size=29, context_length=16, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40)
PARAMS = transformer.init(random.key(0), CFG, dtype=torch.float64)


@pytest.mark.parametrize("name", AXES)
def test_laws_of_a_model(name):
    """Laws: those of check_model; over the whole context, more than windows and the original length of positions."""
    laws = without(MODEL_LAWS, *LEFT_OUT.get(name, ()))
    check_model(transformer.make(Config(**{**SIZES, **AXES[name]})), laws=laws, length=SIZES["context_length"])


def influence(cfg, attention=REFERENCE.attention, T=9):
    """(T, T) bool: whether any logit at position t has a gradient towards the embedding of token s."""
    params = transformer.init(random.key(0), cfg)
    x = torch.randn(1, T, cfg.d_model, requires_grad=True)
    ops = REFERENCE._replace(embedding=lambda ids, w: x, attention=attention)
    logits = apply(params, torch.zeros(1, T, dtype=torch.int64), cfg, ops=ops)
    rows = [torch.autograd.grad(logits[0, t].square().sum(), x, retain_graph=True)[0] for t in range(T)]
    return torch.stack([(row[0] != 0).any(-1) for row in rows])


@pytest.mark.parametrize("attention", [REFERENCE.attention, sdpa_attention])
def test_the_future_has_exactly_no_influence(attention):
    """Exact: the gradient is zero for s > t, and is not for s <= t."""
    assert torch.equal(influence(CFG, attention), torch.ones(9, 9).tril().bool())


@pytest.mark.parametrize(
    ("window", "reach"), [(2, 4), ((2, 0), 2), ((3, 1), 4), (0, 0)], ids=str
)
def test_windows_add_up_over_layers(window, reach):
    """Exact: two layers reach as far back as their windows together, and no further."""
    at = torch.arange(9)
    distance = at[:, None] - at
    assert torch.equal(influence(replace(CFG, window=window)), (distance >= 0) & (distance <= reach))


def test_bidirectional_sees_both_sides():
    """Exact: everything without a window, both sides equally with one."""
    assert bool(influence(replace(CFG, causal=False)).all())
    at = torch.arange(9)
    seen = influence(replace(CFG, causal=False, window=1))
    assert torch.equal(seen, (at[:, None] - at).abs() <= 2)


DOCUMENTS = st.lists(st.lists(st.integers(0, 28), min_size=1, max_size=7), min_size=1, max_size=4)


@given(DOCUMENTS, st.sampled_from(["rope", "learned", "none", "dynamic"]))
def test_packed_equals_separate(documents, position):
    """Law: documents in one row, told apart by segment ids, give what each gives alone; padding changes nothing."""
    cfg = replace(CFG, position="rope" if position == "dynamic" else position, context_length=32)
    if position == "dynamic":  # whose base goes by a length: that of the document
        cfg = replace(cfg, rope_scaling=RopeScaling("dynamic_ntk", 4.0, 3))
    params = transformer.init(random.key(0), cfg, dtype=torch.float64)
    row = [t for d in documents for t in d] + [7, 7]
    ids = [i + 1 for i, d in enumerate(documents) for _ in d] + [0, 0]
    packed = apply(params, torch.tensor([row]), cfg, segment_ids=torch.tensor([ids]))[0]
    at = 0
    for d in documents:
        alone = apply(params, torch.tensor([d]), cfg)[0]
        torch.testing.assert_close(packed[at : at + len(d)], alone, rtol=1e-9, atol=1e-9)
        at += len(d)


def test_segment_positions():
    """Oracle: counting by hand; an id that comes again begins again."""
    ids = torch.tensor([[3, 3, 3, 1, 1, 3], [0, 1, 1, 1, 0, 0]])
    assert segment_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]


def test_positions_matter_and_without_them_order_does_not():
    """Law: with position "none" the last logits do not depend on the order of the tokens before; else they do."""
    a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[3, 1, 2, 4]])
    cfg = replace(CFG, position="none", n_layers=1)  # deeper, a causal mask alone tells positions
    params = transformer.init(random.key(0), cfg, dtype=torch.float64)
    torch.testing.assert_close(apply(params, a, cfg)[:, -1], apply(params, b, cfg)[:, -1])
    assert not torch.allclose(apply(PARAMS, a, CFG)[:, -1], apply(PARAMS, b, CFG)[:, -1])


def test_rope_is_relative():
    """Law: the same document further back in a packed row, so at other positions, has the same logits."""
    d = torch.tensor([[5, 6, 7, 8]])
    behind = torch.cat([torch.tensor([[1, 2, 3]]), d], 1)
    ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2]])
    torch.testing.assert_close(apply(PARAMS, behind, CFG, segment_ids=ids)[:, 3:], apply(PARAMS, d, CFG))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tables_are_never_half(dtype):
    """Oracle: what rope is given. A bf16 cosine is off by 0.2 %."""
    seen = set()

    def spy(x, cos, sin, layout):
        seen.update({x.dtype, cos.dtype, sin.dtype})
        return REFERENCE.rope(x, cos, sin, layout)

    params = transformer.init(random.key(0), CFG, dtype=dtype)
    apply(params, torch.tensor([[1, 2, 3]]), CFG, ops=REFERENCE._replace(rope=spy))
    assert seen == {dtype, torch.float64 if dtype == torch.float64 else torch.float32}


def test_many_models_by_vmap():
    """Oracle: a loop over models whose parameters are stacked."""
    models = [transformer.init(random.key(i), CFG, dtype=torch.float64) for i in range(3)]
    stacked = tree.map(lambda *xs: torch.stack(xs), *models)
    batch = {"tokens": torch.tensor([[1, 2, 3]]), "targets": torch.tensor([[2, 3, 4]])}
    got = torch.func.vmap(lambda p: transformer.loss(p, batch, CFG)[0])(stacked)
    torch.testing.assert_close(got, torch.stack([transformer.loss(p, batch, CFG)[0] for p in models]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's table of forward formulas
def test_forward_over_reverse():
    """Oracle: differences of gradients, for the Hessian times a direction."""
    batch = {"tokens": torch.tensor([[1, 2, 3]]), "targets": torch.tensor([[2, 3, 4]])}
    direction = transformer.init(random.key(9), CFG, dtype=torch.float64)
    gradient = torch.func.grad(lambda params: transformer.loss(params, batch, CFG, z_loss=0.1)[0])
    _, hessian_direction = torch.func.jvp(gradient, (PARAMS,), (direction,))
    step = 1e-5
    after, before = (gradient(tree.map(lambda p, d, s=s: p + s * d, PARAMS, direction)) for s in (step, -step))
    for h, a, b in zip(tree.leaves(hessian_direction), tree.leaves(after), tree.leaves(before), strict=True):
        torch.testing.assert_close(h, (a - b) / (2 * step), rtol=1e-4, atol=1e-7)


def test_wrap_block():
    """Law: torch's checkpoint around each block gives the same loss and gradients; the wrapper sees every block."""
    from torch.utils.checkpoint import checkpoint

    cfg = replace(CFG, window=(2, None, 2), n_layers=3)
    params = tree.map(lambda x: x.requires_grad_(), transformer.init(random.key(0), cfg, dtype=torch.float64))
    batch = {"tokens": torch.randint(0, 29, (2, 6)), "targets": torch.randint(0, 29, (2, 6))}
    calls = []

    def remat(f):
        def wrapped(block_params, x, ctx):
            calls.append(block_params)
            return checkpoint(f, block_params, x, ctx, use_reentrant=False)

        return wrapped

    plain, _ = transformer.loss(params, batch, cfg)
    wrapped, _ = transformer.loss(params, batch, cfg, wrap_block=remat)
    assert [id(c) for c in calls[:3]] == [id(p) for p in params["layers"]]
    assert torch.equal(plain, wrapped)
    leaves = tree.leaves(params)
    for a, b in zip(torch.autograd.grad(plain, leaves), torch.autograd.grad(wrapped, leaves), strict=True):
        assert torch.equal(a, b)


def test_hidden_and_unembedding():
    """Law: logits are the hidden states times the unembedding."""
    tokens = torch.tensor([[1, 2, 3]])
    for cfg in (CFG, replace(CFG, tie_embeddings=True)):
        params = transformer.init(random.key(0), cfg, dtype=torch.float64)
        h = hidden(params, tokens, cfg)
        torch.testing.assert_close(apply(params, tokens, cfg), h @ transformer.unembedding(params, cfg).T)


def test_learned_positions_end():
    cfg = replace(CFG, position="learned")
    params = transformer.init(random.key(0), cfg)
    with pytest.raises(ValueError, match="tokens_BT must have at most context_length 16 positions, got 17"):
        apply(params, torch.zeros(1, 17, dtype=torch.int64), cfg)


def test_check_tokens():
    """The first bad id and where it stands; any integer dtype."""
    transformer.check_tokens(torch.tensor([[0, 28]], dtype=torch.uint16), CFG)
    transformer.check_tokens(torch.zeros(0, dtype=torch.int64), CFG)
    with pytest.raises(ValueError, match=r"tokens: id 29 at position \(1, 2\) is outside the vocabulary \(0..28\)"):
        transformer.check_tokens(torch.tensor([[0, 1, 2], [3, 4, 29]]), CFG)
    with pytest.raises(ValueError, match="targets: id -1 at position 0 is outside the vocabulary"):
        transformer.check_tokens(torch.tensor([-1, 99]), CFG, "targets")
    with pytest.raises(ValueError, match=r"tokens must hold integers, got torch.float32"):
        transformer.check_tokens(torch.zeros(2), CFG)
