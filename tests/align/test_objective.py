"""Laws of objectives and of the loss they make: any split adds up, what is masked has no influence, metrics by hand.

Whether each recipe is its formula: test_recipe_formulas.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.align import advantages as adv
from purelm.align import aggregation, divergences, ratios, regions, regions_batch, weights
from purelm.align.objective import Objective, advantages_of, from_batch, joined_metrics, policy_loss
from purelm.align.whole import denominator, with_token_weights
from tests.align.objectives import F64, NAMES, TOL, G, T, ready, recipe_objective, value_and_grad

RICH = Objective(
    adv.centered,
    ratios.token,
    regions.clip,
    aggregation.token_mean,
    weight=partial(weights.masked, low=0.8, high=1.2),
    kl=from_batch(divergences.unbiased_k3, old_log_probs_BT="old_log_probs"),
    kl_coefficient=0.1,
    entropy_coefficient=0.01,
)
AGGREGATES = {
    "sequence_mean": aggregation.sequence_mean,
    "nonempty": partial(aggregation.sequence_mean, count_empty=False),
    "token_mean": aggregation.token_mean,
    "group_token_mean": partial(aggregation.group_token_mean, group_size=G),
    "constant": partial(aggregation.constant, length=9),
    "sequence_sum": aggregation.sequence_sum,
    "sum_norm": partial(aggregation.sum_norm, length=9),
}


def total(objective, batch, parts):
    """Loss and gradient, added over parts; rows of each part are given by index."""
    loss, g = torch.zeros((), dtype=F64), torch.zeros_like(batch["log_probs"])
    for rows in parts:
        part = {k: v[rows] if v.ndim else v for k, v in batch.items()}
        x, dx, _ = value_and_grad(objective, part)
        loss, g = loss + x, g.index_add(0, rows, dx)
    return loss, g


def splits(n):
    """Any division of n things into parts, in their order."""
    return st.lists(st.integers(1, n), min_size=1, max_size=n).map(lambda sizes: torch.arange(n).split(_cut(sizes, n)))


def _cut(sizes, n):
    out = []
    for size in sizes:
        out.append(min(size, n - sum(out)))
    return [x for x in [*out, n - sum(out)] if x]


@given(splits(3), st.sampled_from(sorted(AGGREGATES)), st.booleans(), st.integers(0, 20))
def test_parts_with_the_denominator_add_up_to_the_whole(parts, aggregate, count_rejected, seed):
    """Groups stay together; KL, entropy and rejected tokens included."""
    objective = replace(RICH, aggregate=AGGREGATES[aggregate], count_rejected=count_rejected)
    batch = ready(objective, seed)
    wanted, wanted_g, _ = value_and_grad(objective, batch)
    batch["denominator"] = denominator(objective, batch)
    rows = [torch.cat([torch.arange(G) + p * G for p in part.tolist()]) for part in parts]
    loss, g = total(objective, batch, rows)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-9)  # a denominator is in fp32
    torch.testing.assert_close(g, wanted_g, rtol=1e-6, atol=1e-9)


@given(st.permutations(range(12)), splits(12), st.sampled_from(NAMES))
def test_parts_with_token_weights_add_up_in_any_order(order, parts, name):
    """Rows of one group in different parts, too."""
    objective = recipe_objective(name)
    batch = ready(objective, 3)
    wanted, wanted_g, _ = value_and_grad(objective, batch)
    batch = with_token_weights(objective, batch)
    loss, g = total(objective, batch, [torch.tensor(order)[part] for part in parts])
    torch.testing.assert_close(loss, wanted, **TOL)
    torch.testing.assert_close(g, wanted_g, **TOL)


def test_a_mean_of_parts_is_not_the_whole():
    """What goes wrong without: the premise of the two tests above."""
    for name in ("dapo", "glm45"):
        objective = recipe_objective(name)
        batch = ready(objective, 3)
        _, wanted, _ = value_and_grad(objective, batch)
        parts = torch.arange(12).split(4) if name == "dapo" else torch.arange(12).roll(1).split(4)
        _, g = total(objective, batch, parts)
        assert float((g / 3 - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [*NAMES, "rich"])
def test_what_is_masked_has_no_influence(name, bad):
    """Exact, for every entry of the batch; and no gradient there."""
    objective = RICH if name == "rich" else recipe_objective(name)
    batch = ready(objective)
    on = batch["mask"] != 0
    loss, g, metrics = value_and_grad(objective, batch)
    for key in ("log_probs", "old_log_probs", "sampler_log_probs", "ref_log_probs", "entropy"):
        batch[key] = torch.where(on, batch[key], bad)
    batch["advantages"] = torch.where(on, batch["advantages"][:, None], bad)
    again, h, others = value_and_grad(objective, batch)
    assert torch.equal(loss, again) and torch.equal(g, h) and not bool(h[~on].any())
    assert all(torch.equal(metrics[k], others[k]) for k in metrics)


@pytest.mark.parametrize("name", [*NAMES, "rich"])
def test_padding_and_order_of_rows(name):
    objective = RICH if name == "rich" else recipe_objective(name)
    batch = ready(objective)
    loss, g, _ = value_and_grad(objective, batch)
    wide = {k: torch.nn.functional.pad(v, (0, 3)) if v.ndim == 2 else v for k, v in batch.items()}
    again, h, _ = value_and_grad(objective, wide)
    torch.testing.assert_close(again, loss, **TOL)
    torch.testing.assert_close(h[:, :T], g, **TOL)
    turned, h, _ = value_and_grad(objective, {k: v.flip(0) for k, v in batch.items()})
    torch.testing.assert_close(turned, loss, **TOL)
    torch.testing.assert_close(h.flip(0), g, **TOL)


@pytest.mark.parametrize("name", [*NAMES, "rich"])
def test_gradient_enters_log_probs_and_entropy_alone(name):
    objective = RICH if name == "rich" else recipe_objective(name)
    batch = {k: v.requires_grad_() if k != "mask" else v for k, v in ready(objective).items()}
    loss, metrics = policy_loss(objective, batch)
    others = [k for k in batch if k not in ("mask", "log_probs", "entropy")]
    found = torch.autograd.grad(loss, [batch[k] for k in others], allow_unused=True)
    assert all(g is None or not bool(g.any()) for g in found)
    assert not any(x.requires_grad for x in metrics.values())
    (g,) = torch.autograd.grad(policy_loss(RICH, batch)[0], batch["entropy"])
    torch.testing.assert_close(g, -0.01 * batch["mask"] / batch["mask"].sum(), **TOL)


def test_flat_groups_have_no_gradient():
    for name in NAMES:
        if name in ("course2025_no_baseline", "course2026_rft", "grpo"):
            continue
        objective = recipe_objective(name)
        _, g, _ = value_and_grad(objective, ready(objective))
        assert not bool(g[:G].any()) and bool(g[G:].any()), name


def test_on_policy_the_loss_is_0_and_the_gradient_is_not():
    """Asked by users again and again; ratios are 1, so the gradient is that of REINFORCE."""
    batch = ready(recipe_objective("dr_grpo"))
    batch["old_log_probs"] = batch["log_probs"]
    batch["mask"] = torch.ones_like(batch["mask"])
    loss, g, metrics = value_and_grad(recipe_objective("dr_grpo"), batch)
    assert abs(float(loss)) < 1e-15 and float(g.abs().max()) > 1e-3
    plain = replace(recipe_objective("dr_grpo"), ratio=ratios.none, region=regions.reinforce)
    torch.testing.assert_close(value_and_grad(plain, batch)[1], g, **TOL)
    assert float(metrics["ratio_mean"]) == 1.0 and float(metrics["kl_old"]) == 0.0


def test_without_old_log_probs():
    """Needed by a ratio; on-policy not, and a weight then takes the present ones."""
    objective = replace(recipe_objective("olmo3_rl_zero"), ratio=ratios.none)
    batch = ready(objective)
    batch["old_log_probs"] = batch["log_probs"]
    wanted = value_and_grad(objective, batch)
    del batch["old_log_probs"]
    got = value_and_grad(objective, batch)
    assert torch.equal(wanted[0], got[0]) and torch.equal(wanted[1], got[1])
    with pytest.raises(ValueError, match="this ratio needs old_log_probs"):
        policy_loss(recipe_objective("dapo"), batch)


def test_metrics():
    """Oracle: numpy over the chosen tokens."""
    batch = ready(RICH, groups=8, spread=0.6)
    _, _, metrics = value_and_grad(RICH, batch)
    on = batch["mask"].numpy() != 0
    lp, lo, ls, lr, H = (
        batch[k].numpy()[on] for k in ("log_probs", "old_log_probs", "sampler_log_probs", "ref_log_probs", "entropy")
    )
    A = np.broadcast_to(batch["advantages"].numpy()[:, None], on.shape)[on]
    w, rho = np.exp(lp - lo), np.exp(lo - ls)
    wanted = {
        "n_tokens": on.sum(),
        "ratio_mean": w.mean(),
        "clipped_low": ((A < 0) & (w < 0.8)).mean(),
        "clipped_high": ((A > 0) & (w > 1.2)).mean(),
        "log_ratio_largest": np.abs(lp - lo).max(),
        "kl_old": (w - 1 - np.log(w)).mean(),
        "zero_advantage": (A == 0).mean(),
        "kl": (w * (np.exp(lr - lp) - (lr - lp) - 1)).mean(),
        "entropy": H.mean(),
        "sampler_gap": np.abs(lo - ls).mean(),
        "sampler_gap_largest": np.abs(lo - ls).max(),
        "sampler_ratio_mean": rho.mean(),
        "rejected": ((rho < 0.8) | (rho > 1.2)).mean(),
        "bounded": 0.0,
        "clamped": 0.0,
    }
    assert set(metrics) == set(wanted) and min(wanted["clipped_low"], wanted["clipped_high"], wanted["rejected"]) > 0
    for name, x in wanted.items():
        assert abs(float(metrics[name]) - x) < 1e-6, name


def test_metrics_before_clipping_and_without_a_weight():
    """A ratio far out is reported as it was; the gap where the sampler's log-probabilities are there."""
    objective = recipe_objective("dapo")
    batch = ready(objective)
    batch["mask"][0, 0] = 1.0
    batch["old_log_probs"][0, 0] = batch["log_probs"][0, 0] - 30.0
    _, _, metrics = value_and_grad(objective, batch)
    assert float(metrics["log_ratio_largest"]) == pytest.approx(30.0) and float(metrics["clamped"]) > 0
    assert float(metrics["ratio_mean"]) > 1e10 and float(metrics["sampler_gap_largest"]) > 25
    del batch["sampler_log_probs"], batch["entropy"]
    assert {"sampler_gap", "entropy", "kl", "rejected"}.isdisjoint(value_and_grad(objective, batch)[2])


