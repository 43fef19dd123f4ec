"""What the losses of recipes add to a training step: advantages, loss, metrics and their gradient.

    python -m experiments.bench.policy_losses [--device cuda] [--size 134m] [--json FILE]

A step is what `experiments.grpo` runs for a minibatch: log-probabilities and entropies of the model, backward pass,
AdamW, uncompiled. Its peer is the same step with the least of losses, the sum of log-probabilities by weights given
before, without advantages and metrics. All take turns, each after the device has come to rest; medians. "alone" is the
loss's part without the model, where a GPU waits for the host: in a step the host is ahead of it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from experiments import limits
from experiments.bench.report import publish, row
from experiments.bench.train_step import batches, shapes, synchronize
from experiments.console import pick_device, program, say
from experiments.limits import Count
from experiments.ops import ops_named
from experiments.rl.update import OF_MODEL, loss_of
from purelm import random
from purelm.align.objective import advantages_of, policy_loss
from purelm.align.recipe import Recipe
from purelm.align.recipes import RECIPES
from purelm.align.whole import with_token_weights
from purelm.kernels import adamw as kernels
from purelm.models import transformer
from purelm.models.model import Model
from purelm.optim import adamw, schedules
from purelm.train import FULL, MIXED, init_state, make_step

PEER = "step with the least of losses"


@dataclass(frozen=True)
class Args:
    """The price of the losses of recipes."""

    device: str = "auto"
    size: str | None = None
    """3m, 22m, 134m or 374m; default 3m on a CPU, else 134m"""
    recipes: tuple[str, ...] = ("course2026_grpo", "grpo", "dapo", "gspo", "cispo", "scalerl")
    """none: all; those with the same loss take the same time"""
    rounds: Count = 10
    group_size: Count = 8
    json: Path | None = None


def rollouts(rows: int, length: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """(batch as `policy_loss` takes it, but for advantages; rewards) of random answers of 1 to `length` tokens."""
    keys = random.split(random.key(7), 6)
    shape = (rows, length)
    n_B1 = random.randint(keys[0], (rows, 1), 1, length + 1)
    log_p_BT = -random.uniform(keys[1], shape) - 0.01
    near = [log_p_BT + 0.1 * (random.uniform(key, shape) - 0.5) for key in keys[2:5]]
    batch = {
        "log_probs": log_p_BT, "mask": (torch.arange(length) < n_B1).float(), "old_log_probs": near[0],
        "sampler_log_probs": near[1], "ref_log_probs": near[2], "entropy": -log_p_BT,
    }  # fmt: skip
    rewards_B = (random.uniform(keys[5], (rows,)) < 0.3).float()
    return {name: x.to(device) for name, x in batch.items()}, rewards_B


def with_advantages(recipe: Recipe, batch: dict[str, Tensor], rewards_B: Tensor, group_size: int) -> dict[str, Any]:
    """The batch as `experiments.rl.update.stepped` makes it."""
    advantages, _ = advantages_of(recipe.objective, rewards_B, group_size=group_size)
    whole = with_token_weights(recipe.objective, {**batch, "advantages": advantages.to(batch["mask"].device)})
    whole["n_tokens"] = (whole["mask"] != 0).sum().float().clamp(min=1.0)
    whole["denominator"] = torch.ones_like(whole["n_tokens"])
    return whole


def alone(recipe: Recipe, batch: dict[str, Tensor], rewards_B: Tensor, group_size: int) -> Callable[[], Any]:
    """All but the model's part of a step: gradients by log-probabilities and entropies."""

    def run() -> Any:
        whole = with_advantages(recipe, batch, rewards_B, group_size)
        inputs = {name: whole[name].detach().requires_grad_() for name in ("log_probs", "entropy")}
        loss, _ = policy_loss(recipe.objective, {**whole, **inputs})
        return torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)

    return run


