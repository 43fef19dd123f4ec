"""Rollout batches: answers to problems, graded; a pure function of (parameters, seed, number of the batch).

On several processes each samples and grades its share of the problems, and all then have all answers. A row's random
key depends on the row's number in the whole batch, so answers are those of one process up to the rounding of logits.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.generate import known_text
from experiments.grading import Reward
from experiments.rl.problems import Problem, content, order
from experiments.rl.shares import ONE, check_alike, everyones
from purelm import generate, random
from purelm.align.collect import Collected, add_round, full, take
from purelm.align.groups import grouped
from purelm.align.recipe import Recipe
from purelm.align.rollouts import Rollouts, joined, of_generation
from purelm.align.rollouts import take as rows_of
from purelm.dist.world import World
from purelm.models.model import Model
from purelm.tokenizer import BPE

__all__ = ["Batch", "Sampler", "answers", "collect"]


class Batch(NamedTuple):
    """Rollouts of P problems, G answers each, row p G + g."""

    problems: list[Problem]
    rollouts: Rollouts
    texts: list[str]
    parts: list[dict[str, float]]  # of each row's reward, "reward" among them, before what lengths add
    n_sampled: int  # groups, those that were not kept among them


def same(params: Any) -> Any:
    """The parameters themselves."""
    return params


class Sampler(NamedTuple):
    """What answers depend on beside the parameters."""

    model: Model
    bpe: BPE
    stop: generate.Stop
    max_new_tokens: int
    rows: int  # at a time
    reward: Reward
    world: World = ONE
    options: Mapping[str, Any] = MappingProxyType({})  # further keywords of `generate`
    weights: Callable[[Any], Any] = same  # from parameters to those that are sampled from


def answers(
    sampler: Sampler, params: Any, problems: Sequence[Problem], key: Tensor, *, n_samples: int, temperature: float
) -> tuple[generate.Generation, list[dict[str, float]]]:
    """n_samples answers to each problem, and their rewards by part; ValueError where processes differ.

    Of N processes the r-th samples problems r, r + N, ...; all of them have all answers.
    """
    world, R = sampler.world, len(problems) * n_samples
    check_alike(world, params, content(problems), key)
    mine = range(world.rank, len(problems), world.size)
    rows = [p * n_samples + g for p in mine for g in range(n_samples)]
    out, parts = generate.Generation([], [], [], [], []), []
    if rows:
        out = generate.generate(
            sampler.model,
            sampler.weights(params),
            [problems[p].ids.tolist() for p in mine],
            random.split(key, R)[rows],
            max_new_tokens=sampler.max_new_tokens,
            n_samples=n_samples,
            sampling=generate.Sampling(temperature=temperature),
            stop=sampler.stop,
            decode_fn=partial(known_text, sampler.bpe),
            batch_size=sampler.rows,
            **sampler.options,
        )
        parts = [sampler.reward(text, problems[k // n_samples].gold) for k, text in zip(rows, _texts(out), strict=True)]
    return everyones(world, rows, out, parts, R)


def _texts(out: generate.Generation) -> list[str]:
    assert out.texts is not None  # generate was given decode_fn
    return out.texts


def collect(
    sampler: Sampler, recipe: Recipe, params: Any, problems: Sequence[Problem], *, prompts: int, seed: int, i: int,
    max_rounds: int, device: torch.device,
) -> Batch:  # fmt: skip
    """Rollout batch i: `prompts` groups of recipe.group_size answers.

    Where the recipe replaces flat groups, other problems take their place in further rounds, at most max_rounds; else
    there is one round.
    """
    G = recipe.group_size

    def sampled(draw: int) -> Batch:
        chosen = [problems[k] for k in order(len(problems), prompts, seed, draw)]
        key = random.fold_in(random.fold_in(random.key(seed), 2), draw).to(device)
        out, parts = answers(sampler, params, chosen, key, n_samples=G, temperature=recipe.temperature)
        rollouts = of_generation([x.ids for x in chosen], out, [part["reward"] for part in parts], n_samples=G)
        return Batch(chosen, rollouts, _texts(out), parts, len(chosen))

    if recipe.flat_groups not in ("rounds", "refill"):
        return sampled(i)
    state = Collected()
    for r in range(max_rounds):
        batch = sampled(i * max_rounds + r)
        groups = [_group(batch, p, G) for p in range(prompts)]
        state = add_round(state, groups, grouped(batch.rollouts.rewards_B, G), max_rounds=None)
        if full(state, prompts):
            return _joined(take(state, prompts)[0], state.n_seen)
    raise ValueError(
        f"rollout batch {i + 1}: of {state.n_seen} groups in {max_rounds} rounds, rewards differ in "
        f"{len(state.groups)}, and {prompts} are wanted: the problems are too easy or too hard; filter them, raise "
        "max_rounds, or take a recipe that keeps or drops flat groups"
    )


def _group(batch: Batch, p: int, size: int) -> Batch:
    rows = range(p * size, p * size + size)
    return Batch(
        [batch.problems[p]], rows_of(batch.rollouts, rows), [batch.texts[k] for k in rows],
        [batch.parts[k] for k in rows], 1,
    )  # fmt: skip


def _joined(groups: Sequence[Batch], n: int) -> Batch:
    return Batch(
        [x for g in groups for x in g.problems],
        joined([g.rollouts for g in groups]),
        [x for g in groups for x in g.texts],
        [x for g in groups for x in g.parts],
        n,
    )