def test_metrics_of_parts():
    batch = ready(RICH)
    _, _, whole = value_and_grad(RICH, batch)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in torch.arange(12).split([1, 7, 4])]
    joined = joined_metrics([value_and_grad(RICH, part)[2] for part in parts])
    assert set(joined) == set(whole)
    for name, x in whole.items():
        torch.testing.assert_close(joined[name].double(), x.double(), rtol=1e-6, atol=1e-9)
    n = whole["n_tokens"]
    added = [value_and_grad(RICH, {**part, "n_tokens": n})[2] for part in parts]
    assert not any(name.endswith("_largest") for name in added[0])
    for name in added[0]:
        torch.testing.assert_close(sum(x[name] for x in added).double(), whole[name].double(), rtol=1e-6, atol=1e-9)
    assert set(joined_metrics([{"n_tokens": n, "a": n}, {"n_tokens": n}])) == {"n_tokens"}


def test_coefficients_of_the_batch_replace_those_of_the_objective():
    batch = ready(RICH)
    changed = value_and_grad(replace(RICH, kl_coefficient=0.3, entropy_coefficient=0.0), batch)
    given_ = {"kl_coefficient": torch.tensor(0.3), "entropy_coefficient": torch.tensor(0.0)}
    got = value_and_grad(RICH, batch | given_)
    torch.testing.assert_close(got[0], changed[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got[1], changed[1], rtol=1e-6, atol=1e-9)


def test_options_from_the_batch():
    """A region that reads the batch's entropy; a weight that reads advantages, given as (B,)."""
    region = from_batch(partial(regions_batch.high_entropy, fraction=0.5), entropy_BT="entropy")
    objective = replace(recipe_objective("dapo"), region=region)
    _, g, metrics = value_and_grad(objective, ready(objective))
    assert 0.4 < float(metrics["chosen"]) <= 0.5
    weight = from_batch(partial(weights.off_policy_sequence_mask, delta=-9.0), advantages="advantages")
    masked = replace(recipe_objective("dapo"), weight=weight)
    batch = ready(masked)
    _, g, _ = value_and_grad(masked, batch)
    below = batch["advantages"] < 0  # with so low a bound all of them are masked
    assert not bool(g[below].any()) and bool(g[batch["advantages"] > 0].any())


@pytest.mark.parametrize("name", [*NAMES, "rich"])
def test_nothing_to_learn_from(name):
    """A batch that is masked as a whole, and one without rows: loss 0, gradient 0, finite metrics."""
    objective = RICH if name == "rich" else recipe_objective(name)
    batch = ready(objective)
    for empty in ({**batch, "mask": torch.zeros_like(batch["mask"])}, {k: v[:0] for k, v in batch.items()}):
        loss, g, metrics = value_and_grad(objective, empty)
        assert float(loss) == 0.0 and not bool(g.any())
        assert all(bool(x.isfinite()) for x in metrics.values())


@pytest.mark.parametrize("name", [*NAMES, "rich"])
def test_far_ratios_stay_finite(name):
    objective = RICH if name == "rich" else recipe_objective(name)
    batch = ready(objective)
    for far in (1e4, -1e4):
        for key in ("old_log_probs", "sampler_log_probs", "ref_log_probs"):
            loss, g, metrics = value_and_grad(objective, {**batch, key: batch["log_probs"] + far})
            assert bool(loss.isfinite()) and bool(g.isfinite().all())
            assert all(bool(x.isfinite()) for x in metrics.values())


@pytest.mark.parametrize("name", [*NAMES, "rich"])
def test_number_formats(name):
    """fp32 within 1e-5 of float64; of bf16 inputs what fp32 gives for the same numbers, exactly."""
    objective = RICH if name == "rich" else recipe_objective(name)
    batch = ready(objective)
    wanted, wanted_g, _ = value_and_grad(objective, batch)
    as_ = lambda dtype: {k: v.to(dtype) for k, v in batch.items()}  # noqa: E731
    if objective.ratio is ratios.sequence:
        batch["old_log_probs"] = batch["log_probs"] + 1e-3  # no tie at a bound of 1e-4 is decided by rounding
        wanted, wanted_g, _ = value_and_grad(objective, batch)
    loss, g, _ = value_and_grad(objective, as_(torch.float32))
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g.double(), wanted_g, rtol=1e-3, atol=1e-5)
    half = as_(torch.bfloat16)
    loss, _, _ = value_and_grad(objective, half)
    again, _, _ = value_and_grad(objective, {k: v.float() for k, v in half.items()})
    assert loss.dtype == torch.float32 and torch.equal(loss, again)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", [*NAMES, "rich"])
