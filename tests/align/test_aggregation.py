"""Aggregates of losses. Oracles: loops in numpy; the parts of any split, added up; each other."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.align import aggregation as ag
from tests.align import policy_oracles as by_hand

NAN = float("nan")
CLOSE = dict(rtol=1e-12, atol=1e-12)
# name -> (aggregate, its denominator, options, the same by loops)
CASES = {
    "sequence_mean": (ag.sequence_mean, ag.sequence_mean_denominator, {}, by_hand.sequence_mean),
    "sequence_mean, dropped": (
        ag.sequence_mean,
        ag.sequence_mean_denominator,
        {"count_empty": False},
        partial(by_hand.sequence_mean, count_empty=False),
    ),
    "token_mean": (ag.token_mean, ag.token_mean_denominator, {}, by_hand.token_mean),
    "group_token_mean": (
        ag.group_token_mean,
        ag.group_token_mean_denominator,
        {"group_size": 2},
        partial(by_hand.group_token_mean, group_size=2),
    ),
    "constant": (
        ag.constant, ag.constant_denominator, {"length": 7.0}, lambda l, m: by_hand.summed(l, m) / 7 / len(l)
    ),
    "constant, dropped": (
        ag.constant,
        ag.constant_denominator,
        {"length": 7.0, "count_empty": False},
        lambda l, m: by_hand.summed(l, m) / 7 / max(1, sum(any(row) for row in m)),
    ),
    "sequence_sum": (
        ag.sequence_sum, ag.sequence_sum_denominator, {}, lambda l, m: by_hand.summed(l, m) / len(l)
    ),
    "length_weighted": (
        ag.length_weighted,
        ag.length_weighted_denominator,
        {},
        lambda l, m: sum(sum(w) * by_hand.token_mean(r[None], w[None]) for r, w in zip(l, m, strict=True)) / len(l),
    ),
    "sum_norm": (ag.sum_norm, ag.sum_norm_denominator, {"length": 7.0}, lambda l, m: by_hand.summed(l, m) / 7),
}  # fmt: skip
every = pytest.mark.parametrize("name", CASES)


def data(seed, n_rows=6, weights=False):
    draw = np.random.default_rng(seed)
    loss, mask = draw.normal(size=(n_rows, 5)), (draw.random((n_rows, 5)) < 0.6).astype(float)
    if n_rows > 2:
        mask[2] = 0.0
    return torch.from_numpy(loss), torch.from_numpy(mask * (draw.random((n_rows, 5)) if weights else 1.0))


@every
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_by_loops(name, seed, weights):
    """In float64; an empty row, and masks of weights too."""
    f, _, options, slow = CASES[name]
    loss, mask = data(seed, weights=weights)
    assert f(loss, mask, **options).item() == pytest.approx(slow(loss.numpy(), mask.numpy()), abs=1e-12)


@every
def test_derivative(name):
    """d/dl_it: m_it by its own divisor, by hand."""
    f, _, options, _ = CASES[name]
    loss, mask = data(1)
    (g,) = torch.autograd.grad(f(loss.requires_grad_(), mask, **options), loss)
    lengths, rows, full = mask.sum(1, keepdim=True).clamp(min=1), len(mask), mask.any(1).sum()
    divisor = {
        "sequence_mean": lengths * rows,
        "sequence_mean, dropped": lengths * full,
        "token_mean": mask.sum(),
        "group_token_mean": (mask.view(3, 10).sum(1).repeat_interleave(2)[:, None]) * 3,
        "constant": torch.tensor(7.0 * rows),
        "constant, dropped": 7.0 * full,
        "sequence_sum": torch.tensor(rows),
        "length_weighted": torch.tensor(rows),
        "sum_norm": torch.tensor(7.0),
    }[name]
    torch.testing.assert_close(g, mask / divisor, check_dtype=False, **CLOSE)


@every
@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 5), st.lists(st.integers(0, 5), max_size=4), st.randoms())
def test_any_split_adds_up(name, seed, n_groups, cuts, order):
    """Values and gradients of parts of any sizes, in any order, with the whole batch's denominator; parts may be all
    masked. Groups stay whole."""
    f, denominator, options, _ = CASES[name]
    loss, mask = data(seed, 2 * n_groups)
    whole = f(loss.requires_grad_(), mask, **options)
    (g,) = torch.autograd.grad(whole, loss)
    groups = list(range(n_groups))
    order.shuffle(groups)
    borders = sorted({0, n_groups, *(min(cut, n_groups) for cut in cuts)})
    n = denominator(mask, **options)
    total, total_g = 0.0, torch.zeros_like(loss)
    for a, b in pairwise(borders):
        ids = torch.tensor([2 * p + k for p in groups[a:b] for k in (0, 1)])
        part = loss.detach()[ids].requires_grad_()
        value = f(part, mask[ids], denominator=n, **options)
        total += value.item()
        total_g[ids] += torch.autograd.grad(value, part)[0]
    assert total == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(total_g, g, **CLOSE)


def test_without_a_shared_denominator_they_do_not():
    """TRL's bnpo, a token mean inside of each microbatch: parts of other lengths give another loss."""
    loss, mask = torch.tensor([[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    local = sum(ag.token_mean(loss[i : i + 1], mask[i : i + 1]) for i in (0, 1)) / 2
    shared = sum(ag.token_mean(loss[i : i + 1], mask[i : i + 1], denominator=4) for i in (0, 1))
    assert (local, shared) == (2.5, 1.75) == (ag.sequence_mean(loss, mask), ag.token_mean(loss, mask))


@every
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_masked_has_no_influence(name, bad):
    f, _, options, _ = CASES[name]
    loss, mask = data(3)
    worse = torch.where(mask == 0, bad, loss).requires_grad_()
    value = f(worse, mask, **options)
    assert torch.equal(value, f(loss, mask, **options))
    (g,) = torch.autograd.grad(value, worse)
    assert g.isfinite().all() and not g[mask == 0].any()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_masked_is_zero(name, dtype):
    """And so is its gradient; with a denominator that is 0 as well."""
    f, denominator, options, _ = CASES[name]
    loss, mask = torch.full((4, 3), NAN, dtype=dtype, requires_grad=True), torch.zeros(4, 3, dtype=torch.bool)
    for given_ in (None, denominator(mask, **options), torch.tensor(0.0)):
        value = f(loss, mask, denominator=given_, **options)
        assert value.item() == 0.0 and value.dtype == torch.float32
        assert not torch.autograd.grad(value, loss)[0].any()


def test_equal_lengths():
    """Token mean is sequence mean; Dr. GRPO is both where L is that length, and groups' too."""
    loss, mask = data(4)[0], torch.ones(6, 5)
    values = [
        ag.token_mean(loss, mask),
        ag.sequence_mean(loss, mask),
        ag.constant(loss, mask, length=5),
        ag.group_token_mean(loss, mask, group_size=3),
        ag.sequence_sum(loss, mask) / 5,
        ag.sum_norm(loss, mask, length=5) / 6,
        loss.mean(),
    ]
    for value in values:
        torch.testing.assert_close(value, loss.mean(), **CLOSE)


def test_luspo_is_gspo_s_losses_times_lengths():
    """(1/B) sum_i T_i l_i of one loss a row."""
    mask = data(5)[1]
    rows = torch.arange(1.0, 7.0, dtype=torch.float64)
    found = ag.length_weighted(rows[:, None].expand(6, 5), mask)
    torch.testing.assert_close(found, (mask.sum(1) * rows).mean(), **CLOSE)


def test_long_rows_in_bf16():
    """Sums and counts in fp32: 301 losses of 1 have the mean 1 and the sum 301, which is no number of bf16."""
    loss, mask = torch.ones(2, 301, dtype=torch.bfloat16), torch.ones(2, 301, dtype=torch.bfloat16)
    assert ag.token_mean(loss, mask) == 1 and ag.sequence_mean(loss, mask) == 1
    assert ag.token_mean_denominator(mask) == 602 and ag.sequence_sum(loss, mask) == 301
    for f, _, options, _ in CASES.values():
        assert f(loss, mask, **options).dtype == torch.float32


def test_more_padding_and_other_orders():
    """Exact where nothing but zeros is added; rows and, in a row, tokens in another order."""
    loss, mask = data(6)
    pad = lambda x, fill: torch.nn.functional.pad(x, (0, 3), value=fill)  # noqa: E731
    for name, (f, _, options, _) in CASES.items():
        whole = f(loss, mask, **options)
        torch.testing.assert_close(f(pad(loss, NAN), pad(mask, 0.0), **options), whole, **CLOSE)
        torch.testing.assert_close(f(loss.flip(1), mask.flip(1), **options), whole, **CLOSE)
        torch.testing.assert_close(f(loss.flip(0), mask.flip(0), **options), whole, msg=name, **CLOSE)


ONES = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ag.token_mean(ONES, ONES[0]), r"loss and mask must have one shape \(B, T\), got \(4, 3\) and \(3,\)"),
        (lambda: ag.token_mean(ONES[0, 0], ONES[0, 0]), "loss and mask must have one shape"),
        (lambda: ag.token_mean(ONES, ONES, denominator=0), "denominator must be above 0 and finite, got 0"),
        (lambda: ag.token_mean(ONES, ONES, denominator=NAN), "denominator must be above 0 and finite, got nan"),
        (lambda: ag.sequence_mean(ONES, ONES, denominator=ONES[0]), r"denominator must be one number, got .*\(3,\)"),
        (lambda: ag.group_token_mean(ONES, ONES, group_size=3), "group_size must divide the number of .*, 4, got 3"),
        (lambda: ag.group_token_mean(ONES, ONES, group_size=0), "group_size must divide"),
        (lambda: ag.constant(ONES, ONES, length=0), "length must be above 0 and finite, got 0"),
        (lambda: ag.constant_denominator(ONES, length=-1), "length must be above 0 and finite, got -1"),
        (lambda: ag.sum_norm(ONES, ONES, length=float("inf")), "length must be above 0 and finite, got inf"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
