"""What a part knows of the whole, and rows of no advantage left out. Oracle: the batch as a whole, undivided."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from purelm.align import advantages as adv
from purelm.align import aggregation, ratios, regions, regions_batch, regions_group, regions_token, weights, whole
from purelm.align.distillation import iw_opd, opd
from purelm.align.environment import echo
from purelm.align.logits import target_log_probs
from purelm.align.objective import Objective, from_batch, policy_loss
from purelm.align.recipes import RECIPES
from purelm.align.whole import denominator, drop_zero_advantage, with_token_weights
from purelm.caches import clear_caches
from purelm.optim import sgd
from purelm.train import init_state, make_step
from tests.align.test_objective import AGGREGATES, RICH, G, ready, recipe_objective, value_and_grad

TOL = {"rtol": 1e-9, "atol": 1e-12}
NO_KL = [name for name in RECIPES if name != "grpo"]


@pytest.mark.parametrize("count_rejected", [True, False])
@pytest.mark.parametrize("name", AGGREGATES)
def test_denominator(name, count_rejected):
    """Oracle: the aggregate's own function of that name."""
    objective = replace(RICH, aggregate=AGGREGATES[name], count_rejected=count_rejected)
    batch = ready(objective, 1)
    batch["mask"][3] = 0.0
    rho = (batch["old_log_probs"] - batch["sampler_log_probs"]).exp()
    counted = batch["mask"] if count_rejected else batch["mask"] * ((rho >= 0.8) & (rho <= 1.2))
    assert count_rejected or not torch.equal(counted, batch["mask"])
    f = AGGREGATES[name]
    options = f.keywords if isinstance(f, partial) else {}
    own = getattr(aggregation, f"{getattr(f, 'func', f).__name__}_denominator")
    torch.testing.assert_close(denominator(objective, batch), own(counted, **options).float(), rtol=1e-7, atol=0)
    if name != "sum_norm":  # over ranks they add up
        parts = [denominator(objective, {k: v[i : i + G] for k, v in batch.items()}) for i in (0, G, 2 * G)]
        torch.testing.assert_close(sum(parts), denominator(objective, batch))


def test_denominator_of_nothing():
    batch = ready(RICH)
    assert float(denominator(RICH, {**batch, "mask": torch.zeros_like(batch["mask"])})) == 1.0


@pytest.mark.parametrize("name", AGGREGATES)
def test_token_weights_make_the_loss(name):
    """sum c l is the aggregate, of any losses; 0 on what does not count; those that are there stay."""
    objective = replace(RICH, aggregate=AGGREGATES[name], count_rejected=False)
    batch = ready(objective, 2)
    full = with_token_weights(objective, batch)
    wanted, got = value_and_grad(objective, batch), value_and_grad(objective, full)
    torch.testing.assert_close(got[0], wanted[0], **TOL)
    torch.testing.assert_close(got[1], wanted[1], **TOL)
    assert not bool(full["token_weights"][batch["mask"] == 0].any()) and "token_weights" not in batch
    assert with_token_weights(objective, full)["token_weights"] is full["token_weights"]
    halved = with_token_weights(objective, {**batch, "denominator": 2 * denominator(objective, batch)})
    torch.testing.assert_close(2 * halved["token_weights"], full["token_weights"], rtol=1e-6, atol=0)
    assert "denominator" not in halved


@pytest.mark.parametrize("name", NO_KL)
@pytest.mark.parametrize("seed", [0, 3])
def test_rows_of_no_advantage_can_be_left_out(name, seed):
    """The same loss and gradient: flat groups, single responses at the mean, and rows that are masked."""
    objective = recipe_objective(name)
    batch = ready(objective, seed)
    batch["mask"][G + 2] = 0.0
    batch["name"], batch["step"] = "a", torch.tensor(3)
    loss, g, _ = value_and_grad(objective, batch)
    few = drop_zero_advantage(objective, batch)
    keep = (batch["advantages"] != 0) & batch["mask"].any(1)
    assert len(few["mask"]) == int(keep.sum()) < 3 * G and few["name"] == "a" and few["step"] is batch["step"]
    again, h, _ = value_and_grad(objective, few)
    torch.testing.assert_close(again, loss, **TOL)
    torch.testing.assert_close(h, g[keep], **TOL)
    assert not bool(g[~keep].any())


def test_left_out_without_the_whole_denominator_the_gradient_differs():
    """The premise: a mean over what is left is larger."""
    objective = recipe_objective("dapo")
    batch = ready(objective)
    keep = batch["advantages"] != 0
    g = value_and_grad(objective, batch)[1][keep]
    h = value_and_grad(objective, {k: v[keep] for k, v in batch.items()})[1]
    assert float((g - h).abs().max()) > 1e-3


def test_all_rows_left_out():
    objective = recipe_objective("dapo")
    batch = ready(objective)
    few = drop_zero_advantage(objective, {**batch, "advantages": torch.zeros(12)})
    loss, g, _ = value_and_grad(objective, few)
    assert g.shape == (0, 6) and float(loss) == 0.0


