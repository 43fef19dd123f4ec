"""cross_entropy and linear_cross_entropy on an accelerator, at realistic sizes.

Oracles: purelm.ops in float64 on the same GPU, with the rule of tests/kernels/rules.py (the other side of the rule is
purelm.ops in the kernel's dtype); eager code for compiled code; the same call again, bit for bit; torch's allocator.
"""

import gc

import pytest
import torch
from torch.func import grad, vmap

from purelm.kernels.cross_entropy import cross_entropy
from purelm.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    log_probs_and_entropy,
)
from purelm.ops.cross_entropy import cross_entropy as reference
from purelm.ops.linear_cross_entropy import linear_cross_entropy as linear_reference
from purelm.ops.log_probs import log_probs
from tests.kernels.rules import assert_as_exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = [{}, {"softcap": 15.0, "z_loss": 1e-2}]
# Sums over a row of up to 2^18, exp of scores up to 15, a softcap, a log, products; in the dtype are held logits, their
# gradients and what is summed of these.
RULE = {"stored": 4.0, "roundings": 18.0 + 15.0 + 8.0}


@pytest.fixture(autouse=True)
def sums_in_fp32():
    """TF32 is off by default, but cuBLAS may add the parts of a 16-bit product in 16 bits, which is no matter here."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


def tokens(N, V, seed=0):
    """(targets, weights): about one weight in five is 0, and there the target is -100."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (N,), generator=g)
    weights = torch.rand(N, generator=g) + 0.1
    weights[torch.rand(N, generator=g) < 0.2] = 0.0
    return torch.where(weights == 0, -100, targets).to(CUDA), weights.to(CUDA)


def random_logits(N, V, dtype, seed=1):
    g = torch.Generator(device=CUDA).manual_seed(seed)
    return (4 * torch.randn(N, V, generator=g, device=CUDA)).to(dtype)


def random_linear(N, V, D, dtype, seed=2):
    g = torch.Generator(device=CUDA).manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, device=CUDA).to(dtype)
    return hidden, (2 * D**-0.5 * torch.randn(V, D, generator=g, device=CUDA)).to(dtype)


def run(f, xs, *args, **options):
    """(loss, nll, gradients of <loss, fixed numbers> for each of xs)."""
    xs = [x.detach().requires_grad_() for x in xs]
    out = f(*xs, *args, **options)
    return *(x.detach() for x in out), *torch.autograd.grad((out[0] * upstream(out[0])).sum(), xs)


def upstream(x):
    return (0.7 + 0.2 * torch.arange(x.numel(), device=x.device, dtype=x.dtype).sin()).reshape(x.shape)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V", [(1, 2), (7, 123), (300, 50257), (257, 128256), (64, 256000)])
def test_cross_entropy_against_float64(N, V, dtype, options):
    logits, (targets, weights) = random_logits(N, V, dtype), tokens(N, V)
    for reduction in ("none", "sum"):
        kw = {"weights": weights, "reduction": reduction, "denominator": 3.0, **options}
        exact = run(reference, [logits.double()], targets, **{**kw, "weights": weights.double()})
        same, ours = (run(f, [logits], targets, **kw) for f in (reference, cross_entropy))
        for o, s, e in zip(ours, same, exact, strict=True):
            assert_as_exact(o, s, e, **RULE)


def test_cross_entropy_where_offsets_exceed_32_bits():
    """Exact: the last rows of 2^31 + elements are those of a small batch."""
    N, V = 17000, 128256
    logits = torch.zeros(N, V, device=CUDA, dtype=torch.bfloat16)
    logits[-3:] = random_logits(3, V, torch.bfloat16)
    targets = torch.full((N,), 5, device=CUDA)
    loss, _ = cross_entropy(logits, targets, reduction="none")
    small, _ = cross_entropy(logits[-3:].clone(), targets[-3:], reduction="none")
    assert torch.equal(loss[-3:], small)
    (d,) = torch.autograd.grad(cross_entropy(logits.requires_grad_(), targets)[0], logits)
    tail = logits.detach()[-3:].clone().requires_grad_()
    assert torch.equal(d[-3:], torch.autograd.grad(cross_entropy(tail, targets[-3:])[0], tail)[0])