def test_torch_func(name):
    """grad, vmap over several batches, and jvp against the gradient."""
    objective = RICH if name == "rich" else recipe_objective(name)
    batches = [ready(objective, seed) for seed in (0, 1)]
    f = lambda lp, batch: policy_loss(objective, {**batch, "log_probs": lp})[0]  # noqa: E731
    grads = [value_and_grad(objective, batch)[1] for batch in batches]
    stacked = {k: torch.stack([b[k] for b in batches]) for k in batches[0]}
    got = torch.func.vmap(torch.func.grad(f))(stacked["log_probs"], stacked)
    torch.testing.assert_close(got, torch.stack(grads), **TOL)
    direction = torch.linspace(-1, 1, 72, dtype=F64).view(12, T)
    _, slope = torch.func.jvp(lambda lp: f(lp, batches[0]), (batches[0]["log_probs"],), (direction,))
    torch.testing.assert_close(slope, (grads[0] * direction).sum(), **TOL)


@pytest.mark.compile
def test_compiled():
    for objective in (RICH, recipe_objective("gspo")):
        batch = ready(objective)
        f = torch.compile(partial(policy_loss, objective), backend="aot_eager", fullgraph=True)
        loss, metrics = f(batch)
        wanted, others = policy_loss(objective, batch)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(metrics, others)


