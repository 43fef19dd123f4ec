"""Stochastic gradient descent with momentum, Nesterov's form of it, and L2 weight decay.

    g <- g + wd p,  m <- mu m + g,  p <- p - lr m        (Nesterov: p <- p - lr (g + mu m))

as torch.optim.SGD (dampening 0); Sutskever et al. 2013 define momentum with lr inside m instead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from purelm.optim.base import (
    Mask,
    Optimizer,
    Tree,
    compute_dtype,
    first_step,
    made_by,
    moments_like,
    per_dtype,
    scalar,
    settle,
    unzip,
    with_step,
)
from purelm.optim.checks import check_range, check_update
from purelm.optim.in_place import leaf_by_leaf, rates

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

    def leaf(rate: float | Tensor, s: tuple[Tensor], p: Tensor, g: Tensor, *m: Tensor) -> tuple:
        wide = compute_dtype(p)
        g_ = g.to(wide)
        if isinstance(rate, Tensor):
            g_ = torch.addcmul(g_, p.to(wide), rate)
        elif rate:
            g_ = g_.add(p.to(wide), alpha=rate)
        if not momentum:
            return (g_ * s[0],)
        m_ = m[0].to(wide) * momentum + g_
        d = g_.add(m_, alpha=momentum) if nesterov else m_
        return d * s[0], m_.to(m[0].dtype)

    def update(grads: Tree, state: SGDState, params: Tree, lr: Tensor | float) -> tuple[Tree, SGDState]:
        check_update("sgd", SGDState, grads, state, params, lr)
        neg_lr = per_dtype(lambda d: (settle(-scalar(lr, state.step), d),))

        def one(rate: float, p: Tensor, g: Tensor | None, *m: Tensor) -> tuple:
            return (None, *m) if g is None else leaf(rate, neg_lr(compute_dtype(p)), p, g, *m)

        moments = (state.m,) if momentum else ()
        updates, *m = unzip(1 + len(moments), one, params, grads, *moments, weight_decay=weight_decay, mask=mask)
        return updates, SGDState(state.step + 1, m[0] if momentum else ())

    write = leaf_by_leaf(leaf, "sgd")

    def step_(grads: Tree, state: SGDState, params: Tree, lr: Tensor | float) -> tuple[Tree, SGDState]:
        check_update("sgd", SGDState, grads, state, params, lr)
        neg_lr = per_dtype(lambda d: (settle(-scalar(lr, state.step), d),))
        moments = (state.m,) if momentum else ()
        write(params, grads, moments, rates(params, weight_decay, mask), lambda dtype, rate: neg_lr(dtype))
        state.step.add_(1)
        return params, state

    optimizer = Optimizer(init, with_step(update, step_))
    return made_by(optimizer, sgd, momentum, weight_decay, nesterov=nesterov, mask=mask, dtype=dtype)
