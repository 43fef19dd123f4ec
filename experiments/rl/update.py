"""What a rollout batch does to the parameters: advantages, epochs, minibatches, passes of a few rows.

On several processes all have the whole batch. Each computes its share of the rows: of old and reference
log-probabilities, which all then have, and of every optimizer step, whose losses and gradients add up.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.rl.passes import LENGTHS
from experiments.rl.shares import ONE, joined_rows, share
from purelm import random, tree
from purelm.align.advantages import Aux
from purelm.align.filters import zero_gradient
from purelm.align.groups import grouped, row_groups
from purelm.align.objective import Objective, advantages_of, policy_loss
from purelm.align.recipe import Recipe
from purelm.align.rollouts import Rollouts, rollout_batch
from purelm.align.shaping import kl_penalty
from purelm.align.whole import drop_zero_advantage, with_token_weights
from purelm.dist.world import World
from purelm.models.model import Model
from purelm.train import TrainState

__all__ = ["OF_MODEL", "Trainer", "loss_of", "minibatches", "padded", "prepared", "stepped", "update"]

OF_MODEL = ("tokens", "targets", "weights")


class Trainer(NamedTuple):
    """What an update depends on beside state and rollouts."""

    model: Model  # of whole parameters
    recipe: Recipe
    step: Callable[[int], Callable[[TrainState, Any], tuple[TrainState, dict[str, Tensor]]]]  # by number of passes
    rows_per_pass: int  # of a process
    pad_id: int
    chunk: int | None
    compute: torch.dtype
    recompute: bool  # old log-probabilities, else the sampler's
    reference: Any | None  # parameters that a KL term, of the loss or of rewards, compares with
    drops: bool  # whether rows of advantage 0 are left out before the forward pass
    seed: int
    world: World = ONE
    whole: Callable[[Any], Any] = lambda params: params  # of a process's part of the parameters
    same_shape: bool = False  # all passes have rows_per_pass rows, and lengths in steps of LENGTHS: for recordings

    @property
    def multiple_of(self) -> int:
        """What the length of rows is padded to."""
        return LENGTHS if self.same_shape else 32

    def rows_multiple(self, n_passes: int = 1) -> int:
        """What the number of rows is padded to."""
        return self.rows_per_pass if self.same_shape else n_passes * self.world.size


def loss_of(model: Model, objective: Objective, temperature: float, chunk: int | None) -> Callable[..., Any]:
    """(params, batch) -> (loss, metrics): `policy_loss` of the model's log-probabilities at this temperature.

    The batch has tokens, targets, weights (the mask), token_weights, n_tokens, denominator, and the entries that the
    objective needs; a sum over rows, so that passes add up. The token weights have the objective's own denominator, so
    the batch's is 1: it is there for make_step, which tries whether a loss divides by it. Without, it compares losses
    that may be sums of what cancels, and nothing but rounding.
    """

    def loss(params: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        of_model = {name: batch[name] for name in OF_MODEL}
        log_p_BT, entropy_BT = model.log_probs(params, of_model, temperature=temperature, chunk=chunk)
        rest = {name: x for name, x in batch.items() if name not in (*OF_MODEL, "denominator")}
        whole = {**rest, "mask": batch["weights"], "log_probs": log_p_BT, "entropy": entropy_BT}
        value, metrics = policy_loss(objective, whole)
        return value / batch["denominator"], metrics

    return loss


def prepared(trainer: Trainer, params: Any, rollouts: Rollouts, device: torch.device) -> tuple[dict[str, Tensor], Aux]:
    """(batch of all rows with advantages, old and reference log-probabilities; what the advantages report).

    Advantages are of the graded rewards and of what the recipe adds to them: by length, and by the distance from the
    reference (reported as "kl_reward", a mean). Whether a group is flat is a matter of the graded rewards.
    """
    recipe = trainer.recipe
    batch = rollout_batch(rollouts, pad_id=trainer.pad_id, multiple_of=trainer.multiple_of)
    batch = {name: x.to(device) for name, x in batch.items()}
    aux: Aux = {}
    batch["old_log_probs"] = batch["sampler_log_probs"]
    if trainer.recompute:
        batch["old_log_probs"] = log_probs(trainer, params, batch)
        gap_BT = (batch["old_log_probs"] - batch["sampler_log_probs"]).abs() * (batch["weights"] != 0)
        aux["sampler_gap_largest"] = gap_BT.amax()
    reference_BT = log_probs(trainer, trainer.reference, batch) if trainer.reference is not None else None
    if recipe.objective.kl is not None:
        assert reference_BT is not None
        batch["ref_log_probs"] = reference_BT
    rewards_B = rollouts.rewards_B
    if recipe.length_reward is not None:
        rewards_B = rewards_B + recipe.length_reward(torch.tensor([len(x) for x in rollouts.responses]))
    if recipe.kl_in_reward:
        assert reference_BT is not None
        old_BT, c = batch["old_log_probs"], recipe.kl_in_reward
        added_B = kl_penalty(old_BT, reference_BT, batch["weights"], coefficient=c).cpu()
        rewards_B = rewards_B + added_B
        aux["kl_reward"] = added_B.mean()
    advantages, of_advantage = advantages_of(recipe.objective, rewards_B, group_size=recipe.group_size)
    batch["advantages"], aux = advantages.to(device), {**of_advantage, **aux}
    if recipe.flat_groups == "drop":
        keep_P = ~zero_gradient(grouped(rollouts.rewards_B, recipe.group_size))
        keep_B = row_groups(keep_P, recipe.group_size).to(device)
        batch = {name: x[keep_B] for name, x in batch.items()}
    return batch, aux


@torch.no_grad()
def log_probs(trainer: Trainer, params: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) log-probabilities of the targets at the temperature of sampling, in the dtype that is trained in."""
    params = tree.cast(params, trainer.compute)
    mine = share(trainer.world, padded({name: batch[name] for name in OF_MODEL}, trainer.rows_multiple()))
    found = []
    for at in range(0, len(mine["tokens"]), trainer.rows_per_pass):
        some = {name: x[at : at + trainer.rows_per_pass] for name, x in mine.items()}
        found.append(
            trainer.model.log_probs(params, some, temperature=trainer.recipe.temperature, chunk=trainer.chunk)[0]
        )
    return joined_rows(trainer.world, torch.cat(found))[: len(batch["tokens"])]


