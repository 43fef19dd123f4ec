"""Regions with options and oracles, and a batch on which each of their branches is taken."""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from purelm.align import ratios, regions, regions_batch, regions_group, regions_sequence, regions_token
from tests.align import policy_oracles as by_hand

B, T = 6, 9
NAN, INF = float("nan"), float("inf")


class Batch(NamedTuple):
    """Log-probabilities of a policy, of the one before, advantages (B, T), mask; float64."""

    lp: torch.Tensor
    lo: torch.Tensor
    adv: torch.Tensor
    mask: torch.Tensor


def batch(seed=0, spread=0.8, per_token=False):
    """Ratios of 0.1 to 10, advantages of both signs and 0, a row without any token."""
    draw = np.random.default_rng(seed)
    lp = -draw.gamma(1.5, 0.8, (B, T)) - 0.01
    lo = np.minimum(lp + spread * draw.normal(size=(B, T)), -1e-3)
    adv = draw.normal(size=(B, T if per_token else 1)) * np.ones((B, T))
    adv[1] = 0.0
    mask = draw.random((B, T)) < 0.75
    mask[2], mask[3, 0] = False, True
    tensors = [torch.from_numpy(x) for x in (lp, lo, adv)]
    return Batch(*tensors, torch.from_numpy(mask))


def poisoned(x, mask, bad=NAN):
    """x with `bad` where masked."""
    return torch.where(mask, x, torch.full_like(x, bad))


ENTROPY = torch.from_numpy(np.random.default_rng(5).gamma(1.0, 1.0, (B, T)))
DRAWS = torch.from_numpy(np.random.default_rng(6).random((B, T)))
TOKEN = ratios.token
_of = by_hand.per_token

# name -> (ratio, region, oracle)
CASES = {
    "reinforce": (TOKEN, regions.reinforce, _of(by_hand.reinforce)),
    "unclipped": (TOKEN, regions.unclipped, _of(by_hand.unclipped)),
    "clip": (TOKEN, regions.clip, _of(by_hand.clip(0.2, 0.2))),
    "clip higher": (TOKEN, partial(regions.clip, low=0.3, high=0.5), _of(by_hand.clip(0.3, 0.5))),
    "dual clip": (TOKEN, partial(regions.dual_clip, high=0.28), _of(by_hand.dual_clip(0.2, 0.28, 3.0))),
    "two-sided": (TOKEN, partial(regions.two_sided, delta=2.0), _of(by_hand.dual_clip(0.2, 0.2, 2.0))),
    "cispo": (TOKEN, partial(regions.cispo, cap=1.5), _of(by_hand.cispo(0.0, 1.5))),
    "cispo, both": (TOKEN, partial(regions.cispo, cap=2.0, floor=0.7), _of(by_hand.cispo(0.7, 2.0))),
    "gspo": (ratios.sequence, partial(regions.clip, low=0.1, high=0.15), by_hand.gspo(0.1, 0.15)),
    "gspo-token": (ratios.sequence_token, partial(regions.clip, low=0.1, high=0.15), by_hand.gspo_token(0.1, 0.15)),
    "sapo": (TOKEN, regions_token.sapo, _of(by_hand.sapo(1.0, 1.05))),
    "dro": (TOKEN, partial(regions_token.dro, beta=0.3), _of(by_hand.dro(0.3))),
    "up-grpo": (TOKEN, regions_token.up_grpo, _of(by_hand.up_grpo(0.2, 0.2, 3.0))),
    "dppo-tv": (TOKEN, partial(regions_token.dppo_tv, cap=2.5, low=0.1), _of(by_hand.dppo_tv(0.1, 0.2, 2.5))),
    "dppo-kl": (TOKEN, partial(regions_token.dppo_kl, low=0.02, high=0.05), _of(by_hand.dppo_kl(0.02, 0.05, 20.0))),
    "band": (TOKEN, regions_token.probability_band, _of(by_hand.probability_band(0.1, 20.0))),
    "gmpo": (TOKEN, regions_sequence.gmpo, by_hand.gmpo(0.4, 0.4)),
    "topr": (TOKEN, regions_sequence.topr, by_hand.topr()),
    "vespo": (TOKEN, regions_sequence.vespo, by_hand.vespo(2.0, 3.0, 3.0, 2.0)),
    "fipo": (
        TOKEN,
        partial(regions_sequence.fipo, half_life=3.0, least=0.8, safe_ratio=1.5, c=3.0),
        by_hand.fipo(3.0, 0.8, 1.2, 1.5, 0.8, 0.2, 0.28, 3.0),
    ),
    "off-policy": (
        TOKEN,
        partial(regions_sequence.off_policy_masked, delta=0.05),
        by_hand.off_policy_masked(by_hand.clip(0.2, 0.2), 0.05),
    ),
    "real": (TOKEN, partial(regions_group.real, group_size=3, tau=0.5), by_hand.real(3, 0.5)),
    "clip-cov": (
        TOKEN,
        partial(regions_batch.clip_cov, fraction=0.1, least=0.1, most=1.0, low=0.5, high=0.5),
        by_hand.clip_cov(0.1, 0.1, 1.0, 0.5, 0.5),
    ),
    "clip-cov, draws": (
        TOKEN,
        partial(regions_batch.clip_cov, fraction=0.1, least=0.1, most=5.0, draws_BT=DRAWS),
        by_hand.clip_cov(0.1, 0.1, 5.0, 1.0, 1.0, DRAWS.numpy()),
    ),
    "kl-cov": (TOKEN, partial(regions_batch.kl_cov, fraction=0.1, coefficient=0.7), by_hand.kl_cov(0.1, 0.7)),
    "80/20": (
        TOKEN,
        partial(regions_batch.high_entropy, entropy_BT=ENTROPY),
        by_hand.high_entropy(0.2, ENTROPY.numpy(), by_hand.clip(0.2, 0.2)),
    ),
}
OF_BATCH = {"real", "clip-cov", "clip-cov, draws", "kl-cov", "80/20"}  # rows are not independent
# Whose gradient at w = 1 is REINFORCE's, with one advantage a sequence and sequence_mean.
LIKE_REINFORCE = [name for name in CASES if name not in {"real", "80/20", "clip-cov", "clip-cov, draws"}]


def composed(name):
    """lp, lo, A, mask -> loss per token."""
    ratio, region, _ = CASES[name]
    return lambda lp, lo, adv, mask: region(lp, ratio(lp, lo, mask)[0], adv, mask)[0]
