"""Weights against the sampler's gap. Oracles: loops in numpy, one token at a time; sums over a vocabulary."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from purelm.align import weights as wt
from purelm.align.aggregation import token_mean
from tests.align.policy_cases import INF, NAN, batch, poisoned

CLOSE = dict(rtol=1e-9, atol=1e-9)
ADV = batch(1).adv


def whole(z):
    return math.exp(sum(z))


def average(z):
    return math.exp(sum(z) / len(z))


# name -> (weight, rule(log rho of the token, those of its row, its advantage) -> weight)
CASES = {
    "none": (wt.none, lambda x, z, a: 1.0),
    "truncated": (wt.truncated, lambda x, z, a: min(math.exp(x), 2.0)),
    "clamped": (wt.clamped, lambda x, z, a: max(0.5, min(math.exp(x), 2.0))),
    "masked": (partial(wt.masked, high=2.0), lambda x, z, a: math.exp(x) if 0.5 <= math.exp(x) <= 2.0 else 0.0),
    "sequence_truncated": (wt.sequence_truncated, lambda x, z, a: min(whole(z), 2.0)),
    "sequence_masked": (
        partial(wt.sequence_masked, low=0.3), lambda x, z, a: whole(z) if 0.3 <= whole(z) <= 3.0 else 0.0
    ),
    "geometric": (partial(wt.geometric, low=0.9, high=1.1), lambda x, z, a: max(0.9, min(1.1, average(z)))),
    "geometric_masked": (
        partial(wt.geometric_masked, low=0.9, high=1.2), lambda x, z, a: float(0.9 <= average(z) <= 1.2)
    ),
    "veto": (partial(wt.veto, least=0.5), lambda x, z, a: float(min(z) >= math.log(0.5))),
    "off_policy": (
        partial(wt.off_policy_sequence_mask, advantages=ADV, delta=0.05),
        lambda x, z, a: float(not (a < 0 and -sum(z) / len(z) > 0.05)),
    ),
    "product": (
        partial(wt.product, of=(wt.truncated, partial(wt.veto, least=0.5))),
        lambda x, z, a: min(math.exp(x), 2.0) * (min(z) >= math.log(0.5)),
    ),
}  # fmt: skip
every = pytest.mark.parametrize("name", CASES)


def by_loops(rule, lo, ls, mask):
    found = np.zeros(lo.shape)
    for i in range(lo.shape[0]):
        z = [lo[i, t] - ls[i, t] for t in range(lo.shape[1]) if mask[i, t]]
        for t in range(lo.shape[1]):
            if mask[i, t]:
                found[i, t] = rule(lo[i, t] - ls[i, t], z, ADV[i, t].item())
    return found


@every
@pytest.mark.parametrize("seed", range(4))
def test_by_loops(name, seed):
    """And the shares of aux; nan and inf where masked."""
    lo, ls, _, mask = batch(seed, spread=0.5)
    weight, rule = CASES[name]
    wanted = by_loops(rule, *(x.numpy() for x in (lo, ls, mask)))
    found, aux = weight(poisoned(lo, mask), poisoned(ls, mask, INF), mask)
    torch.testing.assert_close(found, torch.from_numpy(wanted), **CLOSE)
    n = mask.sum().item()
    assert aux["rejected"].item() == pytest.approx((wanted[mask] == 0).sum() / n)
    gap = (lo - ls)[mask].abs()
    assert aux["sampler_gap"].item() == pytest.approx(gap.mean().item())
    assert aux["sampler_gap_largest"].item() == gap.max().item()
    assert aux["sampler_ratio_mean"].item() == pytest.approx((lo - ls)[mask].exp().mean().item())


@every
def test_both_sides_of_each_bound_are_seen(name):
    """Over the seeds above some tokens are rejected or bounded, and some are not."""
    rejected, bounded = [], []
    for seed in range(4):
        lo, ls, _, mask = batch(seed, spread=0.5)
        _, aux = CASES[name][0](lo, ls, mask)
        rejected.append(aux["rejected"].item())
        bounded.append(aux["bounded"].item())
    if name != "none":
        assert 0 < max(rejected + bounded) and min(rejected) < 1


@every
def test_equal_policies(name):
    """ls = lo: all weights are 1."""
    lo, _, _, mask = batch(1)
    found, aux = CASES[name][0](lo, lo, mask)
    assert torch.equal(found, mask.double()) and aux["sampler_gap"] == 0 and aux["rejected"] == 0


def test_bounds_wide_open():
    """cap = inf is rho itself, whose mean over the sampler's tokens is 1: by enumeration of a vocabulary of 5."""
    lo, ls = (torch.log_softmax(torch.tensor(x).double(), 0)[None] for x in ([1.0, 2, 0, -1, 3], [0.5, 2, 1, 0, 1]))
    ones = torch.ones(1, 5)
    for weight in (partial(wt.truncated, cap=INF), partial(wt.masked, low=0.0, high=INF)):
        rho, _ = weight(lo, ls, ones)
        torch.testing.assert_close(rho, (lo - ls).exp(), **CLOSE)
        assert (rho * ls.exp()).sum().item() == pytest.approx(1.0)


