"""cross_entropy and linear_cross_entropy against torch.nn.functional, with weights, z-loss, softcap and chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from purelm.ops.cross_entropy import cross_entropy, mean_cross_entropy
from purelm.ops.linear_cross_entropy import linear_cross_entropy
from purelm.ops.softcap import soft_cap


def random_case(shape=(3, 5), V=11, D=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, D, dtype=dtype, generator=g)
    unembedding = torch.randn(V, D, dtype=dtype, generator=g)
    targets = torch.randint(0, V, shape, generator=g)
    weights = torch.rand(shape, dtype=dtype, generator=g) * (torch.rand(shape, generator=g) > 0.3)
    return hidden, unembedding, targets, weights


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 1, 3)])
def test_equals_torch(shape):
    """Oracle: torch.nn.functional.cross_entropy in float64."""
    h, w, t, _ = random_case(shape)
    logits = h @ w.T
    expected = F.cross_entropy(logits.flatten(0, -2), t.flatten(), reduction="none").reshape(shape)
    loss, nll = cross_entropy(logits, t, reduction="none")
    torch.testing.assert_close(loss, expected)
    assert torch.equal(loss, nll)
    torch.testing.assert_close(cross_entropy(logits, t)[0], expected.sum())
    torch.testing.assert_close(cross_entropy(logits, t, denominator=4.0)[0], expected.sum() / 4)
    torch.testing.assert_close(cross_entropy(logits, t, denominator=torch.tensor(4.0))[0], expected.sum() / 4)


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_linear_with_everything(chunk, reduction):
    """Oracle: softcap, log-probability and z term written with torch's logsumexp and indexing; gradients too."""
    h, w, t, weights = random_case()
    h.requires_grad_(), w.requires_grad_()
    logits = 3.0 * torch.tanh(h @ w.T / 3.0)
    log_z = logits.logsumexp(-1)
    nll = log_z - logits[torch.arange(3)[:, None], torch.arange(5), t]
    expected = weights * (nll + 0.1 * log_z**2) / 2.5
    got, got_nll = linear_cross_entropy(
        h, w, t, weights=weights, denominator=2.5, reduction=reduction, softcap=3.0, z_loss=0.1, chunk=chunk
    )
    expected, nll = (x.sum() if reduction == "sum" else x for x in (expected, weights * nll / 2.5))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_nll, nll)
    assert not got_nll.requires_grad
    g = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, (h, w), g), torch.autograd.grad(expected, (h, w), g), strict=True):
        torch.testing.assert_close(a, b)


@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 2**31))
def test_any_split_adds_up(n, chunk, seed):
    """Law: with the whole's denominator, losses of parts add to the loss of the whole; so do chunks."""
    h, w, t, weights = random_case((12,), seed=seed)
    total = weights.sum().clamp(min=0.1)

    def f(part, chunk=None):
        return linear_cross_entropy(h[part], w, t[part], weights=weights[part], denominator=total, chunk=chunk)[0]

    whole = f(slice(None))
    torch.testing.assert_close(f(slice(0, n)) + f(slice(n, None)), whole)
    torch.testing.assert_close(f(slice(None), chunk), whole)


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_token_of_weight_0_counts_for_nothing(chunk):
    """Exact: any target there, -100 too, and an infinite loss there, change neither value nor gradient."""
    h, w, t, _ = random_case()
    weights = torch.ones(3, 5, dtype=torch.float64)
    weights[1, 2:] = 0.0
    other = torch.where(weights == 0, -100, t)
    h.requires_grad_()
    first, second = (linear_cross_entropy(h, w, x, weights=weights, chunk=chunk)[0] for x in (t, other))
    assert torch.equal(first, second)
    (g,) = torch.autograd.grad(second, h)
    assert torch.equal(g[1, 2:], torch.zeros(3, 4, dtype=torch.float64))
    logits = torch.zeros(3, 3)
    logits[1, 0] = -torch.inf
    value, _ = cross_entropy(logits, torch.tensor([0, 0, -100]), weights=torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(value, torch.tensor(3.0).log())


def test_gradcheck():
    """Oracle: finite differences, and for the chunked form too."""
    h, w, t, weights = random_case((3,), V=5, D=2)
    h.requires_grad_(), w.requires_grad_()
    for chunk in (None, 2):
        assert torch.autograd.gradcheck(
            lambda a, b, chunk=chunk: linear_cross_entropy(
                a, b, t, weights=weights, softcap=2.0, z_loss=0.3, chunk=chunk
            )[0],
            (h, w),
        )


def test_extreme_logits():
    """Oracle: closed form. A confident right answer costs 0, a confident wrong one the gap."""
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert cross_entropy(logits, torch.tensor([0]))[0] == 0.0
    assert cross_entropy(logits, torch.tensor([2]))[0] == 2e4


def test_bf16_logits_are_summed_in_fp32():
    """Oracle: torch in float64 on the same bf16 logits; only fp32 rounding is left."""
    logits = (torch.randn(6, 5000) * 4).bfloat16()
    t = torch.randint(0, 5000, (6,))
    loss, _ = cross_entropy(logits, t, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits.double(), t, reduction="none"), rtol=1e-6, atol=0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.floats(0.1, 100))
def test_softcap_bounds(xs, c):
    """Law: |softcap(x)| <= c, and None is the identity."""
    x = torch.tensor(xs, dtype=torch.float64)
    assert bool((soft_cap(x, c).abs() <= c).all())
    assert soft_cap(x, None) is x


