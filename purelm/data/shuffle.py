"""A random order of 0..n-1 that is computed element by element, so that no list of n is ever made."""

import math

from jaxtyping import Int
from torch import Tensor

from purelm import random
from purelm.random import Key

__all__ = ["permuted"]

# Up to this length the whole order is drawn: it is exactly uniform, and cheaper than the rounds.
SMALL = 2**12
# Four rounds of a Feistel network with random functions are a strong pseudo-random permutation (Luby and Rackoff
# 1988); two more cost little and leave a margin, since the halves are short.
N_ROUNDS = 6


def permuted(key: Key, n: int, index: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Elements `index` of a random order of 0..n-1: `permuted(key, n, arange(n))` is a permutation.

    Each index costs O(1) time and memory. With a = ceil(sqrt n) and b = ceil(n / a), a number x < a b is a pair
    (l, r) = (x div b, x mod b). Round i adds F_i(one half) to the other half, mod a and mod b by turns, where F_i is
    Threefry under the i-th key split from `key`. A round can be undone, so all of them are a bijection of 0..ab-1
    (a generalised Feistel cipher). A result of n or more is enciphered again until it is below n, which makes it a
    bijection of 0..n-1 (cycle walking); this is rare, since ab - n is at most about sqrt n. Source: Black and Rogaway,
    "Ciphers with arbitrary finite domains" (2002). For n up to 4,096 the order is `random.permutation`.

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
