"""Laws of a loss (params, batch) -> (scalar, metrics), by the contract of `make_step`; `check_loss` runs them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import random, tree
from purelm.testing.laws import assert_trees_equal, draw_like, require, unchanged
from purelm.testing.numeric import (
    Tolerance,
    check_jvp,
    check_metrics,
    check_per_sample,
    check_slope,
    close,
    closeness,
    gradient,
    opened,
    some_gradient,
)
from purelm.train import Loss
from purelm.tree import Tree

__all__ = ["LOSS_LAWS", "Case"]

FIXED = ("segment_ids", "denominator")  # leaves of a batch that say what is a target or a document, and hold no values


class Case(NamedTuple):
    """What every law gets."""

    loss: Loss
    params: Tree
    batch: Tree  # with a denominator, if it has targets
    mask: str
    inputs: tuple[str, ...]
    group: int
    n_groups: int
    tolerance: Tolerance


def _value(case: Case, batch: Tree) -> Tensor:
    return case.loss(case.params, batch)[0].detach()


def _scalar(case: Case, batch: Tree) -> Callable[[Tree], Tensor]:
    return lambda params: case.loss(params, batch)[0]


def scalar(case: Case) -> None:
    """The loss is 0-d, floating and finite, with a gradient; metrics are a dict of detached 0-d tensors."""
    free = opened(case.params)
    out = case.loss(free.closed([x.detach().requires_grad_() for x in free.floats]), case.batch)
    require(isinstance(out, tuple) and len(out) == 2, f"the loss must return (scalar, metrics), got {type(out)}")
    value, metrics = out
    require(
        isinstance(value, Tensor), f"the loss must return (scalar, metrics), the scalar a tensor; got {type(value)}"
    )
    require(
        value.ndim == 0 and value.dtype.is_floating_point,
        f"the scalar must be 0-d and floating, got shape {tuple(value.shape)} {value.dtype}",
    )
    require(torch.isfinite(value), f"the scalar is {float(value.detach())}")
    check_metrics(metrics)
    some_gradient(_scalar(case, case.batch), case.params)


def pure(case: Case) -> None:
    """The loss changes no argument and uses no global generator; two calls give the same bits."""
    with unchanged({"params": case.params, "batch": case.batch}):
        first, second = (case.loss(case.params, case.batch) for _ in range(2))
    assert_trees_equal(second, first, "results of two calls with the same arguments")


def split(case: Case) -> None:
    """With the whole batch's denominator, losses and gradients of its parts sum to those of the whole."""
    whole = _value(case, case.batch)
    g = some_gradient(_scalar(case, case.batch), case.params)
    for parts in _cuts(case):
        total = torch.stack([_value(case, part) for part in parts]).sum()
        if not closeness(total, whole, case.tolerance):
            raise AssertionError(
                f"losses of {len(parts)} parts of the batch sum to {float(total):.6g}, and the loss of the whole is "
                f"{float(whole):.6g}{_advice(case, whole)}"
            )
        of_parts = [gradient(_scalar(case, part), case.params) for part in parts]
        summed = {path: torch.stack([x[path] for x in of_parts]).sum(0) for path in g}
        close(summed, g, f"gradients of {len(parts)} parts of the batch, summed, and of the whole", case.tolerance)


def _advice(case: Case, whole: Tensor) -> str:
    """What to do, where the loss does not see the denominator."""
    advice = (
        'Divide the sum over targets by batch["denominator"], their number in the whole batch, which the strategy sets '
        'for any batch with "targets"'
    )
    if not isinstance(case.batch, Mapping) or "denominator" not in case.batch:
        return f'; the batch has no "denominator" and no "targets", whose number it would be. {advice}'
    other = _value(case, {**case.batch, "denominator": 2 * case.batch["denominator"]})
    if not closeness(other, whole, case.tolerance):
        return "; it divides by the denominator, so some summand depends on more than one row, or on none"
    return f'; it does not divide by batch["denominator"], so that it is a mean over its own part. {advice}'


def metrics(case: Case) -> None:
    """Metrics of the batch's parts sum to those of the whole."""
    whole = case.loss(case.params, case.batch)[1]
    for parts in _cuts(case):
        found = [case.loss(case.params, part)[1] for part in parts]
        for i, part in enumerate(found):
            same = part.keys() == whole.keys()
            require(same, f"metrics of part {i} are {', '.join(part)} and those of the whole {', '.join(whole)}")
        for name, x in whole.items():
            total = torch.stack([part[name].double() for part in found]).sum(0)
            what = f"metric {name} of {len(parts)} parts, summed, and of the whole (a mean must be a sum divided by "
            close(total, x.double(), f'{what}batch["denominator"])', case.tolerance)


