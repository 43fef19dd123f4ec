"""Optimizers as pairs of pure functions, their combinators, clipping and schedules."""

from purelm.optim.adamw import AdamWState, adam, adamw
from purelm.optim.base import (
    Mask,
    Optimizer,
    PartitionedState,
    add_weight_decay,
    apply_updates,
    chain,
    is_matrix,
    partitioned,
    scale_lr,
    step_of,
    with_step,
)
from purelm.optim.clip import clip, clip_by_global_norm
from purelm.optim.lion import LionState, lion
from purelm.optim.muon import MuonState, hidden_matrix, muon, muon_adamw, orthogonalize
from purelm.optim.schedules import (
    Schedule,
    constant,
    cosine,
    cosine_decay,
    linear,
    linear_decay,
    one_minus_sqrt_decay,
    wsd,
)
from purelm.optim.sgd import SGDState, sgd

__all__ = [
    "AdamWState",
    "LionState",
    "Mask",
    "MuonState",
    "Optimizer",
    "PartitionedState",
    "SGDState",
    "Schedule",
    "adam",
    "adamw",
    "add_weight_decay",
    "apply_updates",
    "chain",
    "clip",
    "clip_by_global_norm",
    "constant",
    "cosine",
    "cosine_decay",
    "hidden_matrix",
    "is_matrix",
    "linear",
    "linear_decay",
    "lion",
    "muon",
    "muon_adamw",
    "one_minus_sqrt_decay",
    "orthogonalize",
    "partitioned",
    "scale_lr",
    "sgd",
    "step_of",
    "with_step",
    "wsd",
]
