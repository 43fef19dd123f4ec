"""RMSprop: steps divided by the root of a running mean of squared gradients; with momentum, centred.

    g <- g + wd p,  v <- a v + (1 - a) g^2,  u = g / (sqrt(v) + eps)
    centred:        b <- a b + (1 - a) g,    u = g / (sqrt(v - b^2) + eps)
    momentum:       m <- mu m + u,           p <- p - lr m,     else p <- p - lr u

Tieleman & Hinton, lecture 6.5 of "Neural networks for machine learning" (2012); centred: Graves, "Generating sequences
with recurrent neural networks" (1308.0850, equations 38-45). As torch.optim.RMSprop, with eps beside the root and decay
as L2. v starts at 0 without a correction, so that the first step is up to 1 / sqrt(1 - a) times lr: 10 for a = 0.99.
Where rounding makes v - b^2 negative, which gradients that hardly change can do, it is 0 (nan in torch).
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

__all__ = ["RMSpropState", "rmsprop"]


class RMSpropState(NamedTuple):
    """State of `rmsprop`."""

    step: Tensor  # 0-d int64: updates done so far
    v: Tree  # running mean of g^2, in the dtype of the moments
    m: Tree  # momentum of the divided gradients, likewise; () without momentum
    b: Tree  # running mean of g, likewise; () where it is not centred


def rmsprop(
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    momentum: float = 0.0,
    centered: bool = False,
    mask: Mask = None,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """RMSprop as a pair of functions; formulas at the top of this file, defaults those of torch.optim.RMSprop.

    Args:
        alpha: the share of the old mean square that is kept.
        weight_decay: coefficient of the L2 term that is added to the gradient (coupled, as torch.optim.RMSprop).
        mask: which parameters decay: predicate (path, param) -> bool, or a tree of bools; None is all.
        dtype: of the moments; None is fp32, and fp64 for fp64 parameters.

    >>> optimizer = rmsprop(0.75)
    >>> params = {"w": torch.tensor([1.0, -2.0])}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params, 0.5)
    >>> updates["w"]
    tensor([-1.,  1.])
    """
    check_range("alpha", alpha, 0.0, 1.0)
    check_range("eps", eps, 0.0, float("inf"))
    check_range("weight_decay", weight_decay, 0.0, float("inf"))
    check_range("momentum", momentum, 0.0, 1.0)

    def moments_of(state: RMSpropState) -> tuple[Tree, ...]:
        return (state.v, *((state.m,) if momentum else ()), *((state.b,) if centered else ()))

    def init(params: Tree) -> RMSpropState:
        zeros = lambda wanted: moments_like(params, dtype) if wanted else ()  # noqa: E731
        return RMSpropState(first_step(params), zeros(True), zeros(momentum), zeros(centered))

    def leaf(rate: float | Tensor, s: tuple[Tensor], p: Tensor, g: Tensor, v: Tensor, *rest: Tensor) -> tuple:
        wide = compute_dtype(p)
        g_ = g.to(wide)
        if isinstance(rate, Tensor):
            g_ = torch.addcmul(g_, p.to(wide), rate)
        elif rate:
            g_ = g_.add(p.to(wide), alpha=rate)
        v_ = torch.addcmul(v.to(wide) * alpha, g_, g_, value=1 - alpha)
        new, spread = [v_.to(v.dtype)], v_
        b_ = torch.lerp(rest[-1].to(wide), g_, 1 - alpha) if centered else None
        if b_ is not None:
            spread = torch.addcmul(v_, b_, b_, value=-1).clamp(min=0)
        u = g_ / (torch.sqrt(spread) + eps)
        if momentum:
            u = rest[0].to(wide) * momentum + u
            new.append(u.to(rest[0].dtype))
        if b_ is not None:
            new.append(b_.to(rest[-1].dtype))
        return u * s[0], *new

    def update(grads: Tree, state: RMSpropState, params: Tree, lr: Tensor | float) -> tuple[Tree, RMSpropState]:
        check_update("rmsprop", RMSpropState, grads, state, params, lr)
        neg_lr = per_dtype(lambda d: (settle(-scalar(lr, state.step), d),))

        def one(rate: float, p: Tensor, g: Tensor | None, *moments: Tensor) -> tuple:
            return (None, *moments) if g is None else leaf(rate, neg_lr(compute_dtype(p)), p, g, *moments)

        old = moments_of(state)
        updates, v, *rest = unzip(1 + len(old), one, params, grads, *old, weight_decay=weight_decay, mask=mask)
        m, b = rest[0] if momentum else (), rest[-1] if centered else ()
        return updates, RMSpropState(state.step + 1, v, m, b)

    write = leaf_by_leaf(leaf, "rmsprop")

    def step_(grads: Tree, state: RMSpropState, params: Tree, lr: Tensor | float) -> tuple[Tree, RMSpropState]:
        check_update("rmsprop", RMSpropState, grads, state, params, lr)
        neg_lr = per_dtype(lambda d: (settle(-scalar(lr, state.step), d),))
        write(params, grads, moments_of(state), rates(params, weight_decay, mask), lambda dtype, rate: neg_lr(dtype))
        state.step.add_(1)
        return params, state

    optimizer = Optimizer(init, with_step(update, step_))
    options = {"momentum": momentum, "centered": centered, "mask": mask, "dtype": dtype}
    return made_by(optimizer, rmsprop, alpha, eps, weight_decay, **options)
