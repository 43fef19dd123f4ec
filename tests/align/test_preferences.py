"""Losses of preferences.

Oracles: their formulas as papers print them, in numpy's float64, with sigmoids and logarithms spelt out; derivatives in
closed form; identities between the losses; the laws of an op.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.answers import length_desensitized, sequence_log_probs, token_mean
from purelm.align.preferences import (
    apo_down,
    apo_zero,
    cdpo,
    dpo,
    dpo_norm,
    hinge,
    ipo,
    kto,
    kto_kl,
    reward_model,
    robust_dpo,
)
from purelm.align.reference_free import cpo, log1mexp, orpo, simpo
from purelm.testing import check_op, without
from purelm.testing.operations import OP_LAWS

NW, NL = torch.tensor([3, 5, 1, 8]), torch.tensor([4, 2, 6, 8])
numbers = st.floats(-40, -0.05)
fours = st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=4, max_size=4)


def s(x):
    return 1 / (1 + np.exp(-x))


def log_odds(a):
    return np.log(np.exp(a) / (1 - np.exp(a)))


# name: (ours of (w, l, ref_w, ref_l), the formula, dL/dw and dL/dl), all with b = 0.3, n_w, n_l.
B, E, G, ALPHA = 0.3, 0.2, 0.7, 0.6
n_w, n_l = NW.numpy(), NL.numpy()
WITH_LENGTHS = dict(n_chosen=NW, n_rejected=NL)


def of_d(f, slope):
    """A loss of d alone: dL/dw = slope(d) = -dL/dl."""
    return lambda w, l, rw, rl: f((w - rw) - (l - rl)), lambda w, l, rw, rl: (
        slope((w - rw) - (l - rl)), -slope((w - rw) - (l - rl))
    )  # fmt: skip


def mean_d(w, l, rw, rl):
    return (w - rw) / n_w - (l - rl) / n_l


def odds_slope(a):
    """d log_odds / da."""
    return 1 / (1 - np.exp(a))


def orpo_slopes(w, l, rw, rl):
    a, c = w / n_w, l / n_l
    inner = -B * s(-(log_odds(a) - log_odds(c)))
    return (-1 + inner * odds_slope(a)) / n_w, -inner * odds_slope(c) / n_l


CASES = {
    "dpo": (partial(dpo, beta=B), *of_d(lambda d: -np.log(s(B * d)), lambda d: -B * s(-B * d))),
    "cdpo": (
        partial(cdpo, beta=B, label_smoothing=E),
        *of_d(
            lambda d: -(1 - E) * np.log(s(B * d)) - E * np.log(s(-B * d)),
            lambda d: -B * (1 - E) * s(-B * d) + B * E * s(B * d),
        ),
    ),
    "robust": (
        partial(robust_dpo, beta=B, label_smoothing=E),
        *of_d(
            lambda d: (-(1 - E) * np.log(s(B * d)) + E * np.log(s(-B * d))) / (1 - 2 * E),
            lambda d: B * (-(1 - E) * s(-B * d) - E * s(B * d)) / (1 - 2 * E),
        ),
    ),
    "ipo": (partial(ipo, beta=B), *of_d(lambda d: (d - 1 / (2 * B)) ** 2, lambda d: 2 * (d - 1 / (2 * B)))),
    "ipo of means": (
        partial(ipo, beta=B, **WITH_LENGTHS),
        lambda *x: (mean_d(*x) - 1 / (2 * B)) ** 2,
        lambda *x: (2 * (mean_d(*x) - 1 / (2 * B)) / n_w, -2 * (mean_d(*x) - 1 / (2 * B)) / n_l),
    ),
    "hinge": (
        partial(hinge, beta=B),
        *of_d(lambda d: np.maximum(0, 1 - B * d), lambda d: np.where(B * d < 1, -B, 0.0)),
    ),
    "dpo_norm": (
        partial(dpo_norm, beta=B, **WITH_LENGTHS),
        lambda *x: -np.log(s(B * mean_d(*x))),
        lambda *x: (-B * s(-B * mean_d(*x)) / n_w, B * s(-B * mean_d(*x)) / n_l),
    ),
    "apo_zero": (
        partial(apo_zero, beta=B),
        lambda w, l, rw, rl: 1 - s(B * (w - rw)) + s(B * (l - rl)),
        lambda w, l, rw, rl: (
            -B * s(B * (w - rw)) * s(-B * (w - rw)), B * s(B * (l - rl)) * s(-B * (l - rl))
        ),
    ),
    "apo_down": (
        partial(apo_down, beta=B),
        lambda w, l, rw, rl: s(B * (w - rw)) + 1 - s(B * ((w - rw) - (l - rl))),
        lambda w, l, rw, rl: (
            B * s(B * (w - rw)) * s(-B * (w - rw)) - B * s(B * (w - rw - l + rl)) * s(-B * (w - rw - l + rl)),
            B * s(B * (w - rw - l + rl)) * s(-B * (w - rw - l + rl)),
        ),
    ),
    "simpo": (
        lambda w, l, rw, rl: simpo(w, l, beta=B, gamma=G, **WITH_LENGTHS),
        lambda w, l, rw, rl: -np.log(s(B * (w / n_w - l / n_l) - G)),
        lambda w, l, rw, rl: (
            -B * s(G - B * (w / n_w - l / n_l)) / n_w, B * s(G - B * (w / n_w - l / n_l)) / n_l
        ),
    ),
    "orpo": (
        lambda w, l, rw, rl: orpo(w, l, beta=B, **WITH_LENGTHS),
        lambda w, l, rw, rl: -w / n_w - B * np.log(s(log_odds(w / n_w) - log_odds(l / n_l))),
        orpo_slopes,
    ),
    "cpo": (
        lambda w, l, rw, rl: cpo(w, l, beta=B, alpha=ALPHA),
        lambda w, l, rw, rl: -np.log(s(B * (w - l))) - ALPHA * w,
        lambda w, l, rw, rl: (-B * s(-B * (w - l)) - ALPHA, B * s(-B * (w - l))),
    ),
    "cpo of means": (
        lambda w, l, rw, rl: cpo(w, l, beta=B, alpha=ALPHA, n_chosen=NW),
        lambda w, l, rw, rl: -np.log(s(B * (w - l))) - ALPHA * w / n_w,
        lambda w, l, rw, rl: (-B * s(-B * (w - l)) - ALPHA / n_w, B * s(-B * (w - l))),
    ),
    "reward model": (
        lambda w, l, rw, rl: reward_model(w, l, torch.tensor([0.0, 1.0, 2.0, 3.0])),
        lambda w, l, rw, rl: -np.log(s(w - l - np.arange(4.0))),
        lambda w, l, rw, rl: (-s(np.arange(4.0) - w + l), s(np.arange(4.0) - w + l)),
    ),
}  # fmt: skip
X = torch.tensor(
    [[-3.0, -9.0, -1.5, -20.0], [-4.0, -6.0, -12.0, -21.0], [-2.5, -9.5, -2.0, -18.0], [-4.5, -5.0, -11.0, -25.0]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("name", CASES)
@given(drawn=fours)
def test_values_and_gradients(name, drawn):
    """Value to 1e-9 of the formula; the gradient in closed form; none into the reference."""
    ours, formula, slopes = CASES[name]
    args = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in drawn]
    plain = [np.array(row) for row in drawn]
    losses, aux = ours(*args)
    np.testing.assert_allclose(losses.detach().numpy(), formula(*plain), rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(losses.sum(), args, allow_unused=True)
    for grad, wanted in zip(found[:2], slopes(*plain), strict=True):
        np.testing.assert_allclose(grad.numpy(), wanted, rtol=1e-9, atol=1e-9)
    assert found[2:] == (None, None)
    assert not any(x.requires_grad for x in aux.values()) and all(x.shape == (4,) for x in aux.values())


def test_aux():
    """Rewards b d, by hand; ties count as 0. The policy's own accuracy is of the sums."""
    w, l, rw, rl = X.clone()
    _, aux = dpo(w, l, rw, rl, beta=B)
    assert torch.equal(aux["chosen_reward"], B * (w - rw)) and torch.equal(aux["rejected_reward"], B * (l - rl))
    assert torch.equal(aux["margin"], B * (w - rw) - B * (l - rl))
    assert aux["accuracy"].tolist() == [0.0, 1.0, 1.0, 0.0]  # d = -1, 1.5, 1.5, -6
    assert aux["policy_accuracy"].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert dpo(w, w, w, w)[1]["accuracy"].sum() == 0 == dpo(w, w, w, w)[1]["policy_accuracy"].sum()
    for _, aux in (dpo_norm(w, l, rw, rl, beta=B, **WITH_LENGTHS), ipo(w, l, rw, rl, beta=B, **WITH_LENGTHS)):
        torch.testing.assert_close(aux["margin"], torch.tensor(B * mean_d(*X.numpy())), rtol=1e-12, atol=0)
        assert aux["policy_accuracy"].tolist() == [1.0, 0.0, 1.0, 1.0]
    _, aux = simpo(w, l, beta=B, **WITH_LENGTHS)
    torch.testing.assert_close(aux["margin"], B * (w / NW - l / NL), rtol=1e-12, atol=0)
    _, aux = orpo(w, l, beta=B, **WITH_LENGTHS)
    torch.testing.assert_close(aux["chosen_reward"], B * w / NW, rtol=1e-12, atol=0)
    assert torch.equal(cpo(w, l, beta=B)[1]["rejected_reward"], B * l)
    assert set(reward_model(w, l)[1]) == {"chosen_reward", "rejected_reward", "margin", "accuracy"}


