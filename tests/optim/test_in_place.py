"""Steps written over parameters and state (`step_of`), and what `jit` makes of a training step with them.

Oracle: the pure `update` and `apply_updates`. Fused kernels contract a multiplication and an addition into one
rounding, and a stack of matrices is summed in another order than each by itself.
"""

import pytest
import torch

from purelm import tree
from purelm.optim import (
    adamw,
    apply_if_finite,
    apply_updates,
    chain,
    clip_by_global_norm,
    constant,
    frozen,
    is_matrix,
    labelled,
    lion,
    muon,
    muon_adamw,
    partitioned,
    rmsprop,
    scale_lr,
    sgd,
    step_of,
)
from purelm.optim.base import Optimizer
from purelm.train import init_state, make_step
from purelm.transforms import jit

pytestmark = pytest.mark.compile

CASES = {
    "adamw": adamw(weight_decay=0.1, mask=is_matrix),
    "course": adamw(eps_placement="uncorrected", eps_root=1e-6, decay_order="after", weight_decay=0.1),
    "adamw, moments in bf16, no decay": adamw(weight_decay=0.0, dtype=torch.bfloat16),
    "sgd": sgd(0.9, 0.1, nesterov=True, mask=is_matrix),
    "sgd without momentum": sgd(weight_decay=0.1),
    "lion": lion(weight_decay=0.1, mask=is_matrix),
    "rmsprop": rmsprop(weight_decay=0.1, mask=is_matrix),
    "rmsprop, all": rmsprop(0.9, 1e-6, momentum=0.5, centered=True, dtype=torch.bfloat16),
    "clipped": chain(clip_by_global_norm(0.5), adamw(weight_decay=0.1)),
    "scaled parts": partitioned(lambda path, p: p.ndim > 1, scale_lr(sgd(0.9), 2.0), adamw()),
    "labelled": labelled(
        lambda path, p: path[0], {"a": sgd(0.9), "b": lion(), "c": frozen(), **dict.fromkeys("lnot", adamw())}
    ),
    "muon_adamw": muon_adamw(iteration_dtype=torch.float32),
}


