"""Training of `classifier`: AdamW of `purelm.optim` over minibatches in an order drawn from a key."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from purelm import random
from purelm.curate.classifier import Config, batch_of, init, loss
from purelm.data.checks import check_int
from purelm.optim import adamw, apply_updates, cosine

__all__ = ["Fit", "class_weights", "fit"]


@dataclass(frozen=True)
class Fit:
    """How a classifier is trained."""

    epochs: int = 5
    batch: int = 64  # texts
    lr: float = 0.1  # the peak; a cosine to a hundredth of it
    weight_decay: float = 0.0

    def __post_init__(self):
        check_int("epochs", self.epochs, 1, 10_000)
        check_int("batch", self.batch, 1, 1 << 20)
        for name, low in (("lr", False), ("weight_decay", True)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not isfinite(value) or value < 0 or (value == 0 and not low):
                raise ValueError(f"{name}={value!r}: allowed is a finite number {'from' if low else 'above'} 0")


def class_weights(labels: Sequence[int], n_labels: int) -> list[float]:
    """A weight for each text, n / (n_labels n_class): every class weighs as much. ValueError for an empty one."""
    numbers = _numbers(labels, len(labels), n_labels)
    counts = np.bincount(numbers, minlength=n_labels)
    if not counts.all():
        raise ValueError(f"labels: no text of class {int(np.flatnonzero(counts == 0)[0])}")
    return (len(labels) / (n_labels * counts))[numbers].tolist()


def _numbers(labels: Sequence[int], n: int, n_labels: int) -> list[int]:
    if len(labels) != n:
        raise ValueError(f"labels: one for each of {n} texts, got {len(labels)}")
    return [check_int(f"labels[{i}]", label, 0, n_labels - 1) for i, label in enumerate(labels)]


def fit(
    ids: Sequence[np.ndarray],
    labels: Sequence[int],
    cfg: Config,
    key: random.Key,
    settings: Fit | None = None,
    *,
    weights: Sequence[float] | None = None,
    watch: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> dict[str, Tensor]:
    """Parameters after training on texts' features; the same bits for the same arguments on one machine.

    labels: numbers of cfg.labels. weights: above 0. ValueError for others, and for not one of each a text.

    watch(step, steps, loss of the batch in nats) is called after every step.
    """
    settings = settings or Fit()
    if not len(ids):
        raise ValueError("ids: no text to train on")
    numbers = _numbers(labels, len(ids), len(cfg.labels))
    if weights is not None:
        w = np.asarray(weights, np.float64)
        if w.shape != (len(ids),) or not (np.isfinite(w) & (w > 0)).all():
            raise ValueError(f"weights: allowed: a finite number above 0 for each of {len(ids)} texts")
    per_epoch = -(-len(ids) // settings.batch)
    steps = settings.epochs * per_epoch
    schedule = cosine(settings.lr, steps, lr_final=settings.lr / 100)
    optimizer = adamw((0.9, 0.99), weight_decay=settings.weight_decay)
    init_key, order_key = random.split(key)
    params = init(cfg, init_key)
    state = optimizer.init(params)
    for step in range(steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            order = random.permutation(random.fold_in(order_key, epoch), len(ids)).tolist()
        chosen = order[at * settings.batch : (at + 1) * settings.batch]
        own = None if weights is None else [weights[i] for i in chosen]
        batch = batch_of([ids[i] for i in chosen], [numbers[i] for i in chosen], own)
        names = sorted(params)
        leaves = {name: params[name].detach().requires_grad_() for name in names}
        value, _ = loss(leaves, batch)
        grads = dict(zip(names, torch.autograd.grad(value, [leaves[name] for name in names]), strict=True))
        updates, state = optimizer.update(grads, state, params, schedule(step))
        params = apply_updates(params, updates)
        watch(step + 1, steps, float(value.detach()))
    return params
