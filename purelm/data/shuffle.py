"""A random order of 0..n-1 that is computed element by element, so that no list of n is ever made."""

import math

from jaxtyping import Int
from torch import Tensor

from purelm import random
from purelm.random import Key

__all__ = ["permuted"]

# Up to here the order is drawn whole: exactly uniform, and cheaper than the rounds.
SMALL = 2**12
# Four rounds of a Feistel network with random functions are a strong pseudo-random permutation (Luby and Rackoff
# 1988); two more cost little and leave a margin, since the halves are short.
N_ROUNDS = 6


def permuted(key: Key, n: int, index: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Elements `index` of a random order of 0..n-1: `permuted(key, n, arange(n))` is a permutation.

    Each index costs O(1) time and memory. A number x < a b, with a = ceil(sqrt n) and b = ceil(n / a), is a pair
    (l, r) = (x div b, x mod b); round i adds F_i(other half) to one half, mod a or mod b in turn, where F_i is
    Threefry under the i-th key split from `key`. Each round can be undone, so the whole is a bijection of 0..ab-1.
    Where the result is n or more it is enciphered again until it is below n: following the cycle of a bijection
    from inside 0..n-1 back into it is a bijection of 0..n-1. Both are of Black and Rogaway, "Ciphers with arbitrary
    finite domains" (2002): the generalised Feistel cipher and cycle walking. ab - n is at most about sqrt n, so
    walking is rare. For n up to 4,096 the order is `random.permutation`.

    Raises ValueError for n < 1 or an index outside 0..n-1.

    >>> import torch
    >>> permuted(random.key(0), 5, torch.arange(5)).sort().values
    tensor([0, 1, 2, 3, 4])
    """
    if n < 1:
        raise ValueError(f"permuted: n is {n}; at least 1 is needed")
    if index.numel() and not (0 <= int(index.min()) and int(index.max()) < n):
        raise ValueError(f"permuted: index reaches from {int(index.min())} to {int(index.max())}; n is {n}")
    if n <= SMALL:
        return random.permutation(key, n)[index]
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = random.split(key, N_ROUNDS)
    flat = _encipher(keys, a, b, index.reshape(-1))
    while (outside := (flat >= n).nonzero().reshape(-1)).numel():
        flat = flat.index_put((outside,), _encipher(keys, a, b, flat[outside]))
    return flat.reshape(index.shape)


def _encipher(keys: Tensor, a: int, b: int, x: Tensor) -> Tensor:
    left, right = x // b, x % b
    for i in range(N_ROUNDS):
        if i % 2 == 0:
            left = (left + random.bits(keys[i], right.shape, index=right)) % a
        else:
            right = (right + random.bits(keys[i], left.shape, index=left)) % b
    return left * b + right
