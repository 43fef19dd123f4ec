"""Losses of preferences by name, with the options that each has."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from purelm.align.answers import Scored, scored
from purelm.align.preferences import (
    apo_down,
    apo_zero,
    cdpo,
    dpo,
    dpo_norm,
    hinge,
    ipo,
    kto,
    robust_dpo,
)
from purelm.align.reference_free import cpo, orpo, simpo

LossName = Literal[
    "dpo", "cdpo", "robust", "ipo", "hinge", "dpo_norm", "apo_zero", "apo_down", "kto", "simpo", "orpo", "cpo"
]
NAMES = (
    "beta", "label_smoothing", "gamma", "alpha", "length_normalize", "desirable_weight", "undesirable_weight"
)  # fmt: skip


class Sums(NamedTuple):
    """Of each pair: sums of log-probabilities over the answers' tokens, and the numbers of these."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    n_chosen: Tensor
    n_rejected: Tensor
    kl: Tensor  # the same in each pair, 0 but for kto


class Objective(NamedTuple):
    """A loss as the program knows it."""

    loss: Callable[[Sums], Scored]
    has_reference: bool
    needs_kl: bool


def objective(name: str, given: dict[str, Any]) -> Objective:
    """The loss with the options that are given (not None); ValueError for one that it does not have."""
    loss, has_reference, defaults = _TABLE[name]
    for option, value in given.items():
        if value is not None and option not in defaults:
            raise ValueError(f"{option} is {value}: the loss {name} has none; its options are {', '.join(defaults)}")
    options = {**defaults, **{k: v for k, v in given.items() if v is not None}}
    if "label_smoothing" in options and not options["label_smoothing"] < 0.5:
        raise ValueError(f"label_smoothing must be below 0.5, got {options['label_smoothing']}")
    if "beta" in options and not options["beta"] > 0:
        raise ValueError(f"beta must be above 0, got {options['beta']}")
    return Objective(lambda sums: loss(sums, **options), has_reference, name == "kto")


def _of_ratios(f: Callable[..., Scored]) -> Callable[..., Scored]:
    return lambda x, **options: f(x.chosen, x.rejected, x.ref_chosen, x.ref_rejected, **options)


def _of_means(f: Callable[..., Scored]) -> Callable[..., Scored]:
    """A loss without a reference that takes the numbers of tokens."""
    return lambda x, **options: f(x.chosen, x.rejected, n_chosen=x.n_chosen, n_rejected=x.n_rejected, **options)


def _ipo(x: Sums, beta: float, length_normalize: bool) -> Scored:
    lengths = {"n_chosen": x.n_chosen, "n_rejected": x.n_rejected} if length_normalize else {}
    return ipo(*x[:4], beta=beta, **lengths)


def _cpo(x: Sums, beta: float, alpha: float, length_normalize: bool) -> Scored:
    return cpo(x.chosen, x.rejected, beta=beta, alpha=alpha, n_chosen=x.n_chosen if length_normalize else None)


def _kto(x: Sums, beta: float, **weights: float) -> Scored:
    """The mean of both answers' losses."""
    yes, no = (x.kl * 0 + 1), x.kl * 0
    good, a = kto(x.chosen, x.ref_chosen, yes, x.kl, beta=beta, **weights)
    bad, b = kto(x.rejected, x.ref_rejected, no, x.kl, beta=beta, **weights)
    return (good + bad) / 2, scored(a["reward"], b["reward"], x.chosen, x.rejected)


_beta = {"beta": 0.1}
# name -> (loss, whether it has a reference, options and their defaults)
_TABLE: dict[str, tuple[Callable[..., Scored], bool, dict[str, Any]]] = {
    "dpo": (_of_ratios(dpo), True, _beta),
    "cdpo": (_of_ratios(cdpo), True, {**_beta, "label_smoothing": 0.1}),
    "robust": (_of_ratios(robust_dpo), True, {**_beta, "label_smoothing": 0.1}),
    "ipo": (_ipo, True, {**_beta, "length_normalize": False}),
    "hinge": (_of_ratios(hinge), True, _beta),
    "dpo_norm": (lambda x, beta: dpo_norm(*x[:4], n_chosen=x[4], n_rejected=x[5], beta=beta), True, {"beta": 5.0}),
    "apo_zero": (_of_ratios(apo_zero), True, _beta),
    "apo_down": (_of_ratios(apo_down), True, _beta),
    "kto": (_kto, True, {**_beta, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    "simpo": (_of_means(simpo), False, {"beta": 2.0, "gamma": 0.5}),
    "orpo": (_of_means(orpo), False, _beta),
    "cpo": (_cpo, False, {**_beta, "alpha": 1.0, "length_normalize": False}),
}
