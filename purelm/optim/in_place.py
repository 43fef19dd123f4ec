"""Steps of optimizers over the old parameters and state, leaf by leaf (base.with_step says what for).

A pure update compiled as a whole is one graph over all leaves: it takes longer to compile than the model, and twice as
long for twice the leaves. Here a function of one leaf is compiled once, for leaves of any length, and called for each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.optim.base import Mask, Tree, chosen_by, compute_dtype
from purelm.transforms.boundary import own_cache
from purelm.transforms.torch_versions import keep_writes_behind_reads

__all__ = ["LeafFn", "decays", "leaf_by_leaf", "rates"]

# (rate of decay, scalars, p, g, *moments) -> (update, *new moments), element by element. The rate is a number, 0.0
# where the leaf does not decay, or a 0-d tensor; scalars are 0-d tensors.
LeafFn = Callable[..., tuple[Any, ...]]


def decays(rate: float | Tensor) -> bool:
    """Whether a leaf function must look at the rate: a tensor's value is not known when it is compiled."""
    return isinstance(rate, Tensor) or rate != 0.0


def rates(params: Tree, weight_decay: float, mask: Mask) -> list[float]:
    """weight_decay for each leaf that decays, 0.0 for the others."""
    if mask is None or not weight_decay:
        return [weight_decay] * len(tree.leaves(params))
    return [weight_decay if chosen else 0.0 for chosen in tree.leaves(chosen_by(mask, params))]


def leaf_by_leaf(leaf: LeafFn, name: str) -> Callable[..., None]:
    """The function that writes p + leaf(...)[0] and the new moments over params and moments, in place.

    It takes (params, grads, moments, rates, scalars): the trees of moments in leaf's order; a rate for each leaf;
    scalars: (dtype, rate) -> the scalars of leaves that are computed in dtype. A leaf without a gradient (None) stays
    as it is. `leaf` is compiled once, whatever the lengths and rates, under `name`.
    """
    compiled: dict[bool, Callable[..., None]] = {}  # made when first used: dynamo takes as long to import as torch

    def write(rate: Any, scalars: tuple[Tensor, ...], p: Tensor, g: Tensor, *moments: Tensor) -> None:
        update, *new = leaf(rate, scalars, p, g, *moments)
        p.copy_((p + update).to(p.dtype))
        for m, x in zip(moments, new, strict=True):
            m.copy_(x)

    def write_all(
        params: Tree,
        grads: Tree,
        moments: Sequence[Tree],
        rates: Sequence[float],
        scalars: Callable[[torch.dtype, float], tuple[Tensor, ...]],
    ) -> None:
        keep_writes_behind_reads()
        some = any(rates)
        if some not in compiled:
            f = write if some else functools.partial(write, 0.0)
            compiled[some] = torch.compile(own_cache(f, name), dynamic=True)
        (ps, gs, *ms), _ = tree.flatten_up_to(params, grads, *moments)

        @functools.cache  # a launch for each kind, not for each leaf; of this call alone
        def number(rate: float, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.full((), rate, dtype=dtype, device=device)

        with torch.no_grad():
            for rate, p, g, *m in zip(rates, ps, gs, *ms, strict=True):
                if g is None or not p.numel():
                    continue
                wide = compute_dtype(p)
                before: tuple = (number(rate, wide, p.device),) if some else ()
                s = scalars(wide, rate)
                if p.numel() > 1 and all(x.is_contiguous() for x in (p, *m)):
                    # .data, since a compiled function would be bound to the shape of a view's base.
                    compiled[some](*before, s, *[x.reshape(-1).data for x in (p, g, *m)])
                else:  # another function would be compiled for one number
                    write(before[0] if some else 0.0, s, p, g, *m)

    return write_all
