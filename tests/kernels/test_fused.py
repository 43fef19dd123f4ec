"""The bundle of kernels in a model. Oracle: the same model with REFERENCE, in float64 (equal to rounding)."""

import inspect

import pytest
import torch

from purelm import random, tree
from purelm.kernels.cross_entropy import cross_entropy as kernel_ce
from purelm.kernels.flash_attention import flash_attention_with_lse
from purelm.kernels.fused import FUSED
from purelm.kernels.linear_cross_entropy import log_probs_and_entropy
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.ops.attention import attention_with_lse
from purelm.ops.cross_entropy import cross_entropy
from purelm.ops.decode_attention import decode_attention_
from purelm.ops.log_probs import log_probs
from purelm.ops.sdpa import sdpa_attention
from purelm.optim import adamw, schedules
from purelm.train import init_state, make_step
from purelm.transforms import jit, remat, value_and_grad

CONFIGS = {
    "plain": dict(n_heads=4),
    "axes": dict(n_heads=4, n_kv_heads=2, window=(3, None), qk_norm="head", attention_softcap=5.0, logit_softcap=9.0),
    "half": dict(n_heads=2, rope_layout="half", tie_embeddings=True, norm_position="sandwich"),
}


def make(name):
    cfg = transformer.Config(vocab_size=31, context_length=16, d_model=16, n_layers=2, **CONFIGS[name])
    params = transformer.init(random.key(0), cfg, dtype=torch.float64)
    x = random.randint(random.key(1), (3, 13), 0, 31)
    weights = torch.ones(3, 12, dtype=torch.float64)
    weights[0, 3:7] = 0
    ids = torch.tensor([[1] * 5 + [2] * 7]).expand(3, -1)
    return cfg, params, {"tokens": x[:, :-1], "targets": x[:, 1:], "weights": weights, "segment_ids": ids}


def gradients(cfg, params, batch, ops, **options):
    def f(p):
        return transformer.loss(p, batch, cfg, ops=ops, z_loss=1e-3, **options)

    return value_and_grad(f, has_aux=True)(params)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"wrap_block": remat}, {"chunk": 5}], ids=["plain", "remat", "chunk"])
def test_a_model_with_fused_ops(name, options):
    cfg, params, batch = make(name)
    (loss, aux), grads = gradients(cfg, params, batch, FUSED, **options)
    (wanted, aux2), wanted_grads = gradients(cfg, params, batch, REFERENCE)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(aux["nll"], aux2["nll"], rtol=1e-12, atol=1e-12)
    for x, y in zip(tree.leaves(grads), tree.leaves(wanted_grads), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_with_fused_ops():
    """Oracle: the same step, eager; fp32, so equal to the rounding of other orders of sums.

    aot_eager: what is traced is the point here; what inductor makes of a model is tests/models' affair.
    """
    cfg, params, batch = make("plain")
    params = tree.cast(params, torch.float32)
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    optimizer = adamw()
    step = make_step(
        lambda p, b: transformer.loss(p, b, cfg, ops=FUSED), optimizer, schedules.constant(1e-3), microbatches=1
    )
    copy = tree.map(torch.clone, params)
    eager, _ = step(init_state(params, optimizer), batch)
    compiled, metrics = jit(step, donate=0, backend="aot_eager")(init_state(copy, optimizer), batch)
    assert float(metrics["loss"]) > 0
    for x, y in zip(tree.leaves(compiled.params), tree.leaves(eager.params), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# What a kernel has beyond its reference: keywords with defaults.
MORE = {"attention": ["cu_seqlens", "sinks", "return_lse", "precision"]}


@pytest.mark.parametrize("bundle", [FUSED, REFERENCE._replace(attention=sdpa_attention)], ids=["fused", "sdpa"])
@pytest.mark.parametrize("name", REFERENCE._fields)
def test_signatures_are_those_of_the_reference(bundle, name):
    """Oracle: the reference's signature: names, order, kinds, defaults and shapes of all arguments."""
    reference, op = getattr(REFERENCE, name), getattr(bundle, name)
    if name == "decode_attention_":  # the bundles without one do in several ops what it does
        assert reference is None
        reference, op = decode_attention_, op or decode_attention_
    wanted, found = (list(inspect.signature(f).parameters.values()) for f in (reference, op))
    # As text, which has all of it: two shapes of jaxtyping are never equal.
    assert [str(p) for p in found[: len(wanted)]] == [str(p) for p in wanted]
    assert [p.kind for p in found[: len(wanted)]] == [p.kind for p in wanted]
    more = found[len(wanted) :]
    assert [p.name for p in more] == (MORE.get(name, []) if bundle is FUSED else [])
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in more)


def test_signature_of_attention_with_lse():
    """Oracle: the reference's; the kernel's own keywords come after."""
    both = attention_with_lse, flash_attention_with_lse
    wanted, found = ([str(p) for p in inspect.signature(f).parameters.values()] for f in both)
    assert found[: len(wanted)] == wanted
    more = list(inspect.signature(flash_attention_with_lse).parameters)[len(wanted) :]
    assert more == [name for name in MORE["attention"] if name != "return_lse"]


@pytest.mark.parametrize(("kernel", "reference"), [(log_probs_and_entropy, log_probs), (kernel_ce, cross_entropy)])
def test_signatures_of_kernels_outside_of_the_bundle(kernel, reference):
    """Oracle: the reference's signature, results included."""
    assert str(inspect.signature(kernel)) == str(inspect.signature(reference))