def test_advantages_of_tokens():
    """(B, T): a constant row is the same as one number a row."""
    objective = recipe_objective("dapo")
    batch = ready(objective)
    wide = {**batch, "advantages": batch["advantages"][:, None].expand(-1, T).clone()}
    one = {**batch, "advantages": batch["advantages"][:, None]}
    for other in (wide, one):
        assert torch.equal(value_and_grad(objective, other)[1], value_and_grad(objective, batch)[1])


def broken(**changes):
    return lambda: policy_loss(RICH, {**ready(RICH), **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (broken(log_probs=None), "this objective needs 'log_probs' in the batch, which has log_probs, old_log_probs"),
        (broken(mask=torch.ones(12, 5)), r"one shape \(B, T\), got \(12, 6\) and \(12, 5\)"),
        (broken(advantages=torch.ones(6)), r"advantages must be \(12,\), \(12, 1\) or \(12, 6\), got \(6, 1\)"),
        (broken(advantages=torch.ones(12, 5)), r"got \(12, 5\)"),
        (broken(advantages=torch.full((12,), torch.nan)), "advantages must be finite where the mask is not 0"),
        (broken(sampler_log_probs=None), "needs 'sampler_log_probs' in the batch"),
        (broken(ref_log_probs=None), "needs 'ref_log_probs' in the batch"),
        (broken(entropy=None), "needs 'entropy' in the batch"),
        (broken(token_weights=torch.ones(3)), r"token_weights must have the shape of log_probs \(12, 6\), got \(3,\)"),
        (broken(denominator=0.0), "denominator must be above 0 and finite, got 0.0"),
        (lambda: replace(RICH, kl=None), "kl_coefficient is 0.1 and kl None; give kl=divergences.k3"),
        (lambda: replace(RICH, kl_coefficient=float("nan")), "kl_coefficient must be a finite number, got nan"),
        (lambda: replace(RICH, entropy_coefficient="a"), "entropy_coefficient must be a finite number, got 'a'"),
        (lambda: replace(RICH, region="clip"), "region must be a function, got 'clip'"),
        (lambda: joined_metrics([]), "joined_metrics: no parts"),
        (lambda: advantages_of(RICH, torch.ones(7), group_size=2), "7 rows are no whole number of groups"),
    ],
)
def test_bad_arguments(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
