"""apply_if_finite. Oracle: the optimizer alone, on the steps whose gradients are finite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import tree
from purelm.optim import adamw, apply_if_finite, apply_updates, chain, clip_by_global_norm, sgd
from purelm.optim.base import Optimizer

BAD = [float("nan"), float("inf"), float("-inf")]


def grads_of(step, bad=None):
    g = torch.Generator().manual_seed(step)
    grads = {"a": torch.randn(2, 3, generator=g), "none": None, "b": torch.randn((), generator=g)}
    if bad is not None:
        grads["a"][1, 2] = bad
    return grads


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@given(st.lists(st.sampled_from([None, None, *BAD]), max_size=8))
def test_equals_the_optimizer_on_the_finite_steps(course):
    """Bit for bit, parameters and state; the counters are counted by hand."""
    inner = chain(clip_by_global_norm(1.0), adamw(weight_decay=0.1))
    optimizer = apply_if_finite(inner)
    params = alone = grads_of(100)
    state, alone_state = optimizer.init(params), inner.init(params)
    in_a_row = 0
    for i, bad in enumerate(course):
        updates, state = optimizer.update(grads_of(i, bad), state, params, 0.1)
        params = apply_updates(params, updates)
        in_a_row = 0 if bad is None else in_a_row + 1
        assert int(state.n_consecutive) == in_a_row
        if bad is None:
            updates, alone_state = inner.update(grads_of(i), alone_state, alone, 0.1)
            alone = apply_updates(alone, updates)
        else:
            assert not any(u.any() for u in tree.leaves(updates))
    assert same(params, alone) and same(state.inner, alone_state)
    assert int(state.n_total) == sum(bad is not None for bad in course)


def test_after_max_consecutive_it_is_applied():
    """optax's rule: with 2, the third in a row is applied, and so are those after it until one is finite."""
    optimizer = apply_if_finite(sgd(), 2)
    params = {"w": torch.ones(1)}
    state, applied = optimizer.init(params), []
    for bad in (True, True, True, True, False, True):
        updates, state = optimizer.update({"w": torch.tensor([float("inf") if bad else 1.0])}, state, params, 1.0)
        applied.append(updates["w"].item() != 0.0)
    assert applied == [False, False, True, True, True, False]
    assert (int(state.n_consecutive), int(state.n_total), int(state.inner.step)) == (1, 5, 3)


def test_another_rule_of_what_is_finite():
    """One answer for all processes comes in here."""
    optimizer = apply_if_finite(sgd(), finite=lambda grads: torch.tensor(False))
    params = {"w": torch.ones(1)}
    updates, state = optimizer.update(params, optimizer.init(params), params, 1.0)
    assert updates["w"].item() == 0.0 and int(state.n_total) == 1


def test_dtypes_and_absent_gradients():
    params = {"w": torch.ones(2, dtype=torch.bfloat16), "x": torch.ones(2)}
    optimizer = apply_if_finite(adamw())
    for bad in (1.0, float("nan")):
        grads = {"w": torch.full((2,), bad, dtype=torch.bfloat16), "x": None}
        updates, state = optimizer.update(grads, optimizer.init(params), params, 0.1)
        assert updates["w"].dtype == torch.float32 and updates["x"] is None
        assert state.inner.m["w"].dtype == torch.float32 and state.inner.step.dtype == torch.int64


def test_the_host_does_not_wait():
    """Oracle: meta tensors have no values to look at."""
    params = tree.to(grads_of(0), "meta")
    optimizer = apply_if_finite(adamw())
    updates, _ = optimizer.update(params, optimizer.init(params), params, torch.zeros((), device="meta"))
    assert updates["a"].is_meta


def test_arguments():
    with pytest.raises(ValueError, match=r"apply_if_finite: optimizer is 0\.1"):
        apply_if_finite(0.1)
    with pytest.raises(ValueError, match="max_consecutive is -1"):
        apply_if_finite(sgd(), -1)
    counts = apply_if_finite(Optimizer(lambda params: {"n": 0}, lambda g, s, p, lr: (g, {"n": s["n"] + 1})))
    with pytest.raises(ValueError, match="apply_if_finite: n of the optimizer's state is 1; tensors are needed"):
        counts.update({}, counts.init({}), {}, 0.1)
