"""AdamW. Oracles: torch.optim.AdamW and Adam, the published algorithms in Python floats, closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from purelm import tree
from purelm.optim import adam, adamw, add_weight_decay, apply_updates, chain, is_matrix
from purelm.optim.base import Optimizer

SHAPES = [(7, 5), (123,), (), (1, 1), (0, 3), (2, 3, 4)]


def trees(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {f"p{i}": (torch.randn(s, generator=g, dtype=torch.float64) * scale).to(dtype) for i, s in enumerate(SHAPES)}


def run(optimizer: Optimizer, n: int, dtype: torch.dtype, lr: Callable[[int], float | Tensor], scale: float = 0.5):
    params = trees(0, dtype, scale)
    state = optimizer.init(params)
    for i in range(n):
        updates, state = optimizer.update(trees(i + 1, dtype), state, params, lr(i))
        params = apply_updates(params, updates)
    return params, state


def run_torch(make: Callable[..., torch.optim.Optimizer], n: int, dtype: torch.dtype, lr, scale: float = 0.5):
    params = {k: p.requires_grad_() for k, p in trees(0, dtype, scale).items()}
    optimizer = make(list(params.values()))
    for i in range(n):
        for p, g in zip(params.values(), trees(i + 1, dtype).values(), strict=True):
            p.grad = g
        for group in optimizer.param_groups:
            group["lr"] = float(lr(i))
        optimizer.step()
    return {k: p.detach() for k, p in params.items()}, optimizer


def largest_difference(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True) if x.numel())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas,eps", [((0.9, 0.999), 1e-8), ((0.9, 0.95), 1e-5), ((0.0, 0.0), 1e-3)])
@pytest.mark.parametrize("foreach", [False, True])
def test_equals_torch_in_fp32(weight_decay, betas, eps, foreach):
    """Oracle: torch.optim.AdamW, 100 steps of changing lr; to 1e-7 (measured: 1e-9 with decay, 0 without)."""
    lr = lambda i: 1e-3 * (1 + i % 7)  # noqa: E731
    ours, state = run(adamw(betas, eps, weight_decay), 100, torch.float32, lr)
    theirs, peer = run_torch(
        lambda p: torch.optim.AdamW(p, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach),
        100,
        torch.float32,
        lr,
    )
    assert largest_difference(ours, theirs) <= 1e-7
    if not foreach:  # then the moments are the same floats, and so are parameters without decay
        moments = list(peer.state.values())
        assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(tree.leaves(state.m), moments, strict=True))
        assert all(torch.equal(v, s["exp_avg_sq"]) for v, s in zip(tree.leaves(state.v), moments, strict=True))
        if weight_decay == 0.0:
            assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True))
    assert int(state.step) == 100 and state.step.dtype == torch.int64 and state.step.ndim == 0


def test_equals_torch_with_a_large_lr():
    """Oracle: torch.optim.AdamW at lr 0.1, decay 0.1; differences are last-bit ties (3 ulp of the largest, 2^2)."""
    ours, _ = run(adamw(weight_decay=0.1), 10, torch.float32, lambda i: 0.1, scale=1.0)
    theirs, _ = run_torch(lambda p: torch.optim.AdamW(p, weight_decay=0.1), 10, torch.float32, lambda i: 0.1, scale=1.0)
    assert largest_difference(ours, theirs) <= 3 * 2.0**-22
    same = sum(int((ours[k] == theirs[k]).sum()) for k in ours)
    assert same >= 0.97 * tree.n_params(ours)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_in_fp64(weight_decay):
    """Oracle: torch.optim.AdamW in fp64, 100 steps; 1e-12 is four digits above rounding."""
    ours, state = run(adamw((0.9, 0.95), weight_decay=weight_decay), 100, torch.float64, lambda i: 1e-2)
    theirs, _ = run_torch(
        lambda p: torch.optim.AdamW(p, betas=(0.9, 0.95), weight_decay=weight_decay), 100, torch.float64, lambda i: 1e-2
    )
    assert largest_difference(ours, theirs) <= 1e-12
    assert state.m["p0"].dtype == torch.float64


def test_adam_equals_torch_adam_with_l2():
    """Oracle: torch.optim.Adam(weight_decay), whose decay is coupled."""
    ours, _ = run(chain(add_weight_decay(0.1), adam()), 50, torch.float32, lambda i: 1e-3)
    theirs, _ = run_torch(lambda p: torch.optim.Adam(p, weight_decay=0.1), 50, torch.float32, lambda i: 1e-3)
    assert largest_difference(ours, theirs) <= 1e-7


def slow(p: float, grads: list[float], lrs: list[float], *, betas, eps, wd, placement, order, eps_root=0.0) -> float:
    """The formulas of the docstring on one number, in Python floats."""
    b1, b2 = betas
    m = v = 0.0
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        if placement == "outside":
            d = lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t) + eps_root) + eps)
        else:
            d = lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (math.sqrt(v + eps_root) + eps)
        p = p * (1 - lr * wd) - d if order == "before" else (p - d) * (1 - lr * wd)
    return p


@pytest.mark.parametrize("placement", ["outside", "uncorrected"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("eps_root", [0.0, 1e-3])
def test_every_variant_against_python_floats(placement, order, eps_root):
    """Oracle: the published algorithms, number by number; eps = 0.01 so that its place shows."""
    optimizer = adamw(
        (0.9, 0.99), 0.01, 0.3, eps_placement=placement, decay_order=order, eps_root=eps_root, dtype=torch.float64
    )
    lr = lambda i: 0.02 * (1 + i % 3)  # noqa: E731
    ours, _ = run(optimizer, 100, torch.float64, lr)
    narrow, _ = run(
        adamw((0.9, 0.99), 0.01, 0.3, eps_placement=placement, decay_order=order, eps_root=eps_root),
        100,
        torch.float32,
        lr,
    )
    start, grads = trees(0, torch.float64, 0.5), [trees(i + 1, torch.float64) for i in range(100)]
    for i in range(0, 35, 7):
        expected = slow(
            float(start["p0"].flatten()[i]),
            [float(g["p0"].flatten()[i]) for g in grads],
            [lr(k) for k in range(100)],
            betas=(0.9, 0.99),
            eps=0.01,
            wd=0.3,
            placement=placement,
            order=order,
            eps_root=eps_root,
        )
        assert float(ours["p0"].flatten()[i]) == pytest.approx(expected, abs=1e-12)
        assert float(narrow["p0"].flatten()[i]) == pytest.approx(expected, abs=1e-5)  # 100 roundings of fp32 at 1


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_course_algorithm_in_fp32(order):
    """Oracle: Algorithm 1 of the course as loops of torch operations in fp32, in its own order; to 1e-7.

    2025: m, v, alpha_t, step, then decay. 2026: alpha_t, decay, m, v, then step.
    """
    params, lr, wd, eps, (b1, b2) = trees(0, scale=0.5), 1e-3, 0.1, 1e-8, (0.9, 0.999)
    m, v = tree.zeros_like(params), tree.zeros_like(params)
    for t in range(1, 101):
        grads = trees(t)
        alpha_t = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
        for k, g in grads.items():
            if order == "before":
                params[k] = params[k] - lr * wd * params[k]
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
            params[k] = params[k] - alpha_t * m[k] / (torch.sqrt(v[k]) + eps)
            if order == "after":
                params[k] = params[k] - lr * wd * params[k]
    optimizer = adamw((b1, b2), eps, wd, eps_placement="uncorrected", decay_order=order)
    ours, _ = run(optimizer, 100, torch.float32, lambda i: lr)
    assert largest_difference(ours, params) <= 1e-7  # measured 3e-8


def test_first_step_in_closed_form():
    """Oracle: at t = 1 with eps 0, m_hat / sqrt(v_hat) = sign(g), whatever the betas."""
    params = {"w": torch.tensor([1.0, 2.0, -3.0])}
    optimizer = adam((0.8, 0.6), eps=0.0)
    updates, _ = optimizer.update({"w": torch.tensor([1e-4, -5.0, 1e3])}, optimizer.init(params), params, 0.25)
    torch.testing.assert_close(updates["w"], torch.tensor([-0.25, 0.25, -0.25]), rtol=1e-6, atol=0)


def test_mask_decides_what_decays():
    """Oracle: adamw with decay and without it, leaf by leaf; as predicate and as tree."""
    params, grads = {"w": torch.randn(3, 2), "b": torch.randn(3)}, {"w": torch.randn(3, 2), "b": torch.randn(3)}

    def one(optimizer):
        return optimizer.update(grads, optimizer.init(params), params, 0.1)[0]

    decayed, plain = one(adamw(weight_decay=0.5)), one(adamw(weight_decay=0.0))
    for mask in (is_matrix, lambda path, p: path == "w", {"w": True, "b": False}):
        masked = one(adamw(weight_decay=0.5, mask=mask))
        assert torch.equal(masked["w"], decayed["w"]) and torch.equal(masked["b"], plain["b"])
    assert not torch.equal(decayed["b"], plain["b"])


def test_bias_correction_at_a_late_step():
    """Oracle: Python floats at t = 1 000 000; the corrections have gone to 1 and nothing overflows."""
    params = {"w": torch.ones(3)}
    optimizer = adamw(weight_decay=0.0)
    state = optimizer.init(params)._replace(
        step=torch.tensor(999_999), m={"w": torch.full((3,), 0.5)}, v={"w": torch.full((3,), 0.25)}
    )
    updates, state = optimizer.update({"w": torch.full((3,), 0.5)}, state, params, 0.1)
    torch.testing.assert_close(updates["w"], torch.full((3,), -0.1), rtol=1e-6, atol=0)
    assert int(state.step) == 1_000_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_have_wide_moments(dtype):
    """Oracle: the same run on fp32 copies of the narrow parameters, rounded at each step."""
    optimizer = adamw(weight_decay=0.1)
    params = trees(0, dtype)
    wide, state, wide_state = tree.cast(params, torch.float32), optimizer.init(params), None
    wide_state = optimizer.init(wide)
    for i in range(5):
        grads = trees(i + 1, dtype)
        updates, state = optimizer.update(grads, state, params, 0.1)
        params = apply_updates(params, updates)
        updates, wide_state = optimizer.update(tree.cast(grads, torch.float32), wide_state, wide, 0.1)
        wide = tree.cast(tree.cast(apply_updates(wide, updates), dtype), torch.float32)
    assert all(m.dtype == torch.float32 for m in tree.leaves(state.m))
    assert all(p.dtype == dtype for p in tree.leaves(params))
    assert largest_difference(tree.cast(params, torch.float32), wide) == 0.0


def test_dtype_of_the_moments_is_an_argument():
    """Oracle: fp32 arithmetic, with the moments rounded to bf16 in between."""
    optimizer = adamw(weight_decay=0.0, dtype=torch.bfloat16)
    params, grads = trees(0), trees(1)
    state = optimizer.init(params)
    assert all(x.dtype == torch.bfloat16 for x in tree.leaves(state.m) + tree.leaves(state.v))
    updates, state = optimizer.update(grads, state, params, 0.1)
    exact, exact_state = adamw(weight_decay=0.0).update(grads, adamw().init(params), params, 0.1)
    assert largest_difference(updates, exact) == 0.0  # rounding enters in what is stored, not in this step
    assert torch.equal(state.m["p0"], exact_state.m["p0"].bfloat16())


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0.0, 1.0\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"eps": -1.0}, "eps must be"),
        ({"eps_root": -1.0}, "eps_root must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"eps_placement": "inside"}, "eps_placement must be one of 'outside', 'uncorrected', got 'inside'"),
        ({"decay_order": "first"}, "decay_order must be one of 'before', 'after', got 'first'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        adamw(**arguments)


@pytest.mark.parametrize("eps_placement", ["outside", "uncorrected"])
def test_eps_root_makes_the_update_differentiable_at_zero(eps_placement):
    """Oracle: lr / (sqrt(eps_root) + eps), the derivative of the first step at g = 0; without eps_root it is nan."""
    params, lr, eps_root = {"w": torch.zeros(1, dtype=torch.float64)}, 0.1, 1e-6

    def moved(optimizer, g):
        return optimizer.update({"w": g}, optimizer.init(params), params, lr)[0]["w"].sum()

    zero = torch.zeros(1, dtype=torch.float64)
    smooth = adam(eps=0.0, eps_root=eps_root, eps_placement=eps_placement)
    slope = torch.func.grad(lambda g: moved(smooth, g))(zero)
    scale = 1.0 if eps_placement == "outside" else (1 - 0.999) ** 0.5  # eps_root beside v, which is not corrected yet
    torch.testing.assert_close(slope.item(), -lr * scale / eps_root**0.5, rtol=1e-9, atol=0)
    assert torch.func.grad(lambda g: moved(adam(eps_placement=eps_placement), g))(zero).isnan().all()
