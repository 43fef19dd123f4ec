"""Optimizers as pairs of pure functions, their combinators, clipping, schedules, and averages of parameters.

    optimizer = chain(clip_by_global_norm(1.0), adamw(weight_decay=0.1, mask=is_matrix))
    schedule = cosine(3e-4, n_steps, n_warmup=1000)

    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params, schedule(step))
    params = apply_updates(params, updates)

`ema` is a module of three functions: ema.init, ema.update, ema.value.
"""

from purelm.optim import ema
from purelm.optim.adamw import AdamWState, adam, adamw
from purelm.optim.base import (
    Mask,
    Optimizer,
    apply_updates,
    is_matrix,
    step_of,
    with_step,
)
from purelm.optim.clip import clip, clip_by_global_norm
from purelm.optim.combinators import (
    LabelledState,
    PartitionedState,
    add_weight_decay,
    chain,
    frozen,
    labelled,
    partitioned,
    scale_lr,
)
from purelm.optim.finite import ApplyIfFiniteState, apply_if_finite
from purelm.optim.lion import LionState, lion
from purelm.optim.muon import MuonState, hidden_matrix, muon, muon_adamw, orthogonalize
from purelm.optim.rmsprop import RMSpropState, rmsprop
from purelm.optim.schedules import (
    Schedule,
    constant,
    cosine,
    cosine_decay,
    join,
    linear,
    linear_decay,
    one_minus_sqrt_decay,
    wsd,
)
from purelm.optim.sgd import SGDState, sgd

__all__ = [
    "AdamWState",
    "ApplyIfFiniteState",
    "LabelledState",
    "LionState",
    "Mask",
    "MuonState",
    "Optimizer",
    "PartitionedState",
    "RMSpropState",
    "SGDState",
    "Schedule",
    "adam",
    "adamw",
    "add_weight_decay",
    "apply_if_finite",
    "apply_updates",
    "chain",
    "clip",
    "clip_by_global_norm",
    "constant",
    "cosine",
    "cosine_decay",
    "ema",
    "frozen",
    "hidden_matrix",
    "is_matrix",
    "join",
    "labelled",
    "linear",
    "linear_decay",
    "lion",
    "muon",
    "muon_adamw",
    "one_minus_sqrt_decay",
    "orthogonalize",
    "partitioned",
    "rmsprop",
    "scale_lr",
    "sgd",
    "step_of",
    "with_step",
    "wsd",
]
