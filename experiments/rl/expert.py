"""Expert iteration: the right ones of a policy's answers are what it is fine-tuned on. All checked, nothing written."""

import torch

from experiments.console import say
from experiments.rl.config import ExpertIteration
from experiments.rl.sampling import Batch
from experiments.rl.setup import Ready, described, opened, run_of, sampler_of, say_what_is_trained
from experiments.rl.update import Trainer, minibatches, stepped
from purelm.align import advantages, aggregation, ratios, regions
from purelm.align.advantages import Aux
from purelm.align.objective import Objective
from purelm.align.recipe import Recipe
from purelm.align.rollouts import Rollouts, rollout_batch, take
from purelm.dist.world import World
from purelm.train import TrainState

__all__ = ["fine_tuned", "kept", "recipe_of", "start"]

RIGHT = 1.0  # the reward from which an answer is kept
METRICS = ("loss", "entropy", "n_tokens", "grad_norm", "lr")  # what is left of those of policies, without ratios


def start(cfg: ExpertIteration, world: World) -> Ready:
    """ValueError names what does not fit: files, model, checkpoint, other processes."""
    given = opened(cfg, world, heldout=cfg.heldout, heldout_limit=cfg.eval_prompts)
    meta, done = described(cfg, world, given, {})
    recipe = recipe_of(cfg)
    # As many as there would be if all answers were right; how many are is not known before.
    updates = cfg.epochs * -(-cfg.prompts * cfg.group_size // cfg.batch_size)
    # Answers are imitated as by `sft`, at temperature 1, whatever that of sampling.
    run, trainer = run_of(
        cfg, world, given, recipe, updates=updates, temperature=1.0, reference=False, drops=False, recompute=False
    )
    sampler = sampler_of(cfg, world, given, cfg.min_new_tokens)
    say_what_is_trained(world, cfg, given, f"{cfg.group_size} answers to each of {cfg.prompts:,} an iteration")

    def learn(state: TrainState, batch: Batch, i: int) -> tuple[TrainState, list[dict[str, float]], Aux]:
        rows = kept(batch.rollouts, cfg.duplicates)
        right = batch.rollouts.rewards_B >= RIGHT
        aux = {"right": right.double().mean(), "kept": torch.tensor(float(len(rows)))}
        if not rows:
            if world.rank == 0:
                say(f"iteration {i + 1}: none of {len(batch.texts):,} answers is right: nothing is trained")
            return state, [], aux
        state, metrics = fine_tuned(
            trainer, state, take(batch.rollouts, rows), i, epochs=cfg.epochs, batch_size=cfg.batch_size,
            device=world.device,
        )  # fmt: skip
        return state, metrics, aux

    return Ready(
        given.model, given.bpe, given.chat, recipe, sampler, run, learn, 1, given.problems, given.heldout, given.end,
        given.precision, world, meta, done,
    )  # fmt: skip


def recipe_of(cfg: ExpertIteration) -> Recipe:
    """How answers are sampled, and the loss: -log p, by the mean over tokens or over answers."""
    mean = aggregation.token_mean if cfg.mean_over == "tokens" else aggregation.sequence_mean
    return Recipe(
        Objective(advantages.positive_only, ratios.none, regions.reinforce, mean),
        "CS336 2025, assignment 5, section 5",
        group_size=cfg.group_size,
        prompts=cfg.prompts,
        max_new_tokens=cfg.max_new_tokens,
        min_new_tokens=cfg.min_new_tokens,
        temperature=cfg.temperature,
    )


def kept(rollouts: Rollouts, duplicates: str) -> list[int]:
    """The rows of reward 1 or more; duplicates "drop": of answers to a prompt with the same ids the first alone."""
    found: list[int] = []
    seen: set[tuple[bytes, bytes]] = set()
    for row, reward in enumerate(rollouts.rewards_B.tolist()):
        ids = rollouts.prompts[row].tobytes(), rollouts.responses[row].tobytes()
        if reward < RIGHT or (duplicates == "drop" and ids in seen):
            continue
        seen.add(ids)
        found.append(row)
    return found


def fine_tuned(
    trainer: Trainer, state: TrainState, answers: Rollouts, i: int, *, epochs: int, batch_size: int,
    device: torch.device,
) -> tuple[TrainState, list[dict[str, float]]]:  # fmt: skip
    """(state, metrics of each optimizer step) after supervised learning of these answers.

    In each epoch every answer is in one step: they are dealt, in an order of the epoch's own, into steps of at most
    batch_size, as equal as can be. With one step of one epoch, and the mean over answers, this is a step of the recipe
    `course2026_rft`, which divides by all B answers, of which K are right, times B / K.
    """
    batch = rollout_batch(answers, pad_id=trainer.pad_id, multiple_of=trainer.multiple_of)
    batch = {name: x.to(device) for name, x in batch.items() if name != "sampler_log_probs"}
    batch["advantages"] = torch.ones(len(batch["tokens"]), device=device)
    n_steps = -(-len(batch["tokens"]) // batch_size)
    found: list[dict[str, float]] = []
    for epoch in range(epochs):
        for part in minibatches(batch, 1, n_steps, trainer.seed, i, epoch):
            state, metrics = stepped(trainer, state, part)
            assert metrics is not None  # no part is empty, and no row is left out
            found.append({name: metrics[name] for name in METRICS})
    return state, found
