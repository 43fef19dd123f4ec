"""Filters of groups and prompts, and the states that collect groups. Oracles: loops over lists; simulations."""

import pytest
import torch

from purelm import random
from purelm.align import collect as col
from purelm.align import filters as fil
from purelm.align.advantages import centered

MIXED, FLAT = [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]


def test_zero_gradient():
    """max - min, where the deviation in fp32 is not 0: equal rewards, and sums of parts in another order."""
    r = torch.tensor([[0.1] * 7, [0.1 + 0.2] + [0.3] * 6, [1.0] + [0.0] * 6])
    r = torch.cat([r, torch.tensor([[0.3 + 2e-8 * i for i in range(7)]])])
    assert bool((r[0] != r[0].mean()).any())  # so a test of the deviation would keep the first
    assert fil.zero_gradient(r).tolist() == [True, True, False, True]
    assert fil.zero_gradient(torch.tensor([[0.5, 0.5 + 1e-4]])).tolist() == [False]
    assert fil.zero_gradient(torch.tensor([[0.5, 0.5 + 1e-4]]), tol=1e-3).tolist() == [True]
    assert fil.zero_gradient(torch.tensor([[0, 0], [0, 1]])).tolist() == [True, False]
    assert fil.zero_gradient(torch.tensor([[-1.0, 1.0, 0.0]])).tolist() == [False]  # their sum and mean are 0


def test_what_is_dropped_has_no_advantage():
    r = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.5, 1.0]])
    assert torch.equal((centered(r)[0] == 0).all(1), fil.zero_gradient(r))


def test_pass_rates_and_bands():
    r = torch.tensor([[1.0, 0.5, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.9]])
    rate = fil.pass_rate(r)
    assert rate.tolist() == [0.5, 1.0, 0.0]
    assert fil.pass_rate(r, threshold=0.5).tolist() == [0.75, 1.0, 0.25]
    assert fil.within(rate, 0.0, 0.5).tolist() == [True, False, True]
    assert fil.within(rate, 0.5, 1.0).tolist() == [True, True, False]
    few = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    many = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4])
    assert fil.hard_but_solvable(few, many).tolist() == [True, False, False]


