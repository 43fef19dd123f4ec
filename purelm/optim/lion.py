"""Lion: the sign of an interpolated momentum, with decoupled weight decay.

Chen et al., "Symbolic discovery of optimization algorithms" (2302.06675, Program 1):

    p <- p - lr (sign(b1 m + (1 - b1) g) + wd p),  then  m <- b2 m + (1 - b2) g

Every element moves by lr: the paper advises an lr 3 to 10 times smaller than AdamW's, and wd as much larger.
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
from purelm.optim.checks import check_betas, check_range, check_update
from purelm.optim.in_place import decays, leaf_by_leaf, rates

__all__ = ["LionState", "lion"]


class LionState(NamedTuple):
    """State of `lion`."""

    step: Tensor  # 0-d int64: updates done so far
    m: Tree  # running mean of g, in the dtype of the moments


def lion(
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    *,
    mask: Mask = None,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """Lion as a pair of functions; formula at the top of this file, default betas those of the paper.

    Args:
        mask: which parameters decay: predicate (path, param) -> bool, or a tree of bools; None is all.
        dtype: of the momentum; None is fp32, and fp64 for fp64 parameters.

    >>> optimizer = lion()
    >>> params = {"w": torch.tensor([1.0, -2.0])}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params, 0.5)
    >>> updates["w"]
    tensor([-0.5000,  0.5000])
    """
    b1, b2 = check_betas("lion", betas)
    check_range("weight_decay", weight_decay, 0.0, float("inf"))

    def init(params: Tree) -> LionState:
        return LionState(first_step(params), moments_like(params, dtype))

    def leaf(rate: float | Tensor, s: tuple[Tensor], p: Tensor, g: Tensor, m: Tensor) -> tuple:
        wide = compute_dtype(p)
        g_, m_ = g.to(wide), m.to(wide)
        d = torch.sign(torch.lerp(m_, g_, 1 - b1))
        if decays(rate):
            d = d + rate * p.to(wide)
        return d * s[0], torch.lerp(m_, g_, 1 - b2).to(m.dtype)

    def update(grads: Tree, state: LionState, params: Tree, lr: Tensor | float) -> tuple[Tree, LionState]:
        check_update("lion", LionState, grads, state, params, lr)
        neg_lr = per_dtype(lambda d: (settle(-scalar(lr, state.step), d),))

        def one(rate: float, p: Tensor, g: Tensor | None, m: Tensor) -> tuple:
            return (None, m) if g is None else leaf(rate, neg_lr(compute_dtype(p)), p, g, m)

        updates, m = unzip(2, one, params, grads, state.m, weight_decay=weight_decay, mask=mask)
        return updates, LionState(state.step + 1, m)

    write = leaf_by_leaf(leaf, "lion")

    def step_(grads: Tree, state: LionState, params: Tree, lr: Tensor | float) -> tuple[Tree, LionState]:
        check_update("lion", LionState, grads, state, params, lr)
        neg_lr = per_dtype(lambda d: (settle(-scalar(lr, state.step), d),))
        write(params, grads, (state.m,), rates(params, weight_decay, mask), lambda dtype, rate: neg_lr(dtype))
        state.step.add_(1)
        return params, state

    return made_by(Optimizer(init, with_step(update, step_)), lion, (b1, b2), weight_decay, mask=mask, dtype=dtype)
