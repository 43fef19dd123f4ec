"""Rewards by length, and numbers that follow a run. Oracles: Python's math on single numbers; written-out histories."""

import math

import pytest
import torch

from purelm.align import controllers as con
from purelm.align import shaping as sha


def test_soft_overlong():
    """Oracle: the three cases of the paper's equation, one length at a time."""

    def one(T, L, C):
        return 0.0 if T <= L - C else (L - C - T) / C if T <= L else -1.0

    lengths = torch.tensor([0, 16383, 16384, 16385, 18000, 20480, 20481, 99999])
    wanted = torch.tensor([one(int(T), 20480, 4096) for T in lengths])
    torch.testing.assert_close(sha.soft_overlong(lengths), wanted)
    torch.testing.assert_close(sha.soft_overlong(lengths, longest=20000, buffer=20000).double(), torch.tensor(
        [one(int(T), 20000, 20000) for T in lengths], dtype=torch.float64))  # fmt: skip


def test_truncated():
    mask = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.5, 0.0]])
    assert sha.overlong_mask(mask, torch.tensor([True, False])).tolist() == [[0, 0, 0], [1.0, 0.5, 0]]
    r = torch.tensor([1.0, 1.0, 0.5])
    cut = torch.tensor([True, False, True])
    assert sha.truncated_to(r, cut).tolist() == [0.0, 1.0, 0.0]
    assert sha.truncated_to(r, cut, -1.0).tolist() == [-1.0, 1.0, -1.0] and r.tolist() == [1.0, 1.0, 0.5]


def test_cosine():
    """Oracle: the formula with its bounds swapped for wrong answers, in math's floats."""

    def one(right, T, L):
        least, most = (0.5, 1.0) if right else (-0.5, -1.0)
        return least + 0.5 * (most - least) * (1 + math.cos(math.pi * min(T / L, 1.0)))

    lengths = torch.tensor([0, 1, 50, 99, 100, 150])
    for right in (True, False):
        got = sha.cosine(torch.full((6,), right), lengths, longest=100)
        torch.testing.assert_close(got, torch.tensor([one(right, int(T), 100) for T in lengths]))
    assert bool((sha.cosine(torch.ones(6).bool(), lengths, longest=100).diff() <= 0).all())
    assert bool((sha.cosine(torch.zeros(6).bool(), lengths, longest=100).diff() >= 0).all())


def test_kimi():
    """Oracle: one response at a time; equal lengths have no reward."""
    right = torch.tensor([[True, False, True, False], [True, True, False, False]])
    lengths = torch.tensor([[10, 20, 30, 40], [7, 7, 7, 7]])
    wanted = [[0.5, 0.5 - 1 / 3, 0.5 - 2 / 3, -0.5], [0.0] * 4]
    wanted[0][1] = min(0.0, wanted[0][1])
    torch.testing.assert_close(sha.kimi(right, lengths), torch.tensor(wanted))


def test_linear_length():
    r, lengths = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[5, 10], [0, 0]])
    wanted = torch.tensor([[1 - 0.2 * 0.5 * 0.5, -0.2 * 0.5], [1.0, 1.0]])
    torch.testing.assert_close(sha.linear_length(r, lengths, coefficient=0.2), wanted)


def test_entropy_control():
    """A history by hand: below the target it grows and is applied, above it shrinks and is not; never below `least`."""
    state, got = con.entropy_control(0.005), []
    for entropy in (0.1, 0.2, 0.3, 0.5, 0.9, 0.1):
        state = con.adapt_entropy(state, torch.tensor(entropy), target=0.2)
        got.append((round(float(state.coefficient), 6), round(float(state.applied), 6)))
    assert got == [(0.01, 0.01), (0.015, 0.015), (0.01, 0.0), (0.005, 0.0), (0.0, 0.0), (0.005, 0.005)]
    assert float(con.adapt_entropy(state, 0.0, target=1.0, most=0.006).coefficient) == pytest.approx(0.006)
    assert float(con.entropy_control(0.3).applied) == 0.0


