"""Random numbers from explicit keys: the same key gives the same numbers on every device and for every sharding.

A key is an int64 tensor of shape (2,) holding two 32-bit words. Element i of a draw is a function of (key, i) alone
(`threefry.py`), so bits are equal on CPU and GPU, under torch.vmap and torch.compile, and in any slice of a draw.
They are also jax.random's bits for the same key (threefry2x32, jax_threefry_partitionable=True). Floats are made of
them by the same maps; transcendental ones are evaluated in fp64 and rounded once, so that they agree with jax to
its rounding, and between devices almost always exactly.

Every draw takes `index`, the linear index of its first element in the whole array (int or 0-d tensor), or of each
element (int64 tensor of the draw's shape, see `block_index`): with it a shard draws exactly its part of the whole.
Never use a key twice: `split` or `fold_in` it.
"""

from purelm.random.draws import (
    bernoulli,
    bits,
    categorical,
    choice,
    gumbel,
    normal,
    permutation,
    randint,
    truncated_normal,
    uniform,
)
from purelm.random.keys import (
    Key,
    block_index,
    fold_in,
    key,
    split,
    split_like,
)

__all__ = [
    "Key",
    "bernoulli",
    "bits",
    "block_index",
    "categorical",
    "choice",
    "fold_in",
    "gumbel",
    "key",
    "normal",
    "permutation",
    "randint",
    "split",
    "split_like",
    "truncated_normal",
    "uniform",
]
