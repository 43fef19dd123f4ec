"""SGD and Lion. Oracles: torch.optim.SGD; Lion's Program 1 in Python floats; closed forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import tree
from purelm.optim import apply_updates, is_matrix, lion, sgd

SHAPES = [(7, 5), (123,), (), (1, 1), (0, 3)]


def trees(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in SHAPES]


def run(optimizer, n, dtype, lr):
    params = trees(0, dtype)
    state = optimizer.init(params)
    for i in range(n):
        updates, state = optimizer.update(trees(i + 1, dtype), state, params, lr)
        params = apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("momentum,nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_sgd_equals_torch(momentum, nesterov, weight_decay, dtype, tolerance):
    """Oracle: torch.optim.SGD, 50 steps. fp32: torch fuses multiply and add, we round twice; values reach 8."""
    ours, state = run(sgd(momentum, weight_decay, nesterov=nesterov), 50, dtype, 0.05)
    theirs = [p.requires_grad_() for p in trees(0, dtype)]
    peer = torch.optim.SGD(theirs, lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    for i in range(50):
        for p, g in zip(theirs, trees(i + 1, dtype), strict=True):
            p.grad = g
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=tolerance)
    assert int(state.step) == 50
    assert (state.m == ()) == (momentum == 0.0)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=6), st.floats(-4, 4, width=32), st.booleans())
def test_sgd_is_linear_in_the_gradient(values, a, nesterov):
    """Law: update(a g + h) = a update(g) + update(h) from a fresh state, to fp64 rounding."""
    g = torch.tensor(values, dtype=torch.float64)
    h = g.flip(0) + 1
    optimizer = sgd(0.9, nesterov=True) if nesterov else sgd()
    params = torch.zeros_like(g)

    def update(x):
        return optimizer.update(x, optimizer.init(params), params, 0.3)[0]

    torch.testing.assert_close(update(a * g + h), a * update(g) + update(h), rtol=1e-12, atol=1e-9)


def test_sgd_mask():
    """Oracle: sgd with and without decay, leaf by leaf."""
    params, grads = trees(0), trees(1)

    def one(optimizer):
        return optimizer.update(grads, optimizer.init(params), params, 0.1)[0]

    masked, decayed, plain = one(sgd(0.0, 0.5, mask=is_matrix)), one(sgd(0.0, 0.5)), one(sgd())
    assert torch.equal(masked[0], decayed[0]) and torch.equal(masked[1], plain[1])
    assert not torch.equal(decayed[1], plain[1])


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lion_against_python_floats(weight_decay):
    """Oracle: Program 1 of the paper, number by number in fp64, 60 steps."""
    b1, b2, lr = 0.9, 0.99, 0.01
    ours, state = run(lion((b1, b2), weight_decay), 60, torch.float64, lr)
    narrow, _ = run(lion((b1, b2), weight_decay), 60, torch.float32, lr)
    for i in range(0, 35, 7):
        p, m = float(trees(0, torch.float64)[0].flatten()[i]), 0.0
        for t in range(60):
            g = float(trees(t + 1, torch.float64)[0].flatten()[i])
            c = b1 * m + (1 - b1) * g
            m = b2 * m + (1 - b2) * g
            p = p - lr * ((c > 0) - (c < 0) + weight_decay * p)
        assert float(ours[0].flatten()[i]) == pytest.approx(p, abs=1e-12)
        assert float(narrow[0].flatten()[i]) == pytest.approx(p, abs=2e-6)  # 60 roundings of fp32
        assert float(state.m[0].flatten()[i]) == pytest.approx(m, abs=1e-12)


def test_lion_moves_every_element_by_lr():
    """Closed form: without decay an update is exactly -lr, 0 or lr."""
    params = {"w": torch.tensor([1.0, 2.0, 3.0])}
    optimizer = lion()
    updates, _ = optimizer.update({"w": torch.tensor([5.0, 0.0, -1e-9])}, optimizer.init(params), params, 0.5)
    assert updates["w"].tolist() == [-0.5, 0.0, 0.5]
    masked = lion(weight_decay=0.5, mask=is_matrix)
    assert torch.equal(masked.update(params, masked.init(params), params, 0.5)[0]["w"], torch.full((3,), -0.5))


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: sgd(momentum=1.0), "momentum must be in"),
        (lambda: sgd(weight_decay=-1.0), "weight_decay must be in"),
        (lambda: sgd(nesterov=True), "nesterov needs momentum > 0, got momentum=0.0"),
        (lambda: lion(betas=(1.5, 0.9)), r"betas\[0\] must be in"),
        (lambda: lion(betas=(0.5, 1.0)), r"betas\[1\] must be in"),
        (lambda: lion(weight_decay=-1.0), "weight_decay must be in"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_moment_dtype():
    """The dtype argument decides what is stored; None is fp32 for narrow and fp64 for fp64 parameters."""
    for make in (lambda **k: sgd(0.9, **k), lion):
        for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
            assert {m.dtype for m in tree.leaves(make().init(trees(0, dtype)).m)} == {expected}
        optimizer = make(dtype=torch.bfloat16)
        _, state = optimizer.update(trees(1), optimizer.init(trees(0)), trees(0), 0.1)
        assert {m.dtype for m in tree.leaves(state.m)} == {torch.bfloat16}
