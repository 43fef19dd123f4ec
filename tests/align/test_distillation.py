"""Distillation, ECHO. Oracles: loops over tokens and buckets in numpy with derivatives by hand; enumeration."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from purelm.align import aggregation, ratios, regions
from purelm.align.advantages import centered
from purelm.align.distillation import divergence, iw_opd, opd
from purelm.align.environment import echo
from purelm.align.objective import Objective, from_batch, policy_loss
from purelm.testing import check_op
from tests.align import policy_oracles as by_hand
from tests.align.policy_cases import INF, NAN, B, T, batch, poisoned

CLOSE = dict(rtol=1e-9, atol=1e-9)
LAWS = ("pure", "modes", "upstream", "func_grad", "vmap", "jvp", "jacrev", "checkpoint", "strides")
TEACHER = torch.from_numpy(-np.random.default_rng(8).gamma(1.5, 0.8, (B, T)))
THEIRS = torch.from_numpy(np.random.default_rng(9).random((B, T)) < 0.4)
OPTIONS = {"low": 0.1}


def opd_by_hand(lp, lo, lr):
    w, fallen = math.exp(lp - lo), math.exp(lp) - math.exp(lo) < -OPTIONS["low"]
    return (0.0, 0.0) if fallen else (-(lr - lp) * w, -(lr - lp) * w)


def regions_by_hand(name, lp, lo, adv, mask):
    """(loss, dl/dlp) of each token; their losses depend on a token's own lp alone."""
    loss, slope = np.zeros(lp.shape), np.zeros(lp.shape)
    for i in range(lp.shape[0]):
        ts = [t for t in range(lp.shape[1]) if mask[i, t]]
        a = {t: float(TEACHER[i, t]) - lo[i, t] for t in ts}
        for t in ts:
            if name == "opd":
                loss[i, t], slope[i, t] = opd_by_hand(lp[i, t], lo[i, t], float(TEACHER[i, t]))
            elif name == "iw_opd":
                before, total = (sum(abs(a[k]) for k in ts if k < t), sum(abs(x) for x in a.values()))
                slope[i, t] = -(1 + 0.5 * (1 - before / total)) * a[t]
                loss[i, t] = slope[i, t] * lp[i, t]
            elif THEIRS[i, t]:
                loss[i, t], slope[i, t] = -0.3 * lp[i, t], -0.3
            else:
                loss[i, t], slope[i, t] = by_hand.clip(0.2, 0.2)(lp[i, t], lp[i, t] - lo[i, t], adv[i, t])
    return loss, slope


def region_of(name, teacher=TEACHER):
    return {
        "opd": partial(opd, teacher_log_probs_BT=teacher, **OPTIONS),
        "iw_opd": partial(iw_opd, teacher_log_probs_BT=teacher),
        "echo": partial(echo, environment_BT=THEIRS, coefficient=0.3),
    }[name]


def losses(name, lp, lo, adv, mask, teacher=TEACHER):
    return region_of(name, teacher)(lp, ratios.token(lp, lo, mask)[0], adv, mask)


every = pytest.mark.parametrize("name", ["opd", "iw_opd", "echo"])


@every
@pytest.mark.parametrize("seed", range(3))
def test_value_and_derivative(name, seed):
    """Losses, and their derivative by each token's own lp, at 1e-9 in float64."""
    lp, lo, adv, mask = batch(seed)
    lp.requires_grad_()
    loss, aux = losses(name, lp, lo, adv, mask)
    (g,) = torch.autograd.grad(loss.sum(), lp)
    wanted, slope = regions_by_hand(name, *(x.detach().numpy() for x in (lp, lo, adv, mask)))
    torch.testing.assert_close(loss.detach(), torch.from_numpy(wanted), **CLOSE)
    torch.testing.assert_close(g, torch.from_numpy(slope), **CLOSE)
    assert g.any() and all(x.ndim == 0 and not x.requires_grad for x in aux.values())
    assert name != "opd" or 0 < aux["clipped_low"] < 1


