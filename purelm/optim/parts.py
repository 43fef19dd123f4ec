"""Whether an optimizer that clips by a norm of all gradients sees all of them, where a process holds a part."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.optim.base import Optimizer, Tree

__all__ = ["check_sees_all"]

LARGE = 1e15  # a gradient that any clipping shortens; its square, 1e30, is a number of fp32 still


def check_sees_all(optimizer: Optimizer, params: Tree, norm: Callable[[Tree], Tensor], who: str, advice: str) -> None:
    """ValueError, on all processes, where an optimizer clips by a norm of this process's gradients alone.

    `norm` is the right one, of the gradients of all processes; where the two are the same nothing is refused.

    The optimizer is tried on a tree of the form of `params` that has one number in place of each leaf. It clips if
    gradients of 1e15 and of 1e16 give equal results, and gradients of 1e-15 another. If it does, each process tries
    gradients that are larger by a factor of its own: clipped by the norm of its own gradients the result is the same
    again, clipped by a sum over processes it is not. That takes four updates of numbers and four calls of `norm`; every
    process must take part.

    An optimizer that fails on such a tree (one that holds tensors of the parameters' shapes, say) is not refused.
    """
    rank, size = _process()
    if size == 1:
        return
    numbers = tree.map(lambda x: torch.ones([1] * x.ndim, dtype=_dtype(x), device=x.device), params)
    lr = next((torch.ones((), device=x.device) for x in tree.leaves(numbers)), torch.ones(()))

    def gradients(size: float) -> Tree:
        return tree.map(lambda x: torch.full_like(x, size) if tree.is_floating(x) else None, numbers)

    def result(size: float) -> list[Tensor]:
        updates, state = optimizer.update(gradients(size), optimizer.init(numbers), numbers, lr)
        return [x for x in tree.leaves((updates, state)) if tree.is_floating(x)]

    own = 1.0 + rank % 7
    over_all = float(norm(gradients(own))) / max(float(norm(gradients(1.0))), 1e-30)
    try:
        small, large, larger, as_own = (result(size) for size in (1 / LARGE, LARGE, 10 * LARGE, own * LARGE))
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError):
        return
    clips = _same(large, larger) and not _same(large, small)
    alone = clips and _same(large, as_own) and not math.isclose(over_all, own, rel_tol=1e-2)
    if float(norm(gradients(float(alone)))) > 0.0:
        raise ValueError(
            f"{who}: the optimizer clips by a norm of the gradients that each process holds, which are parts of the "
            f"whole's, so that each would shorten its step by another factor: {advice}"
        )


def _process() -> tuple[int, int]:
    """This process's number among all, only to tell it from others, and how many there are."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if tree.is_floating(x) else x.dtype


def _same(some: list[Any], others: list[Any]) -> bool:
    """Equal up to rounding."""
    return len(some) == len(others) and all(
        torch.allclose(a.float(), b.float(), rtol=1e-3, atol=0.0) for a, b in zip(some, others, strict=True)
    )