def _cuts(case: Case) -> list[list[Tree]]:
    """The batch in parts: the first group and the rest, halves, all but the last group and the last, group by group."""
    n = case.n_groups
    places = sorted({1, n // 2, n - 1})
    cuts = [[0, i, n] for i in places] + ([list(range(n + 1))] if n > 2 else [])
    return [[_part(case, first, end) for first, end in itertools.pairwise(cut)] for cut in cuts]


def _part(case: Case, first: int, end: int) -> Tree:
    def cut(x: Any) -> Any:
        return x[first * case.group : end * case.group] if isinstance(x, Tensor) and x.ndim else x

    return tree.map(cut, case.batch)


def order(case: Case) -> None:
    """Rows in another order give the same loss and gradients (as they do if `split` holds, row by row)."""
    g = some_gradient(_scalar(case, case.batch), case.params)
    n = case.n_groups
    for what, groups in (
        ("reversed", torch.arange(n - 1, -1, -1)),
        ("rotated by one", torch.arange(n).roll(1)),
        ("in a drawn order", random.permutation(random.key(5), n)),
    ):
        at = (groups[:, None] * case.group + torch.arange(case.group)).flatten()
        batch = tree.map(lambda x, at=at: x[at.to(x.device)] if isinstance(x, Tensor) and x.ndim else x, case.batch)
        close(_value(case, batch), _value(case, case.batch), f"losses with rows {what} and as given", case.tolerance)
        close(
            gradient(_scalar(case, batch), case.params), g, f"gradients with rows {what} and as given", case.tolerance
        )


def masked(case: Case) -> None:
    """Values where the mask is 0, of all leaves but inputs, change neither loss nor gradients (and others do)."""
    names = [name for name in _of_mask_shape(case) if name not in case.inputs]
    require(bool(names), f"no leaf of the batch has the shape of {case.mask} but inputs: nothing to compare")
    batch = _with_zeros(case)
    _without_influence(case, batch, names, batch[case.mask] == 0, f"where {case.mask} is 0")


def padding(case: Case) -> None:
    """Inputs in a row after its last position where the mask is not 0 change neither loss nor gradients."""
    names = [name for name in _of_mask_shape(case) if name in case.inputs]
    require(bool(names), f"no leaf of {', '.join(case.inputs)} has the shape of {case.mask}: nothing to compare")
    batch = _with_zeros(case)
    live = batch[case.mask] != 0
    where = f"where {case.mask} is 0"
    if live.ndim == 2:
        live = live.flip(1).cumsum(1).flip(1) > 0  # here or further on
        where = f"after a row's last position where {case.mask} is not 0"
    _without_influence(case, batch, names, ~live, where)


def _of_mask_shape(case: Case) -> list[str]:
    """Names of the batch's leaves that have a value, or several, for each element of the mask."""
    w = case.batch.get(case.mask) if isinstance(case.batch, Mapping) else None
    require(
        isinstance(w, Tensor) and w.ndim in (1, 2),
        f'batch["{case.mask}"] must be the mask, (B, T) or (B,), which is 0 where nothing counts: name it (mask=...), '
        "or leave the laws masked and padding out",
    )
    assert isinstance(w, Tensor)
    return [
        name
        for name, x in case.batch.items()
        if isinstance(x, Tensor) and name not in (case.mask, *FIXED) and x.shape[: w.ndim] == w.shape
    ]


def _with_zeros(case: Case) -> dict[str, Any]:
    """The batch with more zeros in its mask, the same in all rows of a group: a third, and those at the end."""
    w = case.batch[case.mask]
    at = random.uniform(random.key(6), (case.n_groups, *w.shape[1:])) < 0.3
    if w.ndim == 2 and w.shape[1] > 1:
        at[:, -1] = True
        at[1, -2:] = True
    else:
        at[-1] = True
    at.view(-1)[0] = False
    at = at.repeat_interleave(case.group, 0).to(w.device)
    zeroed = torch.where(at, torch.zeros_like(w), w)
    require(
        bool((zeroed != 0).any()),
        f"{case.mask} is 0 wherever this law leaves it as it is: give a batch with fewer zeros",
    )
    return {**case.batch, case.mask: zeroed}


def _without_influence(case: Case, batch: dict[str, Any], names: Sequence[str], at: Tensor, where: str) -> None:
    """AssertionError if other values of a leaf at `at` change anything, or if none do elsewhere either."""
    whole, g = _value(case, batch), some_gradient(_scalar(case, batch), case.params)
    changed = False
    for name in names:
        other = {**batch, name: _changed(case, name, at)}
        changed = changed or not torch.equal(other[name], batch[name])
        close(_value(case, other), whole, f"losses with other {name} {where} and as given", case.tolerance)
        found = gradient(_scalar(case, other), case.params)
        close(found, g, f"gradients with other {name} {where} and as given", case.tolerance)
    what = f"{', '.join(names)} {where}"
    require(changed, f"no other values are there for {what}: each holds one value")
    elsewhere = [_value(case, {**batch, name: _changed(case, name, ~at)}) for name in names]
    moved = [abs(float(x - whole)) > 100 * case.tolerance.eps * abs(float(whole)) for x in elsewhere]
    require(any(moved), f"other values change nothing, of {what}, nor elsewhere: nothing was compared")


def _changed(case: Case, name: str, at: Tensor) -> Tensor:
    """The leaf with other values where `at` holds: floats are drawn, others are taken from where the mask is not 0."""
    x, live = case.batch[name], case.batch[case.mask] != 0
    at = at.reshape(*at.shape, *[1] * (x.ndim - at.ndim))
    if x.dtype.is_floating_point:
        return torch.where(at, draw_like(x, seed=7), x)
    values = torch.unique(x[live])  # valid at any place, unlike a target of -100
    step = random.randint(random.key(8), tuple(x.shape), 1, max(len(values), 2)).to(x.device)
    return torch.where(at, values[(torch.searchsorted(values, x) + step) % len(values)], x)


def gradients(case: Case) -> None:
    """The gradient along a random direction is the loss's difference quotient; if not, leaf by leaf, which fail."""
    check_slope(_scalar(case, case.batch), case.params, case.tolerance)


def jvp(case: Case) -> None:
    """torch.func.jvp is <gradient, direction>."""
    check_jvp(_scalar(case, case.batch), case.params, case.tolerance)


def per_sample(case: Case) -> None:
    """Gradients of each row (or group of rows) by torch.func.vmap are those of a loop."""
    check_per_sample(lambda p, b: case.loss(p, b)[0], case.params, case.batch, case.group, case.tolerance)


# name -> law, a function of a Case
LOSS_LAWS: dict[str, Callable[[Case], None]] = {
    law.__name__: law for law in (pure, scalar, split, metrics, order, masked, padding, gradients, jvp, per_sample)
}
