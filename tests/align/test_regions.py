"""Trust regions. Oracles: loops over tokens in numpy and derivatives by hand (policy_oracles.py); each other."""

from functools import partial

import numpy as np
import pytest
import torch

from purelm.align import aggregation, ratios, regions, regions_batch, regions_group, regions_sequence, regions_token
from tests.align.policy_cases import CASES, INF, LIKE_REINFORCE, NAN, batch, composed, poisoned

CLOSE = dict(rtol=1e-9, atol=1e-9)
every = pytest.mark.parametrize("name", CASES)


def gradient(f, *args):
    lp = args[0].clone().requires_grad_()
    value = f(lp, *args[1:])
    (g,) = torch.autograd.grad(value.sum(), lp)
    return value.detach(), g


def aggregated(name, aggregate, lp, lo, adv, mask):
    """Value and gradient of the aggregate of a case's loss."""
    return gradient(lambda *x: aggregate(composed(name)(*x, mask), mask), lp, lo, adv)


@every
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_value_and_derivative(name, seed, per_token):
    """Losses, and d(sum u l)/dlp for upstream factors u of any sign, at 1e-9 in float64."""
    data = batch(seed, per_token=per_token)
    u = torch.randn(data.lp.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss, g = gradient(lambda *x: composed(name)(*x) * u, *data)
    by_hand, derivative = CASES[name][2](*[x.numpy() for x in data])
    wanted = derivative(np.where(data.mask, u, 0.0))
    torch.testing.assert_close(loss, torch.from_numpy(by_hand) * u, **CLOSE)
    torch.testing.assert_close(g, torch.from_numpy(wanted), **CLOSE)
    assert loss.abs().sum() > 0


@every
def test_branches_are_taken(name):
    """Of the regions with bounds, tokens on both sides, so that the tests above see each branch."""
    ratio, region, _ = CASES[name]
    shares = []
    for seed in range(3):
        lp, lo, adv, mask = batch(seed)
        shares.append(region(lp, ratio(lp, lo, mask)[0], adv, mask)[1])
    for key in ("clipped_low", "clipped_high", "clipped_dual", "chosen", "off_policy"):
        found = [aux[key].item() for aux in shares if key in aux]
        unused = name in {"reinforce", "unclipped", "dro", "vespo", "real"} or (key, name) in {
            ("clipped_low", "cispo"), ("clipped_high", "topr"),
            ("clipped_low", "clip-cov, draws"),  # its bound is 1: w is above 0
            ("clipped_low", "kl-cov"), ("clipped_high", "kl-cov"),
        }  # fmt: skip
        assert not found or (max(found) == 0 if unused else 0 < max(found) < 1), (name, key, found)


@every
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_masked_has_no_influence(name, bad):
    """Exact: values, gradients and aux; bad values in all arguments at once, and a row masked as a whole."""
    lp, lo, adv, mask = batch(1, per_token=True)
    value, g = gradient(composed(name), lp, lo, adv, mask)
    worse = [poisoned(x, mask, bad) for x in (lp, lo, adv)]
    found, found_g = gradient(composed(name), *worse, mask)
    assert torch.equal(found, value) and torch.equal(found_g, g)
    assert not found[~mask].any() and not found_g[~mask].any()
    ratio, region, _ = CASES[name]
    aux = [region(a, ratio(a, b, mask)[0], c, mask)[1] for a, b, c in ((lp, lo, adv), worse)]
    assert aux[0].keys() == aux[1].keys() and all(torch.equal(aux[0][k], aux[1][k]) for k in aux[0])


@every
def test_only_the_policy_has_a_gradient(name):
    """Old log-probabilities and advantages get none: an update of a critic or sampler through the loss would be one."""
    lp, lo, adv, mask = batch(2)
    lo, adv = lo.requires_grad_(), adv.requires_grad_()
    loss = composed(name)(lp.requires_grad_(), lo, adv, mask).sum()
    assert torch.autograd.grad(loss, (lo, adv), allow_unused=True, retain_graph=True) == (None, None)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 50.0, -50.0, 300.0, -300.0])
def test_extreme_ratios_are_finite(name, dtype, shift):
    """log w of up to +-300, where exp overflows fp32, with advantages of both signs: value and gradient."""
    lp, lo, adv, mask = batch(3)
    lp, lo = (lp, lo - shift) if shift > 0 else (lp + shift, lo)
    loss, g = gradient(composed(name), lp.to(dtype), lo.to(dtype), adv.to(dtype), mask)
    assert loss.isfinite().all() and g.isfinite().all()
    assert loss.dtype == torch.float32 and g.dtype == dtype


