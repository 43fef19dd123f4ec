"""The loss of a policy as one value: which functions are composed, and the composition.

    objective = Objective(centered, ratios.token, partial(regions.clip, high=0.272), aggregation.token_mean,
                          weight=partial(weights.truncated, cap=2.0))
    batch["advantages"], aux = advantages_of(objective, rewards_B, group_size=8)
    loss, metrics = policy_loss(objective, {**batch, "log_probs": log_p_BT})

`recipes` has those of GRPO, DAPO, Olmo 3 and others. A batch is a dict of tensors; entries beside these are ignored:

    log_probs (B, T)          lp, of the parameters that are trained, at the temperature of sampling
    mask (B, T)               not 0 on tokens that count; what lies elsewhere has no influence, not even nan
    advantages (B,), (B, 1) or (B, T)
    old_log_probs (B, T)      lo, of the trainer's parameters before the update; not needed with `ratios.none`
    sampler_log_probs (B, T)  ls, as sampled; needed by a weight, else its gap is reported where it is there
    ref_log_probs (B, T)      lr, needed by a KL term
    entropy (B, T)            needed by an entropy bonus, else reported where it is there
    denominator, 0-d          that of the whole optimizer step: `denominator(objective, whole batch)`, summed over ranks
    token_weights (B, T)      in its place, see `with_token_weights`
    n_tokens, 0-d             tokens that count in the whole step: metrics that are means then add up over parts
    kl_coefficient, entropy_coefficient, 0-d: in place of the objective's, where they change from step to step

    l_it = weight_it region_it + kl_coefficient kl_it - entropy_coefficient H_it,   loss = aggregate(l, mask)

On-policy, centred advantages give a loss of 0 that has a gradient: look at rewards and the gradient's norm.

Legend: B sequences, T positions of targets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from purelm.align import weights
from purelm.align.advantages import Advantage, Aux
from purelm.align.aggregation import Aggregate
from purelm.align.groups import grouped, ungrouped
from purelm.align.ratios import Ratio
from purelm.align.regions import Region
from purelm.align.tokens import mean, ratio_of, share, unmasked
from purelm.align.weights import Weight
from purelm.devices import at_hand

__all__ = [
    "Batch",
    "FromBatch",
    "Objective",
    "advantages_of",
    "counted_mask",
    "from_batch",
    "joined_metrics",
    "policy_loss",
]

Batch = Mapping[str, Any]
Number = Float[Tensor, ""]
Divergence = Callable[..., Tensor]
LARGEST = "_largest"  # metrics that are maxima end so; all others but n_tokens are means over tokens


class FromBatch(NamedTuple):
    """A function some of whose options are entries of the batch."""

    f: Callable[..., Any]
    names: tuple[tuple[str, str], ...]  # (option, entry)


def from_batch(f: Callable[..., Any], **names: str) -> FromBatch:
    """f with options that each batch gives: `from_batch(unbiased_k3, old_log_probs_BT="old_log_probs")`."""
    return FromBatch(f, tuple(sorted(names.items())))


@dataclass(frozen=True)
class Objective:
    """Which functions make the loss; options are bound by functools.partial, tensors of the batch by `from_batch`."""

    advantage: Advantage
    ratio: Ratio | FromBatch
    region: Region | FromBatch
    aggregate: Aggregate
    weight: Weight | FromBatch | None = None
    """by which the region's loss is multiplied; None: 1"""
    count_rejected: bool = True
    """whether tokens of weight 0 count in the aggregate's denominator"""
    kl: Divergence | FromBatch | None = None
    """estimate of the divergence from the reference; with a coefficient of 0 it is only reported"""
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        for name in ("advantage", "ratio", "region", "aggregate"):
            f = getattr(self, name)
            if not callable(f.f if isinstance(f, FromBatch) else f):
                raise ValueError(f"Objective: {name} must be a function, got {f!r}")
        for name in ("kl_coefficient", "entropy_coefficient"):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) < float("inf"):
                raise ValueError(f"Objective: {name} must be a finite number, got {x!r}")
        if self.kl is None and self.kl_coefficient:
            raise ValueError(f"Objective: kl_coefficient is {self.kl_coefficient} and kl None; give kl=divergences.k3")


