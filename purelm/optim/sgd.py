"""Stochastic gradient descent with momentum, Nesterov's form of it, and L2 weight decay.

    g <- g + wd p,  m <- mu m + g,  p <- p - lr m        (Nesterov: p <- p - lr (g + mu m))

as torch.optim.SGD (dampening 0); Sutskever et al. 2013 define momentum with lr inside m instead.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm.optim.base import (
    Mask,
    Optimizer,
    Tree,
    check_range,
    compute_dtype,
    first_step,
    moments_like,
    per_dtype,
    scalar,
    settle,
    unzip,
)

__all__ = ["SGDState", "sgd"]


class SGDState(NamedTuple):
    """State of `sgd`."""

    step: Tensor  # 0-d int64: updates done so far
    m: Tree  # momentum, in the dtype of the moments; () without momentum


def sgd(
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    nesterov: bool = False,
    mask: Mask = None,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """SGD as a pair of functions; formulas at the top of this file.

    Args:
        weight_decay: coefficient of the L2 term that is added to the gradient (coupled, as torch.optim.SGD).
        mask: which parameters decay: predicate (path, param) -> bool, or a tree of bools; None is all.
        dtype: of the momentum; None is fp32, and fp64 for fp64 parameters.

    >>> optimizer = sgd()
    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params, 0.5)
    >>> updates["w"]
    tensor([-0.5000, -1.0000])
    """
    check_range("momentum", momentum, 0.0, 1.0)
    check_range("weight_decay", weight_decay, 0.0, float("inf"))
    if nesterov and not momentum:
        raise ValueError(f"nesterov needs momentum > 0, got momentum={momentum}")

    def init(params: Tree) -> SGDState:
        return SGDState(first_step(params), moments_like(params, dtype) if momentum else ())

    def update(grads: Tree, state: SGDState, params: Tree, lr: Tensor | float) -> tuple[Tree, SGDState]:
        neg_lr = per_dtype(lambda d: settle(-scalar(lr, state.step), d))

        def direction(rate: float, p: Tensor, g: Tensor) -> Tensor:
            wide = compute_dtype(p)
            return g.to(wide).add(p.to(wide), alpha=rate) if rate else g.to(wide)

        def plain(rate: float, p: Tensor, g: Tensor | None) -> tuple:
            return (None if g is None else direction(rate, p, g) * neg_lr(compute_dtype(p)),)

        def with_momentum(rate: float, p: Tensor, g: Tensor | None, m: Tensor) -> tuple:
            if g is None:
                return None, m
            g_ = direction(rate, p, g)
            m_ = m.to(g_.dtype) * momentum + g_
            d = g_.add(m_, alpha=momentum) if nesterov else m_
            return d * neg_lr(g_.dtype), m_.to(m.dtype)

        decay: dict[str, Any] = {"weight_decay": weight_decay, "mask": mask}
        if not momentum:
            (updates,), m = unzip(1, plain, params, grads, **decay), ()
        else:
            updates, m = unzip(2, with_momentum, params, grads, state.m, **decay)
        return updates, SGDState(state.step + 1, m)

    return Optimizer(init, update)