@pytest.mark.parametrize("name", [name for name in CASES if name != "dro"])  # its loss is a square: see its formula
def test_without_the_ratio_s_clamp_too(name):
    """The regions' own guard: log_clamp=None and log w = 300, in fp32."""
    lp, lo, adv, mask = (x.float() if x.is_floating_point() else x for x in batch(3))
    ratio, region, _ = CASES[name]
    f = lambda lp: region(lp, ratio(lp, lo - 300.0, mask, log_clamp=None)[0], adv, mask)[0]  # noqa: E731
    loss, g = gradient(f, lp)
    assert loss.isfinite().all() and g.isfinite().all()


@every
def test_half_formats_are_computed_in_fp32(name):
    """Exact: bf16 arguments give what their fp32 copies give. A gradient is rounded on its way back to them, and dro's
    is the sum of two that are, through lp and through the ratio."""
    lp, lo, adv, mask = (x.bfloat16() if x.is_floating_point() else x for x in batch(4))
    value, g = gradient(composed(name), lp, lo, adv, mask)
    wide, wide_g = gradient(composed(name), lp.float(), lo.float(), adv.float(), mask)
    assert value.dtype == torch.float32 and torch.equal(value, wide)
    if name == "dro":
        torch.testing.assert_close(g.float(), wide_g, rtol=2**-7, atol=2**-7)
    else:
        assert torch.equal(g, wide_g.bfloat16())


@pytest.mark.parametrize("name", LIKE_REINFORCE)
def test_at_ratio_one_the_gradient_is_reinforce_s(name):
    """lo = lp, sequence_mean, one advantage a sequence; of kl-cov |log w| has slope 0 there."""
    lp, _, adv, mask = batch(5)
    found, wanted = (aggregated(key, aggregation.sequence_mean, lp, lp, adv, mask)[1] for key in (name, "reinforce"))
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("name", LIKE_REINFORCE)
def test_on_policy_ratio(name):
    """ratios.none is a ratio to the policy itself."""
    lp, _, adv, mask = batch(5)
    region = CASES[name][1]
    none = lambda lp: region(lp, ratios.none(lp, None, mask)[0], adv, mask)[0]  # noqa: E731
    token = lambda lp: region(lp, ratios.token(lp, lp.detach(), mask)[0], adv, mask)[0]  # noqa: E731
    (value, g), (wanted, wanted_g) = gradient(none, lp), gradient(token, lp)
    torch.testing.assert_close(value, wanted, **CLOSE)
    torch.testing.assert_close(g, wanted_g, **CLOSE)


def same(first, second, ratio=ratios.token, seed=6):
    data = batch(seed)
    results = []
    for region in (first, second):
        f = lambda lp, lo, adv, m, r=region: r(lp, ratio(lp, lo, m)[0], adv, m)[0]  # noqa: E731
        results.append(gradient(f, *data))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize(("high", "delta"), [(0.2, 1.21), (0.28, 2.0), (0.2, 4.0)])
def test_two_sided_is_dual_clip(high, delta):
    same(
        partial(regions.two_sided, high=high, delta=delta), partial(regions.dual_clip, high=high, c=delta)
    )


def test_without_bounds_it_is_the_plain_ratio():
    same(partial(regions.clip, low=INF, high=INF), regions.unclipped)
    same(partial(regions.dual_clip, low=INF, high=INF, c=INF), regions.unclipped)
    same(partial(regions_token.dppo_tv, low=1.0, high=1.0, cap=INF), partial(regions.cispo, cap=INF))
    same(partial(regions_token.probability_band, bound=1.0, cap=5.0), partial(regions.cispo, cap=5.0))
    same(partial(regions_sequence.off_policy_masked, delta=INF), regions.clip)
    same(partial(regions_sequence.fipo, least=1.0, most=1.0, safe_ratio=INF, c=3.0), partial(
        regions.dual_clip, high=0.28, c=3.0))  # fmt: skip


