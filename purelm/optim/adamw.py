"""AdamW: step sizes from running moments of the gradient, with decoupled weight decay.

Kingma & Ba, "Adam" (1412.6980, Algorithm 1 and the end of section 2); Loshchilov & Hutter, "Decoupled weight decay
regularization" (1711.05101, Algorithm 2). At step t = 1, 2, ... with gradient g:

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
    eps "outside":      d = lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)
    eps "uncorrected":  d = lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)
    decay "before":  p <- p (1 - lr wd) - d
    decay "after":   p <- (p - d) (1 - lr wd)

("outside", "before") is torch.optim.AdamW. The course's Algorithm 1 is "uncorrected": its handout of 2026 decays
"before", that of 2025 "after". eps inside the root is the separate `eps_root`, sqrt(v / (1 - b2^t) + eps_root), as in
optax; when eps is "uncorrected", sqrt(v + eps_root).

Differentiated once more (meta-gradients), sqrt has an infinite slope at v = 0, and the derivative of d at g = 0 is
0 inf = nan: eps beside the root does not help. With eps_root > 0 it is finite; in the first step, decay aside,

    d = lr g / (sqrt(g^2 + eps_root) + eps),   d d / d g at g = 0: lr / (sqrt(eps_root) + eps)
"""

from typing import Literal, NamedTuple

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
from purelm.optim.checks import check_betas, check_choice, check_range, check_update
from purelm.optim.in_place import decays, leaf_by_leaf, rates

__all__ = ["AdamWState", "adam", "adamw"]


class AdamWState(NamedTuple):
    """State of `adamw`."""

    step: Tensor  # 0-d int64: updates done so far
    m: Tree  # running mean of g, in the dtype of the moments
    v: Tree  # running mean of g^2, likewise


class _Scalars(NamedTuple):
    """What the step alone decides, as 0-d tensors of one dtype."""

    neg_step_size: Tensor  # -lr / (1 - b1^t), times sqrt(1 - b2^t) when eps is uncorrected
    root_scale: Tensor  # sqrt(1 - b2^t)
    root_shift: Tensor  # eps_root brought under the uncorrected root
    keep: Tensor  # 1 - lr wd
    lose: Tensor  # lr wd


