"""Filling a batch with groups that teach something, in rounds (DAPO) or as groups finish (Olmo 3): state -> state.

    state = Collected()                                  # dynamic sampling
    while not full(state, 512):
        groups, rewards_PG = ...                         # sample some prompts anew
        state = add_round(state, groups, rewards_PG)
    batch, state = take(state, 512)                      # state now holds what is left over

    state = InFlight()                                   # active sampling
    state = start(state, prompts, step)                  # as many as n_to_start(...) says
    state = finish(state, prompt, group, rewards_G)      # whenever one is done
    batch, state = take_fresh(state, 64, step)           # None while there are fewer

A group is whatever the caller keeps of it. Nothing here is a tensor but rewards, which are read by the host.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Shaped
from torch import Tensor

from purelm.align.filters import zero_gradient

__all__ = ["Collected", "InFlight", "add_round", "finish", "full", "n_to_start", "start", "take", "take_fresh"]


class Collected(NamedTuple):
    """Groups that dynamic sampling kept."""

    groups: tuple[Any, ...] = ()
    n_rounds: int = 0  # since the last batch was taken
    n_seen: int = 0  # groups sampled in these rounds


def add_round(
    state: Collected,
    groups: Sequence[Any],
    rewards_PG: Shaped[Tensor, "p g"],
    *,
    tol: float = 1e-6,
    max_rounds: int | None = 10,
) -> Collected:
    """The state with those groups of a round whose rewards differ.

    max_rounds: ValueError for a round beyond; None: no limit. 10 in verl, of three times the batch's prompts each.
    """
    if len(groups) != len(rewards_PG):
        raise ValueError(f"add_round: {len(groups)} groups and rewards of {len(rewards_PG)}")
    if max_rounds is not None and state.n_rounds >= max_rounds:
        raise ValueError(
            f"dynamic sampling: of {state.n_seen} groups of {state.n_rounds} rounds, rewards differ in "
            f"{len(state.groups)}; the prompts are too easy or too hard, so filter them or raise max_rounds"
        )
    flat = zero_gradient(rewards_PG, tol=tol).tolist()
    kept = tuple(group for group, is_flat in zip(groups, flat, strict=True) if not is_flat)
    return Collected(state.groups + kept, state.n_rounds + 1, state.n_seen + len(groups))


def full(state: Collected, wanted: int) -> bool:
    """Whether `wanted` groups are there."""
    return len(state.groups) >= wanted


def take(state: Collected, wanted: int) -> tuple[tuple[Any, ...], Collected]:
    """(the first `wanted` groups, the state without them).

    What is left was sampled before the step that follows: begin with `Collected()` in place of it to stay on-policy.
    """
    if not full(state, wanted):
        raise ValueError(f"take: {len(state.groups)} groups of {wanted} are there; add a round")
    return state.groups[:wanted], Collected(state.groups[wanted:])


class InFlight(NamedTuple):
    """Prompts that are being answered and groups that wait to be used."""

    started: tuple[tuple[Hashable, int], ...] = ()  # (prompt, step whose policy began it)
    ready: tuple[tuple[Any, int], ...] = ()  # (group, the same), in the order in which they finished
    n_flat: int = 0  # groups dropped because their rewards were equal
    n_stale: int = 0  # groups dropped because they were too old


def n_to_start(state: InFlight, wanted: int, *, ahead: int = 1) -> int:
    """Prompts to start now, so that those in flight and ready make `ahead` batches of `wanted` groups.

    A flat group leaves a hole, which is so filled at once: the batch does not shrink by filtering.
    """
    if wanted < 1 or ahead < 1:
        raise ValueError(f"n_to_start: wanted and ahead must be at least 1, got {wanted} and {ahead}")
    return max(0, wanted * ahead - len(state.started) - len(state.ready))


def start(state: InFlight, prompts: Sequence[Hashable], step: int) -> InFlight:
    """The state with more prompts in flight, begun by the policy of `step`."""
    names = [prompt for prompt, _ in state.started] + list(prompts)
    if twice := [x for i, x in enumerate(names) if x in names[:i]]:
        raise ValueError(f"start: prompt {twice[0]!r} is in flight already")
    return state._replace(started=state.started + tuple((prompt, step) for prompt in prompts))


def finish(
    state: InFlight, prompt: Hashable, group: Any, rewards_G: Shaped[Tensor, " g"], *, tol: float = 1e-6
) -> InFlight:
    """The state after a prompt's group is done: ready, or dropped where its rewards are equal."""
    begun = dict(state.started)
    if prompt not in begun:
        raise ValueError(f"finish: prompt {prompt!r} is not in flight")
    left = tuple(x for x in state.started if x[0] != prompt)
    if bool(zero_gradient(rewards_G[None], tol=tol)):
        return state._replace(started=left, n_flat=state.n_flat + 1)
    return state._replace(started=left, ready=(*state.ready, (group, begun[prompt])))


def take_fresh(state: InFlight, wanted: int, step: int, *, max_age: int = 8) -> tuple[tuple[Any, ...] | None, InFlight]:
    """(the first `wanted` ready groups or None if there are fewer, the state without them).

    Groups that began more than max_age steps ago are dropped first (8 steps in Olmo 3's scripts).
    """
    fresh = tuple(x for x in state.ready if step - x[1] <= max_age)
    state = state._replace(ready=fresh, n_stale=state.n_stale + len(state.ready) - len(fresh))
    if len(fresh) < wanted:
        return None, state
    return tuple(group for group, _ in fresh[:wanted]), state._replace(ready=fresh[wanted:])
