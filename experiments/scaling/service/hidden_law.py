"""What the surrogate pretends: a law of loss, drawn for each key, and how long a device would take. Nothing is trained.

    loss after t tokens = E + A / N^alpha + B / t^beta + q(x, y) + g lr(t) / lr + shape + more
    x = ln(peak lr / lr*),  y = ln(batch / batch*),  q = a x^2 + b y^2 + c x y
    lr* = 1.79 N^-.713 D^.307 e^u,  batch* = .58 D^.571 e^v tokens             (StepLaw's centres, moved for each key)
    shape = s ((ln(width / layers) - r)^2 + 4 ln(inner / (8/3 width))^2),  inner the feed-forward's width

N parameters without embeddings and head, D tokens of the whole run, g what a learning rate that has not decayed costs.
More: SGD, weights in bf16, a warmup longer than a tenth. Other settings do nothing. No loss lies above that of a model
that knows nothing, ln(vocabulary).

    seconds of an update = FLOPs / (peak MFU) + .002,   MFU = most width / (width + 512) batch / (batch + 8192)

Functions take numbers, or arrays that broadcast.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from experiments.limits import Range, Seed
from experiments.scaling.count import count
from experiments.scaling.service.schemas import (
    AdamWConfig,
    Rules,
    TrainingConfig,
    WarmupCosineDecay,
    total_steps,
)
from purelm import random
from purelm.scaling.hyperparameters import steplaw
from purelm.scaling.laws import Law, loss

__all__ = [
    "EVALUATION",
    "SGD_LR",
    "UPDATE",
    "Hidden",
    "Setup",
    "Surrogate",
    "ceiling",
    "centres",
    "draw",
    "edge_of",
    "eval_seconds",
    "expected",
    "penalty",
    "schedule",
    "setup_of",
    "sgd_of",
    "step_seconds",
]

UPDATE, EVALUATION = 0.002, 0.1  # seconds that an update and an evaluation take however small the model is
HALF_WIDTH, HALF_BATCH = 512.0, 8192.0  # features and tokens at which half of the most utilization is reached
LEAST_VOCABULARY = 1024  # of data: a smaller vocabulary in a configuration lowers no loss
SGD_LR = 50.0  # SGD's best learning rate over AdamW's


@dataclass(frozen=True)
class Surrogate:
    """Settings of the surrogate; the device is an H100 by default."""

    secret: Seed = 0
    """with the key's own seed it decides the hidden law; a server draws one and keeps it"""
    noise: Annotated[float, Range(0, 0.1)] = 0.01
    """nats; the standard deviation of final losses between seeds is .3 to 1 of it, by key"""
    shape: Annotated[float, Range(0, 1)] = 0.004
    """s above: what a model that is too deep or too wide loses"""
    peak_flops: Annotated[float, Range(1e6, 1e18)] = 9.9e14
    """of the device in bf16, a second"""
    fp32_share: Annotated[float, Range(0, 1, open_low=True)] = 0.25
    """fp32's speed over bf16's"""
    most_mfu: Annotated[float, Range(0, 1, open_low=True)] = 0.6
    """of the widest models and the largest batches"""
    time_scale: Annotated[float, Range(0, 100)] = 0.0
    """seconds that a simulated second takes, so that runs can be watched; 0: an answer at once"""


class Hidden(NamedTuple):
    """What is drawn for a key; letters are those of the formulas above."""

    law: Law
    lr: float  # u
    batch: float  # v
    lr_bend: float  # a
    batch_bend: float  # b
    both_bend: float  # c, below 0: larger batches bear larger learning rates
    edge: float  # x above which a run with a warmup of .05 diverges
    decay: float  # g
    bf16: float  # nats that weights in bf16 cost
    sgd: float  # nats that SGD costs
    aspect: float  # r
    noise: float  # standard deviation of final losses, nats


class Setup(NamedTuple):
    """What the law and the clock look at."""

    layers: Any
    width: Any
    inner: Any  # the feed-forward's
    parameters: Any  # without embeddings and head
    head: Any  # vocabulary times width
    bf16: Any
    batch: Any  # tokens of an update
    tokens: Any  # of the whole run


# Least and most of each number. Excess losses, in nats, are those of 1e8 parameters and of 2e9 tokens: with A and B
# drawn themselves, which rise with the exponents, most laws would be far from what is measured.
DRAWN = {
    "E": (1.6, 2.4), "excess_n": (0.4, 0.9), "excess_d": (0.3, 0.7), "alpha": (0.28, 0.42), "beta": (0.28, 0.42),
    "lr": (-0.5, 0.5), "batch": (-0.4, 0.4), "lr_bend": (0.015, 0.04), "batch_bend": (0.008, 0.02), "rho": (-0.6, -0.2),
    "edge": (1.2, 1.8), "decay": (0.03, 0.1), "bf16": (0.002, 0.015), "sgd": (0.6, 1.2),
    "aspect": (math.log(32), math.log(128)), "noise": (0.3, 1.0),
}  # fmt: skip


def draw(settings: Surrogate, seed: int) -> Hidden:
    """The hidden law of the key with this seed, at least 0: the same whenever it is asked for."""
    key = random.fold_in(random.key(settings.secret), seed)
    uniform = random.uniform(key, (len(DRAWN),), dtype=torch.float64).tolist()
    x = {name: low + (high - low) * u for (name, (low, high)), u in zip(DRAWN.items(), uniform, strict=True)}
    terms = x["excess_n"] * 1e8 ** x["alpha"], x["excess_d"] * 2e9 ** x["beta"]
    law = Law(x["E"], *terms, x["alpha"], x["beta"])
    both = 2 * x["rho"] * math.sqrt(x["lr_bend"] * x["batch_bend"])
    return Hidden(
        law, x["lr"], x["batch"], x["lr_bend"], x["batch_bend"], both, x["edge"], x["decay"], x["bf16"], x["sgd"],
        x["aspect"], x["noise"] * settings.noise,
    )  # fmt: skip


