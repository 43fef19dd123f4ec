"""Advantages of groups. Oracles: loops over numpy float64, written out from the formulas; identities between them."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.align import advantages as adv
from purelm.align import baselines as base
from purelm.align.groups import grouped, row_groups, ungrouped
from purelm.testing import check_op, without
from purelm.testing.operations import OP_LAWS

F64 = torch.float64
TOL = {"rtol": 1e-9, "atol": 1e-9}


def rewards(p=5, g=4, seed=0, low=0.0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(low, 2.0, (p, g)))


def by_group(f):
    """A function of one group's list, over all groups."""
    return lambda r: np.array([f([float(x) for x in row]) for row in r.numpy()])


def mean(x):
    return sum(x) / len(x)


def std(x, ddof):
    return (sum((y - mean(x)) ** 2 for y in x) / (len(x) - ddof)) ** 0.5


LENGTHS = torch.tensor(np.random.default_rng(9).integers(1, 30, (5, 4)))
GREEDY = torch.linspace(0, 1, 5, dtype=F64)
LOG_P = -torch.from_numpy(np.random.default_rng(8).uniform(0.1, 2.0, (5, 4)))


def opo_loop(r):
    out = []
    for row, T in zip(r.numpy(), LENGTHS.numpy(), strict=True):
        b = sum(t * x for t, x in zip(T, row, strict=True)) / sum(T)
        out.append([x - b for x in row])
    return np.array(out)


def batch_loop(r):
    every = [float(x) for x in r.reshape(-1)]
    return np.array([[(x - mean(row)) / (std(every, 1) + 1e-6) for x in row] for row in r.tolist()])


def gpg_loop(r):
    n = r.numel() / sum(float(x) != 0 for x in r.reshape(-1))
    return np.array([[n * (x - mean(row)) / 2.0 for x in row] for row in r.tolist()])


def best_loop(row):
    first, second = sorted(row, reverse=True)[:2]
    return [first - second if i == row.index(first) else 0.0 for i in range(len(row))]


def codapo_loop(r):
    out = []
    for row, lp in zip(r.tolist(), LOG_P.tolist(), strict=True):
        c, d = np.exp(mean(lp)), mean([float(x <= 0.5) for x in row])
        v = c * (1 - 4 * (d - 0.5) ** 2)
        out.append([(v + 0.1) * (x - mean(row)) / (std(row, 1) + 1e-6) for x in row])
    return np.array(out)


def soft_loop(r):
    out = []
    for row, other in zip(r.tolist(), LOG_P.tolist(), strict=True):
        v = 0.5 * np.log(mean([np.exp(x / 0.5) for x in other]))
        out.append([x - v for x in row])
    return np.array(out)


