"""Recipes and what differs between them. Oracles: the fields that were changed; the course's and papers' numbers, in
tests/align/test_objective.py as formulas; the program's printed table read back."""

import dataclasses
from functools import partial

import pytest
import torch

from purelm.align import aggregation, divergences, shaping
from purelm.align.objective import Objective, from_batch
from purelm.align.recipe import described
from purelm.align.recipes import RECIPES, Recipe, adapted, differences, fields_of
from tests.programs import run_here


def test_values():
    """Frozen, hashable, with a source; what a source gives is not lost."""
    for name, recipe in RECIPES.items():
        assert isinstance(recipe, Recipe) and recipe.source and recipe.group_size >= 2, name
        hash(recipe)
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe.objective.kl_coefficient = 1.0
    olmo = [RECIPES[x] for x in ("olmo3", "olmo3_32b_think", "olmo3_7b_instruct", "olmo3_rl_zero")]
    assert [x.prompts for x in olmo] == [64, 128, 64, 32] and [x.minibatches for x in olmo] == [1, 1, 4, 1]
    assert [x.steps for x in olmo] == [1400, 750, 450, 2000] and [x.asynchrony for x in olmo] == [1, 8, 8, 8]
    assert [x.objective.weight is not None for x in olmo] == [False, True, False, True]


def test_fields_are_spelled_once():
    """A field of the recipe does not hide one of the objective."""
    names = [{f.name for f in dataclasses.fields(kind)} for kind in (Recipe, Objective)]
    assert names[0] & names[1] == set()
    assert set(fields_of(RECIPES["grpo"])) == (names[0] - {"objective"}) | names[1]


def test_differences():
    base = RECIPES["dapo"]
    assert differences(base, base) == {}
    for a in RECIPES.values():
        for b in RECIPES.values():
            assert differences(b, a) == {k: (y, x) for k, (x, y) in differences(a, b).items()}
    changed = dataclasses.replace(base, lr=2e-6, note="other", source="other")
    assert differences(base, changed) == {"lr": ("1e-06", "2e-06")}
    objective = dataclasses.replace(base.objective, region=partial(base.objective.region.func, low=0.2, high=0.3))
    assert differences(base, dataclasses.replace(base, objective=objective)) == {
        "region": ("clip(high=0.28, low=0.2)", "clip(high=0.3, low=0.2)")
    }
    again = partial(base.objective.region.func, high=0.28, low=0.2)  # another object, the same function
    objective = dataclasses.replace(base.objective, region=again)
    assert differences(base, dataclasses.replace(base, objective=objective)) == {}
    assert len({tuple(fields_of(recipe).items()) for recipe in RECIPES.values()}) == len(RECIPES)


def test_described():
    f = from_batch(divergences.unbiased_k3, old_log_probs_BT="old_log_probs")
    assert described(f) == "unbiased_k3[old_log_probs]" and described(None) == "-" == described("")
    assert described((0.9, 0.98)) == "(0.9, 0.98)" and described(1e-6) == "1e-06" and described(True) == "True"
    assert described(partial(sum, (1, 2), start=3)) == "sum((1, 2), start=3)"


def test_adapted():
    small = adapted(RECIPES["dr_grpo"], prompts=4, max_new_tokens=60)
    assert small.objective.aggregate.keywords == {"length": 60} and (small.prompts, small.max_new_tokens) == (4, 60)
    assert RECIPES["dr_grpo"].objective.aggregate.keywords == {"length": 3000}
    glm = adapted(RECIPES["glm45"], group_size=4)
    assert glm.objective.aggregate.keywords == {"group_size": 4} and glm.group_size == 4
    mask = torch.ones(8, 3)
    assert float(glm.objective.aggregate(mask, mask)) == 1.0
    dapo = adapted(RECIPES["dapo"], max_new_tokens=200)
    assert dapo.length_reward.keywords == {"longest": 200, "buffer": 40}
    assert torch.equal(dapo.length_reward(torch.tensor([160, 180, 200])), torch.tensor([0.0, -0.5, -1.0]))
    assert adapted(RECIPES["dapo"]) == RECIPES["dapo"]
    assert adapted(RECIPES["dapo"], lr=1e-4).lr == 1e-4
    own = dataclasses.replace(RECIPES["dapo"].objective, aggregate=partial(aggregation.constant, length=5))
    assert adapted(RECIPES["dapo"], objective=own, max_new_tokens=9).objective.aggregate.keywords == {"length": 5}
    assert shaping.soft_overlong is RECIPES["dapo"].length_reward.func


@pytest.mark.parametrize("bad", [{"group_size": 0}, {"prompts": 2.5}, {"max_new_tokens": True}])
def test_bad_sizes(bad):
    with pytest.raises(ValueError, match=f"adapted: {next(iter(bad))} must be an int of at least 1"):
        adapted(RECIPES["dapo"], **bad)


def rows(text):
    """The first two cells of each row of a printed table."""
    return [line.split()[:2] for line in text.splitlines()[2:]]


def test_program():
    done = run_here("experiments.recipes")
    assert done.returncode == 0 and [row[0] for row in rows(done.stdout)] == list(RECIPES)
    assert all(row[1] == RECIPES[row[0]].objective.advantage.__name__ for row in rows(done.stdout))
    one = run_here("experiments.recipes", "dapo")
    fields = {k: v for k, v in fields_of(RECIPES["dapo"]).items() if v != "-"}
    assert [row[0] for row in rows(one.stdout)] == list(fields) and "arXiv:2503.14476" in one.stdout
    two = run_here("experiments.recipes", "grpo", "dapo")
    assert [row[0] for row in rows(two.stdout)] == list(differences(RECIPES["grpo"], RECIPES["dapo"]))
    assert run_here("experiments.recipes", "dapo", "dapo").stdout == "dapo and dapo do not differ\n"
    against = rows(run_here("experiments.recipes", "--against", "olmo3").stdout)
    assert {name: int(n) for name, n in against} == {
        name: len(differences(RECIPES["olmo3"], recipe)) for name, recipe in RECIPES.items() if name != "olmo3"
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("dpao",), "no recipe is called 'dpao'; near are dapo"),
        (("zzzzzz",), "no recipe is called 'zzzzzz'; python -m experiments.recipes lists all"),
        (("grpo", "dapo", "gspo"), "two recipes are compared at most, got 3: grpo, dapo, gspo"),
        (("grpo", "--against", "dapo"), "--against compares with all recipes"),
    ],
)
def test_users_errors_are_one_line(args, message):
    done = run_here("experiments.recipes", *args)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
