"""Schedules. Oracles: the course's formulas and others in Python floats; continuity, range and monotony as laws."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.optim.schedules import (
    constant,
    cosine,
    cosine_decay,
    join,
    linear,
    linear_decay,
    one_minus_sqrt_decay,
    wsd,
)

ULP = 2.0**-24  # half an ulp of fp32, relative: values are computed in fp64 and rounded once


def test_course_cosine():
    """Oracle: the course's three cases (4.4), at every step, to the rounding of the result to fp32."""
    high, low, T_w, T_c = 1.0, 0.1, 7, 21
    schedule = cosine(high, T_c, n_warmup=T_w, lr_final=low)
    for t in range(30):
        if t < T_w:
            expected = t / T_w * high
        elif t <= T_c:
            expected = low + 0.5 * (1 + math.cos((t - T_w) / (T_c - T_w) * math.pi)) * (high - low)
        else:
            expected = low
        assert float(schedule(t)) == pytest.approx(expected, rel=ULP, abs=0)


def test_linear_and_constant():
    """Oracle: straight lines in Python floats."""
    schedule = linear(2.0, 110, n_warmup=10, lr_final=0.5, lr_initial=1.0)
    for t in range(130):
        expected = 1.0 + t / 10 if t < 10 else (2.0 - 1.5 * (t - 10) / 100 if t < 110 else 0.5)
        assert float(schedule(t)) == pytest.approx(expected, rel=ULP)
    assert [float(constant(3.0)(t)) for t in (0, 1, 10**9)] == [3.0] * 3
    assert [float(constant(3.0, n_warmup=4)(t)) for t in range(6)] == [0.0, 0.75, 1.5, 2.25, 3.0, 3.0]


@pytest.mark.parametrize(
    "decay,expected",
    [
        (None, lambda x: 1 - x),
        (linear_decay, lambda x: 1 - x),
        (cosine_decay, lambda x: 0.5 * (1 + math.cos(math.pi * x))),
        (one_minus_sqrt_decay, lambda x: 1 - math.sqrt(x)),
    ],
)
def test_wsd(decay, expected):
    """Oracle: its three parts in Python floats."""
    schedule = wsd(3.0, 100, n_warmup=10, n_decay=20, lr_final=1.0, decay=decay)
    for t in range(120):
        if t < 10:
            lr = 0.3 * t
        elif t < 80:
            lr = 3.0
        else:
            lr = 1.0 + 2.0 * expected(min((t - 80) / 20, 1.0))
        assert float(schedule(t)) == pytest.approx(lr, rel=ULP, abs=1e-15)


def test_zero_lengths():
    """No warmup starts at the peak; without a decay every update has it, and lr_final comes at n_steps, as always."""
    assert float(cosine(2.0, 10)(0)) == 2.0
    assert [float(wsd(2.0, 10, n_decay=0, lr_final=0.5)(t)) for t in (9, 10, 11)] == [2.0, 0.5, 0.5]
    ends_with_warmup = linear(2.0, 4, n_warmup=4)
    assert [float(ends_with_warmup(t)) for t in range(6)] == [0.0, 0.5, 1.0, 1.5, 0.0, 0.0]
    assert [float(linear(2.0, 0, lr_final=0.5)(t)) for t in (0, 1)] == [0.5, 0.5]
    assert [float(constant(2.0, n_warmup=2)(t)) for t in range(4)] == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", [constant(2.0, n_warmup=4), cosine(2.0, 8, n_warmup=4), linear(2.0, 8)])
def test_before_the_first_step(schedule):
    """Oracle: step 0. On the warmup's line a step of -1 had a negative rate, and the update went uphill."""
    assert torch.equal(schedule(torch.tensor([-1, -100])), schedule(0).expand(2))
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        schedule(-1)


MAKERS = [
    linear,
    cosine,
    *[partial(wsd, decay=decay) for decay in (linear_decay, cosine_decay, one_minus_sqrt_decay)],
]


@st.composite
def schedules(draw):
    make = draw(st.sampled_from(MAKERS))
    n_warmup, n_stable, n_decay = (draw(st.integers(0, 50)) for _ in range(3))
    peak = draw(st.floats(2.0**-10, 8.0))
    final, initial = (peak * draw(st.floats(0, 1)) for _ in range(2))
    arguments = {"n_warmup": n_warmup, "lr_final": final, "lr_initial": initial}
    if isinstance(make, partial):
        arguments["n_decay"] = n_decay
    else:
        n_stable = 0
    n_steps = n_warmup + n_stable + n_decay
    return make(peak, n_steps, **arguments), n_warmup, n_warmup + n_stable, n_steps, initial, peak, final


@given(schedules())
def test_laws(drawn):
    """Laws: the stated end points; between final or initial and peak; rises, stays, falls; no jump in between."""
    schedule, n_warmup, n_stable, n_steps, initial, peak, final = drawn
    values = schedule(torch.arange(n_steps + 3)).double()
    if n_warmup < n_steps:
        assert values[n_warmup] == torch.tensor(peak, dtype=torch.float32)
    if n_warmup:
        assert values[0] == torch.tensor(initial, dtype=torch.float32)
    end = min(n_stable + 1, n_steps)
    assert torch.equal(values[n_warmup:end], values[n_warmup].expand(end - n_warmup))
    assert (values[n_steps:] == torch.tensor(final, dtype=torch.float32)).all()
    assert (values[: min(n_warmup + 1, n_steps)].diff() >= 0).all() and (values[n_stable:].diff() <= 0).all()
    jumps = values.diff().abs()
    if 0 < n_warmup < n_steps:
        assert jumps[:n_warmup].max() <= (peak - initial) / n_warmup + 1e-6 * peak
    if n_steps > n_stable:
        # The steepest of the decays is 1 - sqrt(x) at its start: sqrt(1 / n); half a cosine is pi / 2 of a line.
        n = n_steps - n_stable
        assert jumps[n_stable:n_steps].max() <= (peak - final) * max(math.pi / 2 / n, math.sqrt(1 / n)) + 1e-6 * peak