def setup_of(cfg: TrainingConfig, rules: Rules) -> Setup:
    """Of a configuration."""
    a = cfg.architecture_config
    return Setup(
        a.num_hidden_layers, a.hidden_size, a.intermediate_size, count(a, "blocks"), a.vocab_size * a.hidden_size,
        a.dtype == "bfloat16", rules.seq_len * cfg.train_batch_size,
        total_steps(cfg, rules) * rules.seq_len * cfg.train_batch_size,
    )  # fmt: skip


def centres(hidden: Hidden, s: Setup) -> tuple[Any, Any]:
    """(lr*, batch* in tokens), of AdamW."""
    n, d = np.asarray(s.parameters, np.float64), np.asarray(s.tokens, np.float64)
    lr, batch = _steplaw(n, d)
    return lr * math.exp(hidden.lr), batch * math.exp(hidden.batch)


def penalty(hidden: Hidden, x: Any, y: Any) -> Any:
    """q of x = ln(lr / lr*) and y = ln(batch / batch*), nats."""
    return hidden.lr_bend * x**2 + hidden.batch_bend * y**2 + hidden.both_bend * x * y


def edge_of(hidden: Hidden, warmup_frac: float, clipped: bool) -> float:
    """x above which a run diverges: lower with a short warmup, and without clipping of gradients."""
    return hidden.edge + 0.3 * math.log((min(warmup_frac, 0.2) + 0.005) / 0.055) - (0.0 if clipped else 0.5)


def schedule(s: WarmupCosineDecay, share: Any) -> Any:
    """The learning rate when this share of the updates is done."""
    share = np.asarray(share, np.float64)
    warmup = s.warmup_frac
    up = s.init_value + (s.peak_value - s.init_value) * share / warmup if warmup else s.peak_value
    turn = np.pi * (share - warmup) / (1 - warmup)
    down = s.peak_value * (s.final_lr_frac + (1 - s.final_lr_frac) * 0.5 * (1 + np.cos(turn)))
    return np.where(share < warmup, up, down)


def expected(hidden: Hidden, settings: Surrogate, s: Setup, q: Any, tokens: Any, lr_share: Any, warmup: float) -> Any:
    """The loss without noise after `tokens`, where the learning rate is lr_share of its peak; q from `penalty`."""
    aspect = np.log(s.width / np.asarray(s.layers, np.float64)) - hidden.aspect
    shape = settings.shape * (aspect**2 + 4 * np.log(s.inner / (8 / 3 * np.asarray(s.width))) ** 2)
    more = hidden.bf16 * np.asarray(s.bf16) + 0.1 * max(0.0, warmup - 0.1) ** 2
    value = loss(hidden.law, np.asarray(s.parameters, np.float64), np.asarray(tokens, np.float64))
    return np.minimum(value + q + shape + hidden.decay * lr_share + more, ceiling(s))


def ceiling(s: Setup) -> Any:
    """The loss of a model that knows nothing: ln of the vocabulary."""
    return np.log(np.maximum(s.head / np.asarray(s.width), LEAST_VOCABULARY))


def step_seconds(settings: Surrogate, s: Setup, seq_len: int) -> Any:
    """Of one update."""
    return s.batch * _flops(s, seq_len) / _rate(settings, s, s.batch) + UPDATE


def eval_seconds(settings: Surrogate, s: Setup, rules: Rules, val_batch_size: int) -> Any:
    """Of one evaluation: a forward pass has a third of an update's FLOPs."""
    rate = _rate(settings, s, float(val_batch_size * rules.seq_len))
    return rules.n_val_tokens * _flops(s, rules.seq_len) / 3 / rate + EVALUATION


def sgd_of(cfg: TrainingConfig) -> bool:
    """Whether the optimizer is SGD."""
    return not isinstance(cfg.optimizer_config, AdamWConfig)


def _steplaw(parameters: Any, tokens: Any) -> tuple[Any, Any]:
    """`purelm.scaling.hyperparameters.steplaw` of arrays: its values at 1 and the slopes of its logarithms."""
    lr, batch = steplaw(1.0, 1.0)
    n_lr, _ = (math.log(x / y) for x, y in zip(steplaw(math.e, 1.0), (lr, batch), strict=True))
    d_lr, d_batch = (math.log(x / y) for x, y in zip(steplaw(1.0, math.e), (lr, batch), strict=True))
    return lr * parameters**n_lr * tokens**d_lr, batch * tokens**d_batch


def _flops(s: Setup, seq_len: int) -> Any:
    """Of training, a token: 6 for each parameter of the blocks and the head, and attention's scores."""
    return 6.0 * (s.parameters + s.head) + 12.0 * s.layers * s.width * seq_len


def _rate(settings: Surrogate, s: Setup, batch: Any) -> Any:
    """FLOPs a second."""
    mfu = settings.most_mfu * s.width / (s.width + HALF_WIDTH) * (batch / (batch + HALF_BATCH))
    return settings.peak_flops * np.where(s.bf16, 1.0, settings.fp32_share) * mfu