def test_a_sequence_of_one_token():
    """T = 1: geometric and arithmetic means are the token; gmpo is a clip in logs of one side."""
    lp, lo, adv, mask = (x[:, :1] for x in batch(7))
    mask = torch.ones_like(mask)
    pairs = [
        (regions.clip, ratios.sequence),
        (regions.clip, ratios.sequence_token),
        (regions.clip, ratios.sequence_product),
    ]
    value, g = gradient(composed("clip"), lp, lo, adv, mask)
    for region, ratio in pairs:
        f = lambda lp, r=region, q=ratio: r(lp, q(lp, lo, mask)[0], adv, mask)[0]  # noqa: E731
        found, found_g = gradient(f, lp)
        torch.testing.assert_close(found, value, **CLOSE)
        torch.testing.assert_close(found_g, g, **CLOSE)


def test_gspo_token_has_gspo_s_gradient():
    """One advantage a sequence and sequence_mean; with token_mean too, whose weights are constant in a row."""
    data = batch(8)
    for aggregate in (aggregation.sequence_mean, aggregation.token_mean):
        results = [aggregated(name, aggregate, *data) for name in ("gspo", "gspo-token")]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_gspo_by_the_paper_s_formula():
    """(1/B) sum_i min(s_i A_i, clip(s_i) A_i) with s_i of whole sequences: one number a row, no tokens."""
    lp, lo, adv, mask = batch(9)
    rows = [i for i in range(len(lp)) if mask[i].any()]
    total = 0.0
    for i in rows:
        s = np.exp((lp[i][mask[i]] - lo[i][mask[i]]).mean().item())
        total -= min(s * adv[i, 0].item(), np.clip(s, 1 - 0.1, 1 + 0.15) * adv[i, 0].item())
    found = aggregation.sequence_mean(composed("gspo")(lp, lo, adv, mask), mask)
    assert found.item() == pytest.approx(total / len(lp), abs=1e-12)


V, LENGTH = 3, 3
SEQUENCES = torch.cartesian_prod(*[torch.arange(V)] * LENGTH)  # all of them


def log_probs_of(theta):
    """Of each sequence (V^LENGTH, LENGTH), by a policy of a table of logits: one row for each previous token."""
    log_p = torch.log_softmax(theta, -1)  # (LENGTH, previous token, token)
    before = torch.cat([torch.zeros(len(SEQUENCES), 1, dtype=torch.long), SEQUENCES[:, :-1]], 1)
    return log_p[torch.arange(LENGTH), before, SEQUENCES]


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_policy_gradient_by_enumeration(off_policy):
    """All 27 sequences of a vocabulary of 3, each as often as its sampler gives it: the exact gradient of E[reward].

    Oracle: autograd of sum_y p(y) r(y). On-policy by reinforce, with a baseline too, and by clip; off-policy by the
    product of ratios, which has E[reward] as its value too.
    """
    draw = torch.Generator().manual_seed(1)
    theta, other = (torch.randn(LENGTH, V, V, generator=draw, dtype=torch.float64) for _ in range(2))
    reward = torch.randn(len(SEQUENCES), 1, generator=draw, dtype=torch.float64)
    theta.requires_grad_()
    lp, ones = log_probs_of(theta), torch.ones(SEQUENCES.shape)
    exact = (lp.sum(1).exp() * reward[:, 0]).sum()
    (wanted,) = torch.autograd.grad(exact, theta, retain_graph=True)
    lo = log_probs_of(other) if off_policy else lp.detach()
    often = lo.sum(1, keepdim=True).exp()
    if off_policy:
        log_w, _ = ratios.sequence_product(lp, lo, ones)
        loss, _ = regions.unclipped(lp, log_w, reward, ones)
        value = aggregation.sequence_mean(loss * often, ones, denominator=1)
        torch.testing.assert_close(-value, exact, **CLOSE)
        torch.testing.assert_close(-torch.autograd.grad(value, theta)[0], wanted, **CLOSE)
        return
    log_w, _ = ratios.token(lp, lo, ones)
    for region, baseline in ((regions.reinforce, 0.0), (regions.reinforce, 0.7), (regions.clip, 0.0)):
        loss, _ = region(lp, log_w, reward - baseline, ones)
        value = aggregation.sequence_sum(loss * often, ones, denominator=1)
        (g,) = torch.autograd.grad(value, theta, retain_graph=True)
        torch.testing.assert_close(-g, wanted, **CLOSE)


@every
def test_a_flat_group_has_no_gradient(name):
    """Advantages of 0: no loss depends on the policy, but for terms that are no policy gradient."""
    lp, lo, adv, mask = batch(10)
    _, g = gradient(composed(name), lp, lo, torch.zeros_like(adv), mask)
    expected = {"dro", "kl-cov"}  # the pull to the old policy has no advantage in it
    assert g.any() == (name in expected)


