"""Exponential moving average of parameters, as pure functions; its values are usually better than the last ones.

With decay d, parameters p_t after update t and average a_t in fp32 (fp64 of fp64 parameters):

    a_t = d a_(t-1) + (1 - d) p_t,    w_t = d w_(t-1) + (1 - d),    value = a_t / w_t

init(params) starts at a_0 = p_0, w_0 = 1, so that w_t stays 1 (Polyak & Juditsky 1992 for averaging itself;
torch.optim.swa_utils.get_ema_multi_avg_fn for this form). init(params, debias=True) starts at a_0 = 0, w_0 = 0: with
one d at all steps w_t = 1 - d^t, the correction of Adam (1412.6980, section 3), and p_0 has no part in the value.

    from purelm.optim import ema

    average = ema.init(params)
    average = ema.update(average, params, 0.999)    # after each step
    loss_fn(ema.value(average, like=params), batch)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from purelm import tree
from purelm.optim.base import Tree, compute_dtype, scalar, settle

__all__ = ["EMAState", "init", "update", "value"]


class EMAState(NamedTuple):
    """The running sum and its weight."""

    step: Tensor  # 0-d int64: updates done so far
    weight: Tensor  # 0-d fp64: w_t above
    average: Tree  # a_t, of the form of params, in the dtype of the average; what is not floating is the latest value


def init(params: Tree, *, debias: bool = False, dtype: torch.dtype | None = None) -> EMAState:
    """The average before the first update, in memory of its own.

    Args:
        debias: start from nothing, as if params had never been; else from params.
        dtype: of the average; None is fp32, and fp64 for fp64 parameters: in bf16 the steps of a decay of 0.999 would
            be lost to rounding.

    >>> init({"w": torch.ones(2, dtype=torch.bfloat16), "frozen": None}).average
    {'w': tensor([1., 1.]), 'frozen': None}
    """

    def first(p: Tensor) -> Tensor:
        if not tree.is_floating(p):
            return p.clone()
        kept = dtype or compute_dtype(p)
        return torch.zeros_like(p, dtype=kept) if debias else p.to(kept, copy=True)

    flat = tree.leaves(params)
    device = flat[0].device if flat else None
    weight = torch.full((), 0.0 if debias else 1.0, dtype=torch.float64, device=device)
    return EMAState(torch.zeros((), dtype=torch.int64, device=device), weight, tree.map(first, params))


def update(state: EMAState, params: Tree, decay: Tensor | float) -> EMAState:
    """The average with one more value of params: a + (1 - decay) (p - a), w + (1 - decay) (1 - w).

    decay is an argument of each update, a number in [0, 1) or a 0-d tensor (whose value is not looked at), so that it
    may follow the step: min(0.999, (1 + t) / (10 + t)) forgets the beginning faster. (1 - 0.999 has four digits in an
    fp32 tensor: use fp64.) Gradients flow through it:
    call it under torch.no_grad() for parameters that require them.

    >>> state = update(init({"w": torch.zeros(2)}), {"w": torch.ones(2)}, 0.75)
    >>> state.average["w"], state.step
    (tensor([0.2500, 0.2500]), tensor(1))
    """
    if not isinstance(decay, Tensor) and not 0.0 <= decay < 1.0:
        raise ValueError(f"ema.update: decay must be in [0, 1), got {decay}")
    rate = 1 - scalar(decay, state.step)

    def leaf(p: Tensor, a: Tensor) -> Tensor:
        if not tree.is_floating(p):
            return p.clone()
        wide = torch.promote_types(compute_dtype(p), a.dtype)
        return torch.lerp(a.to(wide), p.to(wide), settle(rate, wide)).to(a.dtype)

    weight = torch.lerp(state.weight, torch.ones_like(state.weight), rate)
    return EMAState(state.step + 1, weight, tree.map(leaf, params, state.average))


def value(state: EMAState, like: Tree = None) -> Tree:
    """The averaged parameters, a / w, in new memory; with `like`, each in the dtype of that tree's leaf.

    Before the first update of a debiased average there is nothing to divide: its values are nan.

    >>> state = update(init({"w": torch.zeros(2)}, debias=True), {"w": torch.ones(2)}, 0.75)
    >>> state.average["w"], value(state)["w"]
    (tensor([0.2500, 0.2500]), tensor([1., 1.]))
    """

    def leaf(a: Tensor) -> Tensor:
        if not tree.is_floating(a):
            return a.clone()
        wide = compute_dtype(a)
        return (a.to(wide) / settle(state.weight, wide)).to(a.dtype)

    found = tree.map(leaf, state.average)
    return found if like is None else tree.map(lambda p, a: a.to(p.dtype), like, found)
