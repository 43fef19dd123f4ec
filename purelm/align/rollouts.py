"""Rollouts: prompts, sampled responses as ids (never decoded and encoded again), the sampler's log-probs, rewards.

    out = generate(model, params, prompts, key, max_new_tokens=64, n_samples=8)
    rollouts = of_generation(prompts, out, rewards, n_samples=8)
    batch = rollout_batch(rollouts, pad_id=0)          # tokens, targets, weights, sampler_log_probs: (B, T)

A prompt's responses are a group and lie beside each other: row p G + g is response g of prompt p.
Legend: P prompts, G responses of each, B = P G rows, T positions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from purelm.align.responses import Ids, response_batch

__all__ = ["Rollouts", "joined", "of_generation", "rollout_batch", "take"]


class Rollouts(NamedTuple):
    """Rows of prompt and response, B of them."""

    prompts: list[np.ndarray]  # ids, once for each row
    responses: list[np.ndarray]  # ids, the token that ended the row among them
    sampler_log_probs: list[np.ndarray]  # fp32, of each response token under the distribution that it was drawn from
    finish_reasons: list[str]
    rewards_B: Tensor  # fp32


def of_generation(prompts: Sequence[Ids], generation: Any, rewards: Sequence[float], *, n_samples: int) -> Rollouts:
    """Rollouts of what `purelm.generate.generate` returned for these prompts with n_samples each.

    generation: has tokens, logprobs and finish_reasons of B = P n_samples rows. ValueError where numbers of rows do not
    fit, and for a reward that is not finite.
    """
    n = len(prompts) * n_samples
    for name, rows in (("generation.tokens", generation.tokens), ("rewards", rewards)):
        if len(rows) != n:
            raise ValueError(f"{name} has {len(rows)} rows; {len(prompts)} prompts of {n_samples} samples need {n}")
    rewards_B = torch.tensor([float(x) for x in rewards], dtype=torch.float32)
    if not bool(torch.isfinite(rewards_B).all()):
        bad = int((~torch.isfinite(rewards_B)).nonzero()[0, 0])
        raise ValueError(f"rewards[{bad}] is {float(rewards_B[bad])}; rewards must be finite")
    ids = [np.asarray(p, np.int64) for p in prompts]
    return Rollouts(
        [ids[i // n_samples] for i in range(n)],
        [t.cpu().numpy() for t in generation.tokens],
        [x.cpu().numpy() for x in generation.logprobs],
        list(generation.finish_reasons),
        rewards_B,
    )


def take(rollouts: Rollouts, rows: Sequence[int]) -> Rollouts:
    """The rollouts of these rows, in this order."""
    return Rollouts(
        [rollouts.prompts[i] for i in rows],
        [rollouts.responses[i] for i in rows],
        [rollouts.sampler_log_probs[i] for i in rows],
        [rollouts.finish_reasons[i] for i in rows],
        rollouts.rewards_B[torch.tensor(list(rows), dtype=torch.int64)],
    )


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """The rows of all parts, in their order."""
    return Rollouts(
        [x for part in parts for x in part.prompts],
        [x for part in parts for x in part.responses],
        [x for part in parts for x in part.sampler_log_probs],
        [x for part in parts for x in part.finish_reasons],
        torch.cat([part.rewards_B for part in parts]),
    )


def rollout_batch(rollouts: Rollouts, *, pad_id: int, multiple_of: int = 1) -> dict[str, Tensor]:
    """`align.responses.response_batch` of the rows, with "sampler_log_probs" fp32 (B, T), 0 where weights are 0.

    A row with an empty prompt has no prediction of its first token: that token's weight and log-probability are left
    out. A response without tokens has weight 0 throughout.
    """
    batch = response_batch(rollouts.prompts, rollouts.responses, pad_id=pad_id, multiple_of=multiple_of)
    found_BT = torch.zeros_like(batch["weights"])
    for b, (prompt, log_probs) in enumerate(zip(rollouts.prompts, rollouts.sampler_log_probs, strict=True)):
        first = 0 if len(prompt) else 1
        start = max(len(prompt) - 1, 0)
        found_BT[b, start : start + len(log_probs) - first] = torch.from_numpy(log_probs[first:])
    return {**batch, "sampler_log_probs": found_BT}
