"""Rewards as tensors of one row a prompt: (prompts, responses a prompt), in the order in which rows lie in a batch.

Legend: P prompts, G responses a prompt, B = P G rows of a batch; row p G + g is response g of prompt p.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from purelm.devices import at_hand

__all__ = ["checked_rewards", "grouped", "row_groups", "ungrouped"]


def grouped(x_B: Shaped[Tensor, "b *rest"], group_size: int) -> Shaped[Tensor, "p g *rest"]:
    """(B, ...) -> (P, G, ...): the rows of one prompt, which lie one after the other, as one.

    >>> grouped(torch.arange(6), 3).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(f"group_size must be an int of at least 1, got {group_size!r}")
    n = len(x_B) if x_B.ndim else 0
    if not n or n % group_size:
        raise ValueError(f"{n} rows are no whole number of groups of group_size {group_size}")
    return x_B.unflatten(0, (-1, group_size))


def ungrouped(x_PG: Shaped[Tensor, "p g *rest"]) -> Shaped[Tensor, "b *rest"]:
    """(P, G, ...) -> (B, ...), the inverse of `grouped`."""
    return x_PG.flatten(0, 1)


def row_groups(keep_P: Shaped[Tensor, " p"], group_size: int) -> Shaped[Tensor, " b"]:
    """What is said of each prompt, said of each of its rows.

    >>> row_groups(torch.tensor([True, False]), 2).tolist()
    [True, True, False, False]
    """
    return keep_P.repeat_interleave(group_size)


def checked_rewards(
    name: str, rewards: Shaped[Tensor, "*shape"], *, ndim: int = 2, least: int = 1, why: str = ""
) -> Float[Tensor, "*shape"]:
    """rewards in fp32, or in fp64 where they are; ValueError unless they are finite, of ndim axes and groups of least.

    name: of the function that asks, for the message; why: the reason for least.
    """
    if not isinstance(rewards, Tensor) or rewards.ndim != ndim or rewards.is_complex():
        found = f"{tuple(rewards.shape)}" if isinstance(rewards, Tensor) else type(rewards).__name__
        axes = {1: "(B,)", 2: "(P, G)", 3: "(P, G, R)"}[ndim]
        hint = "; see grouped(rewards, group_size)" if ndim == 2 else ""
        raise ValueError(f"{name}: rewards must be a tensor {axes}, got {found}{hint}")
    if ndim > 1 and rewards.shape[1] < least:
        raise ValueError(f"{name}: groups of at least {least} responses are needed{why}, got {rewards.shape[1]}")
    if not rewards.numel():
        raise ValueError(f"{name}: no rewards, their shape is {tuple(rewards.shape)}")
    r = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    if at_hand(r) and not bool(torch.isfinite(r).all()):
        at = torch.nonzero(~torch.isfinite(r))[0].tolist()
        raise ValueError(f"{name}: rewards must be finite, got {float(r[tuple(at)])} at {at}")
    return r