@every
def test_one_advantage_a_sequence_and_padding(name):
    """(B, 1) is (B, T) of equal ones, one number is all; more padding changes nothing: exact."""
    lp, lo, adv, mask = batch(11)
    f = composed(name)
    value = f(lp, lo, adv, mask)
    assert torch.equal(f(lp, lo, adv[:, :1], mask), value)
    assert torch.equal(f(lp, lo, torch.tensor(0.5).double(), mask), f(lp, lo, torch.full_like(adv, 0.5), mask))
    assert torch.equal(f(lp, lo, adv, mask.long()), value)


@pytest.mark.parametrize("name", [n for n in CASES if n not in {"80/20", "clip-cov, draws"}])
def test_padding_and_order_of_rows(name):
    """Two more positions, and the rows backwards. To rounding: sums are of other lengths."""
    lp, lo, adv, mask = batch(11)
    f = composed(name)
    value = f(lp, lo, adv, mask)
    pad = lambda x, fill: torch.nn.functional.pad(x, (0, 2), value=fill)  # noqa: E731
    wider = f(pad(lp, NAN), pad(lo, NAN), pad(adv, NAN), pad(mask, False))
    torch.testing.assert_close(wider[:, :-2], value, **CLOSE)
    torch.testing.assert_close(f(*(x.flip(0) for x in (lp, lo, adv, mask))), value.flip(0), **CLOSE)


def test_aux():
    """Shares and mean by hand: w = 0.5, 1.5, 1, 4; one token masked."""
    log_ratio = torch.tensor([[0.5, 1.5, 1.0, 4.0, NAN]]).log()
    lp, mask = torch.full((1, 5), -1.0), torch.tensor([[1, 1, 1, 1, 0]])
    for sign, low, high, dual in ((1.0, 0.0, 0.5, 0.0), (-1.0, 0.25, 0.0, 0.25)):
        adv = torch.full((1, 1), sign)
        _, aux = regions.clip(lp, log_ratio, adv, mask)
        assert (aux["clipped_low"], aux["clipped_high"], aux["ratio_mean"]) == (low, high, 1.75)
        _, aux = regions.dual_clip(lp, log_ratio, adv, mask)
        assert (aux["clipped_low"], aux["clipped_high"], aux["clipped_dual"]) == (low, high + dual, dual)
        _, aux = regions.cispo(lp, log_ratio, adv, mask, cap=1.2, floor=0.8)
        assert (aux["clipped_low"], aux["clipped_high"]) == (0.25, 0.5)
        assert all(x.ndim == 0 and not x.requires_grad for x in aux.values())
    empty = regions.clip(lp, log_ratio, adv, torch.zeros(1, 5))[1]
    assert all(x == 0 for x in empty.values())


def test_covariance_choices_are_exact_in_number():
    """floor(fraction N), at least one, of equal covariances too."""
    lp, adv, ones = torch.full((4, 5), -1.0), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.ones(4, 5)
    for fraction, n in ((1e-4, 1), (0.2, 4), (0.249, 4), (0.25, 5), (1.0, 20)):
        _, aux = regions_batch.kl_cov(lp, torch.zeros(4, 5), adv, ones, fraction=fraction)
        assert aux["chosen"].item() * 20 == pytest.approx(n)


def test_real_by_hand():
    """A group of one right and one wrong row, and one of equal labels: log 2 + log 2 at w = 1, and 0."""
    real = partial(regions_group.real, group_size=2, tau=0.5)
    lp, adv = torch.full((4, 3), -1.0, dtype=torch.float64), torch.tensor([[1.0], [-1.0], [1.0], [1.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1]])
    loss, g = gradient(lambda lp: aggregation.sequence_mean(real(lp, lp - lp.detach(), adv, mask)[0], mask), lp)
    assert float(loss) == pytest.approx(np.log(2))  # the mean of 2 log 2 and 0
    # (1/P) (1/T) (1/tau) / 2, down for the wrong row
    by_hand = [3 * [-1 / 6], [0.5, 0, 0], 3 * [0.0], 3 * [0.0]]
    torch.testing.assert_close(g, torch.tensor(by_hand, dtype=torch.float64), **CLOSE)


