"""Keyed permutations: bijections at every size, and as even as random ones."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random
from purelm.data import shuffle
from purelm.data.shuffle import permuted


@given(n=st.one_of(st.integers(1, 300), st.integers(4090, 9000)), seed=st.integers(0, 2**32))
def test_bijection(n, seed):
    """Oracle: the sorted images of 0..n-1 are 0..n-1, through both ways of making the order."""
    order = permuted(random.key(seed), n, torch.arange(n))
    assert torch.equal(order.sort().values, torch.arange(n))


@given(n=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_bijection_of_the_rounds(n, seed):
    """The network itself is a bijection at small sizes too, where cycles are walked most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "SMALL", 0)
        order = permuted(random.key(seed), n, torch.arange(n))
    assert torch.equal(order.sort().values, torch.arange(n))


@pytest.mark.parametrize("n", [1000, 5000, 2**33 + 7])
def test_elements_do_not_depend_on_the_request(n):
    """One index at a time, or all in any shape: the same images; nothing of size n is made (n = 2**33 would show)."""
    index = torch.tensor([0, 1, n - 1, n // 2, 17, 998])
    together = permuted(random.key(1), n, index)
    assert torch.equal(permuted(random.key(1), n, index.reshape(2, 3)), together.reshape(2, 3))
    assert [int(permuted(random.key(1), n, i)) for i in index] == together.tolist()
    assert len(set(together.tolist())) == 6 and 0 <= min(together) and max(together) < n
    assert not torch.equal(permuted(random.key(2), n, index), together)
    assert permuted(random.key(1), n, index[:0]).shape == (0,)


def test_small_orders_are_all_met(monkeypatch):
    """Oracle: the uniform distribution on the 24 orders of 4, chi squared, for the network without the small path.

    With 23 degrees of freedom the statistic is below 60 but once in 30,000 for an even network.
    """
    monkeypatch.setattr(shuffle, "SMALL", 0)
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for key in random.split(random.key(0), 480):
        counts[tuple(permuted(key, 4, torch.arange(4)).tolist())] += 1
    assert sum((c - 20) ** 2 / 20 for c in counts.values()) < 60


def test_large_orders_look_random():
    """Oracle: a uniform permutation's displacement, fixed points and serial correlation, within 5 standard errors."""
    n, n_keys = 10_007, 20
    index = torch.arange(n)
    orders = [permuted(key, n, index) for key in random.split(random.key(5), n_keys)]
    fixed = sum(int((order == index).sum()) for order in orders)  # Poisson with mean 1 each
    assert abs(fixed - n_keys) < 5 * math.sqrt(n_keys)
    stacked = torch.stack(orders).double() / n
    # corr(order[i], i) and corr(order[i], order[i + 1]) have standard error 1 / sqrt(n) each.
    for other in (index.double().expand(n_keys, n) / n, stacked.roll(1, dims=1)):
        correlation = ((stacked - 0.5) * (other - 0.5)).mean(1) * 12
        assert correlation.abs().max() < 5 / math.sqrt(n)
    # A block of consecutive images falls evenly into 16 bins: chi squared with 15 degrees of freedom.
    counts = torch.bincount((stacked[:, :800] * 16).long().reshape(-1), minlength=16).double()
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 50


@pytest.mark.parametrize(("n", "index"), [(0, 0), (5, 5), (5, -1), (10**6, 10**6)])
def test_arguments(n, index):
    """n below 1 and an index outside 0..n-1 are refused."""
    with pytest.raises(ValueError, match="permuted: "):
        permuted(random.key(0), n, torch.tensor([index]))