def test_chunks_hold_one_chunk_of_logits():
    """Oracle: the largest tensor saved for backward, and the largest that exists in the forward pass."""
    h, w, t, _ = random_case((64,), V=50, D=8)
    h.requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        linear_cross_entropy(h, w, t)
        assert max(sizes) == 64 * 50
        sizes.clear()
        linear_cross_entropy(h, w, t, chunk=16)
        assert max(sizes, default=0) < 16 * 50


def test_bad_arguments():
    h, w, t, _ = random_case()
    with pytest.raises(ValueError, match='reduction must be "none", "sum" or "mean", got'):
        cross_entropy(h, t.clamp(max=3), reduction="max")
    with pytest.raises(ValueError, match="denominator must be None"):
        linear_cross_entropy(h, w, t, reduction="mean", denominator=2.0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        linear_cross_entropy(h, w, t, chunk=0)


@pytest.mark.compile
def test_targets_that_are_no_index_are_never_a_plausible_loss():
    """Oracle: the eager functions, which raise. Compiled, in one graph, loss and gradients are NaN."""
    h, w, t, weights = random_case((4,), dtype=torch.float32)
    weights[0] = 0.0

    def both(h, w, t, weights):
        some = cross_entropy(h @ w.T, t, weights=weights, z_loss=0.1)[0]
        return some, linear_cross_entropy(h, w, t, denominator=3.0)[0]

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for bad in (-100, -1, 11):
        targets = torch.cat([t[:1], torch.tensor([bad]), t[2:]])
        with pytest.raises((RuntimeError, IndexError)):
            both(h, w, targets, None)
        leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
        for loss in compiled(*leaves, targets, None):
            assert bool(loss.isnan())
            grads = torch.autograd.grad(loss, leaves, retain_graph=True)
            assert bool(grads[0][1].isnan().all()) and bool(grads[1].isnan().all())
        right = both(h, w, t, weights)  # where the weight is 0 the target may be anything
        masked = torch.cat([torch.tensor([bad]), t[1:]])
        assert torch.equal(compiled(h, w, masked.where(weights != 0, t), weights)[0], compiled(h, w, t, weights)[0])
        torch.testing.assert_close(cross_entropy(h @ w.T, masked, weights=weights, z_loss=0.1)[0], right[0])


@pytest.mark.parametrize("denominator", [0.0, torch.tensor(0.0)])
def test_no_target_is_a_loss_of_0(denominator):
    """Oracle: the sum over nothing. Losses and all gradients are exactly 0, where 0 / 0 would be NaN."""
    h, w, t, _ = random_case()
    h.requires_grad_(), w.requires_grad_()
    none = torch.zeros(t.shape, dtype=h.dtype)
    for loss, nll in (
        cross_entropy(h @ w.T, t - 100, weights=none, denominator=denominator, z_loss=0.1),
        linear_cross_entropy(h, w, t - 100, weights=none, denominator=denominator, chunk=2),
    ):
        assert loss == 0.0 and nll == 0.0
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(loss, (h, w)))


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ignore_index_and_mean_equal_torch(reduction, chunk):
    """Oracle: torch.nn.functional.cross_entropy with the same two arguments, values and gradients, float64."""
    h, w, t, _ = random_case()
    t[0, 1:] = -100
    t[2, 2] = 3
    h.requires_grad_(), w.requires_grad_()
    logits = h @ w.T
    for ignore in (-100, 3):
        targets = torch.where(t == -100, 0, t) if ignore == 3 else t
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore, reduction=reduction)
        expected = expected.reshape(t.shape) if reduction == "none" else expected
        options = dict(ignore_index=ignore, reduction=reduction)
        found = [linear_cross_entropy(h, w, targets, chunk=chunk, **options), cross_entropy(logits, targets, **options)]
        g = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (h, w), g, retain_graph=True)
        for loss, nll in found:
            torch.testing.assert_close((loss, nll), (expected, expected.detach()))
            torch.testing.assert_close(torch.autograd.grad(loss, (h, w), g, retain_graph=True), wanted)
    mean = cross_entropy(logits, t.clamp(min=0), weights=t.clamp(min=0) * 0.5, reduction="mean")[0]
    whole = t.clamp(min=0) * 0.5  # the mean is that of the weights
    torch.testing.assert_close(mean, cross_entropy(logits, t.clamp(min=0), weights=whole, denominator=whole.sum())[0])


def test_the_mean_is_one_tensor_and_equals_torch():
    """Oracle: torch.nn.functional.cross_entropy with its defaults; over no token 0, where torch has NaN."""
    h, w, t, _ = random_case()
    logits = (h @ w.T).requires_grad_()
    t[1, :3] = -100
    loss, expected = mean_cross_entropy(logits, t), F.cross_entropy(logits.flatten(0, 1), t.flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))
    every = mean_cross_entropy(logits, t.clamp(min=0), ignore_index=None, softcap=2.0, z_loss=0.1)
    capped = 2.0 * torch.tanh(logits / 2.0)
    z = capped.logsumexp(-1).square().mean()
    torch.testing.assert_close(every, F.cross_entropy(capped.flatten(0, 1), t.clamp(min=0).flatten()) + 0.1 * z)
    nothing = mean_cross_entropy(logits, torch.full_like(t, -100))
    assert nothing == 0.0 and not torch.autograd.grad(nothing, logits)[0].any()
    assert mean_cross_entropy(logits.bfloat16(), t).dtype == torch.float32
