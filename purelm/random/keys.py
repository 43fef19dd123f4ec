"""Keys: made of a seed, split, folded with numbers; and the indices by which a shard draws its part."""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from purelm import tree
from purelm.random.threefry import WORD, encipher, unsigned

__all__ = [
    "Key",
    "block_index",
    "fold_in",
    "key",
    "split",
    "split_like",
]

Key = Int[Tensor, " 2"]
Index = int | Tensor


def key(seed: int, device: torch.device | str | None = None) -> Key:
    """The key of a 64-bit seed: its high and its low word (two's complement for a negative seed).

    Equal to jax.random.key(seed) for 0 <= seed < 2**32, and beyond as jax with jax_enable_x64 (without it, jax
    drops the high word). ValueError outside [-2**63, 2**63).

    >>> key(42)
    tensor([ 0, 42])
    """
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"key: seed is {seed!r}; an int in [-2**63, 2**63) is needed")
    return torch.tensor([(seed >> 32) & WORD, seed & WORD], dtype=torch.int64, device=device)


def split(key: Key, n: int | Sequence[int] = 2) -> Int[Tensor, "n 2"]:
    """n independent keys (or an array of keys of shape n), stacked on the first axes.

    >>> k1, k2 = split(key(0))
    """
    check_key("split", key)
    shape = (n,) if isinstance(n, int) else tuple(n)
    index = torch.arange(math.prod(shape), device=key.device).reshape(shape)
    return torch.stack([unsigned(word) for word in encipher(key, index)], dim=-1)


def fold_in(key: Key, data: int | Int[Tensor, ""]) -> Key:
    """A new key from a key and a number, 0 <= data < 2**63; a 0-d tensor keeps compiled code free of its value.

    Equal to `split(key, n)[data]` for data < n, and to jax's for data < 2**32 (jax refuses larger ones).
    """
    check_key("fold_in", key)
    if isinstance(data, Tensor):
        if data.ndim != 0 or data.dtype.is_floating_point:
            raise ValueError(f"fold_in: data has shape {tuple(data.shape)} and {data.dtype}; a 0-d integer is needed")
        index = data.to(device=key.device, dtype=torch.int64)
    else:
        if not 0 <= data < 2**63:
            raise ValueError(f"fold_in: data is {data}; 0 <= data < 2**63 is needed")
        index = torch.full((), data, dtype=torch.int64, device=key.device)
    return torch.stack([unsigned(word) for word in encipher(key, index)], dim=-1)


def split_like(key: Key, like: Any) -> Any:
    """A key for each leaf of the tree `like`, in a tree of its form: fold_in(key, crc32(path)) for the leaf at `path`.

    A leaf's key depends on its path alone, so that adding or removing other leaves changes none of the rest; so are
    the first values of a model's parameters drawn (`purelm.models.leaves.leaf_key`). ValueError where two leaves
    would get one key, since a key of a dict has a dot, or, once in 2**32 pairs, since their paths have one crc32.

    >>> params = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}
    >>> keys = split_like(key(0), params)
    >>> torch.equal(keys["w"], split_like(key(0), {"w": 0, "more": [1, 2]})["w"])
    True
    >>> from purelm import random
    >>> noise = tree.map(lambda p, k: random.normal(k, p.shape), params, keys)
    """
    check_key("split_like", key)
    paths = tree.paths(like)
    seen: dict[int, str] = {}
    for path in paths:
        number = zlib.crc32(path.encode())
        if number in seen:
            raise ValueError(f"split_like: the paths {seen[number]!r} and {path!r} of two leaves give one key")
        seen[number] = path
    index = torch.tensor(list(seen), dtype=torch.int64, device=key.device)  # all in one pass
    words = torch.stack([unsigned(word) for word in encipher(key, index)], dim=-1)
    return tree.unflatten(tree.structure(like), torch.unbind(words))


def block_index(
    whole: Sequence[int], start: Sequence[int], shape: Sequence[int], device: torch.device | str | None = None
) -> Int[Tensor, "..."]:
    """Linear indices, within an array of shape `whole`, of the block of `shape` that begins at `start`.

    normal(key, shape, index=block_index(whole, start, shape)) equals that block of normal(key, whole).

    >>> block_index((4, 6), (1, 2), (2, 2))
    tensor([[ 8,  9],
            [14, 15]])
    """
    if not len(whole) == len(start) == len(shape):
        raise ValueError(f"block_index: {len(whole)} axes of whole, {len(start)} of start, {len(shape)} of shape")
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, first, length in zip(whole, start, shape, strict=True):
        if not (0 <= first and first + length <= size):
            raise ValueError(f"block_index: [{first}, {first + length}) is not inside an axis of {size}")
        index = index[..., None] * size + torch.arange(first, first + length, device=device)
    return index


def check_key(name: str, key: Tensor) -> None:
    """ValueError, beginning with `name`, unless key is one key: an int64 tensor of shape (2,)."""
    if not isinstance(key, Tensor) or key.shape != (2,) or key.dtype != torch.int64:
        given = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else f"{key!r:.80}"
        hint = f": random.key({key}) makes one" if isinstance(key, int) else " (vmap over several)"
        raise ValueError(f"{name}: key is {given}; a key is an int64 tensor of shape (2,){hint}")