def test_pool():
    pool = fil.new_pool(4)
    kept = fil.record(pool, torch.tensor([2, 0]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert kept.rate_N.nan_to_num(-1.0).tolist() == [0.5, -1.0, 1.0, -1.0] and bool(pool.rate_N.isnan().all())
    gone = fil.retire(kept)
    assert gone.active_N.tolist() == [True, True, False, True] and bool(kept.active_N.all())
    # For good: a later lower rate does not bring it back. The bound itself retires.
    later = fil.retire(fil.record(gone, torch.tensor([2]), torch.tensor([[0.0, 0.0]])))
    assert later.active_N.tolist() == [True, True, False, True]
    at = fil.record(pool, torch.tensor([1]), torch.tensor([[1.0] * 7 + [0.0]]))
    assert fil.retire(at).active_N.tolist() == [True, False, True, True]
    assert bool(fil.retire(at, rate=0.9).active_N.all())


def test_weights_of_a_pool():
    """Oracle: a loop over prompts."""
    rates = [0.0, 0.2, 0.5, 0.5, 1.0, float("nan"), float("nan"), 0.1]
    active = [True] * 7 + [False]
    pool = fil.Pool(torch.tensor(rates), torch.tensor(active))
    edges, weights = [0.1, 0.5], [1.0, 2.0, 4.0]
    classes = [3 if r != r else sum(r >= e for e in edges) for r in rates]
    share = [*weights, 0.5]
    raw = [
        share[k] / sum(c == k and on for c, on in zip(classes, active, strict=True)) if on else 0.0
        for k, on in zip(classes, active, strict=True)
    ]
    wanted = torch.tensor(raw) / sum(raw)
    got = fil.pool_weights(pool, torch.tensor(edges), torch.tensor(weights), untried=0.5)
    torch.testing.assert_close(got, wanted)
    # An empty class gives its share to the others; draws never take what is retired.
    got = fil.pool_weights(fil.new_pool(4), torch.tensor([0.5]), torch.tensor([9.0, 9.0]))
    torch.testing.assert_close(got, torch.full((4,), 0.25))
    p = fil.pool_weights(pool, torch.tensor(edges), torch.tensor(weights))
    drawn = random.choice(random.key(0), 8, (7,), replace=False, p=p)
    assert sorted(drawn.tolist()) == list(range(7))


def test_dynamic_sampling():
    state = col.Collected()
    state = col.add_round(state, ["a", "b"], torch.tensor([MIXED, FLAT]))
    assert state.groups == ("a",) and not col.full(state, 3)
    state = col.add_round(state, ["c", "d", "e"], torch.tensor([MIXED, MIXED, MIXED]))
    assert (state.n_rounds, state.n_seen) == (2, 5) and col.full(state, 3)
    batch, rest = col.take(state, 3)
    assert batch == ("a", "c", "d") and rest == col.Collected(("e",))
    for _ in range(10):
        rest = col.add_round(rest, ["x"], torch.tensor([FLAT]))
    with pytest.raises(ValueError, match="of 10 groups of 10 rounds, rewards differ in 1; the prompts are too easy"):
        col.add_round(rest, ["x"], torch.tensor([FLAT]))
    assert col.add_round(rest, ["x"], torch.tensor([MIXED]), max_rounds=None).groups == ("e", "x")


def test_active_sampling():
    state = col.start(col.InFlight(), [1, 2, 3], step=0)
    assert col.n_to_start(state, 2) == 0 and col.n_to_start(state, 2, ahead=2) == 1
    state = col.finish(state, 2, "two", torch.tensor(MIXED))
    state = col.finish(state, 1, "one", torch.tensor(FLAT))
    assert state.ready == (("two", 0),) and state.n_flat == 1 and col.n_to_start(state, 4) == 2
    none, state = col.take_fresh(state, 2, step=1)
    assert none is None and len(state.ready) == 1
    state = col.finish(col.start(state, [1], step=5), 1, "again", torch.tensor(MIXED))
    batch, after = col.take_fresh(state, 2, step=8)  # the first is 8 steps old
    assert batch == ("two", "again") and after.ready == () and after.started == ((3, 0),)
    none, after = col.take_fresh(state, 2, step=9)
    assert none is None and after.ready == (("again", 5),) and after.n_stale == 1


def test_active_sampling_fills_every_batch():
    """A simulation: half of the prompts are flat, groups finish in any order; batches have exactly 4 groups, fresh."""
    state, following, taken = col.InFlight(), 0, []
    for step in range(6):
        while True:
            more = col.n_to_start(state, 4, ahead=2)
            state = col.start(state, range(following, following + more), step)
            following += more
            batch, state = col.take_fresh(state, 4, step, max_age=2)
            if batch is not None:
                break
            at = (7 * following + step) % len(state.started)
            prompt = state.started[at][0]
            state = col.finish(state, prompt, prompt, torch.tensor(MIXED if prompt % 2 else FLAT))
        taken += batch
        assert len(batch) == 4 and all(x % 2 for x in batch)
    assert len(set(taken)) == 24 and state.n_flat > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fil.zero_gradient(torch.ones(2, 2), tol=-1.0), "tol must be at least 0 and finite, got -1.0"),
        (lambda: fil.zero_gradient(torch.tensor([[float("nan")]])), "rewards must be finite"),
        (lambda: fil.within(torch.ones(2), 1.0, 0.0), "low must be at most high, got 1.0 and 0.0"),
        (lambda: fil.hard_but_solvable(torch.ones(2, 2), torch.ones(3, 2)), "rewards of 2 and of 3 prompts"),
        (lambda: fil.new_pool(0), "at least one prompt is needed, got 0"),
        (lambda: fil.record(fil.new_pool(2), torch.tensor([2]), torch.ones(1, 2)), r"must lie in 0..1, got \[2\]"),
        (lambda: fil.record(fil.new_pool(2), torch.tensor([1, 1]), torch.ones(2, 2)), "occurs twice in one batch"),
        (lambda: fil.record(fil.new_pool(2), torch.tensor([1]), torch.ones(2, 2)), "prompts for rewards"),
        (lambda: fil.pool_weights(fil.new_pool(2), torch.ones(1), torch.ones(1)), "1 edges make 2 classes, got 1"),
        (
            lambda: fil.pool_weights(fil.new_pool(2), torch.tensor([0.5, 0.1]), torch.ones(3)),
            "edges must ascend",
        ),
        (
            lambda: fil.pool_weights(fil.new_pool(2), torch.ones(1), torch.tensor([1.0, -1.0])),
            "weights must be at least 0",
        ),
        (
            lambda: fil.pool_weights(
                fil.new_pool(1)._replace(active_N=torch.tensor([False])), torch.ones(1), torch.ones(2)
            ),
            "the pool is used up",
        ),
        (lambda: col.add_round(col.Collected(), ["a"], torch.ones(2, 2)), "1 groups and rewards of 2"),
        (lambda: col.take(col.Collected(), 1), "0 groups of 1 are there; add a round"),
        (lambda: col.start(col.start(col.InFlight(), [1], 0), [1], 0), "prompt 1 is in flight already"),
        (lambda: col.start(col.InFlight(), [1, 1], 0), "prompt 1 is in flight already"),
        (lambda: col.finish(col.InFlight(), 1, "g", torch.ones(2)), "prompt 1 is not in flight"),
        (lambda: col.n_to_start(col.InFlight(), 0), "wanted and ahead must be at least 1, got 0 and 1"),
    ],
)
def test_bad_arguments(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
