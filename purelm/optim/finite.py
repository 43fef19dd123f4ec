"""Steps whose gradients hold an inf or a nan, left out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import tree
from purelm.optim.base import Optimizer, Tree, first_step, made_by
from purelm.optim.checks import check_optimizer, check_update

__all__ = ["ApplyIfFiniteState", "apply_if_finite"]


class ApplyIfFiniteState(NamedTuple):
    """State of `apply_if_finite`."""

    n_consecutive: Tensor  # 0-d int64: steps without finite gradients since the last finite one
    n_total: Tensor  # 0-d int64: steps without finite gradients so far
    inner: Any  # the optimizer's own state; it counts the steps that were applied


def apply_if_finite(
    optimizer: Optimizer,
    max_consecutive: int | None = None,
    *,
    finite: Callable[[Tree], Tensor] = tree.all_finite,
) -> Optimizer:
    """The optimizer, which leaves out a step whose gradients are not all finite, as optax.apply_if_finite does.

    With ok = finite(grads): updates are the optimizer's where ok, else 0; its state is the new one where ok, else the
    old one. Both are computed and chosen by torch.where, so that the host never waits for the device; the counters of
    the state say how often it happened. There is no in-place form: the old values are needed until ok is known.

    Args:
        max_consecutive: after so many such steps in a row the next one is applied nevertheless, so that a run that
            is lost shows it, and does not go on for ever without moving; None never applies one.
        finite: gradients -> 0-d bool tensor. Where each process holds a part of the gradients it must give all of them
            one answer (combined over processes), or their steps would part.

    >>> from purelm.optim import sgd
    >>> optimizer = apply_if_finite(sgd())
    >>> params = {"w": torch.ones(2)}
    >>> bad = {"w": torch.tensor([1.0, float("nan")])}
    >>> updates, state = optimizer.update(bad, optimizer.init(params), params, 0.1)
    >>> updates["w"], state.n_total, state.inner.step
    (tensor([0., 0.]), tensor(1), tensor(0))
    """
    check_optimizer("apply_if_finite: optimizer", optimizer)
    if max_consecutive is not None and (not isinstance(max_consecutive, int) or max_consecutive < 0):
        raise ValueError(f"apply_if_finite: max_consecutive is {max_consecutive!r}; an int of at least 0, or None")

    def init(params: Tree) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(first_step(params), first_step(params), optimizer.init(params))

    def update(
        grads: Tree, state: ApplyIfFiniteState, params: Tree, lr: Tensor | float
    ) -> tuple[Tree, ApplyIfFiniteState]:
        check_update("apply_if_finite", ApplyIfFiniteState, grads, state, params, lr)
        updates, inner = optimizer.update(grads, state.inner, params, lr)
        ok = finite(grads).to(state.n_total.device)
        n_consecutive = torch.where(ok, 0, state.n_consecutive + 1)
        applied = ok if max_consecutive is None else ok | (n_consecutive > max_consecutive)

        def chosen(path: str, new: Tensor, old: Tensor) -> Tensor:
            if not isinstance(new, Tensor):
                raise ValueError(f"apply_if_finite: {path} of the optimizer's state is {new!r:.60}; tensors are needed")
            return torch.where(applied.to(new.device), new, old)

        updates = tree.map(lambda u: torch.where(applied.to(u.device), u, 0.0), updates)
        inner = tree.map_with_path(chosen, inner, state.inner)
        return updates, ApplyIfFiniteState(n_consecutive, state.n_total + (~ok).to(torch.int64), inner)

    return made_by(Optimizer(init, update), apply_if_finite, optimizer, max_consecutive, finite=finite)
