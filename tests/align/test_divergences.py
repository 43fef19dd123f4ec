"""Estimates of KL. Oracles: formulas one number at a time, derivatives by hand, KL by enumeration of a vocabulary."""

import math

import numpy as np
import pytest
import torch

from purelm.align import divergences as dv
from tests.align.policy_cases import INF, NAN, batch, poisoned

CLOSE = dict(rtol=1e-9, atol=1e-9)
ALL = [getattr(dv, name) for name in dv.__all__]
every = pytest.mark.parametrize("estimate", ALL)

# d -> (value, derivative by lp), on-policy
BY_HAND = {
    dv.k1: lambda d: (d, 1.0),
    dv.k2: lambda d: (d * d / 2, d),
    dv.k3: lambda d: (math.exp(-d) + d - 1, 1 - math.exp(-d)),
    dv.absolute: lambda d: (abs(d), math.copysign(1, d)),
    dv.straight_through: lambda d: (math.exp(-d) + d - 1, d),
    dv.importance: lambda d: (d, d + 1),
    dv.unbiased_k3: lambda d: (math.exp(-d) + d - 1, d),
}


@every
def test_value_and_derivative(estimate):
    lp, lr, _, mask = batch(1)
    value, slope = np.zeros(lp.shape), np.zeros(lp.shape)
    for i, t in mask.nonzero().tolist():
        value[i, t], slope[i, t] = BY_HAND[estimate]((lp[i, t] - lr[i, t]).item())
    lp = poisoned(lp, mask).requires_grad_()
    found = estimate(lp, poisoned(lr, mask, INF), mask)
    torch.testing.assert_close(found, torch.from_numpy(value), **CLOSE)
    (g,) = torch.autograd.grad(found.sum(), lp)
    torch.testing.assert_close(g, torch.from_numpy(slope), **CLOSE)


@pytest.mark.parametrize("estimate", [dv.importance, dv.unbiased_k3])
def test_weighted(estimate):
    """w times the estimate, w = exp(lp - lo): value, and slope w (k + k')."""
    lp, lr, _, mask = batch(1)
    lo = batch(2).lo
    plain = {dv.importance: dv.k1, dv.unbiased_k3: dv.k3}[estimate]
    value, slope = np.zeros(lp.shape), np.zeros(lp.shape)
    for i, t in mask.nonzero().tolist():
        k, dk = BY_HAND[plain]((lp[i, t] - lr[i, t]).item())
        w = math.exp(lp[i, t] - lo[i, t])
        value[i, t], slope[i, t] = w * k, w * (k + dk)
    lp.requires_grad_(), lo.requires_grad_()
    found = estimate(lp, lr, mask, old_log_probs_BT=lo)
    torch.testing.assert_close(found, torch.from_numpy(value), **CLOSE)
    g, none = torch.autograd.grad(found.sum(), (lp, lo), allow_unused=True)
    torch.testing.assert_close(g, torch.from_numpy(slope), **CLOSE)
    assert none is None


def expected(estimate, theta, ref, old=None):
    """sum_v p_v estimate(v) over the sampler's p, and the sampled gradient, sum_v p_v d estimate(v)/d theta."""
    lp, lr = torch.log_softmax(theta, 0)[:, None], torch.log_softmax(ref, 0)[:, None]
    options = {} if old is None else {"old_log_probs_BT": torch.log_softmax(old, 0)[:, None]}
    p = (lp if old is None else options["old_log_probs_BT"]).detach().exp()
    value = (p * estimate(lp, lr, torch.ones_like(lp), **options)).sum()
    return value.item(), torch.autograd.grad(value, theta)[0]