CASES = {
    "raw": (adv.raw, lambda r: r.numpy()),
    "positive_only": (adv.positive_only, by_group(lambda x: [float(y >= 1) for y in x])),
    "centered": (adv.centered, by_group(lambda x: [y - mean(x) for y in x])),
    "group_normalized": (
        adv.group_normalized,
        by_group(lambda x: [(y - mean(x)) / (std(x, 1) + 1e-6) for y in x]),
    ),
    "biased": (
        partial(adv.group_normalized, ddof=0, eps=1e-4),
        by_group(lambda x: [(y - mean(x)) / (std(x, 0) + 1e-4) for y in x]),
    ),
    "leave_one_out": (
        adv.leave_one_out,
        by_group(lambda x: [y - mean(x[:i] + x[i + 1 :]) for i, y in enumerate(x)]),
    ),
    "max_rl": (adv.max_rl, by_group(lambda x: [(y - mean(x)) / mean(x) for y in x])),
    "max_rl_eps": (partial(adv.max_rl, eps=0.5), by_group(lambda x: [(y - mean(x)) / (mean(x) + 0.5) for y in x])),
    "batch_normalized": (adv.batch_normalized, batch_loop),
    "opo": (partial(adv.opo, lengths_PG=LENGTHS), opo_loop),
    "gpg": (partial(adv.gpg, f_norm=2.0), gpg_loop),
    "pass_at_k": (adv.pass_at_k, by_group(best_loop)),
    "pass_at_k_std": (
        partial(adv.pass_at_k, eps=1e-6),
        by_group(lambda x: [a / (std(x, 1) + 1e-6) for a in best_loop(x)]),
    ),
    "codapo": (partial(adv.codapo, mean_log_probs_PG=LOG_P), codapo_loop),
    "remax": (partial(base.remax, greedy_P=GREEDY), lambda r: r.numpy() - GREEDY.numpy()[:, None]),
    "ema": (partial(base.ema_baseline, baseline=0.3), lambda r: r.numpy() - 0.3),
    "ema_P": (partial(base.ema_baseline, baseline=GREEDY), lambda r: r.numpy() - GREEDY.numpy()[:, None]),
    "soft_baseline": (partial(base.soft_baseline, reference_rewards_PN=LOG_P), soft_loop),
}
# those that subtract something of the group itself
CENTRED = [n for n in CASES if n not in ("raw", "positive_only", "remax", "ema", "ema_P", "soft_baseline")]


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    f, loop = CASES[name]
    r = rewards()
    r[1, 2] = 0.0
    a, aux = f(r)
    torch.testing.assert_close(a, torch.from_numpy(loop(r)), **TOL)
    assert a.dtype == F64 and not any(x.requires_grad for x in aux.values())
    torch.testing.assert_close(aux["reward"], r.mean())
    assert float(aux["flat_groups"]) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_number_formats(name):
    """bf16 rewards are computed in fp32, and integers and booleans too."""
    f, loop = CASES[name]
    r = (rewards() > 1).to(torch.bfloat16)
    wanted = torch.from_numpy(loop(r.double())).float()
    for x in (r, r.long(), r.bool()):
        a, _ = f(x)
        assert a.dtype in (torch.float32, F64)
        torch.testing.assert_close(a.float(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0, 0.7, 1e6 + 0.1])
def test_equal_rewards_have_no_advantage(name, value):
    """Exactly 0, and no nan in the gradient. In fp32 the mean of equal numbers need not equal them."""
    f, _ = CASES[name]
    r = torch.full((5, 4), value, requires_grad=True)
    a, aux = f(r)
    assert torch.equal(a.detach(), torch.zeros(5, 4, dtype=a.dtype)) and float(aux["flat_groups"]) == 1.0
    (g,) = torch.autograd.grad((a * torch.arange(4.0)).sum(), r)
    assert bool(g.isfinite().all())


def test_equal_rewards_whose_mean_differs_in_fp32():
    """The premise of the test above: a plain (r - mean) / (std + eps) is not 0 there."""
    r = torch.full((3, 7), 0.1)
    plain = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)
    assert bool((plain != 0).any())
    assert not bool((adv.group_normalized(r)[0] != 0).any())


groups = st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(0, 999)).map(lambda x: rewards(*x))


@given(groups, st.floats(-3, 3), st.floats(0.5, 4))
def test_shift_and_scale(r, shift, scale):
    for f in (adv.centered, adv.leave_one_out, adv.batch_normalized, partial(adv.group_normalized, eps=0.0)):
        a = f(r)[0]
        torch.testing.assert_close(f(r + shift)[0], a, **TOL)
        torch.testing.assert_close(a.sum(1), torch.zeros(len(r), dtype=F64), **TOL)
    torch.testing.assert_close(adv.group_normalized(scale * r, eps=0.0)[0], adv.group_normalized(r, eps=0.0)[0], **TOL)
    torch.testing.assert_close(adv.max_rl(scale * r)[0], adv.max_rl(r)[0], **TOL)


@given(groups)
def test_leave_one_out_is_a_multiple_of_centered(r):
    n = r.shape[1]
    torch.testing.assert_close(adv.leave_one_out(r)[0], n / (n - 1) * adv.centered(r)[0], **TOL)


@given(groups)
def test_order_of_prompts_and_responses(r):
    """Advantages move with the responses."""
    for name in ("group_normalized", "centered", "leave_one_out", "max_rl", "batch_normalized", "gpg", "pass_at_k"):
        f, _ = CASES[name]
        torch.testing.assert_close(f(r.flip(0).flip(1))[0], f(r)[0].flip(0).flip(1), **TOL)