def trees(seed, dtype=torch.float32):
    """Leaves of several lengths: one number, none, a transposed one, equal shapes."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 5), "b": (8, 5), "c": (5, 8), "lm_head": (9, 4), "norm": (7,), "one": (1,), "none": (0,)}
    out = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    return {**out, "turned": torch.randn(4, 6, generator=g).to(dtype).T}


def copied(t):
    return tree.map(lambda x: x.detach().clone(memory_format=torch.preserve_format), t)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_pure_update_and_lies_in_the_old_memory(name):
    optimizer = CASES[name]
    params = trees(0)
    state = optimizer.init(params)
    step_ = step_of(optimizer)
    assert step_ is not None
    mine = copied(params), copied(state)
    for i in range(3):
        grads = trees(i + 1)
        if i == 1:
            grads["b"] = None  # keeps its value and its moments
        before = copied(grads)
        updates, state = optimizer.update(grads, state, params, 0.1)
        params = apply_updates(params, updates)
        at = [x.data_ptr() for x in tree.leaves(mine)]
        mine = step_(grads, mine[1], mine[0], 0.1)
        assert [x.data_ptr() for x in tree.leaves(mine)] == at
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(before), tree.leaves(grads), strict=True))
        for x, y in zip(tree.leaves((params, state)), tree.leaves(mine), strict=True):
            tolerance = 1e-2 if x.dtype == torch.bfloat16 else 2e-6 if "muon" not in name else 1e-5
            torch.testing.assert_close(y, x, atol=tolerance, rtol=tolerance)


def test_parameters_in_bf16_are_rounded_once():
    optimizer = adamw(weight_decay=0.1)
    params, grads = trees(0, torch.bfloat16), trees(1, torch.bfloat16)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, 0.1)
    right = apply_updates(params, updates)
    found, _ = step_of(optimizer)(grads, optimizer.init(params), copied(params), 0.1)
    for x, y in zip(tree.leaves(right), tree.leaves(found), strict=True):
        # an ulp of bf16, where the last bit of fp32 falls to the other side of a tie
        torch.testing.assert_close(y, x, atol=0, rtol=2**-7)


def test_one_function_for_all_lengths_and_rates():
    """Compiled at the first step, and never again, whatever comes: rates of decay, learning rates, lengths."""
    optimizer = adamw(weight_decay=0.1, mask=lambda path, p: path == "a")
    step_ = step_of(optimizer)
    params = {"a": torch.randn(6), "b": torch.randn(3, 3)}
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    with pytest.MonkeyPatch.context() as patch:
        compile_ = torch.compile
        patch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=counter, **options))
        state = optimizer.init(params)
        for i in range(3):
            params, state = step_(tree.map(torch.ones_like, params), state, params, 0.1 * i)
    more = {"a": torch.randn(4, 2, 5), "b": torch.randn(17)}
    step_(tree.map(torch.ones_like, more), optimizer.init(more), more, 0.1)
    assert counter.frame_count == 1


def test_stacks_of_muon_are_bounded(monkeypatch):
    import sys

    module = sys.modules["purelm.optim.muon"]
    params = {str(i): torch.randn(4, 3) for i in range(7)} | {"other": torch.randn(3, 4)}
    grads = tree.map(torch.randn_like, params)
    optimizer = muon(iteration_dtype=torch.float32)
    right, _ = step_of(optimizer)(grads, optimizer.init(params), copied(params), 0.1)
    monkeypatch.setattr(module, "STACK_BYTES", 3 * 48)
    assert [len(x) for x in module._stacks(tree.leaves(grads))] == [3, 3, 1, 1]
    found, _ = step_of(optimizer)(grads, optimizer.init(params), copied(params), 0.1)
    for x, y in zip(tree.leaves(right), tree.leaves(found), strict=True):
        torch.testing.assert_close(y, x, atol=1e-6, rtol=1e-6)


def test_parts_without_a_second_form_have_none_together():
    own = Optimizer(adamw().init, lambda *args: adamw().update(*args))
    assert step_of(labelled(lambda path, p: "a", {"a": sgd(), "b": own})) is None
    assert step_of(apply_if_finite(sgd())) is None  # the old values are needed until gradients are known


@pytest.mark.parametrize("kind", ["own", "finite", "in place"])
def test_a_training_step_without_a_second_form_is_the_same(kind):
    """A user's own optimizer, which is compiled as a whole, beside the one that writes over its state."""
    made = adamw(weight_decay=0.1)

    def update(grads, state, params, lr):
        return made.update(grads, state, params, lr)

    optimizer = {"own": Optimizer(made.init, update), "finite": apply_if_finite(made), "in place": made}[kind]
    assert (step_of(optimizer) is None) == (kind != "in place")

    def loss(params, batch):
        value = ((batch["x"] @ params["w"] + params["b"]) ** 2).mean()
        return value, {"size": batch["x"].abs().max()}

    params = {"w": torch.linspace(-1, 1, 12).view(4, 3), "b": torch.zeros(3)}
    batch = {"x": torch.linspace(0, 1, 20).view(5, 4)}
    plain = make_step(loss, optimizer, constant(0.1))
    compiled = jit(make_step(loss, optimizer, constant(0.1)), donate=0)
    state, donated = init_state(params, optimizer), init_state(copied(params), optimizer)
    for _ in range(3):
        state, metrics = plain(state, batch)
        old = donated
        donated, found = compiled(donated, batch)
        with pytest.raises(RuntimeError, match="was donated to jit"):
            old.params["w"] + 1
        assert metrics.keys() == found.keys()
        for x, y in zip(tree.leaves((state, metrics)), tree.leaves((donated, found)), strict=True):
            torch.testing.assert_close(y, x, atol=1e-6, rtol=1e-6)
    inner = donated.opt_state.inner if kind == "finite" else donated.opt_state
    assert int(donated.step) == 3 and int(inner.step) == 3


def test_without_donation_the_state_stays():
    optimizer = adamw()
    params = {"w": torch.ones(3)}
    step = jit(make_step(lambda p, b: ((p["w"] * b).sum(), {}), optimizer, constant(0.1)))
    state = init_state(params, optimizer)
    kept = copied(state)
    new, _ = step(state, torch.ones(3))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(kept), tree.leaves(state), strict=True))
    assert int(new.step) == 1 and not torch.equal(new.params["w"], state.params["w"])


def test_shared_memory_is_refused_and_nothing_written():
    optimizer = adamw()
    w = torch.ones(4)
    step = jit(make_step(lambda p, b: ((p["a"] * p["b"]).sum(), {}), optimizer, constant(0.1)), donate=0)
    state = init_state({"a": w, "b": w}, optimizer)
    with pytest.raises(ValueError, match="share memory"):
        step(state, torch.ones(3))
    assert torch.equal(w, torch.ones(4))
