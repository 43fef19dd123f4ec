"""What a part of a batch must know of the whole: the denominator, or the weight of each token; and rows left out.

    batch = with_token_weights(objective, batch)          # once for each optimizer step
    batch = drop_zero_advantage(objective, batch)         # before the forward pass
    for part in ...: loss, metrics = policy_loss(objective, {**part, "log_probs": ...})     # add gradients

A denominator is one number, and enough for any split of the rows. Token weights c, with loss = sum_it c_it l_it, go
with the rows: so rows may be left out or dealt out anew too, also where groups have denominators of their own.

Legend: B sequences, T positions of targets.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.objective import Batch, FromBatch, Objective, counted_mask, policy_loss
from purelm.caches import memo

__all__ = ["denominator", "drop_zero_advantage", "with_token_weights"]


def denominator(objective: Objective, batch: Batch) -> Float[Tensor, ""]:
    """The number by which the objective's aggregate divides this batch's sum; 1 if no token counts.

    Of the batch's mask, and with count_rejected=False of its old and sampler log-probabilities. Over several processes
    the denominator of the whole is the sum of theirs (of `sum_norm` it is the same number everywhere).
    """
    counted = counted_mask(objective, batch)
    # An aggregate is a sum divided by one number, so two of its values tell that number, whichever it is.
    ones = torch.ones_like(counted, dtype=torch.float64)
    undivided, divided = objective.aggregate(ones, counted, denominator=1.0), objective.aggregate(ones, counted)
    none = divided == 0
    return torch.where(none, 1.0, undivided / torch.where(none, 1.0, divided)).to(torch.float32)


def with_token_weights(objective: Objective, batch: Batch) -> dict[str, Any]:
    """The batch with "token_weights" (B, T), c_it = d loss / d l_it: the whole loss is sum_it c_it l_it.

    By batch["denominator"] where the batch is a part of the whole already, else the batch is the whole. 0 on tokens
    that do not count. Token weights that are there stay.
    """
    if batch.get("token_weights") is not None:
        return dict(batch)
    counted, given = counted_mask(objective, batch), batch.get("denominator")
    zeros = torch.zeros_like(counted, dtype=torch.promote_types(counted.dtype, torch.float32))
    c_BT = torch.func.grad(lambda loss_BT: objective.aggregate(loss_BT, counted, denominator=given))(zeros)
    return {**{k: v for k, v in batch.items() if k != "denominator"}, "token_weights": c_BT.detach()}


def drop_zero_advantage(objective: Objective, batch: Batch) -> dict[str, Any]:
    """The batch without rows whose advantages are all 0 (where the mask is not), and with the whole's token weights.

    Loss and gradient are those of the whole batch: such rows add nothing, but count in denominators. There may be no
    row left. What has as many rows as the mask loses them; all else stays. The host reads the advantages.

    ValueError for an objective in which such rows have a gradient: by a KL or entropy term, by the region (dro, those
    with a penalty), or by what rows do to others (clip_cov). It is tried on an example, once for each objective.
    """
    for name in ("kl_coefficient", "entropy_coefficient"):
        x = batch.get(name, getattr(objective, name))
        if isinstance(x, Tensor) or x != 0:
            raise ValueError(f"drop_zero_advantage: {name} is not 0, so rows of advantage 0 have a gradient; keep them")
    if not _ignores_zero(objective):
        raise ValueError("drop_zero_advantage: rows of advantage 0 have a gradient or change others' in this "
                         "objective's region; keep them")  # fmt: skip
    batch = with_token_weights(objective, batch)
    a, mask = batch["advantages"], batch["mask"]
    a = a[:, None] if a.ndim == 1 else a
    keep = ((a != 0) & (mask != 0)).any(1).nonzero()[:, 0]
    of_rows = lambda x: isinstance(x, Tensor) and x.ndim > 0 and len(x) == len(mask)  # noqa: E731
    return {name: x[keep] if of_rows(x) else x for name, x in batch.items()}


def _ignores_zero(objective: Objective) -> bool:
    """Whether, on an example off-policy, rows of advantage 0 change nothing; 10 ms the first time."""
    try:
        hash(objective)
    except TypeError:  # a function of it is an object that cannot be hashed
        return _tried.__wrapped__(objective)
    return _tried(objective)


@memo(64)
def _tried(objective: Objective) -> bool:
    B, T = 64, 256  # so many that a share of 2e-4 of the tokens is more than one, as in clip_cov
    at = torch.arange(B * T, dtype=torch.float64).view(B, T)
    lp = 4 * at.sin() - 4
    old = lp + 0.4 * (2 * at).cos()
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0, 2.0, -0.5, 0.0], dtype=torch.float64).repeat(B // 8)
    batch = {"old_log_probs": old, "sampler_log_probs": old + (3 * at).sin() / 4, "ref_log_probs": old, "entropy": -lp,
             "advantages": advantages, "mask": torch.ones(B, T), "token_weights": torch.ones(B, T)}  # fmt: skip
    for f in (objective.region, objective.ratio, objective.weight, objective.kl):  # entries of the user's own
        # Not the old log-probabilities: from a teacher that is the old policy there is nothing to learn.
        own = old + (5 * at).cos() / 3
        batch = {entry: own for _, entry in (f.names if isinstance(f, FromBatch) else ())} | batch
    grad = torch.func.grad(lambda lp, batch: policy_loss(objective, {**batch, "log_probs": lp})[0])
    keep = advantages != 0
    try:
        whole, part = grad(lp, batch), grad(lp[keep], {k: v[keep] for k, v in batch.items()})
    except ValueError:  # of a region of whole groups, whose size does not divide these rows
        return False
    return bool((whole[~keep] == 0).all()) and torch.equal(whole[keep], part)