def test_real_bounds_the_gradient_and_ignores_rows_without_tokens():
    """log w = 15 of a wrong answer: at most 1/tau a group, where clip has e^15. A row cut off leaves its group."""
    real = partial(regions_group.real, group_size=3, tau=0.5)
    adv, mask = torch.tensor([[1.0], [-1.0], [-1.0]]), torch.ones(3, 1)
    log_w = torch.tensor([[0.0], [15.0], [0.0]], dtype=torch.float64)
    total = lambda x, m: aggregation.sequence_mean(real(x, x, adv, m)[0], m)  # noqa: E731
    _, g = gradient(lambda x: total(x, mask), log_w)
    assert g.abs().max() == pytest.approx(1 / 0.5) and (g[:, 0] * adv[:, 0] <= 0).all()
    without = torch.tensor([[1.0], [1.0], [0.0]])
    pair = partial(regions_group.real, group_size=2, tau=0.5)
    wanted = aggregation.sequence_mean(pair(log_w[:2], log_w[:2], adv[:2], mask[:2])[0], mask[:2])
    torch.testing.assert_close(total(log_w, without), wanted, **CLOSE)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: regions.clip(ONES, ONES, torch.ones(3), ONES), r"advantages must have the shape \(2, 1\).*got \(3,\)"),
        (lambda: regions.clip(ONES, ONES, torch.ones(1, 2), ONES), r"advantages .* got \(1, 2\)"),
        (lambda: regions.clip(ONES, ONES[:1], ONES, ONES), r"log_ratio must have .* \(2, 3\), got \(1, 3\)"),
        (lambda: regions.clip(ONES.long(), ONES, ONES, ONES), "log_probs must be floating, got torch.int64"),
        (lambda: regions.reinforce(ONES[0], None, ONES, ONES), "log_probs must have the mask's shape"),
        (lambda: regions.clip(ONES, ONES, ONES, ONES, low=-0.1), "low and high must be at least 0, got -0.1 and 0.2"),
        (lambda: regions.clip(ONES, ONES, ONES, ONES, high=NAN), "low and high must be at least 0"),
        (lambda: regions.dual_clip(ONES, ONES, ONES, ONES, c=1.0), "c must be above 1, got 1.0"),
        (lambda: regions.two_sided(ONES, ONES, ONES, ONES, delta=1.1), "delta must be above 1 [+] high = 1.2, got 1.1"),
        (lambda: regions.cispo(ONES, ONES, ONES, ONES, cap=0.5, floor=0.6), "0 <= floor < cap, got 0.6 and 0.5"),
        (lambda: regions_token.sapo(ONES, ONES, ONES, ONES, tau_negative=0), "tau_positive and tau_negative must be"),
        (lambda: regions_token.dro(ONES, ONES, ONES, ONES, beta=0.0), "beta must be above 0 and finite, got 0.0"),
        (lambda: regions_token.dppo_tv(ONES, ONES, ONES, ONES, high=-1), "low and high must be at least 0"),
        (lambda: regions_token.dppo_kl(ONES, ONES, ONES, ONES, low=-1), "low and high must be at least 0"),
        (lambda: regions_token.dppo_tv(ONES, ONES, ONES, ONES, cap=0), "cap must be above 0, got 0"),
        (lambda: regions_token.probability_band(ONES, ONES, ONES, ONES, bound=-1), "bound must be at least 0, got -1"),
        (lambda: regions_sequence.gmpo(ONES, ONES, ONES, ONES, low=-1), "low and high must be at least 0"),
        (lambda: regions_sequence.vespo(ONES, ONES, ONES, ONES, k_negative=0), "k_negative must be above 0 and finite"),
        (lambda: regions_sequence.fipo(ONES, ONES, ONES, ONES, half_life=0), "half_life must be above 0, got 0"),
        (lambda: regions_sequence.fipo(ONES, ONES, ONES, ONES, least=2.0), "0 < least <= most .* got 2.0, 1.2"),
        (lambda: regions_group.real(ONES, ONES, ONES, ONES, group_size=3), "group_size must divide .* 2, got 3"),
        (lambda: regions_group.real(ONES, ONES, ONES, ONES, group_size=2, tau=0), "tau must be above 0 and finite"),
        (lambda: regions_batch.kl_cov(ONES, ONES, ONES, ONES, fraction=0), "fraction must be above 0 and at most 1"),
        (lambda: regions_batch.high_entropy(ONES, ONES, ONES, ONES, entropy_BT=ONES[0]), "entropy must have"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
