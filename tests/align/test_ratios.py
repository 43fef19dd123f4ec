"""Log importance ratios. Oracles: loops in numpy, derivatives by hand, each other."""

import numpy as np
import pytest
import torch

from purelm.align import aggregation, ratios
from tests.align.policy_cases import INF, NAN, batch, poisoned

CLOSE = dict(rtol=1e-9, atol=1e-9)
RATIOS = [getattr(ratios, name) for name in ratios.__all__ if name != "Ratio"]
every = pytest.mark.parametrize("ratio", RATIOS)


def by_hand(ratio, lp, lo, mask):
    """log w, and the matrix d log w_it / d lp_is of each row i, one token at a time."""
    value, slope = np.zeros(lp.shape), np.zeros((*lp.shape, lp.shape[1]))
    for i in range(lp.shape[0]):
        ts = [t for t in range(lp.shape[1]) if mask[i, t]]
        total = sum(lp[i, t] - lo[i, t] for t in ts)
        for t in ts:
            for s in ts:
                slope[i, t, s] = {
                    "token": float(s == t),
                    "none": float(s == t),
                    "sequence_token": float(s == t),
                    "sequence": 1 / len(ts),
                    "sequence_product": 1.0,
                }[ratio.__name__]
            value[i, t] = {
                "token": lp[i, t] - lo[i, t],
                "none": 0.0,
                "sequence_token": total / len(ts),
                "sequence": total / len(ts),
                "sequence_product": total,
            }[ratio.__name__]
    return value, slope


@every
def test_value_and_derivative(ratio):
    """All of the Jacobian, at 1e-9 in float64; what is masked is nan, and a row is masked as a whole."""
    lp, lo, _, mask = batch(1)
    value, slope = by_hand(ratio, *(x.numpy() for x in (lp, lo, mask)))
    lp, lo = poisoned(lp, mask), poisoned(lo, mask)
    f = lambda lp: ratio(lp, lo, mask)[0]  # noqa: E731
    torch.testing.assert_close(f(lp), torch.from_numpy(value), **CLOSE)
    jacobian = torch.autograd.functional.jacobian(f, lp)
    own = torch.stack([jacobian[i, :, i] for i in range(len(lp))])
    torch.testing.assert_close(own, torch.from_numpy(slope), **CLOSE)
    assert jacobian.sum().item() == pytest.approx(slope.sum())  # no row depends on another


@every
def test_only_the_policy_has_a_gradient(ratio):
    lp, lo, _, mask = batch(2)
    value, aux = ratio(lp.requires_grad_(), lo.requires_grad_(), mask)
    assert torch.autograd.grad(value.sum(), lo, allow_unused=True) == (None,)
    assert not any(x.requires_grad for x in aux.values())


@pytest.mark.parametrize("ratio", [r for r in RATIOS if r is not ratios.none])
@pytest.mark.parametrize("clamp", [0.3, 20.0, None])
def test_clamp(ratio, clamp):
    """At +-clamp, where the gradient is 0; aux shows what was before it."""
    lp, lo, _, mask = batch(3)
    free, _ = ratio(lp, lo, mask, log_clamp=None)
    bound = INF if clamp is None else clamp
    lp.requires_grad_()
    value, aux = ratio(lp, lo, mask, log_clamp=clamp)
    torch.testing.assert_close(value, free.clamp(-bound, bound), **CLOSE)
    beyond = free.abs() > bound
    assert aux["clamped"].item() == pytest.approx((beyond & mask).sum().item() / mask.sum().item())
    torch.testing.assert_close(aux["ratio_mean"], free[mask].exp().mean(), **CLOSE)
    assert aux["log_ratio_largest"] == free.abs().max()
    if ratio is not ratios.sequence_token:  # whose clamp is of the value alone
        (g,) = torch.autograd.grad(value.sum(), lp)
        assert not g[beyond].any() and g[mask & ~beyond].all()


def test_product_and_mean_of_a_row():
    """log W = T_i log s; of a product, sequence_mean counts each row once."""
    lp, lo, _, mask = batch(4)
    mean, product = ratios.sequence(lp, lo, mask)[0], ratios.sequence_product(lp, lo, mask)[0]
    torch.testing.assert_close(mean * mask.sum(1, keepdim=True), product, **CLOSE)
    rows = [((lp - lo)[i][mask[i]].sum().exp() if mask[i].any() else torch.zeros(()).double()) for i in range(len(lp))]
    found = aggregation.sequence_mean(product.exp() * mask, mask)
    torch.testing.assert_close(found, torch.stack(rows).mean(), **CLOSE)


def test_small_differences_in_fp32():
    """A long row's mean ratio of 1e-5: sums of 4,096 in fp32, 1e-6 of the value."""
    g = torch.Generator().manual_seed(0)
    lo = -torch.rand(1, 4096, generator=g) * 5
    lp = lo + 1e-5 * torch.randn(1, 4096, generator=g)
    exact = (lp.double() - lo.double()).mean()
    found = ratios.sequence(lp, lo, torch.ones(1, 4096))[0][0, 0]
    assert abs(found.double() - exact) < 1e-6 * (lp - lo).abs().mean()


@every
def test_bf16_and_no_tokens(ratio):
    lp, lo, _, mask = batch(5)
    value, _ = ratio(lp.bfloat16(), lo.bfloat16(), mask)
    wide, _ = ratio(lp.bfloat16().float(), lo.bfloat16().float(), mask)
    assert value.dtype == torch.float32 and torch.equal(value, wide)
    nothing, aux = ratio(torch.full_like(lp, NAN), lo, torch.zeros_like(mask))
    assert not nothing.any() and all(x == 0 for x in aux.values())
    assert ratio(lp[:, :0], lo[:, :0], mask[:, :0])[0].shape == (len(lp), 0)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ratios.token(ONES, None, ONES), "needs old_log_probs, got None.*ratios.none"),
        (lambda: ratios.sequence(ONES, ONES[0], ONES), r"old_log_probs must have .* \(2, 3\), got \(3,\)"),
        (lambda: ratios.none(ONES[0], None, ONES), "log_probs must have the mask's shape"),
        (lambda: ratios.token(ONES.int(), ONES, ONES), "log_probs must be floating, got torch.int32"),
        (lambda: ratios.token(ONES, ONES, ONES, log_clamp=0.0), "log_clamp must be above 0, or None .* got 0.0"),
        (lambda: ratios.none(ONES[0, 0], None, ONES[0, 0]), "the mask must have an axis of tokens"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