def test_bad_targets_give_nan_and_no_illegal_access():
    logits = random_logits(4, 1000, torch.bfloat16).requires_grad_()
    targets = torch.tensor([1, 1000, -1, 2**40], device=CUDA)
    loss, _ = cross_entropy(logits, targets, reduction="none")
    (d,) = torch.autograd.grad(loss.sum(), logits)
    torch.cuda.synchronize()
    assert loss.isnan().tolist() == [False, True, True, True] and d[1:].isnan().all() and d[0].isfinite().all()
    hidden, unembedding = random_linear(4, 1000, 64, torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden.requires_grad_(), unembedding, targets)
    (d,) = torch.autograd.grad(loss, hidden)
    assert loss.isnan() and d[1:].isnan().all() and d[0].isfinite().all()


def test_float64_is_refused():
    logits, targets = random_logits(2, 3, torch.float64), tokens(2, 3)[0]
    with pytest.raises(ValueError, match=r"use purelm\.ops"):
        cross_entropy(logits, targets)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V, D, chunk", [(1, 2, 8, None), (777, 5003, 96, 100), (2048, 32000, 512, 600)])
def test_linear_against_float64(N, V, D, chunk, dtype, options):
    """Odd V too: rows of the chunk's buffer are padded."""
    hidden, unembedding = random_linear(N, V, D, dtype)
    targets, weights = tokens(N, V)
    for reduction in ("sum", "none"):
        kw = {"weights": weights, "reduction": reduction, "denominator": float(N), **options}
        exact = run(
            linear_reference, [hidden.double(), unembedding.double()], targets, **{**kw, "weights": weights.double()}
        )
        same = run(linear_reference, [hidden, unembedding], targets, **kw)
        ours = run(linear_cross_entropy, [hidden, unembedding], targets, chunk=chunk, **kw)
        for o, s, e in zip(ours, same, exact, strict=True):
            assert_as_exact(o, s, e, **RULE)
        with torch.no_grad():
            alone = linear_cross_entropy(hidden, unembedding, targets, chunk=chunk, **kw)
        for a, s, e in zip(alone, same[:2], exact[:2], strict=True):
            assert_as_exact(a, s, e, **RULE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_and_entropy_against_float64(dtype):
    N, V, D = 777, 5003, 96
    hidden, unembedding = random_linear(N, V, D, dtype)
    targets, _ = tokens(N, V)
    kw = {"softcap": 15.0, "temperature": 0.7, "ignore_index": -100}

    def both(f, xs, **more):
        xs = [x.detach().requires_grad_() for x in xs]
        p, h = f(*xs, targets, **kw, **more)
        return p.detach(), h.detach(), *torch.autograd.grad((p * upstream(p) + h * upstream(h).cos()).sum(), xs)

    exact = both(log_probs, [hidden.double(), unembedding.double()])
    same = both(log_probs, [hidden, unembedding])
    for o, s, e in zip(both(log_probs_and_entropy, [hidden, unembedding], chunk=200), same, exact, strict=True):
        assert_as_exact(o, s, e, **RULE)


def test_loss_scale_in_fp16():
    """Oracle: float64. Per-token gradients of a mean underflow in fp16 unless the scale comes before the rounding."""
    N, V, D = 4096, 4099, 128
    hidden, unembedding = random_linear(N, V, D, torch.float16)
    targets, _ = tokens(N, V)
    kw = {"ignore_index": -100, "denominator": float(N) * 100}
    xs = [hidden.requires_grad_(), unembedding.requires_grad_()]
    ours = torch.autograd.grad(linear_cross_entropy(*xs, targets, **kw)[0] * 2.0**16, xs)
    wide = [x.detach().double().requires_grad_() for x in xs]
    weights = (targets != -100).double()
    exact = torch.autograd.grad(
        linear_reference(*wide, targets, weights=weights, denominator=kw["denominator"])[0] * 2.0**16, wide
    )
    for o, e in zip(ours, exact, strict=True):
        assert (o.double() - e).norm() <= 1e-2 * e.norm()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled_equals_eager(reduction):
    """In one graph, with work before and after; a second call with other values does not recompile."""
    hidden, unembedding = random_linear(1000, 5003, 64, torch.bfloat16)
    targets, weights = tokens(1000, 5003)

    def f(h, w, t, s):
        loss, nll = linear_cross_entropy(
            h.sin(), w * 2, t, weights=s, denominator=s.sum(), reduction=reduction, chunk=300
        )
        log_prob, _ = log_probs_and_entropy(h, w, t, ignore_index=-100)
        given, _ = cross_entropy(h, t.clamp(0, 63), reduction=reduction)
        return loss + log_prob.sum() / 1000 + given, nll

    compiled = torch.compile(f, fullgraph=True)
    expected = run(f, [hidden, unembedding], targets, weights)
    for _ in range(2):
        got = run(compiled, [hidden, unembedding], targets, weights)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=3e-2 * float(b.float().abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(hidden, unembedding, targets, weights)[0], expected[0], rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_identical_again(dtype, reduction):
    hidden, unembedding = random_linear(3000, 32000, 256, dtype)
    targets, weights = tokens(3000, 32000)
    logits = random_logits(500, 32000, dtype)

    def everything():
        a = run(linear_cross_entropy, [hidden, unembedding], targets, weights=weights, reduction=reduction, chunk=700)
        b = run(cross_entropy, [logits], targets[:500], weights=weights[:500], reduction=reduction)
        return *a, *b

    first = everything()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, everything(), strict=True))