def test_identities():
    """Between the losses, and where their least values lie."""
    w, l, rw, rl = X.clone()
    exact = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    plain = dpo(w, l, rw, rl, beta=B)[0]
    exact(cdpo(w, l, rw, rl, beta=B, label_smoothing=0.0)[0], plain)
    exact(robust_dpo(w, l, rw, rl, beta=B, label_smoothing=0.0)[0], plain)
    # robust: right on average over labels that are wrong with probability e
    right, wrong = (robust_dpo(*x, beta=B, label_smoothing=E)[0] for x in ((w, l, rw, rl), (l, w, rl, rw)))
    exact((1 - E) * right + E * wrong, plain)
    # cDPO with exchanged answers is that of 1 - e; with e = 1/2 both are one
    exact(*(cdpo(*x, beta=B, label_smoothing=0.5)[0] for x in ((w, l, rw, rl), (l, w, rl, rw))))
    # -log s(x) + log s(-x) = -x: antisymmetric but for that
    exact(dpo(w, l, rw, rl, beta=B)[0] - dpo(l, w, rl, rw, beta=B)[0], -B * ((w - rw) - (l - rl)))
    exact(dpo(w, w, w, w)[0], torch.full((4,), math.log(2), dtype=torch.float64))
    # Equal lengths: means are sums with beta / n
    n = torch.full((4,), 5)
    exact(dpo_norm(w, l, rw, rl, beta=B, n_chosen=n, n_rejected=n)[0], dpo(w, l, rw, rl, beta=B / 5)[0])
    one = torch.ones(4)
    exact(ipo(w, l, rw, rl, beta=B, n_chosen=one, n_rejected=one)[0], ipo(w, l, rw, rl, beta=B)[0])
    # Without a reference: one of zeros
    zero = torch.zeros_like(w)
    exact(simpo(w, l, beta=B, gamma=0.0, **WITH_LENGTHS)[0], dpo_norm(w, l, zero, zero, beta=B, **WITH_LENGTHS)[0])
    exact(cpo(w, l, beta=B, alpha=0.0)[0], dpo(w, l, zero, zero, beta=B)[0])
    exact(reward_model(w, l)[0], dpo(w, l, zero, zero, beta=1.0)[0])
    # Minima: IPO at d = 1 / (2 b); cDPO at s(b d) = 1 - e; hinge from b d = 1 on
    at = torch.tensor([1 / (2 * B), math.log((1 - E) / E) / B, 1 / B + 0.1], dtype=torch.float64, requires_grad=True)
    rest = [torch.zeros(3, dtype=torch.float64)] * 3
    for i, loss in enumerate((ipo, partial(cdpo, label_smoothing=E), hinge)):
        (slope,) = torch.autograd.grad(loss(at, *rest, beta=B)[0].sum(), at)
        assert abs(slope[i]) < 1e-12 and abs(slope[0] if i else slope[1]) > 1e-3
    # What is added to both answers' log-probabilities, as the prompt's are, changes nothing where d alone counts
    for name in ("dpo", "cdpo", "robust", "ipo", "hinge"):
        exact(CASES[name][0](w + 2.5, l + 2.5, rw, rl)[0], CASES[name][0](w, l, rw, rl)[0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extremes_are_finite(name, size):
    """fp32, log-ratios of +-1e4: finite losses and gradients; where a sigmoid saturates the loss is linear or flat."""
    w, l = torch.full((4,), -2e4, requires_grad=True), torch.full((4,), -2e4 - size, requires_grad=True)
    ref = torch.full((4,), -2e4)
    losses, aux = CASES[name][0](w, l, ref, ref)
    grads = torch.autograd.grad(losses.sum(), (w, l))
    assert all(torch.isfinite(x).all() for x in (losses, *grads, *aux.values()))
    if name == "dpo":
        torch.testing.assert_close(losses, torch.full((4,), 0.0 if size > 0 else B * 1e4), rtol=1e-6, atol=0)
        assert grads[0].tolist() == pytest.approx([0.0 if size > 0 else -B] * 4)


# Numbers of tokens and margins, closed over, are of all pairs: one pair alone has not their shape.
CLOSED_OVER = {"ipo of means", "dpo_norm", "simpo", "orpo", "cpo of means", "reward model"}


@pytest.mark.parametrize("name", CASES)
def test_laws(name):
    """Every transform, also compiled; the kink of the hinge is away from these points."""
    ours = CASES[name][0]
    given = ("value", "gradient", "dtypes")  # test_values_and_gradients
    laws = without(OP_LAWS, *given, "vmap", "per_sample") if name in CLOSED_OVER else without(OP_LAWS, *given)
    check_op(lambda w, l: ours(w, l, X[2], X[3])[0], (X[0].clone(), X[1].clone()), laws=laws)


def test_vmap_of_grad_over_pairs():
    """One pair at a time, lengths too. Oracle: a loop."""
    rows = [x.clone() for x in X]
    for loss in (
        lambda w, l, rw, rl, a, b: dpo_norm(w, l, rw, rl, n_chosen=a, n_rejected=b)[0],
        lambda w, l, rw, rl, a, b: ipo(w, l, rw, rl, n_chosen=a, n_rejected=b)[0],
        lambda w, l, rw, rl, a, b: simpo(w, l, n_chosen=a, n_rejected=b)[0],
        lambda w, l, rw, rl, a, b: orpo(w, l, n_chosen=a, n_rejected=b)[0],
        lambda w, l, rw, rl, a, b: cpo(w, l, n_chosen=a)[0] + kto(w, rw, a > 2, rl)[0] + reward_model(w, l)[0],
    ):
        gradient = torch.func.grad(loss, (0, 1))
        mapped = torch.func.vmap(gradient)(*rows, NW, NL)
        alone = [gradient(*(x[i] for x in (*rows, NW, NL))) for i in range(4)]
        for found, wanted in zip(mapped, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-15)


@given(fours, st.lists(st.booleans(), min_size=4, max_size=4), st.floats(0, 3))
def test_kto(drawn, good, kl):
    """The published form, w_d (1 - s(b (d - kl))) and w_u (1 - s(b (kl - d))), and its derivatives."""
    log_p = torch.tensor(drawn[0], dtype=torch.float64, requires_grad=True)
    log_ref = torch.tensor(drawn[1], dtype=torch.float64, requires_grad=True)
    z = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    losses, aux = kto(log_p, log_ref, torch.tensor(good), z, beta=B, desirable_weight=1.3, undesirable_weight=0.7)
    d = np.array(drawn[0]) - np.array(drawn[1])
    wanted = np.where(good, 1.3 * (1 - s(B * (d - kl))), 0.7 * (1 - s(B * (kl - d))))
    np.testing.assert_allclose(losses.detach().numpy(), wanted, rtol=1e-9, atol=1e-12)
    grads = torch.autograd.grad(losses.sum(), (log_p, log_ref, z), allow_unused=True)
    inner = B * s(B * (d - kl)) * s(-B * (d - kl))
    np.testing.assert_allclose(grads[0].numpy(), np.where(good, -1.3 * inner, 0.7 * inner), rtol=1e-9, atol=1e-12)
    assert grads[1] is None and grads[2] is None
    np.testing.assert_allclose(aux["reward"].numpy(), B * d, rtol=1e-12)


def test_kto_kl():
    """The mean, cut at 0, without gradient; and `kto` is finite far from it."""
    p = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert kto_kl(p, torch.tensor([-2.0, -4.0])).item() == 1.5 and kto_kl(p, torch.zeros(2)).item() == 0.0
    assert not kto_kl(p, p).requires_grad
    assert kto_kl(p, torch.tensor([-2.0, -4.0]), denominator=6).item() == 0.5
    with pytest.raises(ValueError, match="the mean of 0 answers"):
        kto_kl(torch.zeros(0), torch.zeros(0))
    for kl in (0.0, 1e4):
        for d in (-1e4, 1e4):
            assert torch.isfinite(kto(torch.tensor([d, d]), torch.zeros(2), torch.tensor([1, 0]), kl)[0]).all()


def test_sums_of_tokens():
    """Masked nan and inf have no influence, on values and gradients; bf16 is summed in fp32."""
    x = torch.tensor([[-1.0, -2.0, float("nan")], [float("-inf"), -3.0, -4.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert sequence_log_probs(x, mask).tolist() == [-3.0, -7.0]
    (grad,) = torch.autograd.grad(sequence_log_probs(x, mask).sum(), x)
    assert grad.tolist() == mask.tolist()
    shared = torch.tensor([1, 2])
    assert length_desensitized(x, mask, shared, alpha=0.5).tolist() == [-2.0, -7.0]
    (grad,) = torch.autograd.grad(length_desensitized(x, mask, shared, alpha=0.5).sum(), x)
    assert grad.tolist() == [[1.0, 0.5, 0.0], [0.0, 1.0, 1.0]]
    assert torch.equal(length_desensitized(x, mask, shared, alpha=1.0), sequence_log_probs(x, mask))
    # 300 x -1 - 2^-7: in bf16 sums above 256 would be wrong by 1 and more
    many = torch.full((1, 300), -1.0078125, dtype=torch.bfloat16)
    assert sequence_log_probs(many, torch.ones(1, 300)).item() == -302.34375
    assert dpo(*(torch.full((2,), -300.0, dtype=torch.bfloat16),) * 4)[0].dtype == torch.float32
    assert token_mean(torch.tensor([-6.0, -5.0]), torch.tensor([3, 0])).tolist() == [-2.0, 0.0]
    (grad,) = torch.autograd.grad(token_mean(x[0, :2] * 1, torch.tensor([0, 2])).sum(), x)
    assert grad[0].tolist() == [0.0, 0.5, 0.0]


def test_log1mexp():
    """fp32 against Python's math in float64, and its derivative, -e^a / (1 - e^a); the odds of a certain answer."""
    a = torch.tensor([-1e-30, -1e-10, -1e-3, -0.5, -0.6931472, -0.7, -1.0, -20.0, -80.0])
    wanted = [math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x)) for x in a.double().tolist()]
    torch.testing.assert_close(log1mexp(a).double(), torch.tensor(wanted, dtype=torch.float64), rtol=3e-7, atol=0)
    a.requires_grad_()
    (grad,) = torch.autograd.grad(log1mexp(a).sum(), a)
    exact = [-math.exp(x) / -math.expm1(x) for x in a.double().tolist()]
    torch.testing.assert_close(grad.double(), torch.tensor(exact, dtype=torch.float64), rtol=1e-6, atol=0)
    certain = torch.zeros(2, requires_grad=True)
    one = torch.ones(2)
    losses, _ = orpo(certain, torch.full((2,), -1.0), n_chosen=one, n_rejected=one)
    (grad,) = torch.autograd.grad(losses.sum(), certain)
    assert torch.isfinite(losses).all() and grad.tolist() == [-1.0, -1.0]


def test_parts_add_up():
    """Microbatches over the denominator of the whole: any split, the same loss and gradient. Exact but for sums."""
    w, l, rw, rl = X.clone()
    whole = dpo(w, l, rw, rl)[0].sum() / 4
    for cut in range(1, 4):
        parts = [dpo(*(x[at] for x in (w, l, rw, rl)))[0].sum() / 4 for at in (slice(cut), slice(cut, None))]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)


def test_refusals():
    x, short, lengths = torch.zeros(4), torch.zeros(3), dict(n_chosen=NW, n_rejected=NL)
    cases = [
        (lambda: dpo(x, short, x, x), r"rejected has shape \(3,\), and chosen \(4,\)"),
        (lambda: dpo(x, x, x, short), "ref_rejected has shape"),
        (lambda: dpo(x, x, x, x, beta=0.0), "beta must be above 0 and finite, got 0.0"),
        (lambda: hinge(x, x, x, x, beta=float("nan")), "beta must be above 0"),
        (lambda: cdpo(x, x, x, x, label_smoothing=0.6), "label_smoothing must be at least 0 and at most 0.5, got 0.6"),
        (lambda: robust_dpo(x, x, x, x, label_smoothing=0.5), "at least 0 and below 0.5, got 0.5"),
        (lambda: ipo(x, x, x, x, n_chosen=NW), "n_chosen and n_rejected: one is given"),
        (lambda: dpo_norm(x, x, x, x, n_chosen=NW[:3], n_rejected=NL), "numbers of tokens have shape"),
        (lambda: simpo(x, short, **lengths), "rejected has shape"),
        (lambda: orpo(x, x, beta=-1.0, **lengths), "beta must be above 0"),
        (lambda: kto(x, x, torch.ones(3), 0.0), "desirable has shape"),
        (lambda: dpo(x.long(), x, x, x), "must be floating, got torch.int64"),
        (lambda: length_desensitized(torch.zeros(2, 3), torch.ones(2, 3), x, alpha=1.0), "shared must have"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
