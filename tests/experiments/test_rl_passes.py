"""Passes of one shape (experiments.rl.passes).

Oracles: one pass over all rows; torch's fake tensors, which hold no numbers and refuse whoever asks for one.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from experiments.rl.passes import LENGTHS, in_passes, recorded
from experiments.rl.sampling import collect
from experiments.rl.setup import on_graph
from experiments.rl.update import Trainer, loss_of, prepared, update
from purelm import tree
from purelm.align.recipe import adapted
from purelm.align.recipes import RECIPES
from purelm.align.whole import with_token_weights
from purelm.dist.world import World
from purelm.optim import sgd
from purelm.optim.schedules import constant
from purelm.train import ALONE, Precision, init_state, make_step
from purelm.transforms import value_and_grad
from tests.experiments.small_policy import CPU, sampler_of, write_policy

F64 = Precision(torch.float64, torch.float64, torch.float64)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """(model, params, rollouts of 6 prompts, 4 answers each)."""
    sampler, params, problems = sampler_of(write_policy(tmp_path_factory.mktemp("passes")))
    recipe = adapted(RECIPES["course2026_grpo"], group_size=4, max_new_tokens=4)
    batch = collect(sampler, recipe, params, problems, prompts=6, seed=1, i=0, max_rounds=1, device=CPU)
    return sampler.model, params, batch.rollouts


@pytest.mark.parametrize("name", ["course2026_grpo", "dapo", "gspo", "grpo"])
def test_the_update_is_that_of_one_pass(sampled, name):
    """5 rows a pass do not divide 24, nor what is left of them. fp64; 1e-9 of an update is the order of sums."""
    model, params, rollouts = sampled
    recipe = adapted(RECIPES[name], group_size=4, max_new_tokens=4)
    recipe = type(recipe)(**{**recipe.__dict__, "flat_groups": "keep"})
    params = tree.cast(params, torch.float64)
    loss, shapes = loss_of(model, recipe.objective, recipe.temperature, None), set()

    def seen(params, batch):
        shapes.add(tuple(batch["tokens"].shape))
        return loss(params, batch)

    def after(rows, same):
        strategy = ALONE._replace(differentiate=in_passes(rows)) if same else ALONE

        def step(n):
            n = 1 if same else n
            return make_step(seen, sgd(), constant(1.0), strategy=strategy, microbatches=n, precision=F64)

        kl = recipe.objective.kl is not None
        reference = tree.map(lambda x: 0.9 * x, params) if kl else None
        trainer = Trainer(
            model, recipe, step, rows, 0, None, torch.float64, True, reference, not kl, 3, same_shape=same
        )
        state = init_state(params, sgd(), F64)
        return update(trainer, state, rollouts, 0, epochs=2, n_minibatches=2, device=CPU)

    (whole, metrics, _), (other, found, _) = after(1000, False), after(5, True)
    assert {shape for shape in shapes if shape[0] == 5} == {(5, LENGTHS)}
    for x, y in zip(tree.leaves(other.params), tree.leaves(whole.params), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
    moved = [torch.dist(x, y) for x, y in zip(tree.leaves(whole.params), tree.leaves(params), strict=True)]
    assert max(moved) > 1e-3 and len(found) == len(metrics) == 4
    for x, y in zip(found, metrics, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-9)
        assert x["n_tokens"] == y["n_tokens"] and x["rows_trained"] == y["rows_trained"]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_pass_asks_for_no_number(sampled, name):
    """What a CUDA graph cannot record: the host reading a tensor."""
    model, params, rollouts = sampled
    recipe = adapted(RECIPES[name], group_size=4, max_new_tokens=4)
    reference = params if recipe.objective.kl is not None or recipe.kl_in_reward else None
    trainer = Trainer(model, recipe, lambda n: None, 8, 0, None, torch.float32, True, reference, False, 3,
                      same_shape=True)  # fmt: skip
    batch, _ = prepared(trainer, params, rollouts, CPU)
    batch = with_token_weights(recipe.objective, {**batch, "mask": batch["weights"]})
    batch["n_tokens"] = (batch.pop("mask") != 0).sum().to(torch.float32)
    batch["denominator"] = torch.ones(())
    one = value_and_grad(loss_of(model, recipe.objective, recipe.temperature, None), has_aux=True)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        faked = tree.map(fake.from_tensor, (params, batch))
        (_, metrics), grads = recorded(one)(*faked)
        assert all(x.ndim == 0 for x in metrics.values())
        assert [x.shape for x in tree.leaves(grads)] == [x.shape for x in tree.leaves(params)]
        with pytest.raises(DataDependentOutputException):  # the oracle can fail
            float(metrics["entropy"])


def test_what_does_not_divide_is_refused():
    gradients = in_passes(4)(lambda p, b: ((p["x"] * b["y"]).sum() / b["denominator"], {}))
    params = {"x": torch.ones(())}
    for n in (0, 3, 6):
        with pytest.raises(ValueError, match=f"a batch of {n} rows does not divide into passes of 4"):
            gradients(params, {"y": torch.ones(n), "denominator": torch.ones(())})
    (value, _), grads = gradients(params, {"y": torch.arange(8.0), "denominator": torch.tensor(2.0)})
    assert float(value) == float(grads["x"]) == 14
    with pytest.raises(ValueError, match="microbatches is 2"):
        in_passes(4)(lambda p, b: (p, {}), microbatches=2)


@pytest.mark.parametrize(
    ("graph", "exact", "device", "size", "found"),
    [
        ("auto", False, "cuda", 1, True), ("auto", True, "cuda", 1, False), ("yes", True, "cuda", 1, True),
        ("no", False, "cuda", 1, False), ("auto", False, "cuda", 2, False), ("auto", False, "cpu", 1, False),
        ("yes", False, "cpu", 1, None), ("yes", False, "cuda", 2, None),
    ],
)  # fmt: skip
def test_where_passes_are_recorded(graph, exact, device, size, found):
    cfg, world = SimpleNamespace(graph=graph, exact=exact), World(0, size, torch.device(device))
    if found is None:
        with pytest.raises(ValueError, match="graph: yes needs one process on a GPU"):
            on_graph(cfg, world)
    else:
        assert on_graph(cfg, world) is found
