"""Passes of an update as CUDA graphs. Oracle: the same passes without graphs, to the last bit."""

import numpy as np
import pytest
import torch

from experiments.rl import passes, update
from purelm import random, tree
from purelm.align.recipe import adapted
from purelm.align.recipes import RECIPES
from purelm.align.rollouts import Rollouts
from purelm.kernels.adamw import adamw
from purelm.kernels.fused import FUSED
from purelm.models import transformer
from purelm.optim.schedules import constant
from purelm.train import ALONE, FULL, MIXED, init_state, make_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
]
CUDA = torch.device("cuda")
CFG = transformer.Config(vocab_size=97, context_length=160, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2)


def rollouts(i, n=24):
    """Of prompts of 5 to 20 tokens, with answers of 1 to 90."""
    key = random.fold_in(random.key(3), i)

    def rows(k, low, high):
        sizes = random.randint(random.fold_in(key, k), (n,), low, high + 1).tolist()
        return [
            random.randint(random.fold_in(random.fold_in(key, k + 1), b), (size,), 0, CFG.vocab_size).numpy()
            for b, size in enumerate(sizes)
        ]

    prompts = [x for x in rows(0, 5, 20)[: n // 4] for _ in range(4)]
    answers = rows(10, 1, 90)
    log_probs = [np.full(len(x), -4.5, np.float32) for x in answers]
    rewards = (random.uniform(random.fold_in(key, 20), (n,)) < 0.4).float()
    return Rollouts(prompts, answers, log_probs, ["stop"] * n, rewards)


@pytest.mark.parametrize("precision", [FULL, MIXED], ids=["fp32", "mixed"])
@pytest.mark.parametrize("name", ["course2026_grpo", "dapo", "gspo", "scalerl"])
def test_replays_are_the_passes(name, precision, monkeypatch):
    """Seven updates of two minibatches: more of them than calls before a recording, and of several lengths."""
    recipe = adapted(RECIPES[name], group_size=4, max_new_tokens=90)
    model, optimizer = transformer.make(CFG, FUSED), adamw()
    start = tree.to(transformer.init(random.key(0), CFG), CUDA)

    def after(graph):
        if not graph:
            monkeypatch.setattr(passes, "recorded", lambda f: f)
        strategy = ALONE._replace(differentiate=passes.in_passes(8))
        loss = update.loss_of(model, recipe.objective, recipe.temperature, None)
        step = make_step(loss, optimizer, constant(1e-2), strategy=strategy, max_norm=1.0, precision=precision)
        kl = recipe.objective.kl is not None
        trainer = update.Trainer(
            model._replace(log_probs=passes.recorded(model.log_probs)), recipe, lambda n: step, 8, 0, None,
            precision.compute, True, start if kl else None, not kl, 3, same_shape=True,
        )  # fmt: skip
        state, found = init_state(tree.map(torch.clone, start), optimizer, precision), []
        for i in range(7):
            state, metrics, _ = update.update(trainer, state, rollouts(i), i, epochs=1, n_minibatches=2, device=CUDA)
            found += metrics
        return state, found

    (state, metrics), (plain, same) = after(True), after(False)
    assert metrics == same and len(metrics) > 10
    for x, y in zip(tree.leaves(state), tree.leaves(plain), strict=True):
        assert torch.equal(x, y)
    assert any(not torch.equal(x, y) for x, y in zip(tree.leaves(state.params), tree.leaves(start), strict=True))