@every
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_masked_has_no_influence(name, bad):
    """Exact, in all arguments at once: value, gradient, aux."""
    lp, lo, adv, mask = batch(1)
    found = []
    for x in (lp, lo, adv, TEACHER), [poisoned(x, mask, bad) for x in (lp, lo, adv, TEACHER)]:
        x[0].requires_grad_()
        loss, aux = losses(name, *x[:3], mask, x[3])
        found.append([loss.detach(), *torch.autograd.grad(loss.sum(), x[0]), *aux.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not found[0][0][~mask].any() and not found[0][1][~mask].any()


@every
def test_laws(name):
    """As the other regions: torch.func, views, checkpointing."""
    lp, lo, adv, mask = batch(1)
    check_op(lambda lp: losses(name, lp, lo, adv, mask)[0], (lp,), laws=LAWS)


@pytest.mark.parametrize("name", ["opd", "iw_opd"])
def test_no_gradient_into_the_teacher_or_the_old_policy(name):
    lp, lo, adv, mask = batch(2)
    teacher = TEACHER.clone().requires_grad_()
    loss, _ = losses(name, lp.requires_grad_(), lo.requires_grad_(), adv, mask, teacher)
    assert torch.autograd.grad(loss.sum(), [lo, teacher], allow_unused=True) == (None, None)


def test_opd_has_the_gradient_of_the_divergence():
    """Enumerated: E over p of opd's gradient, on-policy, is that of KL(p || q) by the logits."""
    z = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    log_q = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(0)
    log_p, ones = z.log_softmax(0), torch.ones(5, 1)
    lp = log_p[:, None]
    loss, _ = opd(lp, ratios.none(lp, None, ones)[0], None, ones, teacher_log_probs_BT=log_q[:, None])
    (g,) = torch.autograd.grad((loss[:, 0] * log_p.exp().detach()).sum(), z, retain_graph=True)
    (wanted,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), z)
    torch.testing.assert_close(g, wanted, **CLOSE)


def test_iw_opd_by_hand():
    """a = 1, -1, 2: shares before are 0, 1/4, 1/2, so u = 1.5, 1.375, 1.25; without drift u = 1 + gamma."""
    lp = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64)
    teacher = lp + torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64)
    loss, _ = iw_opd(lp, torch.zeros_like(lp), None, torch.ones(1, 3), teacher_log_probs_BT=teacher)
    assert loss.tolist() == [[1.5, -1.375, 2.5]]
    loss, _ = iw_opd(lp, torch.zeros_like(lp), None, torch.ones(1, 3), teacher_log_probs_BT=lp)
    assert not loss.any()


def test_in_an_objective():
    """policy_loss of a teacher's column is the aggregate of the region's loss."""
    lp, lo, adv, mask = batch(3)
    made = Objective(centered, ratios.token, from_batch(opd, teacher_log_probs_BT="teacher"), aggregation.token_mean)
    data = {"log_probs": lp, "old_log_probs": lo, "mask": mask, "advantages": adv, "teacher": TEACHER}
    found, metrics = policy_loss(made, data)
    wanted, _ = opd(lp, ratios.token(lp, lo, mask)[0], None, mask, teacher_log_probs_BT=TEACHER)
    torch.testing.assert_close(found, wanted.sum() / mask.sum(), **CLOSE)
    assert "teacher_gap" in metrics


def test_echo_without_environment_is_the_region():
    lp, lo, adv, mask = batch(4)
    log_w, _ = ratios.token(lp, lo, mask)
    plain, aux = regions.dual_clip(lp, log_w, adv, mask)
    found, more = echo(lp, log_w, adv, mask, environment_BT=torch.zeros_like(mask), region=regions.dual_clip)
    assert torch.equal(found, plain) and more.pop("environment_nll") == 0 and more == aux


def divergence_by_hand(z, other, alpha, top_k, tail):
    """(value, d/dz) of one token: buckets of student's and teacher's probability, by their definitions."""
    V = len(z)
    p, q = np.exp(z) / np.exp(z).sum(), np.exp(other) / np.exp(other).sum()
    top = list(range(V)) if top_k is None else sorted(range(V), key=lambda v: -z[v])[:top_k]
    bucket = {v: b for b, v in enumerate(top)}
    if tail and len(top) < V:
        bucket |= {v: len(top) for v in range(V) if v not in bucket}
    P, Q = (np.array([sum(x[v] for v in bucket if bucket[v] == b) for b in range(max(bucket.values()) + 1)])
            for x in (p, q))  # fmt: skip
    inside = P.sum()
    P, Q = P / P.sum(), Q / Q.sum()
    M = (1 - alpha) * P + alpha * Q
    if alpha == 0:
        value, slope = (Q * np.log(Q / P)).sum(), -Q / P
    elif alpha == 1:
        value, slope = (P * np.log(P / Q)).sum(), np.log(P / Q) + 1
    else:
        value = alpha * (Q * np.log(Q / M)).sum() + (1 - alpha) * (P * np.log(P / M)).sum()
        slope = (1 - alpha) * np.log(P / M)
    d = np.zeros(V)
    for v, b in bucket.items():
        d[v] = p[v] / inside * (slope[b] - (P * slope).sum())
    return value, d


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_divergence(alpha, top_k, tail):
    """Value and d/dz of each token and logit, at 1e-9 in float64; masked logits are nan."""
    draw = np.random.default_rng(0)
    z, other = (torch.from_numpy(2 * draw.normal(size=(2, 3, 7))) for _ in range(2))
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    z, other = (torch.where(mask[..., None] == 0, NAN, x) for x in (z, other))
    z, other = z.requires_grad_(), other.requires_grad_()
    loss, aux = divergence(z, other, mask, alpha=alpha, top_k=top_k, tail=tail)
    g, none = torch.autograd.grad(loss.sum(), [z, other], allow_unused=True)
    assert none is None
    for i, t in mask.nonzero().tolist():
        value, slope = divergence_by_hand(*(x[i, t].detach().numpy() for x in (z, other)), alpha, top_k, tail)
        torch.testing.assert_close(float(loss[i, t].detach()), value, **CLOSE)
        torch.testing.assert_close(g[i, t], torch.from_numpy(slope), **CLOSE)
    off = mask == 0
    assert not loss[off].any() and not g[off].any()
    assert all(0 < float(x) <= 1 + 1e-12 for x in aux.values())
    assert (float(aux["student_mass"]) == 1) == (top_k in (None, 7, 50))


