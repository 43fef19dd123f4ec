"""Filters against slow plain versions; the draw against the distribution."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.generate.sampling import distribution, forbid, keep_min_p, keep_top_k, keep_top_p, pick, temper

INF = math.inf
# Small integers, so that equal logits are common.
ROWS = st.lists(st.integers(-4, 4), min_size=1, max_size=8)


def softmax(row):
    m = max(row)
    e = [math.exp(x - m) if x > -INF else 0.0 for x in row]
    return [x / sum(e) for x in e]


def run(f, row, *args):
    return f(torch.tensor([row], dtype=torch.float64), *args)[0].tolist()


def plain_top_k(row, k):
    least = sorted(row, reverse=True)[min(k, len(row)) - 1]
    return [x if x >= least else -INF for x in row]


def plain_top_p(row, p):
    probabilities, kept, total = softmax(row), set(), 0.0
    for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        if total >= p:
            break
        kept.add(i)
        total += probabilities[i]
    return [x if i in kept else -INF for i, x in enumerate(row)]


def plain_min_p(row, p):
    probabilities = softmax(row)
    return [x if q >= p * max(probabilities) else -INF for x, q in zip(row, probabilities, strict=True)]


@given(ROWS, st.integers(1, 10))
def test_top_k(row, k):
    """Oracle: sort and compare, in plain Python."""
    row = [float(x) for x in row]
    assert run(keep_top_k, row, k) == plain_top_k(row, k)


@given(ROWS, st.floats(0.01, 0.999))
def test_top_p(row, p):
    """Oracle: add up in order until p is reached; sums within rounding of p may fall either way."""
    row = [float(x) for x in row]
    sums = [sum(sorted(softmax(row), reverse=True)[:n]) for n in range(1, len(row))]
    if all(abs(s - p) > 1e-12 for s in sums):
        assert run(keep_top_p, row, p) == plain_top_p(row, p)
    assert run(keep_top_p, row, 1.0) == row


def test_top_p_among_equals():
    """Exact: a sum that reaches p is enough, and of equals the first are kept."""
    assert run(keep_top_p, [0.0, 0.0], 0.5) == [0.0, -INF]
    assert run(keep_top_p, [0.0] * 4096, 0.25) == [0.0] * 1024 + [-INF] * 3072


@given(ROWS, st.floats(0.01, 1.0))
def test_min_p(row, p):
    """Oracle: compare with the largest probability, in plain Python; p = 1 keeps what equals the largest."""
    row = [float(x) for x in row]
    if all(abs(math.exp(x - max(row)) - p) > 1e-12 for x in row):
        assert run(keep_min_p, row, p) == plain_min_p(row, p)
    assert run(keep_min_p, row, 1.0) == plain_top_k(row, 1)
    assert run(keep_min_p, row, 0.0) == row


@given(ROWS, st.floats(0.1, 5.0))
def test_temperature(row, t):
    """Oracle: softmax(x / t) in plain Python; at 0 the first of the largest alone."""
    got = torch.softmax(torch.tensor(run(temper, [float(x) for x in row], t), dtype=torch.float64), 0)
    torch.testing.assert_close(got, torch.tensor(softmax([x / t for x in row]), dtype=torch.float64))
    greedy = run(temper, [float(x) for x in row], 0.0)
    assert [i for i, x in enumerate(greedy) if x > -INF] == [row.index(max(row))]


def test_tiny_temperature_is_greedy():
    """Closed form: dividing by 1e-37 alone would overflow."""
    log_probs = distribution(torch.tensor([[100.0, 300.0, 200.0]]), temperature=1e-37)
    assert torch.equal(log_probs.exp(), torch.tensor([[0.0, 1.0, 0.0]]))


def test_forbid():
    """Exact: these ids, these rows."""
    x = torch.zeros(2, 4)
    assert forbid(x, [1, 3])[0].tolist() == [0.0, -INF, 0.0, -INF]
    assert forbid(x, [1], torch.tensor([False, True])).tolist() == [[0.0] * 4, [0.0, -INF, 0.0, 0.0]]
    assert forbid(x, []) is x


@given(ROWS, st.floats(0.2, 3.0), st.integers(1, 8), st.floats(0.05, 0.99), st.floats(0.0, 0.9))
def test_distribution(row, t, k, p, q):
    """Oracle: the plain filters one after another; and it is a distribution."""
    row = [float(x) for x in row]
    got = run(lambda x: distribution(x, temperature=t, top_k=k, top_p=p, min_p=q), row)
    left = plain_min_p(plain_top_p(plain_top_k([x / t for x in row], k), p), q)
    kept = [x > -INF for x in got]
    near = any(abs(sum(sorted(softmax(plain_top_k([x / t for x in row], k)))[-n:]) - p) < 1e-9 for n in range(9))
    near = near or any(abs(math.exp((x - max(row)) / t) - q) < 1e-9 for x in row)
    if not near:
        assert kept == [x > -INF for x in left]
        torch.testing.assert_close(torch.tensor(got).exp(), torch.tensor(softmax(left)))
    assert abs(sum(math.exp(x) for x in got) - 1) < 1e-9


@given(ROWS, st.floats(0, 1, exclude_max=True))
def test_pick(row, u):
    """Oracle: walk along the cumulative sum; a token of probability 0 is never picked."""
    log_probs = torch.log_softmax(torch.tensor([row], dtype=torch.float64), -1)
    log_probs[:, ::2] -= INF if len(row) > 1 else 0.0
    token = int(pick(log_probs, torch.tensor([u], dtype=torch.float64))[0])
    assert log_probs[0, token] > -INF
    weights = log_probs[0].exp().tolist()
    below, at = sum(weights[:token]), u * sum(weights)
    assert below - 1e-12 <= at <= below + weights[token] + 1e-12


def test_pick_at_the_ends():
    """Exact: 0 picks the first possible token, the largest uniform below 1 the last."""
    log_probs = torch.tensor([[-INF, 0.5, 0.5, -INF]]).log()
    log_probs = torch.tensor([[-INF, math.log(0.5), math.log(0.5), -INF]]).expand(2, 4)
    assert pick(log_probs, torch.tensor([0.0, 1 - 2**-52], dtype=torch.float64)).tolist() == [1, 2]


def test_pick_has_the_distribution():
    """Oracle: frequencies over an even grid of uniforms, exact to one in 10,000."""
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = torch.bincount(pick(p.log().expand(10_000, 4), u), minlength=4)
    assert bool(((counts - 10_000 * p).abs() <= 1).all())


def test_half_precision_logits_become_fp32():
    assert distribution(torch.zeros(1, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_bad_arguments():
    x = torch.zeros(1, 3)
    for kwargs, message in (
        (dict(temperature=-1.0), r"temperature must be 0 \(greedy\), or finite and at least 1e-37, got -1.0"),
        (dict(temperature=math.nan), "temperature must be 0 .* got nan"),
        (dict(temperature=math.inf), "temperature must be 0 .* got inf"),
        (dict(temperature=1e-320), "temperature must be 0 .* got 1e-320"),
        (dict(top_k=0), "top_k must be an integer of at least 1, got 0"),
        (dict(top_k=2.5), "top_k must be an integer of at least 1, got 2.5"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(top_p=1.1), "top_p must be above 0 and at most 1, got 1.1"),
        (dict(min_p=1.5), r"min_p must be in 0..1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            distribution(x, **kwargs)


@pytest.mark.parametrize("row", [[math.nan, 0.0], [math.inf, 0.0], [-INF, -INF]], ids=str)
def test_pick_refuses_what_is_no_distribution(row):
    """Oracle: the definition; the answer was the vocabulary's size, an index out of bounds further on."""
    with pytest.raises(ValueError, match="log_probs must be log-probabilities in each row"):
        pick(torch.tensor([[0.0, -INF], row]), torch.tensor([0.5, 0.5]))


def test_forbid_refuses_ids_that_are_none():
    """-1 was the last id, silently."""
    for ids in ([-1], [3], [0.5]):
        with pytest.raises(ValueError, match=r"ids must be integers in 0..2, got"):
            forbid(torch.zeros(1, 3), ids)
