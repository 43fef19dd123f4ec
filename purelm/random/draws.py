"""Draws from a key: bits, and what is made of them."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from purelm.devices import at_hand
from purelm.random.keys import Index, Key, check_key, split
from purelm.random.threefry import WORD, as_shape, draw, unsigned

__all__ = [
    "bernoulli",
    "bits",
    "categorical",
    "choice",
    "gumbel",
    "normal",
    "permutation",
    "randint",
    "truncated_normal",
    "uniform",
]


def bits(key: Key, shape: Sequence[int], *, index: Index = 0) -> Int[Tensor, "..."]:
    """32 random bits an element, as int64 values in [0, 2**32).

    >>> from purelm.random import key
    >>> bits(key(0), (2,))
    tensor([4070199207, 4202968722])
    """
    check_key("bits", key)
    return draw(key, shape, index, lambda a, b: unsigned(a ^ b), torch.int64)


def uniform(
    key: Key,
    shape: Sequence[int],
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
    *,
    index: Index = 0,
) -> Float[Tensor, "..."]:
    """Uniform on [low, high): the mantissa's bits are random, so values lie on a grid of 2**-23 of the range.

    The grid is 2**-52 in float64, 2**-10 in float16 and 2**-7 in bfloat16, as in jax.

    >>> from purelm.random import key
    >>> uniform(key(0), (3,))
    tensor([0.9477, 0.9786, 0.3323])
    """
    check_key("uniform", key)
    _check_float("uniform", dtype)
    return draw(key, shape, index, lambda a, b: _scaled(a, b, low, high, dtype), dtype)


def normal(
    key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, index: Index = 0
) -> Float[Tensor, "..."]:
    """Standard normal: sqrt(2) erfinv(u), u uniform on (-1, 1).

    In bfloat16 and float16 u itself has that dtype (jax's way), which leaves 128 or 2048 distinct values: draw in
    float32 and cast where that is too few, as for weights.

    >>> from purelm.random import key
    >>> whole = normal(key(0), (3,))
    >>> whole, torch.equal(normal(key(0), (2,), index=1), whole[1:])  # a shard draws its part of the whole
    (tensor([ 1.6226,  2.0253, -0.4336]), True)
    """
    check_key("normal", key)
    _check_float("normal", dtype)
    low = -1.0 + torch.finfo(dtype).eps / 2  # the float after -1

    def finish(a: Tensor, b: Tensor) -> Tensor:
        return (torch.erfinv(_scaled(a, b, low, 1.0, dtype).double()) * math.sqrt(2.0)).to(dtype)

    return draw(key, shape, index, finish, dtype)


def truncated_normal(
    key: Key,
    shape: Sequence[int],
    lower: float,
    upper: float,
    dtype: torch.dtype = torch.float32,
    *,
    index: Index = 0,
) -> Float[Tensor, "..."]:
    """Standard normal given that it lies in (lower, upper): sqrt(2) erfinv(u), u uniform on the bounds' erf.

    lower and upper are in standard deviations; multiply the result for another scale. It never touches the bounds.

    >>> from purelm.random import key
    >>> truncated_normal(key(0), (3,), -1.0, 1.0)
    tensor([ 0.8619,  0.9413, -0.2910])
    """
    check_key("truncated_normal", key)
    _check_float("truncated_normal", dtype)
    if not lower < upper:
        raise ValueError(f"truncated_normal: lower {lower} must be below upper {upper}")
    u_low, u_high = math.erf(lower / math.sqrt(2.0)), math.erf(upper / math.sqrt(2.0))

    def finish(a: Tensor, b: Tensor) -> Tensor:
        u = _scaled(a, b, u_low, u_high, dtype)
        ends = [torch.full((), x, dtype=dtype, device=u.device) for x in (lower, upper)]
        first, last = torch.nextafter(ends[0], ends[1]), torch.nextafter(ends[1], ends[0])
        return (torch.erfinv(u.double()) * math.sqrt(2.0)).to(dtype).clamp(first, last)

    return draw(key, shape, index, finish, dtype)


def gumbel(
    key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, index: Index = 0
) -> Float[Tensor, "..."]:
    """Standard Gumbel: -log(-log(u)), u uniform on [tiny, 1). In float32 the values lie in [-4.5, 16].

    >>> from purelm.random import key
    >>> gumbel(key(0), (2,))
    tensor([2.9234, 3.8326])
    """
    check_key("gumbel", key)
    _check_float("gumbel", dtype)
    tiny = torch.finfo(dtype).tiny

    def finish(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.log(-torch.log(_scaled(a, b, tiny, 1.0, dtype).double()))).to(dtype)

    return draw(key, shape, index, finish, dtype)


def bernoulli(
    key: Key, p: float | Float[Tensor, "..."] = 0.5, shape: Sequence[int] | None = None, *, index: Index = 0
) -> Bool[Tensor, "..."]:
    """True with probability p: uniform < p. `shape` is p's own by default, and p is broadcast to it.

    Probabilities are resolved to the uniform's grid: 2**-23 for float32.

    >>> from purelm.random import key
    >>> bernoulli(key(0), torch.tensor([0.0, 0.5, 1.0]))
    tensor([False, False,  True])
    """
    if isinstance(p, Tensor):
        _check_float("bernoulli", p.dtype)
        if at_hand(p) and not bool(((p >= 0) & (p <= 1)).all()):
            raise ValueError("bernoulli: p must be in [0, 1] everywhere")
        return uniform(key, p.shape if shape is None else shape, dtype=p.dtype, index=index) < p
    if not 0 <= p <= 1:
        raise ValueError(f"bernoulli: p must be in [0, 1], got {p}")
    return uniform(key, () if shape is None else shape, index=index) < p


def randint(
    key: Key, shape: Sequence[int], low: int, high: int, *, n_bits: int = 32, index: Index = 0
) -> Int[Tensor, "..."]:
    """Integers in [low, high), int64, from n_bits = 32 (jax's int32) or 64 (jax's int64) random bits.

    With 32 bits the probabilities differ by up to a factor 1 + (high - low) / 2**32, which is much for a range of
    many millions (an offset into a corpus): take n_bits=64 there. Bounds beyond int32 always use 64.

    >>> from purelm.random import key
    >>> randint(key(0), (5,), 0, 10)
    tensor([9, 0, 2, 3, 1])
    """
    check_key("randint", key)
    if n_bits not in (32, 64):
        raise ValueError(f"randint: n_bits is {n_bits}; 32 or 64 are allowed")
    if not low < high:
        raise ValueError(f"randint: low {low} must be below high {high}")
    if not (-(2**62) <= low and high <= 2**62):
        raise ValueError(f"randint: [{low}, {high}) must lie in [-2**62, 2**62]")
    span = high - low
    if n_bits == 32 and -(2**31) <= low and high <= 2**31:
        # Two words a value: (word1 * 2**32 + word2) mod span. jax's uint32 arithmetic wraps in the square only, which
        # makes the factor 0 for spans above 2**16; below, nothing reaches 2**32.
        first, second = (bits(k, shape, index=index) for k in split(key))
        factor = (2**16 % span) ** 2 % 2**32 % span
        return low + ((first % span) * factor + second % span) % span

    def long(k: Key) -> Tensor:
        return draw(k, shape, index, lambda a, b: (a.to(torch.int64) << 32) | unsigned(b), torch.int64)

    first, second = (long(k) for k in split(key))
    factor = (2**32 % span) ** 2 % 2**64 % span
    product = _unsigned_mod(first, span) * factor  # wraps, as uint64 does
    return low + _unsigned_mod(_unsigned_mod(product, span) + _unsigned_mod(second, span), span)


def permutation(key: Key, n: int) -> Int[Tensor, " n"]:
    """A uniformly random order of 0..n-1: repeated stable sorts by random 32-bit words, as many as jax makes.

    >>> from purelm.random import key
    >>> permutation(key(0), 5)
    tensor([0, 1, 4, 3, 2])
    """
    check_key("permutation", key)
    order = torch.arange(n, device=key.device)
    # Words of one sort collide; after this many rounds two elements agree in all of them with negligible chance.
    n_rounds = math.ceil(3 * math.log(max(1, n)) / math.log(WORD))
    for _ in range(n_rounds):
        key, subkey = split(key)
        order = order[torch.sort(bits(subkey, (n,)), stable=True).indices]
    return order


def categorical(key: Key, logits: Float[Tensor, "..."], axis: int = -1) -> Int[Tensor, "..."]:
    """A class by its unnormalised log-probability, along `axis`: argmax of logits + Gumbel noise.

    Logits in half precision are taken to float32 first (jax stays in their dtype, with 128 levels of noise).
    In float32, classes of probability below 1e-7 are drawn too rarely.
    ValueError for logits that are no distribution (NaN, inf, or nothing possible), where the host can look: on a CPU.

    >>> from purelm.random import key
    >>> categorical(key(0), torch.tensor([[0.0, 50.0], [50.0, 0.0]]))
    tensor([1, 0])
    """
    _check_float("categorical", logits.dtype)
    if at_hand(logits) and logits.numel() and not bool(torch.isfinite(logits.amax(axis)).all()):
        raise ValueError("categorical: logits must be finite, or -inf for some classes, along the axis; got NaN or inf")
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return torch.argmax(logits + gumbel(key, logits.shape, logits.dtype), dim=axis)


def choice(
    key: Key,
    a: int | Tensor,
    shape: Sequence[int] = (),
    replace: bool = True,
    p: Float[Tensor, " n"] | None = None,
) -> Tensor:
    """`shape` draws from range(a), or from the first axis of tensor a, with probabilities p (uniform by default).

    Without replacement and with p, the draws are ordered as if taken one after another (Gumbel top-k).
    ValueError for a p that is no distribution, where the host can look: on a CPU.

    >>> from purelm.random import key
    >>> choice(key(0), torch.tensor([2.0, 3.0, 5.0]), (4,)), choice(key(0), 10, (3,), replace=False)
    (tensor([3., 2., 5., 3.]), tensor([0, 1, 8]))
    """
    check_key("choice", key)
    n = a.shape[0] if isinstance(a, Tensor) else a
    shape = as_shape(shape)
    n_draws = math.prod(shape)
    if n <= 0:
        raise ValueError(f"choice: a has {n} elements; at least one is needed")
    if not replace and n_draws > n:
        raise ValueError(f"choice: {n_draws} draws without replacement from {n} elements")
    if p is not None and p.shape != (n,):
        raise ValueError(f"choice: p has shape {tuple(p.shape)}, a has {n} elements")
    if p is not None and at_hand(p):
        n_possible = int((p > 0).sum())
        if not bool((p >= 0).all()) or not bool(torch.isfinite(p).all()) or not n_possible:
            raise ValueError("choice: p must be at least 0 and finite everywhere, and above 0 somewhere")
        if not replace and n_draws > n_possible:
            raise ValueError(f"choice: {n_draws} draws without replacement, but p is above 0 for {n_possible} elements")
    if p is None:
        picked = randint(key, shape, 0, n) if replace else permutation(key, n)[:n_draws]
    elif replace:
        total = torch.cumsum(p, dim=0)
        picked = torch.searchsorted(total, total[-1] * (1 - uniform(key, shape, dtype=p.dtype)))
    else:
        picked = torch.topk(torch.log(p) + gumbel(key, (n,), p.dtype), n_draws).indices
    picked = picked.reshape(shape)
    return a[picked] if isinstance(a, Tensor) else picked


def _unit(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform on [0, 1) from two words: as many random bits as the mantissa has, times a power of two (exact)."""
    if dtype == torch.float64:
        return ((unsigned(a) << 20) | ((b >> 12) & 0xFFFFF)).to(dtype) * 2.0**-52
    if dtype == torch.float32:
        return (((a ^ b) >> 9) & 0x7FFFFF).to(dtype) * 2.0**-23
    if dtype == torch.float16:
        return (((a ^ b) >> 6) & 0x3FF).to(dtype) * 2.0**-10
    return (((a ^ b) >> 1) & 0x7F).to(dtype) * 2.0**-7


def _scaled(a: Tensor, b: Tensor, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """low + (high - low) * unit, all in `dtype`, and never below low."""
    unit = _unit(a, b, dtype)
    if low == 0.0 and high == 1.0:
        return unit
    first, last = (torch.full((), x, dtype=dtype, device=unit.device) for x in (low, high))
    return torch.maximum(unit * (last - first) + first, first)


def _unsigned_mod(x: Tensor, span: int) -> Tensor:
    """x mod span, with the int64 x read as unsigned: (2 * (x >> 1) + lowest bit) mod span, for span <= 2**62."""
    half = ((x >> 1) & 0x7FFFFFFFFFFFFFFF) % span
    return (2 * half + (x & 1)) % span


def _check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: dtype is {dtype}; float32, float64, bfloat16 and float16 are allowed")