def test_ddof_and_eps_are_told_apart():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]], dtype=F64)
    ones = [float(adv.group_normalized(r, ddof=d, eps=e)[0][0, 0]) for d in (0, 1) for e in (1e-4, 1e-6, 1e-8)]
    assert min(abs(a - b) for i, a in enumerate(ones) for b in ones[:i]) > 1e-7


def test_max_rl_of_zero_and_one():
    """p = k / G: right (1 - p) / p, wrong -1."""
    for k in range(1, 5):
        r = torch.zeros(1, 4)
        r[0, :k] = 1
        a, _ = adv.max_rl(r)
        torch.testing.assert_close(a[0, :k], torch.full((k,), 4 / k - 1))
        torch.testing.assert_close(a[0, k:], torch.full((4 - k,), -1.0))
    assert torch.equal(adv.max_rl(torch.zeros(2, 3))[0], torch.zeros(2, 3))


def test_the_whole_batch_in_parts():
    r = rewards(6, 3)
    whole, alpha = adv.batch_normalized(r)[0], r.numel() / (r != 0).sum()
    torch.testing.assert_close(torch.cat([adv.batch_normalized(x, std=r.std())[0] for x in r.split(2)]), whole, **TOL)
    torch.testing.assert_close(torch.cat([adv.gpg(x, alpha=alpha)[0] for x in r.split(2)]), adv.gpg(r)[0], **TOL)


def test_ties_at_the_top_and_short_groups():
    assert torch.equal(adv.pass_at_k(torch.tensor([[1.0, 1.0, 0.0]]))[0], torch.zeros(1, 3))
    assert torch.equal(adv.raw(torch.ones(2, 1))[0], torch.ones(2, 1))
    assert torch.equal(adv.group_normalized(torch.ones(2, 1), ddof=0)[0], torch.zeros(2, 1))


def test_opo_with_equal_lengths_is_centered():
    r = rewards()
    for length in (0, 7):
        torch.testing.assert_close(adv.opo(r, torch.full((5, 4), length))[0], adv.centered(r)[0], **TOL)


def test_multi_reward():
    """Loops: each reward normalised in its group, the weighted sum over the batch."""
    rng = np.random.default_rng(3)
    r, w = rng.uniform(0, 1, (3, 4, 2)), [1.0, 0.5]
    total = np.zeros((3, 4))
    for p in range(3):
        for k in range(2):
            z = list(r[p, :, k])
            total[p] += [w[k] * (x - mean(z)) / (std(z, 1) + 1e-4) for x in z]
    flat = list(total.reshape(-1))
    wanted = (total - mean(flat)) / (std(flat, 1) + 1e-4)
    a, aux = adv.multi_reward(torch.from_numpy(r), torch.tensor(w))
    torch.testing.assert_close(a, torch.from_numpy(wanted), **TOL)
    torch.testing.assert_close(aux["reward"], torch.from_numpy(r.mean((0, 1))))
    equal, aux = adv.multi_reward(torch.full((3, 4, 2), 0.1))
    assert torch.equal(equal, torch.zeros(3, 4)) and float(aux["flat_groups"]) == 1.0
    # Rewards that trade places leave a plain sum flat, but not this: the scales differ.
    r = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.9, 0.1]]])
    assert float(adv.centered(r.sum(2))[0].abs().max()) < 1e-6
    assert float(adv.multi_reward(r, torch.tensor([1.0, 0.5]))[0].abs().max()) > 0.5


def test_moving_average():
    b = torch.tensor(0.2)
    _, aux = base.ema_baseline(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), b, decay=0.9)
    torch.testing.assert_close(aux["baseline"], torch.tensor(0.9 * 0.2 + 0.1 * 0.75))
    _, aux = base.ema_baseline(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.zeros(2), decay=0.9)
    torch.testing.assert_close(aux["baseline"], torch.tensor([0.05, 0.1]))