def test_divergence_of_equals_is_0_and_is_symmetric_at_a_half():
    """Laws: 0 for p = q with gradient 0, at least 0 else; JSD(p, q) = JSD(q, p)."""
    draw = torch.Generator().manual_seed(2)
    z, other = (torch.randn(4, 9, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    ones = torch.ones(4)
    for alpha in (0.0, 0.5, 1.0):
        loss, _ = divergence(z, z, ones, alpha=alpha, top_k=None)
        torch.testing.assert_close(loss, torch.zeros_like(loss), **CLOSE)
        assert float(torch.autograd.grad(loss.sum(), z)[0].abs().max()) < 1e-12
        assert (divergence(z, other, ones, alpha=alpha, top_k=None)[0] > 0).all()
    both = [divergence(*x, ones, top_k=None)[0] for x in ((z, other), (other, z))]
    torch.testing.assert_close(*both, **CLOSE)


def test_a_tail_is_as_exact_as_the_whole():
    """With logits 40 apart the tail holds 1e-17 of the mass, which 1 - the rest does not see in float64."""
    z = torch.tensor([[0.0, -40.0, -41.0]], dtype=torch.float64)
    other = torch.tensor([[0.0, -40.0, -30.0]], dtype=torch.float64)
    loss, _ = divergence(z, other, torch.ones(1), alpha=0.0, top_k=1, tail=True)
    p, q = (math.exp(-40) + math.exp(-41), math.exp(-40) + math.exp(-30))
    wanted = q * math.log(q / p) - (1 - q) * (math.log1p(q) - math.log1p(p))
    assert float(loss) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("top_k", [None, 2, 3, 4])
def test_excluded_tokens_have_no_gradient(top_k, tail):
    """Logits of -inf in both, in one: finite wherever the divergence is."""
    z = torch.tensor([[1.0, 0.5, 0.0, -INF, -INF]], dtype=torch.float64).requires_grad_()
    other = torch.tensor([[0.0, 0.5, 1.0, -INF, 0.3]], dtype=torch.float64)
    loss, _ = divergence(z, other, torch.ones(1), top_k=top_k, tail=tail)
    (g,) = torch.autograd.grad(loss.sum(), z)
    assert loss.isfinite().all() and g.isfinite().all() and not g[0, 3:].any() and g[0, :3].any()


def test_divergence_in_half_formats_and_laws():
    """bf16 logits give what their fp32 copies give; torch.func."""
    z, other = (torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (3, 4))
    ones = torch.ones(2, 3)
    found, _ = divergence(z, other, ones, top_k=4, tail=True)
    assert found.dtype == torch.float32
    assert torch.equal(found, divergence(z.float(), other.float(), ones, top_k=4, tail=True)[0])
    check_op(lambda z: divergence(z, other.double(), ones, top_k=4, tail=True)[0], (z.double(),), laws=LAWS)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: opd(ONES, ONES, None, ONES, teacher_log_probs_BT=ONES[:1]), "teacher_log_probs must have"),
        (lambda: opd(ONES, ONES, None, ONES, teacher_log_probs_BT=ONES, low=-1), "low must be at least 0, got -1"),
        (lambda: iw_opd(ONES, ONES, None, ONES, teacher_log_probs_BT=ONES, gamma=-1), "gamma must be at least 0"),
        (lambda: iw_opd(ONES, ONES, None, ONES, teacher_log_probs_BT=ONES, eps=0), "eps above 0, got 0.5 and 0"),
        (lambda: echo(ONES, ONES, ONES, ONES, environment_BT=ONES[0]), "environment must have the mask's shape"),
        (lambda: echo(ONES, ONES, ONES, ONES, environment_BT=ONES, coefficient=-1), "coefficient must be at least 0"),
        (lambda: divergence(ONES, ONES, ONES[:, 0], alpha=2), "alpha must be in 0..1, got 2"),
        (lambda: divergence(ONES, ONES, ONES[:, 0], top_k=0), "top_k must be an int of at least 1"),
        (lambda: divergence(ONES.long(), ONES, ONES[:, 0]), "logits must be floating"),
        (lambda: divergence(ONES, ONES[:1], ONES[:, 0]), "teacher_logits must be .* mask's shape"),
        (lambda: divergence(ONES, ONES[:, :2], ONES[:, 0]), "must have the student's 3 tokens, got 2"),
    ],
)
def test_bad_arguments(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
