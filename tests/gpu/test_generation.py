"""Generation on an accelerator: its kernels against float64, and the recorded step against the plain one.

Oracles: the references of purelm.ops and purelm.generate in float64 on the CPU; generation without kernels and graphs.
"""

import pytest
import torch

from purelm import random, tree
from purelm.generate import Sampling, Stop, generate, on_graph, reused
from purelm.generate.rows import begin, draw
from purelm.kernels.decode_attention import decode_attention_
from purelm.kernels.draw import draw_
from purelm.kernels.fused import FUSED
from purelm.kernels.invariant_decode import invariant_decode_attention_
from purelm.models import transformer
from purelm.models.joined import join_weights
from purelm.ops.decode_attention import decode_attention_ as reference
from purelm.ops.rope import rope_tables
from tests.kernels.rules import assert_as_exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
]
CUDA = torch.device("cuda")
CFG = transformer.Config(vocab_size=97, context_length=160, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2)


def numbers(seed, *shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).to(CUDA) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(12, 12), (9, 3), (4, 1), (32, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 100}, {"softcap": 2.0, "scale": 0.3}, {"layout": "half"}, {"rope": False, "window": 0}],
    ids=str,
)
@pytest.mark.parametrize("op", [decode_attention_, invariant_decode_attention_], ids=lambda op: op.__name__)
def test_attention_of_one_token_is_as_exact_as_the_reference(dtype, heads, options, op):
    """Oracle: the reference in float64, on the cache as the kernel leaves it."""
    H, G = heads
    K, S = (64, 300) if H != 32 else (128, 1300)
    options = dict(options)
    length = torch.tensor([0, 1, 63, 64, 65, 200, S - 1], device=CUDA)
    B = len(length)
    q, k, v, keys, values = numbers(0, (B, H, K), (B, G, K), (B, G, K), (B, S, G, K), (B, S, G, K), dtype=dtype)
    if options.pop("rope", True):
        options["cos_BJ"], options["sin_BJ"] = rope_tables(length, K)
    mine = [keys.clone(), values.clone()]
    got = op(q, k, v, *mine, length, **options)
    same_cache = [keys.clone(), values.clone()]
    same = reference(q, k, v, *same_cache, length, **options)
    exact = reference(*[x.double() for x in (q, k, v, keys, values)], length, **options)
    assert_as_exact(got, same, exact, roundings=30)
    for x, y, before in zip(mine, same_cache, (keys, values), strict=True):
        torch.testing.assert_close(x, y, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        untouched = torch.ones(B, S, dtype=torch.bool, device=CUDA)
        untouched[torch.arange(B), length] = False
        assert torch.equal(x[untouched], before[untouched])


def test_a_row_has_the_same_bits_in_every_batch_and_cache():
    """Exact: rows alone, and in a longer cache, are those of the batch."""
    for H, G in ((12, 12), (9, 3)):
        length = torch.tensor([5, 511, 512, 700], device=CUDA)
        q, k, v, keys, values = numbers(1, (4, H, 64), (4, G, 64), (4, G, 64), (4, 701, G, 64), (4, 701, G, 64))
        whole = decode_attention_(q, k, v, keys.clone(), values.clone(), length)
        longer = [torch.cat([x, x], 1) for x in (keys, values)]
        assert torch.equal(whole, decode_attention_(q, k, v, *longer, length))
        for b in range(4):
            one = slice(b, b + 1)
            alone = decode_attention_(q[one], k[one], v[one], keys[one].clone(), values[one].clone(), length[one])
            assert torch.equal(whole[one], alone)


@pytest.mark.parametrize("op", [decode_attention_, invariant_decode_attention_], ids=lambda op: op.__name__)
def test_a_full_row_is_nan_and_writes_nothing(op):
    q, k, v, keys, values = numbers(2, (2, 4, 32), (2, 4, 32), (2, 4, 32), (2, 10, 4, 32), (2, 10, 4, 32))
    mine = [keys.clone(), values.clone()]
    out = op(q, k, v, *mine, torch.tensor([10, 3], device=CUDA))
    assert out[0].isnan().all() and out[1].isfinite().all()
    assert torch.equal(mine[0][0], keys[0]) and torch.equal(mine[1][0], values[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.7])
@pytest.mark.parametrize("V", [7, 1000, 49_152, 151_936])
def test_drawing_by_one_kernel(V, temperature, dtype):
    """Oracle: the reference; a token may be its neighbour where the target is within rounding of their border."""
    B = 64
    (logits,) = numbers(3, (B, V), dtype=dtype)
    logits = 4 * logits
    u = random.uniform(random.key(0), (B, 3), dtype=torch.float64).to(CUDA)
    u[0], u[1] = 0.0, 1 - 2**-53
    logits[2, 0], logits[3], logits[4, 2] = torch.nan, -torch.inf, torch.inf
    logits[5, :3] = -torch.inf
    stops = torch.zeros(V, dtype=torch.bool, device=CUDA)
    stops[::2] = True
    rows = begin([1, 2, 3, 3] * 16, u)
    rows = rows._replace(n_B=rows.n_B + (rows.limit_B - 1), open_B=torch.arange(B, device=CUDA) % 7 != 6)
    sampling, stop = Sampling(temperature), Stop(tuple(range(0, V, 2)))
    got = draw_(logits, tree.map(torch.clone, rows), sampling, stop, stops)
    want = draw(logits, rows, sampling, stop, stops)
    exact = draw(logits.double(), rows, sampling, stop, stops)
    same = got.token_B == exact.token_B
    at = (rows.limit_B - 1).unsqueeze(-1)
    if not bool(same.all()):  # neighbours at a border: both sums are within 1e-6 of the target
        p = torch.softmax((logits[~same].double() - logits[~same].double().amax(-1, keepdim=True)) / temperature, -1)
        upper = p.cumsum(-1).gather(-1, got.token_B[~same].unsqueeze(-1))
        here = p.gather(-1, got.token_B[~same].unsqueeze(-1))
        target = rows.uniforms_BN.gather(1, at)[~same]
        assert temperature and (upper - here <= target + 1e-6).all() and (upper >= target - 1e-6).all()
    assert same.sum() >= B - 3
    for name in ("n_B", "bad_B"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert want.bad_B.sum() == 3
    for name in ("token_B", "open_B", "stopped_B", "tokens_BN"):
        assert torch.equal(getattr(got, name)[same], getattr(exact, name)[same])
    for name in ("logprobs_BN", "model_logprobs_BN"):
        torch.testing.assert_close(getattr(got, name)[same], getattr(exact, name)[same], rtol=1e-5, atol=2e-5)


def test_recorded_generation_is_the_plain_one():
    """Oracle: no kernels, no graph, one reading a step; in fp32, so that no near tie is decided by rounding."""
    plain, fast = transformer.make(CFG), transformer.make(CFG, FUSED)
    params = join_weights(tree.to(plain.init(random.key(0)), CUDA))
    prompts = [random.randint(random.fold_in(random.key(1), i), (5 + 7 * (i % 9),), 0, 97) for i in range(20)]
    options = {"max_new_tokens": 40, "stop": Stop((3, 4)), "n_samples": 2}
    key = random.key(2, device=CUDA)
    want = generate(plain, params, prompts, key, read_every=1, **options)
    wrap = reused(on_graph)
    for batch_size in (None, 7, 7, 40):
        got = generate(fast, params, prompts, key, batch_size=batch_size, wrap_step=wrap, draw=draw_, **options)
        assert [t.tolist() for t in got.tokens] == [t.tolist() for t in want.tokens]
        assert got.finish_reasons == want.finish_reasons
        for a, b in zip(got.logprobs, want.logprobs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    again = random.key(5, device=CUDA)
    other = tree.map(lambda x: 1.1 * x, params)  # recorded anew for other parameters
    a = generate(fast, other, prompts, again, wrap_step=wrap, draw=draw_, **options)
    b = generate(plain, other, prompts, again, **options)
    assert [t.tolist() for t in a.tokens] == [t.tolist() for t in b.tokens]


def test_two_generations_in_turns_share_a_recorded_step():
    """Exact: each is what it is alone, though both are of one shape."""
    from purelm.generate import stream

    model = transformer.make(CFG, FUSED)
    params = tree.to(model.init(random.key(0)), CUDA)
    prompts = [[1, 2, 3], [4, 5, 6]]
    options = {"max_new_tokens": 60, "draw": draw_, "read_every": 4}
    keys = [random.key(i, device=CUDA) for i in (7, 8)]
    alone = [generate(model, params, prompts, key, **options) for key in keys]
    wrap = reused(on_graph)
    generate(model, params, prompts, keys[0], wrap_step=wrap, **options)
    streams = [stream(model, params, prompts, key, wrap_step=wrap, **options) for key in keys]
    found = [[[], []], [[], []]]
    for steps in zip(*streams, strict=True):
        for rows, step in zip(found, steps, strict=True):
            for row, token in zip(rows, step.tokens, strict=True):
                row.append(token)
    assert found == [[t.tolist() for t in out.tokens] for out in alone]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_of_the_invariant_product_has_the_same_bits_in_every_batch(dtype):
    """Exact: tiles of both sizes, alone and beside others; and as exact as the library's product."""
    from purelm.kernels.invariant_linear import invariant_linear

    for M, N, K in ((4096, 2048, 768), (300, 1000, 576), (64, 49_152, 576)):
        x, w = numbers(7, (M, K), (N, K), dtype=dtype)
        whole = invariant_linear(x, w)
        for part in (slice(0, 1), slice(5, 37), slice(M - 1, M)):
            assert torch.equal(invariant_linear(x[part].contiguous(), w), whole[part])
        assert torch.equal(invariant_linear(x, w[100:260]), whole[:, 100:260])
        assert_as_exact(whole, x @ w.mT, x.double() @ w.double().mT, roundings=12, scale=K**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"qk_norm": "head", "window": 20}, {"n_kv_heads": 4}], ids=str)
def test_what_is_sampled_is_what_is_trained_to_the_last_bit(dtype, options):
    """Exact: log-probabilities of `generate` with INVARIANT and those of `model.log_probs`, batched in another way."""
    from dataclasses import replace

    from purelm.align.responses import response_batch
    from purelm.kernels.invariant import INVARIANT

    cfg = replace(CFG, d_model=192, n_layers=3, **options)
    model = transformer.make(cfg, INVARIANT)
    params = join_weights(tree.to(tree.cast(model.init(random.key(0)), dtype), CUDA))
    prompts = [random.randint(random.fold_in(random.key(1), i), (5 + 7 * (i % 9),), 0, 97) for i in range(20)]
    for temperature in (1.0, 0.7):
        out = generate(
            model, params, prompts, random.key(3, device=CUDA), max_new_tokens=50, n_samples=2, batch_size=13,
            draw=draw_, wrap_step=reused(on_graph), sampling=Sampling(temperature), stop=Stop((3, 4)),
        )  # fmt: skip
        rows = [(prompts[i // 2].numpy(), ids.numpy()) for i, ids in enumerate(out.tokens)]
        for some in (range(40), range(3), range(17, 40)):
            batch = response_batch([rows[i][0] for i in some], [rows[i][1] for i in some], pad_id=0)
            batch = {name: torch.as_tensor(x).to(CUDA) for name, x in batch.items()}
            for recorded in (False, True):
                with torch.set_grad_enabled(recorded):
                    log_p, _ = model.log_probs(params, batch, temperature=temperature)
                for row, i in enumerate(some):
                    got = log_p[row][batch["weights"][row] != 0].detach().cpu()
                    assert torch.equal(got, out.logprobs[i]), (got - out.logprobs[i]).abs().max()


def test_gradients_of_the_invariant_ops():
    """Oracle: REFERENCE in float64; in fp32, so to 1e-4 of the largest."""
    from purelm.kernels.invariant import INVARIANT

    model, exact = transformer.make(CFG, INVARIANT), transformer.make(CFG)
    params = tree.to(model.init(random.key(0)), CUDA)
    tokens = random.randint(random.key(1), (3, 33), 0, 97).to(CUDA)
    batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}

    def grads(model, params):
        leaves = tree.map(lambda x: x.detach().requires_grad_(), params)
        log_p, entropy = model.log_probs(leaves, batch)
        return torch.autograd.grad(log_p.sum() + 0.1 * entropy.sum(), tree.leaves(leaves))

    found, wanted = grads(model, params), grads(exact, tree.map(lambda x: x.double(), params))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-4 * float(y.abs().max()) + 1e-6)
