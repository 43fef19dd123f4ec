"""Advantages of tokens. Oracles: loops over the chosen tokens of each row, in numpy float64; PPO's identities."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.align import token_advantages as tok
from purelm.testing import check_op, without
from purelm.testing.operations import OP_LAWS

F64 = torch.float64
TOL = {"rtol": 1e-9, "atol": 1e-9}


def drawn(b=4, t=7, seed=0):
    """(rewards, values, mask): rows with holes in the middle, one of them without any token."""
    rng = np.random.default_rng(seed)
    mask = rng.random((b, t)) < 0.6
    mask[0] = False
    return torch.from_numpy(rng.normal(size=(b, t))), torch.from_numpy(rng.normal(size=(b, t))), torch.tensor(mask)


def over_tokens(f, mask, *tensors):
    """f of the lists of each row's chosen tokens, put back where they were; 0 elsewhere."""
    out = np.zeros(mask.shape)
    for b, row in enumerate(mask.numpy()):
        at = np.flatnonzero(row)
        if len(at):
            out[b, at] = f(*[[float(x[b, t]) for t in at] for x in tensors])
    return torch.from_numpy(out)


def returns_loop(r, gamma):
    return [sum(gamma ** (s - t) * r[s] for s in range(t, len(r))) for t in range(len(r))]


def gae_loop(r, v, gamma, lam):
    delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(r))) for t in range(len(r))]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns(gamma):
    r, _, mask = drawn()
    wanted = over_tokens(lambda x: returns_loop(x, gamma), mask, r)
    torch.testing.assert_close(tok.returns(r, mask, gamma=gamma), wanted, **TOL)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
def test_gae(gamma, lam):
    r, v, mask = drawn()
    a, aux = tok.gae(r, v, mask, gamma=gamma, lam=lam)
    wanted = over_tokens(lambda x, y: gae_loop(x, y, gamma, lam), mask, r, v)
    torch.testing.assert_close(a, wanted, **TOL)
    torch.testing.assert_close(aux["returns"], torch.where(mask, wanted + v, 0.0), **TOL)
    torch.testing.assert_close(aux["reward"], torch.where(mask, r, 0.0).sum(1).mean(), **TOL)


def test_gae_of_one_and_one_is_the_return_minus_the_value():
    r, v, mask = drawn(seed=2)
    a, _ = tok.gae(r, v, mask)
    torch.testing.assert_close(a, torch.where(mask, tok.returns(r, mask) - v, 0.0), **TOL)


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitened(ddof):
    r, _, mask = drawn()
    x = r[mask].numpy()
    wanted = torch.zeros_like(r)
    wanted[mask] = torch.from_numpy((x - x.mean()) / np.sqrt(x.var(ddof=ddof) + 1e-3))
    torch.testing.assert_close(tok.whitened(r, mask, ddof=ddof, eps=1e-3), wanted, **TOL)


def test_whitened_of_few():
    """No token, and one: 0, not nan."""
    assert torch.equal(tok.whitened(torch.ones(1, 2), torch.zeros(1, 2)), torch.zeros(1, 2))
    assert torch.equal(tok.whitened(torch.ones(1, 2), torch.tensor([[1, 0]])), torch.zeros(1, 2))


def test_reinforce_plus_plus():
    """With gamma 1 and the reward at the end, every token's return is the reward: whitened with lengths as weights."""
    _, _, mask = drawn()
    r = torch.tensor([0.5, 1.0, 0.0, 0.3], dtype=F64)
    a, aux = tok.reinforce_plus_plus(tok.at_last_token(r, mask), mask)
    every = np.concatenate([[float(x)] * int(n) for x, n in zip(r, mask.sum(1), strict=True)])
    for b in range(1, 4):
        wanted = (float(r[b]) - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8)
        assert set(a[b][mask[b]].tolist()) and abs(float(a[b][mask[b]][0]) - wanted) < 1e-9
        assert float((a[b][mask[b]] - a[b][mask[b]][0]).abs().max()) < 1e-12
    torch.testing.assert_close(aux["reward"], r[1:].sum() / 4)  # the first row has no token, and loses its reward


def test_reinforce_plus_plus_baseline():
    _, _, mask = drawn()
    r = torch.tensor([[0.5, 1.0], [0.0, 0.3]], dtype=F64)
    centred = (r - r.mean(1, keepdim=True)).view(-1)
    a, aux = tok.reinforce_plus_plus_baseline(r, mask)
    torch.testing.assert_close(a, tok.whitened(centred[:, None].expand(4, 7), mask), **TOL)
    torch.testing.assert_close(aux["reward"], r.mean())
    flat, _ = tok.reinforce_plus_plus_baseline(torch.full((2, 2), 0.1), mask)
    assert torch.equal(flat, torch.zeros(4, 7))


