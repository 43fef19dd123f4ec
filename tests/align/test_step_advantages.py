"""Baselines by ids, GiGPO. Oracles: dictionaries of Python floats; `advantages.centered` and `group_normalized`."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.advantages import centered, group_normalized
from purelm.align.step_advantages import baselined, gigpo

CLOSE = dict(rtol=1e-9, atol=1e-9)


def by_dict(values, ids, std, eps=1e-6):
    """(v - mean) / (deviation + eps) of those with the same id; 0 of one alone."""
    groups = {}
    for v, i in zip(values, ids, strict=True):
        groups.setdefault(i, []).append(v)
    out = []
    for v, i in zip(values, ids, strict=True):
        g = groups[i]
        scale = (statistics.stdev(g) if len(g) > 1 else 0.0) + eps if std else 1.0
        out.append((v - statistics.fmean(g)) / scale)
    return out


@pytest.mark.parametrize("std", [False, True])
@given(rows=st.lists(st.tuples(st.integers(-8, 8), st.sampled_from([-3, 0, 5])), min_size=1, max_size=12))
def test_baselined(std, rows):
    values, ids = ([float(v) for v, _ in rows], [i for _, i in rows])
    found = baselined(torch.tensor(values, dtype=torch.float64), torch.tensor(ids), std=std)
    torch.testing.assert_close(found, torch.tensor(by_dict(values, ids, std), dtype=torch.float64), **CLOSE)


def test_groups_of_one_size_are_the_usual_advantages():
    r = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.arange(3).repeat_interleave(4)
    torch.testing.assert_close(baselined(r.flatten(), ids).view(3, 4), centered(r)[0], **CLOSE)
    torch.testing.assert_close(baselined(r.flatten(), ids, std=True).view(3, 4), group_normalized(r)[0], **CLOSE)


def test_equal_values_have_exactly_0():
    """In fp32, where the mean of seven 0.7 is not 0.7; with eps 0 too."""
    for std in (False, True):
        assert not baselined(torch.full((7,), 0.7), torch.zeros(7, dtype=torch.long), std=std, eps=0.0).any()


def gigpo_by_hand(r, mask, states, size, gamma, weight, std):
    E, S = r.shape
    sums = [sum(r[i, t] for t in range(S) if mask[i, t]) for i in range(E)]
    of_episode = by_dict(sums, [i // size for i in range(E)], std)
    steps = [(i, t) for i in range(E) for t in range(S) if mask[i, t]]
    returns = []
    for i, t in steps:
        later = [k for k in range(t, S) if mask[i, k]]
        returns.append(sum(gamma**n * r[i, k] for n, k in enumerate(later)))
    of_step = by_dict(returns, [(i // size, states[i, t]) for i, t in steps], std)
    a = np.zeros((E, S))
    for (i, t), x in zip(steps, of_step, strict=True):
        a[i, t] = of_episode[i] + weight * x
    return a


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_gigpo(seed, std):
    """Values at 1e-9; what is masked may be nan, and its state does not count."""
    draw = np.random.default_rng(seed)
    r, mask = draw.normal(size=(6, 5)), draw.random((6, 5)) < 0.8
    states = draw.integers(-1, 3, (6, 5))
    wanted = gigpo_by_hand(r, mask, states, 3, 0.9, 0.7, std)
    given = torch.where(torch.from_numpy(mask), torch.from_numpy(r), math.nan)
    found, aux = gigpo(given, torch.from_numpy(mask), torch.from_numpy(states), group_size=3, gamma=0.9, weight=0.7,
                       std=std)  # fmt: skip
    torch.testing.assert_close(found, torch.from_numpy(wanted), **CLOSE)
    assert 0 < float(aux["shared"]) <= 1
    torch.testing.assert_close(float(aux["reward"]), float((r * mask).sum(1).mean()), **CLOSE)


def test_gigpo_by_numbers():
    """Two episodes of two steps; both begin in state 7, then go apart, and the first is right."""
    r, states = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).double(), torch.tensor([[7, 8], [7, 9]])
    found, aux = gigpo(r, torch.ones(2, 2), states, group_size=2, gamma=0.5)
    # Episodes +-1/2; in state 7 the returns are 1/2 and 0, so +-1/4; states 8 and 9 were seen once.
    assert found.tolist() == [[0.75, 0.5], [-0.75, -0.5]] and float(aux["shared"]) == 0.5


def test_tasks_do_not_share_states():
    r, states = torch.tensor([[1.0], [5.0]]), torch.tensor([[7], [7]])
    assert not gigpo(r, torch.ones(2, 1), states, group_size=1)[0].any()
    assert not gigpo(r, torch.zeros(2, 1), states, group_size=2)[0].any()  # no step was taken


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baselined(torch.ones(3), torch.zeros(2, dtype=torch.long)), r"ids must be integers of the shape \(3,"),
        (lambda: baselined(torch.ones(3), torch.zeros(3)), "ids must be integers"),
        (lambda: baselined(torch.ones(3), torch.zeros(3).long(), ddof=2), "ddof must be 0 or 1"),
        (lambda: baselined(torch.tensor([math.nan]), torch.zeros(1).long()), "rewards must be finite"),
        (lambda: gigpo(torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2).long(), group_size=3), "group_size must"),
        (lambda: gigpo(torch.ones(4, 2), torch.ones(4, 1), torch.ones(4, 2).long(), group_size=2), "mask must have"),
    ],
)
def test_bad_arguments(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
