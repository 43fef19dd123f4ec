"""From finished experiments of the training service to the next ones, and to the best run of a larger budget.

The budget is time on a device, not FLOPs: small models use a device badly, so what is optimal depends on both the law
of loss and the law of speed,

    L(N, D) = E + A / N^alpha + B / D^beta,    seconds(N, D) = D (u + v N),

N being the parameters that multiply: all but the embeddings (Porian et al. 2024 count the head, too). Everything here
is a pure function of shapes, laws and results.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.scaling.count import count
from experiments.scaling.service.schemas import (
    AdamWConfig,
    ArchitectureConfig,
    Completed,
    Experiment,
    Rules,
    TrainingConfig,
    WarmupCosineDecay,
)
from purelm.scaling.laws import Law, loss
from purelm.scaling.runs import Array, Runs

__all__ = [
    "HEAD_DIM",
    "Choice",
    "RateLaw",
    "Shape",
    "Speed",
    "best_rate",
    "best_run",
    "config",
    "counted",
    "rate_law",
    "rate_of",
    "runs_of",
    "shapes",
    "speed_of",
    "work",
]

HEAD_DIM = 16
STEEP_N = (0.0, 0.75)  # StepLaw: .713
STEEP_D = (-0.5, 0.35)  # StepLaw: .307 with batches that grow; with one batch size, longer runs want lower rates


class Shape(NamedTuple):
    """A model in three numbers; the feed-forward is 8/3 of the width, rounded up to a multiple of head_dim."""

    width: int
    layers: int
    head_dim: int = HEAD_DIM


class Speed(NamedTuple):
    """seconds = tokens (a_token + a_parameter N)."""

    a_token: float
    a_parameter: float


class RateLaw(NamedTuple):
    """Best learning rate = coefficient N^-parameters D^tokens, for one number of sequences in a batch."""

    coefficient: float
    parameters: float
    tokens: float


class Choice(NamedTuple):
    """A run for a budget."""

    shape: Shape
    tokens: int
    loss: float  # by the law
    seconds: float  # by the speed


def shapes(widths: Iterable[int], aspect: int = 32, head_dim: int = HEAD_DIM) -> tuple[Shape, ...]:
    """Models of these widths, with width / aspect layers, 2 at least."""
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, since RoPE turns pairs; got {head_dim}")
    found = []
    for width in widths:
        if width < head_dim or width % head_dim:
            raise ValueError(f"width must be a multiple of head_dim {head_dim}, got {width}")
        found.append(Shape(width, max(2, round(width / aspect)), head_dim))
    return tuple(found)


def config(
    shape: Shape, tokens: int, rate: float, rules: Rules, *, batch: int, evals: int, seconds: float, seed: int = 0,
    dtype: str = "float32",
) -> TrainingConfig:  # fmt: skip
    """The run as the service takes it; tokens are rounded to a whole number of updates between evaluations."""
    a_chunk = rules.seq_len * batch * evals
    rows = math.gcd(batch, rules.n_val_tokens // rules.seq_len)
    return TrainingConfig.model_validate({
        "architecture_config": {
            "attention_bias": False, "head_dim": shape.head_dim, "hidden_size": shape.width,
            "intermediate_size": -(-8 * shape.width // 3 // shape.head_dim) * shape.head_dim,
            "num_attention_heads": shape.width // shape.head_dim, "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.width // shape.head_dim, "rms_norm_eps": 1e-6, "rope_theta": 10_000,
            "tie_word_embeddings": False, "dtype": dtype, "vocab_size": rules.min_vocab_size,
        },
        "optimizer_config": AdamWConfig(lr_scheduler=WarmupCosineDecay(peak_value=rate)).model_dump(),
        "train_batch_size": batch, "val_batch_size": rows, "n_evals": evals,
        "total_train_tokens": max(1, round(tokens / a_chunk)) * a_chunk,
        "max_runtime_seconds": seconds, "model_seed": seed,
    })  # fmt: skip


def counted(a: ArchitectureConfig) -> int:
    """N: the parameters that multiply."""
    return count(a, "head")


def runs_of(done: Sequence[tuple[TrainingConfig, float]]) -> Runs:
    """Runs of (configuration, last validation loss)."""
    n = np.array([counted(cfg.architecture_config) for cfg, _ in done], np.float64)
    return Runs(n, np.array([cfg.total_train_tokens for cfg, _ in done], np.float64), np.array([x for _, x in done]))


def work(cfg: TrainingConfig, rules: Rules) -> float:
    """Tokens trained on, and a third of those evaluated on, which have no backward pass."""
    return cfg.total_train_tokens + cfg.n_evals * rules.n_val_tokens / 3


def speed_of(done: Iterable[Experiment], rules: Rules) -> Speed:
    """The speed with the least squared relative errors of seconds, both numbers at least 0. ValueError without runs."""
    rows = []
    for run in done:
        if isinstance(run.status, Completed):
            tokens = work(run.training_config, rules) / run.status.used_runtime_seconds
            rows.append((tokens, tokens * counted(run.training_config.architecture_config)))
    if not rows:
        raise ValueError("no run has been completed, so nothing is known of the device's speed")
    x = np.array(rows)  # x (u, v) = 1
    alone = x.sum(0) / (x**2).sum(0)
    tries = [np.array([alone[0], 0.0]), np.array([0.0, alone[1]])]
    scale = np.abs(x).max(0)
    both = np.linalg.lstsq(x / scale, np.ones(len(x)), rcond=None)[0] / scale
    if len(x) > 1 and (both >= 0).all():
        tries.append(both)
    return Speed(*(float(v) for v in min(tries, key=lambda v: float(((x @ v - 1) ** 2).sum()))))


def seconds_of(cfg: TrainingConfig, speed: Speed, rules: Rules) -> float:
    """By the law of speed, evaluations included."""
    return work(cfg, rules) * (speed.a_token + speed.a_parameter * counted(cfg.architecture_config))


def best_run(
    law: Law, speed: Speed, among: Sequence[Shape], seconds: float, rules: Rules, *, batch: int, evals: int
) -> Choice:
    """The shape of the least loss by the law, each trained on as many tokens as fit in the time (and in the data)."""
    found = []
    for shape in among:
        cfg = config(shape, 1, 1.0, rules, batch=batch, evals=evals, seconds=1.0)
        n, least = counted(cfg.architecture_config), cfg.total_train_tokens
        spare = seconds / (speed.a_token + speed.a_parameter * n) - evals * rules.n_val_tokens / 3
        tokens = int(min(spare, rules.max_train_tokens) // least * least)
        if tokens > 0:
            cfg = cfg.model_copy(update={"total_train_tokens": tokens})
            found.append(Choice(shape, tokens, float(loss(law, n, tokens)), seconds_of(cfg, speed, rules)))
    if not found:
        raise ValueError(f"{seconds:.0f} s are too few for any of these models")
    return min(found, key=lambda x: x.loss)


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The least of the parabola in ln(rate) through the best and its neighbours; an end of the range is itself."""
    if len(rates) != len(losses) or not rates:
        raise ValueError(f"there are {len(rates)} rates and {len(losses)} losses")
    order = np.argsort(rates)
    x, y = np.log(np.asarray(rates, np.float64)[order]), np.asarray(losses, np.float64)[order]
    i = int(np.argmin(y))
    if not 0 < i < len(x) - 1:
        return float(np.exp(x[i]))
    curve = np.polyfit(x[i - 1 : i + 2], y[i - 1 : i + 2], 2)
    return float(np.exp(np.clip(-curve[1] / (2 * curve[0]), x[i - 1], x[i + 1])))


