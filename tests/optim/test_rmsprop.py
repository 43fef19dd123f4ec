"""RMSprop. Oracles: torch.optim.RMSprop; its formulas in Python floats; closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import checkpoint, tree
from purelm.interop.torch_state import from_torch, to_torch
from purelm.optim import apply_updates, is_matrix, rmsprop

SHAPES = [(7, 5), (123,), (), (1, 1), (0, 3)]


def trees(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in SHAPES]


def run(optimizer, n, dtype, lr):
    params = trees(0, dtype)
    state = optimizer.init(params)
    for i in range(n):
        updates, state = optimizer.update(trees(i + 1, dtype), state, params, lr)
        params = apply_updates(params, updates)
    return params, state


def peer(n, dtype, lr, **options):
    """(parameters, torch.optim.RMSprop) after n steps."""
    params = [p.requires_grad_() for p in trees(0, dtype)]
    optimizer = torch.optim.RMSprop(params, lr=lr, **options)
    for i in range(n):
        for p, g in zip(params, trees(i + 1, dtype), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params], optimizer


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_equals_torch(momentum, centered, weight_decay, dtype, tolerance):
    """50 steps. fp32: torch fuses multiply and add, we round twice; centred, v - b^2 cancels."""
    options = {"momentum": momentum, "centered": centered, "weight_decay": weight_decay}
    ours, state = run(rmsprop(0.9, 1e-6, **options), 50, dtype, 0.01)
    theirs, _ = peer(50, dtype, 0.01, alpha=0.9, eps=1e-6, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    assert int(state.step) == 50
    assert (state.m == ()) == (momentum == 0.0) and (state.b == ()) == (not centered)


def test_defaults_are_torch_s():
    ours, _ = run(rmsprop(), 5, torch.float64, 0.01)
    for a, b in zip(ours, peer(5, torch.float64, 0.01)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_against_python_floats():
    """All options at once, number by number in fp64."""
    a, eps, wd, mu, lr = 0.9, 1e-3, 0.2, 0.5, 0.02
    ours, state = run(rmsprop(a, eps, wd, momentum=mu, centered=True), 30, torch.float64, lr)
    for i in range(0, 35, 7):
        p, v, m, b = float(trees(0)[0].flatten()[i]), 0.0, 0.0, 0.0
        for t in range(30):
            g = float(trees(t + 1)[0].flatten()[i]) + wd * p
            v, b = a * v + (1 - a) * g * g, a * b + (1 - a) * g
            m = mu * m + g / (math.sqrt(v - b * b) + eps)
            p -= lr * m
        found = [x[0].flatten()[i].item() for x in (ours, state.v, state.m, state.b)]
        assert found == pytest.approx([p, v, m, b], abs=1e-12)


@given(st.floats(0.01, 100), st.lists(st.floats(-8, 8).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=6))
def test_steps_do_not_depend_on_the_gradient_s_scale(scale, values):
    """Law: with eps = 0, update(c g) = update(g) for c > 0; the first step is lr / sqrt(1 - a), by its closed form."""
    g = torch.tensor(values, dtype=torch.float64)
    optimizer, params = rmsprop(0.75, 0.0, momentum=0.5), torch.zeros_like(g)
    found = []
    for c in (1.0, scale):
        state = optimizer.init(params)
        first, state = optimizer.update(c * g, state, params, 0.3)
        found.append((first, optimizer.update(c * g.flip(0), state, params, 0.3)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0][0], -0.3 * 2 * g.sign())


def test_centred_at_equal_gradients_is_finite():
    """v - b^2 tends to 0 and is rounded below it somewhere, where torch's root is nan."""
    g = torch.linspace(0.1, 0.9, 4096)
    params, theirs = {"w": torch.ones(4096)}, torch.ones(4096).requires_grad_()
    optimizer, other = rmsprop(0.9, 1e-3, centered=True), torch.optim.RMSprop([theirs], alpha=0.9, centered=True)
    state, theirs.grad = optimizer.init(params), g
    for _ in range(200):
        updates, state = optimizer.update({"w": g}, state, params, 1.0)
        other.step()
    assert updates["w"].isfinite().all() and theirs.isnan().any()
    assert float(updates["w"].abs().max()) <= 900  # g / eps, at most


def test_mask():
    """Oracle: with and without decay, leaf by leaf."""
    params, grads = trees(0), trees(1)

    def one(optimizer):
        return optimizer.update(grads, optimizer.init(params), params, 0.1)[0]

    masked, decayed, plain = (
        one(rmsprop(0.9, 1.0, 0.5, mask=is_matrix)),
        one(rmsprop(0.9, 1.0, 0.5)),
        one(rmsprop(0.9, 1.0)),
    )
    assert torch.equal(masked[0], decayed[0]) and torch.equal(masked[1], plain[1])
    assert not torch.equal(decayed[1], plain[1])


def test_state_goes_to_torch_and_back_and_to_a_checkpoint(tmp_path):
    """Oracles: the state dict of torch's own optimizer after the same steps; what was saved."""
    optimizer = rmsprop(0.9, 1e-6, momentum=0.5, centered=True)
    params, state = run(optimizer, 4, torch.float64, 0.01)
    theirs = peer(4, torch.float64, 0.01, alpha=0.9, eps=1e-6, momentum=0.5, centered=True)[1].state_dict()["state"]
    ours = to_torch(state, params)
    for i, entries in theirs.items():
        assert ours[i].keys() == entries.keys()
        for name, x in entries.items():
            torch.testing.assert_close(ours[i][name], x.detach(), rtol=0, atol=1e-12)
    again = from_torch(theirs, optimizer.init(params), params, range(len(params)))
    checkpoint.save(tmp_path, 4, {"state": state})
    loaded, _ = checkpoint.load(tmp_path, like={"state": optimizer.init(params)})
    for found in (again, loaded["state"]):
        assert tree.structure(found) == tree.structure(state)
        for x, y in zip(tree.leaves(found), tree.leaves(state), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: rmsprop(alpha=1.0), "alpha must be in"),
        (lambda: rmsprop(eps=-1.0), "eps must be in"),
        (lambda: rmsprop(weight_decay=-1.0), "weight_decay must be in"),
        (lambda: rmsprop(momentum=1.0), "momentum must be in"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_moment_dtype():
    """None is fp32 for narrow and fp64 for fp64 parameters."""
    make = lambda **k: rmsprop(momentum=0.5, centered=True, **k)  # noqa: E731
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        assert {x.dtype for x in tree.leaves(make().init(trees(0, dtype))[1:])} == {expected}
    optimizer = make(dtype=torch.bfloat16)
    _, state = optimizer.update(trees(1), optimizer.init(trees(0)), trees(0), 0.1)
    assert {x.dtype for x in tree.leaves(state[1:])} == {torch.bfloat16}