def test_batch_normalized():
    """Mean 1 over unmasked tokens, rejected ones included; parts with the whole's mean are the whole's rows."""
    lo, ls, _, mask = batch(2, spread=0.5)
    for weight in (wt.truncated, wt.masked):
        plain, _ = weight(lo, ls, mask)
        found, aux = wt.batch_normalized(lo, ls, mask, weight=weight)
        torch.testing.assert_close(found[mask].mean(), torch.ones(()).double(), **CLOSE)
        torch.testing.assert_close(found, plain / plain[mask].mean(), **CLOSE)
        halves = [
            wt.batch_normalized(lo[s], ls[s], mask[s], weight=weight, mean_weight=aux["weight_mean"])[0]
            for s in (slice(0, 2), slice(2, None))
        ]
        torch.testing.assert_close(torch.cat(halves), found, **CLOSE)
    nothing, _ = wt.batch_normalized(lo + 50, ls, mask, weight=wt.masked)
    assert not nothing.any()


def test_rejected_tokens_and_the_denominator():
    """The two choices of the module's docstring: 4 tokens, one rejected."""
    lo, ls, mask = torch.tensor([[1.0, 1.0, 1.0, 9.0]]).log(), torch.zeros(1, 4), torch.ones(1, 4)
    w, aux = wt.masked(lo, ls, mask)
    assert aux["rejected"] == 0.25
    loss = torch.ones(1, 4) * w
    assert token_mean(loss, mask) == 0.75 and token_mean(loss, mask * (w != 0)) == 1.0


def test_spread_of_a_sequence_grows_with_length():
    """0.012 a token is e^1.2 after 100 tokens; the geometric mean stays at e^0.012."""
    lo, ls, ones = torch.full((1, 100), -1.0), torch.full((1, 100), -1.012), torch.ones(1, 100)
    assert wt.sequence_truncated(lo, ls, ones, cap=10.0)[0][0, 0].item() == pytest.approx(math.exp(1.2), rel=1e-4)
    assert wt.geometric(lo, ls, ones)[0][0, 0].item() == pytest.approx(math.exp(0.012), rel=1e-5)
    assert wt.geometric_masked(lo, ls, ones)[1]["rejected"] == 1


@every
@pytest.mark.parametrize("shift", [-500.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gaps_are_finite(name, shift, dtype):
    lo, ls, _, mask = batch(3)
    found, aux = CASES[name][0]((lo + shift).to(dtype), ls.to(dtype), mask)
    assert found.isfinite().all() and found.dtype == torch.float32 and all(x.isfinite() for x in aux.values())


@every
def test_nothing_chosen(name):
    lo, _, _, mask = batch(3)
    found, aux = CASES[name][0](torch.full_like(lo, NAN), lo, torch.zeros_like(mask))
    assert not found.any() and all(x == 0 for x in aux.values())


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wt.truncated(ONES, None, ONES), "sampler_log_probs is None"),
        (lambda: wt.none(None, ONES, ONES), "old_log_probs is None"),
        (lambda: wt.none(ONES, ONES[:1], ONES), r"sampler_log_probs must have .* got \(1, 3\)"),
        (lambda: wt.truncated(ONES, ONES, ONES, cap=0.0), "0 <= low < high, got 0.0 and 0.0"),
        (lambda: wt.clamped(ONES, ONES, ONES, low=3.0), "0 <= low < high, got 3.0 and 2.0"),
        (lambda: wt.masked(ONES, ONES, ONES, low=-1.0), "0 <= low < high, got -1.0"),
        (lambda: wt.product(ONES, ONES, ONES, of=()), "product needs one weight at least"),
        (lambda: wt.batch_normalized(ONES, ONES, ONES, mean_weight=0.0), "mean_weight must be above 0 and finite"),
        (lambda: wt.off_policy_sequence_mask(ONES, ONES, ONES, advantages=torch.ones(2)), r"advantages .* got \(2,\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