def test_advantages_of_tokens_count_where_the_mask_does():
    """(B, T): one token of advantage keeps its row; a masked one, even nan, does not."""
    objective = recipe_objective("dapo")
    batch = ready(objective)
    a = torch.zeros_like(batch["mask"])
    batch["mask"][:3, :3] = torch.tensor([1.0, 1.0, 0.0]).double()
    a[0, 1], a[1, 2], a[2, 2] = 1.0, 1.0, torch.nan
    few = drop_zero_advantage(objective, {**batch, "advantages": a})
    assert torch.equal(few["advantages"], a[:1])


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (recipe_objective("grpo"), "kl_coefficient is not 0"),
        (replace(recipe_objective("dapo"), entropy_coefficient=0.1), "entropy_coefficient is not 0"),
        (replace(recipe_objective("dapo"), region=partial(regions_token.dro, beta=0.1)), "objective's region"),
        (replace(recipe_objective("dapo"), region=regions_token.dppo_tv), None),
        (replace(recipe_objective("dapo"), region=regions_batch.kl_cov), "objective's region"),
        (replace(recipe_objective("dapo"), region=regions_batch.clip_cov), "objective's region"),
        (replace(recipe_objective("dapo"), region=partial(regions_group.real, group_size=4)), "objective's region"),
        (replace(recipe_objective("dapo"), region=partial(regions_group.real, group_size=3)), "objective's region"),
        (replace(recipe_objective("dapo"), region=from_batch(opd, teacher_log_probs_BT="x")), "objective's region"),
        (replace(recipe_objective("dapo"), region=from_batch(iw_opd, teacher_log_probs_BT="x")), "objective's region"),
        (replace(recipe_objective("dapo"), region=from_batch(echo, environment_BT="x")), "objective's region"),
        (replace(recipe_objective("dapo"), weight=weights.batch_normalized), "objective's region"),
        (replace(recipe_objective("dapo"), weight=weights.truncated), None),
    ],
)
def test_where_such_rows_have_a_gradient_they_stay(objective, message):
    batch = ready(objective)
    if message is None:
        drop_zero_advantage(objective, batch)
        return
    with pytest.raises(ValueError, match=message):
        drop_zero_advantage(objective, batch)
    with pytest.raises(ValueError, match="entropy_coefficient is not 0"):
        drop_zero_advantage(recipe_objective("dapo"), batch | {"entropy_coefficient": torch.tensor(0.0)})


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize("by", ["denominator", "token_weights"])
def test_a_training_step_in_microbatches(microbatches, by):
    """purelm.train's own step: parameters, loss and metrics of 1 microbatch and of several; a table of logits."""
    objective = recipe_objective("olmo3_rl_zero")
    batch = ready(objective, 4)
    targets = torch.arange(12 * 6).view(12, 6) % 5

    def loss(params, batch):
        lp = target_log_probs(params["logits"][batch["targets"]].cumsum(1), batch["targets"])
        return policy_loss(objective, {**batch, "log_probs": lp})

    batch = {k: v for k, v in batch.items() if k != "log_probs"} | {"targets": targets}
    batch["n_tokens"] = (batch["mask"] != 0).sum()
    batch |= {"denominator": denominator(objective, batch)} if by == "denominator" else {}
    batch = batch if by == "denominator" else with_token_weights(objective, batch)
    params = {"logits": torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5).sin()}
    found = []
    for n in (1, microbatches):
        step = make_step(loss, sgd(), lambda step: 0.1, microbatches=n)
        state, metrics = step(init_state(params, sgd()), batch)
        found.append((state.params["logits"], metrics))
    torch.testing.assert_close(found[0][0], found[1][0], **TOL)
    assert float((found[0][0] - params["logits"]).abs().max()) > 1e-4
    for name, x in found[0][1].items():
        assert float(found[1][1][name]) == pytest.approx(float(x), rel=1e-5, abs=1e-8), name
    assert "ratio_mean" in found[0][1] and "sampler_gap_largest" not in found[0][1]


def test_nothing_is_written_to():
    objective = recipe_objective("dapo")
    batch = ready(objective)
    before = {k: v.clone() for k, v in batch.items()}
    drop_zero_advantage(objective, batch)
    denominator(objective, batch)
    policy_loss(objective, batch)
    assert set(batch) == set(before) and all(torch.equal(batch[k], before[k]) for k in before)


def test_rejected_tokens_that_do_not_count():
    """Oracle: the token mean over those that are kept."""
    weight = partial(weights.masked, low=0.8, high=1.2)
    objective = Objective(adv.centered, ratios.token, regions.clip, aggregation.token_mean, weight=weight)
    batch = ready(objective)
    rho = (batch["old_log_probs"] - batch["sampler_log_probs"]).exp()
    kept = batch["mask"] * ((rho >= 0.8) & (rho <= 1.2))
    plain = replace(objective, weight=None)
    lost = value_and_grad(plain, {**batch, "mask": kept, "advantages": batch["advantages"]})[0]
    leave = value_and_grad(replace(objective, count_rejected=False), batch)[0]
    stay = value_and_grad(objective, batch)[0]
    torch.testing.assert_close(stay * batch["mask"].sum(), leave * kept.sum(), **TOL)
    ones = value_and_grad(replace(objective, weight=lambda lo, ls, m: (kept, {}), count_rejected=False), batch)[0]
    torch.testing.assert_close(ones, lost, **TOL)


def test_the_example_is_tried_once_for_an_objective():
    """Oracle: functools' counters. One that cannot be hashed is tried each time."""
    clear_caches()
    objective = recipe_objective("dapo")
    for _ in range(3):
        drop_zero_advantage(objective, ready(objective))
    assert whole._tried.cache_info()[:2] == (2, 1)

    class Unhashable:
        __hash__ = None

        def __call__(self, *args, **kwargs):
            return objective.aggregate(*args, **kwargs)

    other = replace(objective, aggregate=Unhashable())
    drop_zero_advantage(other, ready(objective))
    with pytest.raises(ValueError, match="objective's region"):
        drop_zero_advantage(replace(other, region=regions_batch.kl_cov), ready(objective))
    assert whole._tried.cache_info().misses == 1