def rate_law(sizes: Sequence[float], tokens: Sequence[float], rates: Sequence[float]) -> RateLaw:
    """The law through the best rates of three sweeps, the last two of one size or of one number of tokens or neither.

    Least squares of logarithms under p in `STEEP_N` and q in `STEEP_D`: sweeps are short and noisy, and must not be
    extrapolated wildly. With fewer than three, exponents that are not determined are 0.
    """
    x = np.stack([-np.log(np.asarray(sizes, np.float64)), np.log(np.asarray(tokens, np.float64))], -1)
    y = np.log(np.asarray(rates, np.float64))
    x0, y0 = x.mean(0), y.mean()
    x, z, box = x - x0, y - y0, np.array([STEEP_N, STEEP_D])

    def cost(b: Array) -> tuple[float, float]:
        return float(((x @ b - z) ** 2).sum()), float(b @ b)

    # A convex problem in a rectangle: its least is that of the plane, or else lies on an edge.
    free = np.linalg.lstsq(x, z, rcond=None)[0]
    found = [free] if (np.clip(free, *box.T) == free).all() else []
    for at, other in ((0, 1), (1, 0)):
        for end in box[at]:
            b = np.zeros(2)
            b[at], b[other] = end, np.linalg.lstsq(x[:, [other]], z - end * x[:, at], rcond=None)[0][0]
            found.append(np.clip(b, *box.T))
    best = min(found, key=cost)
    return RateLaw(float(np.exp(y0 - x0 @ best)), float(best[0]), float(best[1]))


def rate_of(law: RateLaw, parameters: float, tokens: float) -> float:
    """c N^-p D^q, in three digits."""
    return float(f"{law.coefficient * parameters**-law.parameters * tokens**law.tokens:.3g}")
