"""Clipping by the global norm (Pascanu et al., 1211.5063, Algorithm 1), as torch.nn.utils.clip_grad_norm_."""

from collections.abc import Callable

from torch import Tensor

from purelm import tree
from purelm.optim.base import Optimizer, Tree, made_by
from purelm.optim.checks import check_range

__all__ = ["clip", "clip_by_global_norm"]


def clip(
    grads: Tree, max_norm: float, eps: float = 1e-6, *, norm: Callable[[Tree], Tensor] = tree.global_norm
) -> tuple[Tree, Tensor]:
    """(g * min(1, max_norm / (norm + eps)), norm), norm being that of all gradients together, before clipping.

    The norm is a 0-d tensor, accumulated in fp32; leaves keep their dtype. A norm of inf or nan makes gradients nan,
    as in torch (test `tree.all_finite` first to skip such a step). norm: another function of the gradients, such as
    `purelm.dist.zero.global_norm(group)` where each rank holds only its parts of them.

    >>> import torch
    >>> clipped, norm = clip({"w": torch.tensor([3.0, 4.0])}, max_norm=1.0)
    >>> clipped["w"], norm
    (tensor([0.6000, 0.8000]), tensor(5.))
    """
    check_range("max_norm", max_norm, 0.0, float("inf"))
    found = norm(grads)
    factor = (max_norm / (found + eps)).clamp(max=1.0)
    # Multiplied in the norm's dtype: a factor in bf16 would be off by up to 0.4 %, above max_norm at times.
    return tree.map(lambda g: (g.to(factor.dtype) * factor).to(g.dtype), grads), found


def clip_by_global_norm(
    max_norm: float, eps: float = 1e-6, *, norm: Callable[[Tree], Tensor] = tree.global_norm
) -> Optimizer:
    """`clip` as a link of `chain`; it has no state.

    >>> from purelm.optim import adamw, chain
    >>> optimizer = chain(clip_by_global_norm(1.0), adamw())
    """
    check_range("max_norm", max_norm, 0.0, float("inf"))

    def update(grads: Tree, state: tuple[()], params: Tree, lr: Tensor | float) -> tuple[Tree, tuple[()]]:
        return clip(grads, max_norm, eps, norm=norm)[0], state

    return made_by(Optimizer(lambda params: (), update), clip_by_global_norm, max_norm, eps, norm=norm)
