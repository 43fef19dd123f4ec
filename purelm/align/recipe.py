"""What a recipe of reinforcement learning is: an objective, and the sampling and the optimizer that go with it.

`recipes` has published ones by name.
"""

import dataclasses
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from purelm.align import aggregation, shaping
from purelm.align.objective import FromBatch, Objective

__all__ = ["Recipe", "adapted", "described", "differences", "fields_of"]

Flat = Literal["keep", "drop", "rounds", "refill"]


@dataclass(frozen=True)
class Recipe:
    """An objective with its sampling and its optimizer; None where the source does not say."""

    objective: Objective
    source: str
    group_size: int
    """responses a prompt, G"""
    prompts: int | None = None
    """prompts a rollout batch"""
    max_new_tokens: int | None = None
    min_new_tokens: int = 1
    temperature: float = 1.0
    minibatches: int = 1
    """optimizer steps that divide a rollout batch"""
    epochs: int = 1
    """passes over a rollout batch"""
    asynchrony: int = 1
    """most steps by which the policy that samples may be older; 1: a rollout batch, then its update"""
    flat_groups: Flat = "keep"
    """groups of equal rewards: trained on, dropped, replaced in rounds (DAPO), or refilled as they finish (Olmo 3)"""
    retire_rate: float | None = None
    """mean reward from which a prompt is not sampled again"""
    length_reward: Any = None
    """function of lengths whose value is added to rewards"""
    kl_in_reward: float = 0.0
    """coefficient of the KL estimate k1 that is taken from rewards"""
    lr: float | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    max_norm: float | None = None
    """of the gradient"""
    steps: int | None = None
    """rollout batches"""
    note: str = ""


def differences(a: Recipe, b: Recipe) -> dict[str, tuple[str, str]]:
    """{field: (a's, b's)} where they differ, as text, fields of the objective among them; source and note left out.

    >>> from purelm.align.recipes import RECIPES
    >>> differences(RECIPES["course2026_grpo"], RECIPES["course2026_maxrl"])
    {'advantage': ('group_normalized', 'max_rl')}
    """
    of_a, of_b = fields_of(a), fields_of(b)
    return {name: (x, of_b[name]) for name, x in of_a.items() if x != of_b[name] and name not in ("source", "note")}


def fields_of(recipe: Recipe) -> dict[str, str]:
    """Each field as text: those of the objective, then the recipe's own."""
    own = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.name != "objective"}
    objective = {f.name: getattr(recipe.objective, f.name) for f in dataclasses.fields(recipe.objective)}
    return {name: described(x) for name, x in {**objective, **own}.items()}


def described(x: Any) -> str:
    """A function by its name and what is bound: "clip(high=0.28)". None is "-".

    >>> from purelm.align import regions
    >>> described(partial(regions.clip, high=0.28))
    'clip(high=0.28)'
    """
    if x is None or x == "":
        return "-"
    if isinstance(x, FromBatch):
        return f"{described(x.f)}[{', '.join(entry for _, entry in x.names)}]"
    if isinstance(x, partial):
        bound = [described(a) for a in x.args] + [f"{k}={described(v)}" for k, v in sorted(x.keywords.items())]
        return f"{described(x.func)}({', '.join(bound)})"
    if isinstance(x, tuple | list):
        return f"({', '.join(described(a) for a in x)})"
    if isinstance(x, bool | str):
        return str(x)
    if isinstance(x, int | float):
        return f"{x:g}" if isinstance(x, float) else str(x)
    return getattr(x, "__name__", str(x))


def adapted(
    recipe: Recipe,
    *,
    group_size: int | None = None,
    prompts: int | None = None,
    max_new_tokens: int | None = None,
    **changes: Any,
) -> Recipe:
    """The recipe at another scale: options that repeat its group size or its length follow.

    Those are group_size of `group_token_mean`, length of `constant`, and longest and buffer of `soft_overlong`, in
    proportion. changes: other fields; of the objective with `objective=dataclasses.replace(...)`.
    """
    for name, x in (("group_size", group_size), ("prompts", prompts), ("max_new_tokens", max_new_tokens)):
        if x is not None and (not isinstance(x, int) or isinstance(x, bool) or x < 1):
            raise ValueError(f"adapted: {name} must be an int of at least 1, got {x!r}")
    G, L = group_size or recipe.group_size, max_new_tokens or recipe.max_new_tokens
    objective = changes.pop("objective", recipe.objective)
    aggregate, length_reward = objective.aggregate, recipe.length_reward
    if _calls(aggregate, aggregation.group_token_mean):
        aggregate = partial(aggregation.group_token_mean, **{**aggregate.keywords, "group_size": G})
    if _calls(aggregate, aggregation.constant) and aggregate.keywords["length"] == recipe.max_new_tokens:
        aggregate = partial(aggregation.constant, **{**aggregate.keywords, "length": L})
    if _calls(length_reward, shaping.soft_overlong) and L is not None and L != recipe.max_new_tokens:
        buffer = max(1, round(length_reward.keywords["buffer"] * L / length_reward.keywords["longest"]))
        length_reward = partial(shaping.soft_overlong, longest=L, buffer=buffer)
    changed = {"length_reward": length_reward, "group_size": G, "max_new_tokens": L, **changes}
    return replace(
        recipe, objective=replace(objective, aggregate=aggregate), prompts=prompts or recipe.prompts, **changed
    )


def _calls(f: Any, what: Any) -> bool:
    return isinstance(f, partial) and f.func is what