def test_expectations_by_enumeration():
    """A vocabulary of 7: which are KL on average, and which have its gradient as a loss. The table of the module."""
    draw = torch.Generator().manual_seed(0)
    theta, ref, old = (torch.randn(7, generator=draw, dtype=torch.float64) for _ in range(3))
    theta.requires_grad_()
    log_p, log_r = torch.log_softmax(theta, 0), torch.log_softmax(ref, 0)
    kl = (log_p.exp() * (log_p - log_r)).sum()
    other = (log_r.exp() * (log_r - log_p)).sum()
    (g,), (g_other,) = torch.autograd.grad(kl, theta, retain_graph=True), torch.autograd.grad(other, theta)
    for estimate in ALL:
        value, slope = expected(estimate, theta, ref)
        name = estimate.__name__
        right = {"k1", "k3", "straight_through", "importance", "unbiased_k3"}
        assert (abs(value - kl.item()) < 1e-12) == (name in right), name
        near = torch.allclose(slope, g, atol=1e-12)
        assert near == (name in {"k2", "straight_through", "importance", "unbiased_k3"}), name
    assert expected(dv.k1, theta, ref)[1].abs().max() < 1e-12
    torch.testing.assert_close(expected(dv.k3, theta, ref)[1], g_other, **CLOSE)
    for estimate in (dv.importance, dv.unbiased_k3):  # sampled from another policy, the weight makes up for it
        value, slope = expected(estimate, theta, ref, old)
        assert value == pytest.approx(kl.item(), abs=1e-12)
        torch.testing.assert_close(slope, g, **CLOSE)


def test_k3_is_not_negative_and_keeps_small_differences():
    """At d = 1e-3 in fp32, where exp(-d) - 1 + d is 10 % off: d^2/2 - d^3/6 to 1e-3 of it."""
    ones = torch.ones(1, 2001)
    d = torch.linspace(-30, 30, 2001)[None]
    assert (dv.k3(d, torch.zeros_like(d), ones) >= 0).all()
    small = torch.tensor([[1e-3]])
    wanted = 1e-3**2 / 2 - 1e-3**3 / 6
    assert dv.k3(small, 0 * small, ones[:, :1]).item() == pytest.approx(wanted, rel=1e-3)


@every
@pytest.mark.parametrize("shift", [-400.0, 400.0])
def test_extreme_differences_are_finite(estimate, shift):
    lp, lr, _, mask = (x.float() if x.is_floating_point() else x for x in batch(3))
    lp.requires_grad_()
    value = estimate(lp, lr + shift, mask)
    (g,) = torch.autograd.grad(value.sum(), lp)
    assert value.isfinite().all() and g.isfinite().all()


@every
def test_bf16_no_tokens_and_no_gradient_to_the_reference(estimate):
    lp, lr, _, mask = batch(4)
    value = estimate(lp.bfloat16(), lr.bfloat16(), mask)
    assert value.dtype == torch.float32
    assert torch.equal(value, estimate(lp.bfloat16().float(), lr.bfloat16().float(), mask))
    assert not estimate(torch.full_like(lp, NAN), lr, torch.zeros_like(mask)).any()
    value = estimate(lp.requires_grad_(), lr.requires_grad_(), mask).sum()
    assert torch.autograd.grad(value, lr, allow_unused=True) == (None,)


@pytest.mark.parametrize("clamp", [1.0, None])
def test_clamp(clamp):
    lp, ones = torch.tensor([[-9.0, -2.0, -0.5]]).double(), torch.ones(1, 3)
    found = dv.k1(lp, torch.full_like(lp, -1.0), ones, log_clamp=clamp)
    assert found.tolist() == [[-1.0, -1.0, 0.5] if clamp else [-8.0, -1.0, 0.5]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dv.k1(x, x[0], x), r"ref_log_probs must have .* \(2, 3\), got \(3,\)"),
        (lambda x: dv.k3(x, x, x, log_clamp=-1), "log_clamp must be above 0, or None for no clamp, got -1"),
        (lambda x: dv.unbiased_k3(x, x, x, old_log_probs_BT=x[0]), "old_log_probs must have the mask's shape"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3))