def adamw(
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    mask: Mask = None,
    eps_placement: Literal["outside", "uncorrected"] = "outside",
    eps_root: float = 0.0,
    decay_order: Literal["before", "after"] = "before",
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """AdamW as a pair of functions: formulas at the top of this file, defaults those of torch.optim.AdamW.

    Args:
        mask: which parameters decay: predicate (path, param) -> bool, or a tree of bools; None is all.
        eps_placement: eps beside the bias-corrected root ("outside") or beside the raw one ("uncorrected").
        eps_root: added inside the root; above 0 for gradients through the update (top of this file).
        decay_order: weight decay before or after the step of Adam.
        dtype: of the moments; None is fp32, and fp64 for fp64 parameters. Arithmetic is in fp32 or fp64 always.

    The float operations and their order are torch.optim.AdamW's, or the course's when eps is uncorrected, so that
    parameters agree to rounding with either.

    >>> optimizer = adamw(betas=(0.9, 0.95), weight_decay=0.1, mask=lambda path, p: p.ndim >= 2)
    >>> params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params, torch.tensor(0.5))
    >>> updates["b"]
    tensor([-0.5000, -0.5000])
    """
    b1, b2 = check_betas("adamw", betas)
    check_range("eps", eps, 0.0, float("inf"))
    check_range("eps_root", eps_root, 0.0, float("inf"))
    check_range("weight_decay", weight_decay, 0.0, float("inf"))
    check_choice("eps_placement", eps_placement, ("outside", "uncorrected"))
    check_choice("decay_order", decay_order, ("before", "after"))

    def init(params: Tree) -> AdamWState:
        return AdamWState(first_step(params), moments_like(params, dtype), moments_like(params, dtype))

    def scalars(step: Tensor, lr: Tensor | float, dtype: torch.dtype) -> _Scalars:
        t, lr_ = scalar(step, step), scalar(lr, step)
        correction2 = 1 - b2**t
        step_size, root_scale = lr_ / (1 - b1**t), torch.sqrt(correction2)
        if eps_placement == "uncorrected":
            step_size, correction2 = step_size * root_scale, torch.ones_like(correction2)
        return _Scalars(
            settle(-step_size, dtype),
            settle(root_scale, dtype),
            settle(eps_root * correction2, dtype),
            settle(1 - lr_ * weight_decay, dtype),
            settle(lr_ * weight_decay, dtype),
        )

    def decayed(p: Tensor, s: _Scalars) -> Tensor:
        # Equal on paper; 1 - lr wd in fp32 is off by up to 3e-8, which adds up over steps.
        return p * s.keep if eps_placement == "outside" else p - s.lose * p

    def leaf(rate: float | Tensor, s: _Scalars, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple:
        wide = compute_dtype(p)
        p_, g_ = p.to(wide), g.to(wide)
        m_ = torch.lerp(m.to(wide), g_, 1 - b1)
        v_ = torch.addcmul(v.to(wide) * b2, g_, g_, value=1 - b2)
        root = torch.sqrt(v_ + s.root_shift if eps_root else v_)
        if eps_placement == "outside":
            root = root / s.root_scale
        u = m_ * s.neg_step_size / (root + eps)
        # Where decay enters, the update is the new parameter less the old: the difference is exact when they are
        # within a factor two (Sterbenz), and adding it gives the new parameter to the last bit.
        if decays(rate):
            u = (decayed(p_, s) + u if decay_order == "before" else decayed(p_ + u, s)) - p_
        return u, m_.to(m.dtype), v_.to(v.dtype)

    def update(grads: Tree, state: AdamWState, params: Tree, lr: Tensor | float) -> tuple[Tree, AdamWState]:
        check_update("adamw", AdamWState, grads, state, params, lr)
        step = state.step + 1
        of_dtype = per_dtype(lambda d: scalars(step, lr, d))

        def one(rate: float, p: Tensor, g: Tensor | None, m: Tensor, v: Tensor) -> tuple:
            return (None, m, v) if g is None else leaf(rate, of_dtype(compute_dtype(p)), p, g, m, v)

        updates, m, v = unzip(3, one, params, grads, state.m, state.v, weight_decay=weight_decay, mask=mask)
        return updates, AdamWState(step, m, v)

    write = leaf_by_leaf(leaf, "adamw")

    def step_(grads: Tree, state: AdamWState, params: Tree, lr: Tensor | float) -> tuple[Tree, AdamWState]:
        check_update("adamw", AdamWState, grads, state, params, lr)
        step = state.step.add_(1)

        def of_kind(dtype: torch.dtype) -> tuple[_Scalars, _Scalars]:
            # Leaves that do not decay go through the same compiled function: p * 1 and p - 0 p are p.
            s = scalars(step, lr, dtype)
            return s._replace(keep=torch.ones_like(s.keep), lose=torch.zeros_like(s.lose)), s

        kinds = per_dtype(of_kind)
        chosen = rates(params, weight_decay, mask)
        write(params, grads, (state.m, state.v), chosen, lambda dtype, rate: kinds(dtype)[rate != 0.0])
        return params, state

    return made_by(
        Optimizer(init, with_step(update, step_)),
        adamw,
        (b1, b2),
        eps,
        weight_decay,
        mask=mask,
        eps_placement=eps_placement,
        eps_root=eps_root,
        decay_order=decay_order,
        dtype=dtype,
    )


def adam(
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    eps_placement: Literal["outside", "uncorrected"] = "outside",
    eps_root: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """Adam (1412.6980, Algorithm 1): `adamw` without decay; for L2 use `chain(add_weight_decay(c), adam())`."""
    return adamw(betas, eps, 0.0, eps_placement=eps_placement, eps_root=eps_root, dtype=dtype)