def test_temperature():
    state = con.temperature(1.0)
    for reward in (0.1, 0.2, 0.2, 0.15):
        state = con.observe(state, reward)
    assert state == con.Temperature(1.0, 0.2, 2) and con.plateaued(state, 2) and not con.plateaued(state, 3)
    assert con.observe(state, 0.201, least_gain=0.01).n_without_gain == 3
    held_out = {0.8: 0.9, 1.0: 0.5, 1.1: 0.496, 1.2: 0.6, 1.3: 0.494}
    assert con.raised(state, held_out) == con.Temperature(1.2, 0.2, 0)  # 1.3 lost 1.2 %, 0.8 is no rise
    assert con.raised(state, held_out, most_drop=0.02).value == 1.3
    assert con.raised(state, {1.0: 0.5, 1.1: 0.4}).value == 1.0
    assert con.raised(state, {1.0: -0.5, 1.1: -0.504, 1.2: -0.506}).value == 1.1  # scores below 0 too


def test_mixed_reference():
    p = {"w": torch.ones(2, requires_grad=True), "b": [torch.zeros(1)]}
    r = {"w": torch.zeros(2), "b": [torch.ones(1)]}
    got = con.mixed_reference(p, r)
    torch.testing.assert_close(got, {"w": torch.full((2,), 0.6), "b": [torch.full((1,), 0.4)]})
    assert not got["w"].requires_grad and torch.equal(r["w"], torch.zeros(2))


def test_half_precision():
    """Lengths above 256 are no numbers of bf16, so integers and fp32 are computed in fp32."""
    assert sha.soft_overlong(torch.tensor([18001])).dtype == torch.float32
    assert sha.linear_length(torch.ones(1, 2).bfloat16(), torch.ones(1, 2), coefficient=0.1).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sha.soft_overlong(torch.ones(1), longest=10, buffer=11), "at most longest 10, got 11"),
        (lambda: sha.cosine(torch.ones(1).bool(), torch.ones(1), longest=0), "longest must be at least 1, got 0"),
        (lambda: sha.kimi(torch.ones(1, 2).bool(), torch.ones(2, 1)), r"kimi: the shapes \(1, 2\) and \(2, 1\)"),
        (lambda: sha.truncated_to(torch.ones(2), torch.ones(3).bool()), "truncated_to: the shapes"),
        (lambda: sha.overlong_mask(torch.ones(2, 3), torch.ones(3).bool()), "overlong_mask: the shapes"),
        (lambda: con.temperature(0.0), "temperature must be above 0 and finite, got 0.0"),
        (lambda: con.raised(con.temperature(1.0), {1.1: 0.5}), "no score of the present temperature 1.0"),
        (lambda: con.adapt_entropy(con.entropy_control(), 0.1, 0.2, least=1.0, most=0.0), "least 1.0 <= most 0.0"),
        (lambda: con.mixed_reference({}, {}, alpha=1.5), "alpha must be in 0..1, got 1.5"),
    ],
)
def test_bad_arguments(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()


def test_kl_penalty():
    """Oracle: a loop in Python's floats. nan where masked changes nothing; nothing is clamped; no gradient."""
    lp = torch.tensor([[-0.5, -3.0, -0.1], [-90.0, -1.0, float("nan")], [-2.0, -2.0, -2.0]], requires_grad=True)
    lr = torch.tensor([[-1.5, -2.0, -0.3], [-0.5, -80.0, float("inf")], [-9.0, -9.0, -9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    found = sha.kl_penalty(lp, lr, mask, coefficient=0.2)
    every = zip(lp.tolist(), lr.tolist(), mask.tolist(), strict=True)
    wanted = [-0.2 * sum(a - b for a, b, m in zip(*row, strict=True) if m) for row in every]
    assert not found.requires_grad and found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert sha.kl_penalty(lp.double(), lr.double(), mask, coefficient=0.2).dtype == torch.float64
    for bad in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="kl_penalty: coefficient must be"):
            sha.kl_penalty(lp, lr, mask, coefficient=bad)
    with pytest.raises(ValueError, match="must have the mask's shape"):
        sha.kl_penalty(lp[:2], lr, mask, coefficient=0.1)