def minibatches(
    batch: dict[str, Tensor], group_size: int, n: int, seed: int, i: int, epoch: int
) -> Iterator[dict[str, Tensor]]:
    """The batch's groups in an order of their own, dealt into n parts as equal as can be; groups stay whole."""
    P = len(batch["tokens"]) // group_size
    key = random.fold_in(random.fold_in(random.fold_in(random.key(seed), 3), i), epoch)
    shuffled = random.permutation(key, P)
    for part in shuffled.tensor_split(min(n, P)) if P else ():
        rows = (part.unsqueeze(-1) * group_size + torch.arange(group_size)).flatten()
        yield {name: x[rows.to(x.device)] for name, x in batch.items()}


def padded(batch: dict[str, Tensor], multiple: int) -> dict[str, Tensor]:
    """The batch with rows of no weight added, so that their number is a multiple; 0-d entries stay."""
    B = len(batch["tokens"])
    extra = -B % multiple
    if not extra:
        return batch

    def longer(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(extra, *x.shape[1:])]) if x.ndim and len(x) == B else x

    return {name: longer(x) for name, x in batch.items()}


def update(
    trainer: Trainer, state: TrainState, rollouts: Rollouts, i: int, *, epochs: int, n_minibatches: int,
    device: torch.device,
) -> tuple[TrainState, list[dict[str, float]], Aux]:  # fmt: skip
    """(state, metrics of each optimizer step, what the advantages report) after rollout batch i.

    A minibatch in which no row has an advantage makes no step: its gradient is 0, and momentum alone would move the
    parameters.
    """
    recipe = trainer.recipe
    params = trainer.whole(state.params) if trainer.recompute else None
    batch, aux = prepared(trainer, params, rollouts, device)
    found: list[dict[str, float]] = []
    for epoch in range(epochs):
        for part in minibatches(batch, recipe.group_size, n_minibatches, trainer.seed, i, epoch):
            state, metrics = stepped(trainer, state, part)
            if metrics is not None:
                found.append(metrics)
    return state, found, aux


def stepped(trainer: Trainer, state: TrainState, part: dict[str, Tensor]) -> tuple[TrainState, dict[str, float] | None]:
    """One optimizer step on a minibatch, in as many passes as its rows need; without a row to train on none, and None.

    The weight of each token is that of the whole minibatch, before rows without advantage are left out and the others
    are dealt over processes and passes: so it does not matter how many are left, and where.
    """
    objective, world = trainer.recipe.objective, trainer.world
    n_rows = len(part["tokens"])
    part = with_token_weights(objective, {**part, "mask": part["weights"]})
    if trainer.drops:
        part = drop_zero_advantage(objective, part)
    n_trained = len(part["tokens"])
    if not n_trained:
        return state, None
    part["n_tokens"] = (part.pop("mask") != 0).sum().to(torch.float32).clamp(min=1.0)
    part["denominator"] = torch.ones_like(part["n_tokens"])
    n_passes = -(-n_trained // (trainer.rows_per_pass * world.size))
    state, metrics = trainer.step(n_passes)(state, share(world, padded(part, trainer.rows_multiple(n_passes))))
    values = {name: float(x) for name, x in metrics.items() if name != "non_finite_rank"}
    return state, values | {"rows_trained": n_trained / n_rows}