def advantages_of(
    objective: Objective, rewards_B: Shaped[Tensor, "b *rest"], *, group_size: int, **inputs: Any
) -> tuple[Float[Tensor, "b *t"], Aux]:
    """The objective's advantages of the rewards of P groups of group_size rows, one a row (or (B, T), of tokens).

    inputs: what that advantage needs beside rewards, such as lengths_PG of opo.
    """
    advantages, aux = objective.advantage(grouped(rewards_B, group_size), **inputs)
    is_of_groups = advantages.shape[:2] == (len(rewards_B) // group_size, group_size)
    return (ungrouped(advantages) if is_of_groups else advantages).detach(), aux


def policy_loss(objective: Objective, batch: Batch) -> tuple[Number, dict[str, Tensor]]:
    """(loss to minimise, metrics) of a batch or of a part of one; the legend of batches is this module's docstring.

    With the denominator (or the token weights) of the whole step, losses and gradients of its parts add up to those of
    the whole, for any split by rows (between groups for `group_token_mean`). Without, the batch is the whole. Gradients
    enter log_probs and entropy alone. A batch of masked tokens, or of no rows, has loss 0.

    metrics, detached: n_tokens; over tokens that count the means of
        ratio_mean (w before clipping), clamped, clipped_low, clipped_high and what else the region reports,
        zero_advantage (share), kl_old (w - 1 - log w: how far the policy is from the old one),
        kl, entropy, sampler_gap |lo - ls|, sampler_ratio_mean, rejected, bounded: where their tensors are in the batch;
    and the maxima log_ratio_largest, sampler_gap_largest. With n_tokens in the batch means are divided by it, so that
    they add up over parts, and maxima, which do not, are left out. `joined_metrics` joins parts without it.
    """
    lp_BT, mask_BT = _entry(batch, "log_probs"), _entry(batch, "mask")
    if lp_BT.ndim != 2 or mask_BT.shape != lp_BT.shape:
        shapes = f"{tuple(lp_BT.shape)} and {tuple(mask_BT.shape)}"
        raise ValueError(f"policy_loss: log_probs and mask must have one shape (B, T), got {shapes}")
    advantages = _advantages(batch, mask_BT)
    batch = {**batch, "advantages": advantages}
    old_BT = batch.get("old_log_probs")
    log_ratio_BT, metrics = _call(objective.ratio, batch, lp_BT, old_BT, mask_BT)
    loss_BT, of_region = _call(objective.region, batch, lp_BT, log_ratio_BT, advantages, mask_BT)
    before_BT = lp_BT.detach() if old_BT is None else old_BT
    metrics = {**of_region, **metrics, **_distance(lp_BT.detach(), before_BT, mask_BT)}
    metrics["zero_advantage"] = share((advantages == 0).expand(mask_BT.shape), mask_BT)

    counted_BT = mask_BT
    if objective.weight is not None:
        weight_BT, of_weight = _weights(objective, batch)
        loss_BT = loss_BT * weight_BT
        counted_BT = counted_BT if objective.count_rejected else _kept(mask_BT, weight_BT)
        metrics |= of_weight
    elif batch.get("sampler_log_probs") is not None:
        metrics |= weights.none(before_BT, batch["sampler_log_probs"], mask_BT)[1]
    if objective.kl is not None:
        kl_BT = _call(objective.kl, batch, lp_BT, _entry(batch, "ref_log_probs"), mask_BT)
        metrics["kl"] = mean(kl_BT, mask_BT)
        coefficient = batch.get("kl_coefficient", objective.kl_coefficient)
        loss_BT = loss_BT + coefficient * kl_BT if _is_on(coefficient) else loss_BT
    bonus = batch.get("entropy_coefficient", objective.entropy_coefficient)
    if _is_on(bonus) or batch.get("entropy") is not None:
        entropy_BT = unmasked(_entry(batch, "entropy"), mask_BT)
        metrics["entropy"] = mean(entropy_BT, mask_BT)
        loss_BT = loss_BT - bonus * entropy_BT if _is_on(bonus) else loss_BT
    return _total(objective, batch, loss_BT, counted_BT), _shared(metrics, batch, mask_BT)


def counted_mask(objective: Objective, batch: Batch) -> Float[Tensor, "b t"]:
    """The mask that the aggregate is given: the batch's, without tokens of weight 0 where those do not count."""
    mask_BT = _entry(batch, "mask")
    if objective.weight is None or objective.count_rejected:
        return mask_BT
    return _kept(mask_BT, _weights(objective, {**batch, "advantages": _advantages(batch, mask_BT)})[0])


def joined_metrics(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Metrics of a batch from those of its parts: means weighted by n_tokens, maxima of maxima.

    Where a metric is not in all parts, it is left out.
    """
    if not parts:
        raise ValueError("joined_metrics: no parts")
    n = torch.stack([part["n_tokens"] for part in parts])
    out = {"n_tokens": n.sum()}
    for name in parts[0]:
        if name == "n_tokens" or not all(name in part for part in parts):
            continue
        x = torch.stack([part[name] for part in parts])
        out[name] = x.amax() if name.endswith(LARGEST) else (x * n).sum() / n.sum().clamp(min=1)
    return out


def _call(f: Callable[..., Any] | FromBatch, batch: Batch, *args: Any) -> Any:
    if not isinstance(f, FromBatch):
        return f(*args)
    return f.f(*args, **{option: _entry(batch, entry) for option, entry in f.names})


def _entry(batch: Batch, name: str) -> Tensor:
    x = batch.get(name)
    if not isinstance(x, Tensor):
        raise ValueError(f"policy_loss: this objective needs {name!r} in the batch, which has {', '.join(batch)}")
    return x


def _advantages(batch: Batch, mask_BT: Tensor) -> Tensor:
    """(B, 1) or (B, T)."""
    a = _entry(batch, "advantages")
    if a.ndim == 1:
        a = a[:, None]
    if a.ndim != 2 or a.shape[0] != mask_BT.shape[0] or a.shape[1] not in (1, mask_BT.shape[1]):
        B, T = mask_BT.shape
        raise ValueError(f"policy_loss: advantages must be ({B},), ({B}, 1) or ({B}, {T}), got {tuple(a.shape)}")
    if at_hand(a) and at_hand(mask_BT) and not bool((a.isfinite() | (mask_BT == 0)).all()):
        raise ValueError("policy_loss: advantages must be finite where the mask is not 0; look at the rewards")
    return a


def _weights(objective: Objective, batch: Batch) -> tuple[Tensor, Aux]:
    assert objective.weight is not None
    mask_BT, old_BT = _entry(batch, "mask"), batch.get("old_log_probs")
    # Without an update since the rollout the old policy is the present one.
    old_BT = _entry(batch, "log_probs").detach() if old_BT is None else old_BT
    return _call(objective.weight, batch, old_BT, _entry(batch, "sampler_log_probs"), mask_BT)


def _kept(mask_BT: Tensor, weight_BT: Tensor) -> Tensor:
    return mask_BT * (weight_BT != 0).to(mask_BT.dtype)


def _distance(lp_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> Aux:
    """KL(old || policy) on tokens of the old policy, by w - 1 - log w >= 0."""
    d = unmasked(lp_BT, mask_BT) - unmasked(old_BT.detach(), mask_BT)
    return {"kl_old": mean(ratio_of(d) - 1 - d, mask_BT)}


def _is_on(coefficient: Tensor | float) -> bool:
    """A tensor's value is not looked at."""
    return isinstance(coefficient, Tensor) or coefficient != 0


def _total(objective: Objective, batch: Batch, loss_BT: Tensor, counted_BT: Tensor) -> Tensor:
    token_weights = batch.get("token_weights")
    if token_weights is None:
        return objective.aggregate(loss_BT, counted_BT, denominator=batch.get("denominator"))
    if token_weights.shape != loss_BT.shape:
        shapes = f"{tuple(loss_BT.shape)}, got {tuple(token_weights.shape)}"
        raise ValueError(f"policy_loss: token_weights must have the shape of log_probs {shapes}")
    return (loss_BT * token_weights).sum()


def _shared(metrics: dict[str, Tensor], batch: Batch, mask_BT: Tensor) -> dict[str, Tensor]:
    n = (mask_BT != 0).sum().to(torch.float32)
    whole = batch.get("n_tokens")
    metrics = {name: x.detach() for name, x in metrics.items()}
    if whole is None:
        return {"n_tokens": n, **metrics}
    return {"n_tokens": n, **{k: x * n / whole for k, x in metrics.items() if not k.endswith(LARGEST)}}
