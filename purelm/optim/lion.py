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
    check_range,
    compute_dtype,
    first_step,
    moments_like,
    per_dtype,
    scalar,
    settle,
    unzip,
)

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
    b1, b2 = betas
    check_range("betas[0]", b1, 0.0, 1.0)
    check_range("betas[1]", b2, 0.0, 1.0)
    check_range("weight_decay", weight_decay, 0.0, float("inf"))

    def init(params: Tree) -> LionState:
        return LionState(first_step(params), moments_like(params, dtype))

    def update(grads: Tree, state: LionState, params: Tree, lr: Tensor | float) -> tuple[Tree, LionState]:
        neg_lr = per_dtype(lambda d: settle(-scalar(lr, state.step), d))

        def leaf(rate: float, p: Tensor, g: Tensor | None, m: Tensor) -> tuple:
            if g is None:
                return None, m
            wide = compute_dtype(p)
            g_, m_ = g.to(wide), m.to(wide)
            d = torch.sign(torch.lerp(m_, g_, 1 - b1))
            if rate:
                d = d + rate * p.to(wide)
            return d * neg_lr(wide), torch.lerp(m_, g_, 1 - b2).to(m.dtype)

        updates, m = unzip(2, leaf, params, grads, state.m, weight_decay=weight_decay, mask=mask)
        return updates, LionState(state.step + 1, m)

    return Optimizer(init, update)
