"""The best run that a hidden law allows in a number of device-seconds: what a final run is measured by.

Every candidate is a configuration that could be submitted, so that its loss is reached and not only written down: whole
layers, widths, batches and updates. A grid over these is evaluated at once, and a pattern search goes on from its best.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.scaling.service.hidden_law import (
    Hidden,
    Setup,
    Surrogate,
    centres,
    edge_of,
    eval_seconds,
    expected,
    penalty,
    step_seconds,
)
from experiments.scaling.service.schemas import (
    MAX_SECONDS,
    AdamWConfig,
    ArchitectureConfig,
    Rules,
    TrainingConfig,
    WarmupCosineDecay,
)

__all__ = ["best"]

WARMUP = 0.05
SLACK = 1e-9  # of the time that is left over, so that rounding makes no run late
Whole = NDArray[np.int64]


class Shapes(NamedTuple):
    """Candidates, arrays of one shape."""

    layers: Any
    pairs: Any  # half the width: heads of 2 features are allowed, so that every even width is
    inner: Any  # half the feed-forward's width
    batch: Any  # sequences


def best(
    settings: Surrogate, hidden: Hidden, like: TrainingConfig, rules: Rules, seconds: float
) -> TrainingConfig | None:
    """The configuration of the least loss in this time, with the vocabulary, the tying and the rules of `like`.

    It can be submitted: its max_runtime_seconds are at most an experiment's, and a final run has its own.
    None where no update fits into it.
    """
    if seconds < 1:  # the least max_runtime_seconds
        return None
    ends = []
    for bf16 in (True, False):

        def value(x: Shapes, bf16: bool = bf16) -> NDArray[np.float64]:
            return _value(settings, hidden, like, rules, seconds, x, bf16)[0]

        layers = np.unique(np.geomspace(1, 200, 40).round().astype(np.int64))
        pairs = np.unique(np.geomspace(8, 8192, 60).round().astype(np.int64))
        batch = np.unique(np.geomspace(1, 16384, 40).round().astype(np.int64))
        mesh = np.meshgrid(layers, pairs, batch, indexing="ij")
        grid = Shapes(mesh[0], mesh[1], np.maximum(mesh[1], (8 * mesh[1]) // 3), mesh[2])
        at = np.unravel_index(int(np.argmin(value(grid))), mesh[0].shape)
        found = _searched(value, np.array([x[at] for x in grid]))
        ends.append((float(value(_shapes(found[None]))[0]), bf16, found))
    least, bf16, found = min(ends, key=lambda x: x[0])
    if not np.isfinite(least):
        return None
    _, setup, lr = _value(settings, hidden, like, rules, seconds, _shapes(found[None]), bf16)
    shape = Shapes(*(int(x) for x in found))
    return TrainingConfig(
        architecture_config=_architecture(like.architecture_config, shape, bf16),
        optimizer_config=AdamWConfig(
            lr_scheduler=WarmupCosineDecay(peak_value=float(lr[0]), final_lr_frac=0.0, warmup_frac=WARMUP)
        ),
        train_batch_size=shape.batch, val_batch_size=like.val_batch_size, n_evals=1,
        total_train_tokens=int(setup.tokens[0]), max_runtime_seconds=min(seconds, MAX_SECONDS),
        model_seed=like.model_seed,
    )  # fmt: skip


def _shapes(rows: NDArray[np.int64]) -> Shapes:
    return Shapes(*np.moveaxis(rows, -1, 0))


def _architecture(like: ArchitectureConfig, shape: Shapes, bf16: bool) -> ArchitectureConfig:
    width = 2 * int(shape.pairs)
    head = next(h for h in (128, 64, 32, 16, 8, 4, 2) if width % h == 0)
    return ArchitectureConfig(
        **{
            **like.model_dump(), "attention_bias": False, "head_dim": head, "hidden_size": width,
            "intermediate_size": 2 * int(shape.inner), "num_attention_heads": width // head,
            "num_key_value_heads": width // head, "num_hidden_layers": int(shape.layers),
            "dtype": "bfloat16" if bf16 else "float32",
        }
    )  # fmt: skip


def _value(
    settings: Surrogate, hidden: Hidden, like: TrainingConfig, rules: Rules, seconds: float, x: Shapes, bf16: bool
) -> tuple[NDArray[np.float64], Setup, NDArray[np.float64]]:
    """(loss, inf where no update fits or the rules forbid it; setup; learning rate) of candidates."""
    a = like.architecture_config
    width, inner = 2 * x.pairs, 2 * x.inner
    head_dim = np.select([width % h == 0 for h in (128, 64, 32, 16, 8, 4)], [128, 64, 32, 16, 8, 4], 2)
    parameters = x.layers * (4 * width**2 + 3 * width * inner + 2 * width + 2 * head_dim) + width
    tables = (1 if a.tie_word_embeddings else 2) * a.vocab_size * width
    batch = x.batch * rules.seq_len
    s = Setup(x.layers, width, inner, parameters, a.vocab_size * width, bf16, batch, batch)
    left = seconds - eval_seconds(settings, s, rules, like.val_batch_size)
    fits = np.floor(left * (1 - SLACK) / step_seconds(settings, s, rules.seq_len))
    steps = np.minimum(fits, rules.max_train_tokens // batch).astype(np.int64)
    allowed = (steps >= 1) & (parameters + tables <= rules.max_parameters) & (inner >= width) & (x.batch >= 1)
    s = s._replace(tokens=np.maximum(steps, 1) * batch)
    lr_star, batch_star = centres(hidden, s)
    y = np.log(batch / batch_star)
    lr_at = np.minimum(-hidden.both_bend * y / (2 * hidden.lr_bend), edge_of(hidden, WARMUP, True) - 1e-6)
    value = expected(hidden, settings, s, penalty(hidden, lr_at, y), s.tokens, 0.0, WARMUP)
    return np.where(allowed, value, np.inf), s, lr_star * np.exp(lr_at)


def _searched(value: Callable[[Shapes], NDArray[np.float64]], x: Whole) -> Whole:
    """Pattern search over whole numbers: steps of each, and of pairs of them, halved until they are 1."""
    least = float(value(_shapes(x[None]))[0])
    share = 0.25
    moves = np.array([m for m in np.ndindex(3, 3, 3, 3)]) - 1
    while True:
        step = np.maximum((share * x).astype(np.int64), 1)
        rows = np.maximum(x + moves * step, 1)
        found = value(_shapes(rows))
        at = int(np.argmin(found))
        if found[at] < least:
            x, least = rows[at], float(found[at])
        elif (step == 1).all():
            return x
        else:
            share /= 2
