"""From a configuration of `experiments.grpo` to the functions and data of a run: all checked, nothing written."""

from typing import Any

import torch

from experiments.rl.config import Grpo
from experiments.rl.sampling import Batch
from experiments.rl.setup import Ready, described, opened, run_of, sampler_of, say_what_is_trained
from experiments.rl.update import update
from purelm.align.recipe import Recipe, adapted, fields_of
from purelm.align.recipe import described as words_of
from purelm.align.recipes import RECIPES
from purelm.align.whole import drop_zero_advantage
from purelm.dist.world import World
from purelm.train import TrainState

__all__ = ["start"]


def start(cfg: Grpo, world: World) -> Ready:
    """ValueError names what does not fit: recipe, files, model, checkpoint, other processes."""
    recipe = _recipe(cfg)
    given = opened(cfg, world, heldout=cfg.heldout, heldout_limit=cfg.eval_prompts)
    meta, done = described(cfg, world, given, {"recipe_fields": fields_of(recipe)})
    sampler = sampler_of(cfg, world, given, recipe.min_new_tokens)
    epochs = cfg.epochs or recipe.epochs
    minibatches = min(cfg.minibatches or recipe.minibatches, cfg.prompts)
    run, trainer = run_of(
        cfg, world, given, recipe, updates=epochs * minibatches, temperature=cfg.temperature,
        reference=recipe.objective.kl is not None or recipe.kl_in_reward != 0, drops=_drops(recipe),
        recompute=cfg.old_log_probs == "recomputed",
    )  # fmt: skip
    objective = recipe.objective
    parts = (objective.advantage, objective.region, objective.aggregate)
    say_what_is_trained(world, cfg, given, f"{cfg.recipe}: {', '.join(map(words_of, parts))}")

    def learn(state: TrainState, batch: Batch, i: int) -> Any:
        return update(trainer, state, batch.rollouts, i, epochs=epochs, n_minibatches=minibatches, device=world.device)

    return Ready(
        given.model, given.bpe, given.chat, recipe, sampler, run, learn, cfg.max_rounds, given.problems, given.heldout,
        given.end, given.precision, world, meta, done,
    )  # fmt: skip


def _recipe(cfg: Grpo) -> Recipe:
    """The recipe at the sizes of the configuration."""
    if cfg.recipe not in RECIPES:
        raise ValueError(f"recipe: {cfg.recipe!r} is not known; there are {', '.join(RECIPES)}")
    recipe = RECIPES[cfg.recipe]
    if cfg.group_size == 1 and _compares(recipe):
        raise ValueError(f"group_size must be at least 2 for {cfg.recipe}, which compares a prompt's answers")
    return adapted(
        recipe, group_size=cfg.group_size, prompts=cfg.prompts, max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
    )  # fmt: skip


def _compares(recipe: Recipe) -> bool:
    """Whether the one answer to a prompt has no advantage, whatever its reward."""
    try:
        advantages, _ = recipe.objective.advantage(torch.tensor([[1.0], [0.0]]))
    except ValueError:
        return True
    return not bool(advantages.any())


def _drops(recipe: Recipe) -> bool:
    """Whether rows of advantage 0 have no gradient under this recipe, and may be left out."""
    B, T = 2, 2
    one = torch.zeros(B, T)
    batch = {"mask": torch.ones(B, T), "advantages": torch.ones(B), "old_log_probs": one, "sampler_log_probs": one}
    try:
        drop_zero_advantage(recipe.objective, batch)
    except ValueError:
        return False
    return True