def least(model: Model) -> Callable[..., Any]:
    """(params, batch) -> (the weighted sum of -log p, no metrics)."""

    def loss(params: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        log_p_BT, _ = model.log_probs(params, {name: batch[name] for name in OF_MODEL})
        return -(log_p_BT * batch["token_weights"]).sum() / batch["denominator"], {}

    return loss


def step_with(loss: Callable[[Model], Callable[..., Any]], cfg: transformer.Config, device: torch.device) -> Callable:
    """batch -> metrics, a step of `experiments.grpo` with this loss."""
    core = kernels.adamw(betas=(0.9, 0.95)) if device.type == "cuda" else adamw(betas=(0.9, 0.95))
    precision = MIXED if device.type == "cuda" else FULL
    model = transformer.make(cfg, ops_named("sdpa"))
    step = make_step(loss(model), core, schedules.constant(1e-5), max_norm=1.0, precision=precision)
    state = init_state(transformer.init(random.key(0, device=device), cfg), core, precision)

    def run(batch: dict[str, Tensor]) -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return run


def full(
    recipe: Recipe, cfg: transformer.Config, device: torch.device, batch: dict[str, Tensor], rewards_B: Tensor,
    group_size: int,
) -> Callable[[], Any]:  # fmt: skip
    """A step with the recipe's loss, advantages and weights of tokens included."""

    def loss(model: Model) -> Callable[..., Any]:
        return loss_of(model, recipe.objective, 1.0, None)

    step = step_with(loss, cfg, device)
    return lambda: step(with_advantages(recipe, batch, rewards_B, group_size))


def seconds(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name in [*runs][:: -1 if i % 2 else 1]:
            synchronize(device)
            begin = time.perf_counter()
            runs[name]()
            synchronize(device)
            if i >= 2:  # the first rounds warm up
                found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(x) for name, x in found.items()}


@program
def main(args: Args) -> None:
    limits.check(args)
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    size = args.size or ("134m" if cuda else "3m")
    cfg, rows = shapes(size, device)
    if rows % args.group_size:
        raise ValueError(f"group_size: {args.group_size} does not divide the {rows} rows of size {size}")
    unknown = [name for name in args.recipes if name not in RECIPES]
    if unknown:
        raise ValueError(f"recipes: {', '.join(unknown)} is none of {', '.join(RECIPES)}")
    batch, rewards_B = rollouts(rows, cfg.context_length, device)
    data = batches(cfg, rows, device)[0]
    batch = {**batch, "tokens": data["tokens"], "targets": data["targets"], "weights": batch["mask"]}
    given = with_advantages(RECIPES["course2026_grpo"], batch, rewards_B, args.group_size)
    plain = step_with(least, cfg, device)
    runs: dict[str, Callable[[], Any]] = {PEER: lambda: plain(given)}
    for name in args.recipes or tuple(RECIPES):
        recipe = RECIPES[name]
        part = alone(recipe, batch, rewards_B, args.group_size)
        try:
            part()
        except ValueError as error:
            if args.recipes:
                raise
            say(f"{name}: left out: {error}")
            continue
        runs[f"{name} alone"] = part
        runs[name] = full(recipe, cfg, device, batch, rewards_B, args.group_size)
    found = seconds(runs, args.rounds, device)
    where = f"{size}, {rows} rows of {cfg.context_length} tokens"
    label = torch.cuda.get_device_name() if cuda else "cpu"
    peer: dict[str, Any] = {"peer": PEER, "peer_value": 1e3 * found[PEER], "device": label}
    publish([row(f"{x}, {where}", 1e3 * found[x], "ms", **peer) for x in runs if x != PEER], args.json)
    added = {x: found[x] / found[PEER] - 1 for x in runs if x != PEER and not x.endswith(" alone")}
    most = max(added, key=lambda x: added[x])
    say(f"added to a step: median {statistics.median(added.values()):.2%}, at most {added[most]:.2%} ({most})")


if __name__ == "__main__":
    main(tyro.cli(Args))
