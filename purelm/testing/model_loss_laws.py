"""Laws of a Model's loss and log_probs, and of the derivatives of its loss. `models.check_model` runs them."""

from collections.abc import Callable

import torch
from torch import Tensor

from purelm import random
from purelm.testing.laws import require
from purelm.testing.model_laws import PLACE, Case, log_p_of, logits_of
from purelm.testing.numeric import (
    check_jvp,
    check_metrics,
    check_per_sample,
    check_slope,
    close,
    gradient,
    opened,
    some_gradient,
)
from purelm.tree import Tree

__all__ = ["MODEL_LOSS_LAWS"]


def loss(case: Case) -> None:
    """The loss is the mean over all positions of -log_softmax(logits)[target]; metrics are detached 0-d tensors."""
    free = opened(case.params)
    value, metrics = case.model.loss(free.closed([x.detach().requires_grad_() for x in free.floats]), case.batch)
    require(value.ndim == 0, f"the loss must be 0-d, got shape {tuple(value.shape)}")
    expected = -log_p_of(logits_of(case), case.batch["targets"])[0].mean()
    close(value.double(), expected, "the loss and the mean of -log_softmax(logits)[target]", case.tolerance)
    check_metrics(metrics)


def weights(case: Case) -> None:
    """With weights w and a denominator d the loss is sum_i w_i nll_i / d; d is sum_i w_i if the batch has none."""
    shape = tuple(case.tokens_BT.shape)
    # Multiples of 1/64, whose sum is exact in fp32; a third of them 0.
    w = random.randint(random.fold_in(case.key, 4), shape, 1, 128) / 64.0
    w = torch.where(random.bernoulli(random.fold_in(case.key, 5), 0.3, shape), 0.0, w)
    w[0, 0], w[-1, -1] = 0.75, 0.0
    w = w.to(case.tokens_BT.device)
    nll = -log_p_of(logits_of(case), case.batch["targets"])[0]
    total = (w * nll).sum()
    batch = {**case.batch, "weights": w}
    value = case.model.loss(case.params, batch)[0].double()
    close(value, total / w.double().sum(), "the loss and sum w nll / sum w", case.tolerance)
    value = case.model.loss(case.params, {**batch, "denominator": torch.tensor(2.5, device=w.device)})[0].double()
    close(value, total / 2.5, 'the loss and sum w nll / batch["denominator"]', case.tolerance)


def options(case: Case) -> None:
    """z_loss adds its multiple of the mean (log Z)^2; chunk changes nothing; temperature divides the logits."""
    model, params, batch = case.model, case.params, case.batch
    found = logits_of(case).double()
    plain = model.loss(params, batch)[0]
    z = model.loss(params, batch, z_loss=0.5)[0] - plain
    z2 = found.logsumexp(-1).square().mean()
    close(z.double(), 0.5 * z2, "what z_loss=0.5 adds and half the mean (log Z)^2", case.tolerance)
    close(model.loss(params, batch, chunk=2)[0], plain, "losses with chunk=2 and without", case.tolerance)
    chunked = gradient(lambda p: model.loss(p, batch, chunk=2)[0], params)
    close(chunked, _gradient(case), "gradients with chunk=2 and without", case.tolerance)
    whole = model.log_probs(params, batch)
    for name, x, y in zip(("log_probs", "entropies"), model.log_probs(params, batch, chunk=2), whole, strict=True):
        close(x, y, f"{name} with chunk=2 and without", case.tolerance, PLACE)
    hot = model.log_probs(params, batch, temperature=0.7)
    for name, x, y in zip(("log_probs", "entropies"), hot, log_p_of(found / 0.7, batch["targets"]), strict=True):
        close(x.double(), y, f"{name} at temperature 0.7 and those of logits / 0.7", case.tolerance, PLACE)


def log_probs(case: Case) -> None:
    """log_probs gives log_softmax(logits)[target], and the entropy -sum_v p_v log p_v, at each position."""
    found = case.model.log_probs(case.params, case.batch)
    expected = log_p_of(logits_of(case), case.batch["targets"])
    for name, x, y in zip(("log-probabilities", "entropies"), found, expected, strict=True):
        close(x.double(), y, f"{name} and those of apply's logits", case.tolerance, PLACE)


def used(case: Case) -> None:
    """Every parameter has a gradient of the loss."""
    dead = [path for path, x in _gradient(case).items() if not bool(x.any())]
    require(not dead, f"the gradient of the loss is zero at {', '.join(dead[:3])}: is it used?")


def _loss_of(case: Case) -> Callable[[Tree], Tensor]:
    return lambda params: case.model.loss(params, case.batch)[0]


def _gradient(case: Case) -> dict[str, Tensor]:
    return some_gradient(_loss_of(case), case.params)


def gradients(case: Case) -> None:
    """The loss's gradient along a random direction is its difference quotient; if not, leaf by leaf, which fail."""
    check_slope(_loss_of(case), case.params, case.tolerance)


def jvp(case: Case) -> None:
    """torch.func.jvp of the loss is <gradient, direction>."""
    check_jvp(_loss_of(case), case.params, case.tolerance)


def per_sample(case: Case) -> None:
    """Gradients of each row's loss by torch.func.vmap are those of a loop over rows."""
    check_per_sample(lambda p, batch: case.model.loss(p, batch)[0], case.params, case.batch, 1, case.tolerance)


MODEL_LOSS_LAWS = {law.__name__: law for law in (loss, weights, options, log_probs, used, gradients, jvp, per_sample)}
