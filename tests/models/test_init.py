"""init: names, spread, and a key for each leaf that depends on its path alone."""

import math

import pytest
import torch

from purelm import random, tree
from purelm.models.leaves import Leaf, leaf_key
from purelm.models.transformer import Config, apply, course_init, gpt2_init, init, leaves, scaled_residual

BIG = Config(vocab_size=400, context_length=8, d_model=96, n_layers=2, n_heads=4, d_ff=320, position="learned")


def flat(params):
    return dict(zip(tree.paths(params), tree.leaves(params), strict=True))


def test_names_are_the_courses():
    """Oracle: the course's state_dict."""
    cfg = Config(vocab_size=8, context_length=4, d_model=4, n_layers=1, n_heads=2, d_ff=6)
    shapes = {name: tuple(x.shape) for name, x in flat(init(random.key(0), cfg)).items()}
    assert shapes == {
        "token_embeddings.weight": (8, 4),
        "layers.0.attn.q_proj.weight": (4, 4),
        "layers.0.attn.k_proj.weight": (4, 4),
        "layers.0.attn.v_proj.weight": (4, 4),
        "layers.0.attn.output_proj.weight": (4, 4),
        "layers.0.ln1.weight": (4,),
        "layers.0.ffn.w1.weight": (6, 4),
        "layers.0.ffn.w2.weight": (4, 6),
        "layers.0.ffn.w3.weight": (6, 4),
        "layers.0.ln2.weight": (4,),
        "ln_final.weight": (4,),
        "lm_head.weight": (8, 4),
    }


def test_the_table_is_of_what_init_makes(axis):
    """Oracle: the leaf table; every leaf finite and contiguous, ones and zeros where vectors are."""
    table, found = leaves(axis), flat(init(random.key(0), axis))
    assert {k: tuple(x.shape) for k, x in found.items()} == {k: x.shape for k, x in table.items()}
    for path, x in found.items():
        assert x.dtype == torch.float32 and x.is_contiguous()
        assert (x.ndim == 1) == (table[path].kind in ("norm", "bias"))
        if x.ndim == 1:
            assert torch.equal(x, torch.full_like(x, 0.0 if path.endswith("bias") else 1.0))


def test_course_spread():
    """Oracle: the variance of a normal cut at 3 sigma, 0.9733 sigma^2, and the cut itself."""
    ratio = math.sqrt(1 - 2 * 3 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
    for path, x in flat(init(random.key(0), BIG)).items():
        if x.ndim == 1 or x.numel() < 5000:
            continue
        std = 1.0 if "embeddings" in path else math.sqrt(2 / sum(x.shape))
        assert x.abs().max() <= 3 * std * (1 + 1e-6)
        assert abs(x.std().item() / (ratio * std) - 1) < 4 / math.sqrt(2 * x.numel())  # 4 standard errors
        assert abs(x.mean().item()) < 4 * std / math.sqrt(x.numel())


def test_rules():
    """Closed forms; only what writes to the residual stream is scaled."""
    rule = scaled_residual(course_init, 8)
    plain, scaled = init(random.key(0), BIG), init(random.key(0), BIG, rule)
    for path, x in flat(plain).items():
        factor = 0.25 if path.endswith(("output_proj.weight", "w2.weight")) else 1.0
        torch.testing.assert_close(flat(scaled)[path], x * factor)
    assert gpt2_init("w", Leaf((8, 8), "matrix", "ffn")) == 0.02
    assert abs(flat(init(random.key(0), BIG, gpt2_init))["lm_head.weight"].std().item() - 0.02) < 5e-4


def test_a_leaf_depends_on_key_and_path_alone(small):
    """Exact: more layers, other heads or a new parameter leave the rest as it was; keys and paths matter."""
    base = flat(init(random.key(3), small))
    for change in (dict(n_layers=5), dict(qk_norm="head"), dict(tie_embeddings=True), dict(biases="all")):
        other = flat(init(random.key(3), Config(**{**vars(small), **change})))
        same = [p for p in base if p in other]
        assert len(same) >= len(base) - 1
        assert all(torch.equal(base[p], other[p]) for p in same)
    assert not torch.equal(base["layers.0.attn.q_proj.weight"], base["layers.1.attn.q_proj.weight"])
    assert not torch.equal(base["lm_head.weight"], flat(init(random.key(4), small))["lm_head.weight"])
    expected = random.truncated_normal(leaf_key(random.key(3), "lm_head.weight"), (29, 24), -3.0, 3.0)
    assert torch.equal(base["lm_head.weight"], expected * math.sqrt(2 / 53))


def test_leaf_keys_do_not_change_between_versions():
    """Golden: what a seed means; 2605591890 by python -c "import zlib; print(zlib.crc32(b'lm_head.weight'))"."""
    assert torch.equal(leaf_key(random.key(0), "lm_head.weight"), random.fold_in(random.key(0), 2605591890))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(small, dtype):
    """bf16 is the fp32 draw rounded; float64 is a draw of its own."""
    params = init(random.key(0), small, dtype=dtype)
    assert {x.dtype for x in tree.leaves(params)} == {dtype}
    if dtype == torch.bfloat16:
        wide = init(random.key(0), small)
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(tree.leaves(params), tree.leaves(wide), strict=True))


def test_initial_loss_is_near_uniform(small):
    """Closed form: at first every token is about as likely, ln V, plus half the variance of the logits (about 1)."""
    params = init(random.key(0), BIG)
    tokens = torch.randint(0, 400, (8, 8), generator=torch.Generator().manual_seed(0))
    nll = -torch.log_softmax(apply(params, tokens, BIG), -1).mean()
    assert math.log(400) < nll < math.log(400) + 1.0