@given(schedules(), st.integers(0, 200))
def test_int_tensor_and_batch_agree(drawn, step):
    """Law: the same fp32 number from an int, a 0-d int64 or int32 tensor, a batch, and vmap; 0-d for 0-d."""
    schedule = drawn[0]
    lr = schedule(step)
    assert lr.dtype == torch.float32 and lr.ndim == 0
    steps = torch.tensor([step, step])
    for other in (schedule(torch.tensor(step)), schedule(torch.tensor(step, dtype=torch.int32))):
        assert torch.equal(lr, other)
    for other in (schedule(steps), torch.vmap(schedule)(steps)):
        assert torch.equal(lr.expand(2), other)


def test_join_takes_one_after_another():
    """Oracle: optax.join_schedules' rule in Python, each part asked for its own step."""
    parts, boundaries = [linear(1.0, 5), cosine(2.0, 9, n_warmup=3), constant(0.25)], [5, 11]
    schedule = join(parts, boundaries)
    expected = [float(parts[0](t) if t < 5 else parts[1](t - 5) if t < 11 else parts[2](t - 11)) for t in range(20)]
    assert [float(schedule(t)) for t in range(20)] == schedule(torch.arange(20)).tolist() == expected


@given(st.lists(schedules(), min_size=1, max_size=4), st.data())
def test_join_laws(drawn, data):
    """Laws: one schedule joined is itself; joined at 0 it is gone; joins nest; an int is a 0-d tensor is a batch."""
    parts = [d[0] for d in drawn]
    boundaries = sorted(data.draw(st.lists(st.integers(0, 60), min_size=len(parts) - 1, max_size=len(parts) - 1)))
    steps = torch.arange(80)
    schedule = join(parts, boundaries)
    values = schedule(steps)
    assert torch.equal(join(parts[:1], [])(steps), parts[0](steps))
    assert torch.equal(join([constant(7.0), *parts], [0, *boundaries])(steps), values)
    if boundaries:
        later = join(parts[1:], [b - boundaries[0] for b in boundaries[1:]])
        assert torch.equal(join([parts[0], later], boundaries[:1])(steps), values)
    t = data.draw(st.integers(0, 79))
    for one in (schedule(t), schedule(torch.tensor(t)), schedule(torch.tensor(t, dtype=torch.int32))):
        assert one.ndim == 0 and one.dtype == torch.float32 and torch.equal(one, values[t])
    assert torch.equal(torch.vmap(schedule)(steps), values)


def test_join_asks_each_part_for_its_own_steps_only():
    """A user's schedule without a rule for negative steps gives no nan before its turn."""
    schedule = join([constant(1.0), lambda t: (1 / torch.sqrt(t + 1)).to(torch.float32)], [10])
    assert torch.equal(schedule(torch.tensor([0, 9, 10, 13])), torch.tensor([1.0, 1.0, 1.0, 0.5]))
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        schedule(-1)


def test_large_steps_are_exact():
    """fp32 cannot tell 2^24 + 1 from 2^24; the schedule can."""
    schedule = linear(1.0, 2**25)
    a, b = schedule(torch.tensor(2**24)), schedule(torch.tensor(2**24 + 1))
    assert float(a) == 0.5 and float(b) == pytest.approx(0.5 - 2.0**-25, rel=1e-9)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: cosine(1.0, 10, n_warmup=11), r"n_warmup must be in \[0, n_steps = 10\], got 11"),
        (lambda: linear(1.0, 10, n_warmup=-1), "n_warmup must be in"),
        (lambda: wsd(1.0, 10, n_warmup=4, n_decay=7), r"n_decay must be in \[0, n_steps - n_warmup = 6\], got 7"),
        (lambda: wsd(1.0, 10, n_decay=-1), "n_decay must be in"),
        (lambda: linear(1.0, -1), "n_steps must be at least 0, got -1"),
        (lambda: linear(1.0, math.nan), "n_steps must be at least 0, got nan"),
        (lambda: constant(-1.0), "lr_peak must be at least 0 and finite, got -1.0"),
        (lambda: cosine(math.nan, 10), "lr_peak must be at least 0 and finite, got nan"),
        (lambda: wsd(1.0, 10, n_decay=2, lr_final=-0.1), "lr_final must be at least 0 and finite, got -0.1"),
        (lambda: join([], []), "join: 0 schedules need 0 boundaries, got 0"),
        (lambda: join([constant(1.0)] * 3, [1]), "join: 3 schedules need 2 boundaries, got 1"),
        (lambda: join([constant(1.0)] * 3, [5, 1]), r"ascending integers of at least 0, got \[5, 1\]"),
        (lambda: join([constant(1.0)] * 2, [1.5]), r"ascending integers of at least 0, got \[1.5\]"),
        (lambda: join([constant(1.0), 0.5], [1]), r"join: schedules\[1\] is 0.5; functions of the step"),
        (lambda: linear(1.0, 10, lr_initial=math.inf), "lr_initial must be at least 0 and finite, got inf"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
