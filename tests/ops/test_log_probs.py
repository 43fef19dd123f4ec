"""log_probs against torch's distributions and finite differences; its chunks against the whole."""

import pytest
import torch
from torch.distributions import Categorical
from torch.func import grad, jvp, vmap

from purelm.ops.log_probs import log_probs

# torch's own: its tables of forward-mode formulas use what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def random_case(shape=(3, 5), V=11, D=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, D, generator=g, dtype=torch.float64).to(dtype)
    unembedding = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), unembedding.requires_grad_(), torch.randint(0, V, shape, generator=g)


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("ignore_index", [None, -100])
def test_equals_torch_distributions(chunk, ignore_index):
    """Oracle: Categorical's log_prob and entropy of the capped and divided logits, float64; gradients too."""
    h, w, t = random_case()
    if ignore_index is not None:
        t[0, 1:] = ignore_index
    found = log_probs(h, w, t, softcap=3.0, temperature=0.7, chunk=chunk, ignore_index=ignore_index)
    p = Categorical(logits=3.0 * torch.tanh(h @ w.T / 3.0) / 0.7)
    live = t != -100
    wanted = torch.where(live, p.log_prob(t.clamp(min=0)), 0.0), torch.where(live, p.entropy(), 0.0)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
        for x, y in zip(*(torch.autograd.grad(z.sin().sum(), (h, w), retain_graph=True) for z in (a, b)), strict=True):
            torch.testing.assert_close(x, y)


def test_gradcheck():
    """Oracle: finite differences, first and second order."""
    h, w, t = random_case((3,), V=5, D=2)
    assert torch.autograd.gradcheck(lambda h, w: log_probs(h, w, t, temperature=1.5, chunk=2), (h, w))
    assert torch.autograd.gradgradcheck(lambda h, w: log_probs(h, w, t), (h, w))


def test_bf16_is_summed_in_fp32():
    """Oracle: float64 on the same bf16 logits: only fp32 rounding is left."""
    h, w, t = random_case(V=5000, dtype=torch.bfloat16)
    found = log_probs(h, w, t)
    exact = Categorical(logits=(h @ w.T).double())
    for a, b in zip(found, (exact.log_prob(t), exact.entropy()), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


def test_chunks_hold_one_chunk_of_logits():
    """Oracle: the largest tensor saved for backward."""
    h, w, t = random_case((64,), V=50, D=8)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        log_probs(h, w, t)
        assert max(sizes) == 64 * 50
        sizes.clear()
        log_probs(h, w, t, chunk=16)
        assert max(sizes, default=0) < 16 * 50


@pytest.mark.parametrize("chunk", [None, 2])
def test_torch_func(chunk):
    """Oracles: torch.autograd for grad, a loop for vmap, <gradient, direction> for jvp."""
    h, w, t = random_case()

    def f(h, w, t):
        p, e = log_probs(h, w, t, chunk=chunk)
        return (p.sin() * e).sum()

    expected = torch.autograd.grad(f(h, w, t), (h, w))
    h, w = h.detach(), w.detach()
    found = grad(f, (0, 1))(h, w, t)
    torch.testing.assert_close(found, expected)
    rows = vmap(grad(f, 1), in_dims=(0, None, 0))(h, w, t)
    for i in range(3):
        torch.testing.assert_close(rows[i], grad(f, 1)(h[i], w, t[i]))
    d = torch.randn_like(h)
    torch.testing.assert_close(jvp(lambda h: f(h, w, t), (h,), (d,))[1], (found[0] * d).sum())


@pytest.mark.compile
def test_compiled_equals_eager():
    """Oracle: eager, in one graph."""
    h, w, t = random_case()
    found = torch.compile(log_probs, fullgraph=True, backend="aot_eager")(h, w, t, temperature=0.5)
    torch.testing.assert_close(found, log_probs(h, w, t, temperature=0.5))


def test_bad_arguments():
    h, w, t = random_case()
    with pytest.raises(ValueError, match="temperature must be above 0"):
        log_probs(h, w, t, temperature=0.0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        log_probs(h, w, t, chunk=0)
    with pytest.raises((RuntimeError, IndexError)):
        log_probs(h, w, t - 100)