def test_value_and_grad_equals_autograd():
    hidden, unembedding = random_linear(1000, 5003, 64, torch.bfloat16)
    targets, weights = tokens(1000, 5003)
    xs = [hidden.requires_grad_(), unembedding.requires_grad_()]
    loss, nll = linear_cross_entropy(*xs, targets, weights=weights, denominator=800.0)
    expected = (loss.detach(), nll, *torch.autograd.grad(loss, xs))
    got = linear_cross_entropy_value_and_grad(*xs, targets, weights=weights, denominator=800.0)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if a.ndim == 0 else 2**-7, atol=0)


def test_per_sample_gradients():
    """Oracle: one sample at a time."""
    hidden, unembedding = random_linear(3 * 50, 301, 32, torch.float32)
    targets, _ = tokens(3 * 50, 301)
    h, t = hidden.reshape(3, 50, 32), targets.clamp(min=0).reshape(3, 50)
    for reduction in ("sum", "none"):

        def f(h, w, t, reduction=reduction):
            return linear_cross_entropy(h, w, t, reduction=reduction)[0].sum()

        got = vmap(grad(f, (0, 1)), (0, None, 0))(h, unembedding, t)
        for b in range(3):
            one = grad(f, (0, 1))(h[b], unembedding, t[b])
            for x, y in zip(got, one, strict=True):
                torch.testing.assert_close(x[b], y, rtol=1e-4, atol=1e-5)


def test_nothing_waits_for_the_device():
    """torch's own check: a call that synchronises raises."""
    hidden, unembedding = random_linear(1000, 5003, 64, torch.bfloat16)
    targets, weights = tokens(1000, 5003)
    xs = [hidden.requires_grad_(), unembedding.requires_grad_()]

    def step():
        loss, _ = linear_cross_entropy(*xs, targets, reduction="mean", ignore_index=-100, chunk=300)
        per_token, _ = linear_cross_entropy(*xs, targets, weights=weights, reduction="none")
        return torch.autograd.grad(loss + per_token.sum(), xs)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory():
    """Beside inputs and returned gradients: half of dW in fp32 and a chunk's logits; backward, one copy of each."""
    N, V, D, chunk = 8192, 64000, 1024, 1024
    hidden, unembedding = random_linear(N, V, D, torch.bfloat16)
    targets, _ = tokens(N, V)
    xs = [hidden.requires_grad_(), unembedding.requires_grad_()]

    def step():
        loss, _ = linear_cross_entropy(*xs, targets, ignore_index=-100, chunk=chunk)
        return torch.autograd.grad(loss, xs)

    kept = step()
    del kept
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = step()
    torch.cuda.synchronize()
    gradients = sum(x.numel() * x.element_size() for x in kept)
    extra = torch.cuda.max_memory_allocated() - before - gradients
    assert extra <= 2 * V * D + max(2 * chunk * V, 2 * N * D) + (16 << 20), extra / 2**20
