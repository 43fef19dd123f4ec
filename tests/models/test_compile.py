"""The model under torch.compile: one graph, the same numbers, no second compilation, tables formed once."""

import re
from dataclasses import replace

import pytest
import torch

from purelm import random, tree
from purelm.models import transformer
from purelm.models.cache_rows import insert_
from purelm.models.transformer import Config, apply, decode, decode_, init_cache, loss, prefill
from purelm.ops import REFERENCE
from purelm.ops.sdpa import sdpa_attention

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # importing inductor warns
]

CFG = Config(vocab_size=29, context_length=16, d_model=16, n_layers=2, n_heads=2, d_ff=24)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_batch(seed, shape=(2, 8)):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randint(0, 29, shape, generator=g) for k in ("tokens", "targets")}


def test_loss_by_inductor():
    """Oracle: eager, with gradients. One graph; step two compiles nothing; sin and cos once, not in each layer."""
    from torch._inductor.utils import run_and_get_code

    cfg = replace(CFG, n_layers=1)  # each kernel costs the compiler over a second
    params = tree.map(lambda x: x.requires_grad_(), transformer.init(random.key(0), cfg))
    leaves = tree.leaves(params)
    ops = REFERENCE._replace(attention=sdpa_attention)
    compiled = torch.compile(lambda p, b: loss(p, b, cfg, ops=ops), fullgraph=True)

    def both(batch):
        values = [f(params, batch)[0] for f in (compiled, lambda p, b: loss(p, b, cfg, ops=ops))]
        return values, [torch.autograd.grad(v, leaves) for v in values]

    (values, gradients), code = run_and_get_code(both, make_batch(0))
    torch.testing.assert_close(*values)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # fp32 sums in another order
    n_sines = [len(re.findall(r"\bsin\(", c)) for c in code]
    # Forward: once in each loop that was written out (vector body, scalar tail), in one kernel. Backward: never.
    assert 1 <= n_sines[0] <= 2
    assert n_sines[1:] == [0]
    with torch.compiler.set_stance("fail_on_recompile"):
        values, _ = both(make_batch(1))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize(
    "change",
    [
        dict(window=(2, None), n_kv_heads=1, qk_norm="head", norm_position="sandwich", ffn="geglu", logit_softcap=3.0),
        dict(norm="layer", biases="all", position="learned", ffn="gelu", tie_embeddings=True),
    ],
    ids=["like gemma2", "like gpt2"],
)
def test_one_graph_for_packed_batches(change):
    """Oracle: eager, with gradients, segments, weights, z-loss and chunks; traced and differentiated ahead of time."""
    cfg = Config(**{**vars(CFG), **change})
    params = tree.map(lambda x: x.requires_grad_(), transformer.init(random.key(0), cfg))
    batch = make_batch(0)
    batch["segment_ids"] = torch.tensor([[1] * 5 + [2] * 3, [1] * 8])
    batch["weights"] = torch.rand(2, 8)

    def f(params, batch):
        return loss(params, batch, cfg, z_loss=0.1, chunk=5)[0]

    values = [torch.compile(f, fullgraph=True, backend="aot_eager")(params, batch), f(params, batch)]
    torch.testing.assert_close(*values)
    for a, b in zip(*(torch.autograd.grad(v, tree.leaves(params)) for v in values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_decode_compiles_once():
    """Oracle: eager decode; one graph for every length, because the length is a tensor."""
    params = transformer.init(random.key(0), CFG)
    tokens = torch.randint(0, 29, (2, 8))
    _, cache = prefill(params, tokens[:, :3], init_cache(CFG, 2, 8), CFG)
    compiled = torch.compile(lambda p, t, c: decode(p, t, c, CFG), fullgraph=True, backend="aot_eager")
    full = apply(params, tokens, CFG)
    for t in range(3, 8):
        with torch.compiler.set_stance("default" if t == 3 else "fail_on_recompile"):
            logits, cache = compiled(params, tokens[:, t], cache)
        torch.testing.assert_close(logits, full[:, t])


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_decode_compiles_once_for_rows_of_different_lengths(position):
    """Oracle: eager apply; lengths of rows are values in one graph, in place too, also after rows were exchanged."""
    cfg = replace(CFG, position=position, window=(3, None))
    params = transformer.init(random.key(0), cfg)
    tokens = torch.randint(0, 29, (2, 16))
    full = apply(params, tokens, cfg)
    _, cache = prefill(params, tokens[:, :5], init_cache(cfg, 2, 16), cfg, lengths=torch.tensor([2, 5]))
    _, other = prefill(params, tokens[1:, :9], init_cache(cfg, 1, 16), cfg)
    compiled = torch.compile(lambda p, t, c: decode_(p, t, c, cfg), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for step in range(8):
            if step == 4:
                cache = insert_(cache, [1], other)
            n = cache.length.tolist()
            with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
                logits, cache = compiled(params, tokens[[0, 1], n], cache)
            torch.testing.assert_close(logits, full[[0, 1], n])


def test_regional_compilation():
    """wrap_block=torch.compile: one compilation for all layers and all later calls; equal to eager."""
    params = transformer.init(random.key(0), CFG)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        for seed in range(3):
            tokens = make_batch(seed)["tokens"]
            got = apply(params, tokens, CFG, wrap_block=lambda f: torch.compile(f, backend=counter))
            torch.testing.assert_close(got, apply(params, tokens, CFG))
    assert counter.frame_count == 1