def test_optimal_token_baseline():
    """Loops; with weights that do not depend on the response (uniform policy, one length) it is the group's mean."""
    rng = np.random.default_rng(4)
    _, _, mask = drawn(seed=4)
    r, lp = torch.from_numpy(rng.random((2, 2))), torch.from_numpy(-rng.random((4, 7)))
    squares = (2 * lp).exp() + 0.1
    wanted = torch.zeros(4, 7, dtype=F64)
    W = over_tokens(
        lambda a, s: np.cumsum([1 - 2 * np.exp(x) + y for x, y in zip(a, s, strict=True)]), mask, lp, squares
    )
    for p in range(2):
        for t in range(7):
            rows = [b for b in (2 * p, 2 * p + 1) if mask[b, t]]
            for b in rows:
                base = sum(float(r.view(-1)[j] * W[j, t]) for j in rows) / sum(float(W[j, t]) for j in rows)
                wanted[b, t] = float(r.view(-1)[b]) - base
    a, _ = tok.optimal_token_baseline(r, lp, squares, mask)
    torch.testing.assert_close(a, wanted, **TOL)
    uniform = torch.full((4, 7), -np.log(5.0), dtype=F64)
    a, _ = tok.optimal_token_baseline(r, uniform, torch.full((4, 7), 0.2, dtype=F64), torch.ones(4, 7))
    torch.testing.assert_close(a[:, 3].view(2, 2), r - r.mean(1, keepdim=True), **TOL)


FUNCTIONS = {
    "returns": lambda r, v, m: tok.returns(r, m),
    "discounted": lambda r, v, m: tok.returns(r, m, gamma=0.9),
    "whitened": lambda r, v, m: tok.whitened(r, m),
    "reinforce_plus_plus": lambda r, v, m: tok.reinforce_plus_plus(r, m)[0],
    "gae": lambda r, v, m: tok.gae(r, v, m, lam=0.9)[0],
    "otb": lambda r, v, m: tok.optimal_token_baseline(r[:, :1].nan_to_num().reshape(2, 2), r, v, m)[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_masked_has_no_influence(name, bad):
    """Exact, in value and gradient; masked results are 0."""
    f = FUNCTIONS[name]
    r, v, mask = drawn()
    mask[:, 0] = True
    with_bad = [torch.where(mask, x, bad).requires_grad_() for x in (r, v)]
    plain = [x.clone().requires_grad_() for x in (r, v)]
    a, b = f(*with_bad, mask), f(*plain, mask)
    assert torch.equal(a, b) and not bool((a * ~mask).any())
    (ga,), (gb,) = (torch.autograd.grad((x * v).sum(), (y[0],)) for x, y in ((a, with_bad), (b, plain)))
    assert torch.equal(torch.where(mask, ga, 0.0), torch.where(mask, gb, 0.0)) and bool(ga.isfinite().all())


@given(st.integers(0, 3), st.integers(0, 999))
def test_padding_changes_nothing(n, seed):
    r, v, mask = drawn(seed=seed)
    pad = partial(torch.nn.functional.pad, pad=(0, n))
    for f in (FUNCTIONS[name] for name in ("discounted", "reinforce_plus_plus", "gae")):
        torch.testing.assert_close(f(pad(r), pad(v), pad(mask))[:, :7], f(r, v, mask), **TOL)


def test_no_gradient_enters_values():
    r, v, mask = drawn()
    v.requires_grad_()
    assert not tok.gae(r, v, mask)[0].requires_grad


@pytest.mark.parametrize("name", ["returns", "discounted", "whitened"])
def test_as_an_op(name):
    """check_op: every transform of torch."""
    r, v, mask = drawn()
    laws = without(OP_LAWS, "compile", "value", "gradient", "dtypes")
    check_op(lambda r, m: FUNCTIONS[name](r, v, m), (r, mask), laws=laws)


def test_half_precision_is_computed_in_fp32():
    r, v, mask = (x.bfloat16() if x.is_floating_point() else x for x in drawn())
    for f in (FUNCTIONS["discounted"], FUNCTIONS["gae"], FUNCTIONS["whitened"]):
        assert f(r, v, mask).dtype == torch.float32
        torch.testing.assert_close(f(r, v, mask), f(r.float(), v.float(), mask))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tok.returns(torch.ones(2, 3), torch.ones(2, 2)), r"got \(2, 3\) and \(2, 2\)"),
        (lambda: tok.returns(torch.ones(2, 0), torch.ones(2, 0)), r"returns: tensors \(B, T\) .* got \(2, 0\)"),
        (lambda: tok.returns(torch.ones(2, 3), torch.ones(2, 3), gamma=1.5), "gamma must be in 0..1, got 1.5"),
        (lambda: tok.gae(*[torch.ones(2, 3)] * 3, lam=-1.0), "lam must be in 0..1, got -1.0"),
        (lambda: tok.whitened(torch.ones(2, 3), torch.ones(2, 3), eps=0.0), "eps above 0, got 1 and 0.0"),
        (lambda: tok.at_last_token(torch.ones(3), torch.ones(2, 3)), r"3 rewards need a mask \(3, T\), got \(2, 3\)"),
        (
            lambda: tok.reinforce_plus_plus_baseline(torch.ones(2, 2), torch.ones(3, 2)),
            r"rewards \(2, 2\) need a mask of 4 rows, got \(3, 2\)",
        ),
    ],
)
def test_bad_arguments(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