def test_value_of_codapo():
    """Half of the responses right: the prompt's value is its confidence; all or none right: 0."""
    r = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    lp = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    _, aux = adv.codapo(r, lp)
    torch.testing.assert_close(aux["value"], torch.tensor([float(np.exp(-1.5)), 0.0]))
    _, aux = adv.codapo(torch.tensor([[1.0, 0.5]]), lp[:1])  # a reward of `right` itself is not right
    torch.testing.assert_close(aux["value"], torch.tensor([float(np.exp(-1.5))]))


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("positive_only", "pass_at_k", "pass_at_k_std", "gpg")])
def test_as_an_op(name):
    """check_op: every transform of torch, derivatives too."""
    f, _ = CASES[name]
    laws = without(OP_LAWS, "compile", "value", "gradient", "dtypes")
    if "PG" in str(getattr(f, "keywords", {})) or name in ("remax", "ema_P"):
        laws = [law for law in laws if law not in ("vmap", "per_sample")]
    check_op(lambda r: f(r)[0], (rewards(),), laws=laws)


def test_compiled():
    for name in ("group_normalized", "max_rl", "pass_at_k"):
        f = torch.compile(lambda r, f=CASES[name][0]: f(r), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(f(rewards())[0], CASES[name][0](rewards())[0])


def test_rows():
    x = torch.arange(12).view(6, 2)
    assert grouped(x, 3).shape == (2, 3, 2) and torch.equal(ungrouped(grouped(x, 3)), x)
    assert row_groups(torch.tensor([1, 2]), 3).tolist() == [1, 1, 1, 2, 2, 2]


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grouped(torch.ones(7), 3), "7 rows are no whole number of groups of group_size 3"),
        (lambda: grouped(torch.ones(0), 3), "0 rows are no whole number"),
        (lambda: grouped(torch.ones(7), 0), "group_size must be an int of at least 1, got 0"),
        (lambda: adv.centered(torch.ones(6)), r"centered: rewards must be a tensor \(P, G\), got \(6,\); see grouped"),
        (lambda: adv.centered([[1.0]]), r"rewards must be a tensor \(P, G\), got list"),
        (lambda: adv.centered(torch.ones(0, 4)), r"centered: no rewards, their shape is \(0, 4\)"),
        (lambda: adv.group_normalized(torch.ones(3, 1)), "groups of at least 2 responses are needed for a deviation"),
        (lambda: adv.leave_one_out(torch.ones(3, 1)), "groups of at least 2 responses are needed, one is left out"),
        (lambda: adv.pass_at_k(torch.ones(3, 1)), "pass_at_k: groups of at least 2"),
        (lambda: adv.batch_normalized(torch.ones(1, 1)), "1 rewards have no deviation with ddof 1"),
        (lambda: adv.raw(torch.tensor([[1.0, float("nan")]])), r"raw: rewards must be finite, got nan at \[0, 1\]"),
        (lambda: adv.raw(torch.tensor([[1.0, float("-inf")]])), r"got -inf at \[0, 1\]"),
        (lambda: adv.max_rl(torch.tensor([[1.0, -1.0]])), r"max_rl: rewards must be at least 0, got -1.0"),
        (lambda: adv.group_normalized(ONES, ddof=2), "ddof must be 0 or 1, got 2"),
        (lambda: adv.group_normalized(ONES, eps=-1.0), "eps must be at least 0 and finite, got -1.0"),
        (lambda: adv.multi_reward(torch.ones(2, 3, 2), torch.ones(3)), r"2 rewards and weights of shape \(3,\)"),
        (lambda: adv.multi_reward(ONES), r"rewards must be a tensor \(P, G, R\), got \(2, 3\)"),
        (lambda: adv.opo(ONES, torch.ones(2, 2)), r"lengths must have the shape of rewards \(2, 3\), got \(2, 2\)"),
        (lambda: adv.gpg(ONES, f_norm=0.0), "f_norm must be above 0, got 0.0"),
        (lambda: adv.codapo(ONES, torch.ones(2)), "mean_log_probs must have the shape of rewards"),
        (lambda: base.remax(ONES, torch.ones(3)), r"greedy must have one reward a prompt, \(2,\), got \(3,\)"),
        (lambda: base.ema_baseline(ONES, torch.ones(3)), r"baseline must be one number or \(2,\), got \(3,\)"),
        (lambda: base.ema_baseline(ONES, 0.0, decay=2.0), "decay must be in 0..1, got 2.0"),
        (lambda: base.soft_baseline(ONES, torch.ones(3, 2)), "rewards of 2 prompts, reference rewards of 3"),
        (lambda: base.soft_baseline(ONES, ONES, beta=0.0), "beta must be above 0, got 0.0"),
    ],
)
def test_bad_arguments(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
