"""Strategies of shapes, tensors and keys.

    @given(tensors(shapes(min_dims=1, allow_empty=False), FLOATS, values=("normal", "special"), layouts=LAYOUTS))
    def test_my_op(x): ...

`drawn` and `laid` are the values and the layout without hypothesis.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from purelm import random
from purelm.data.checks import check_int
from purelm.testing.strategies.choices import chosen, one_or_strategy

__all__ = ["FLOATS", "INTEGERS", "LAYOUTS", "VALUES", "Layout", "Values", "drawn", "keys", "seeds", "shapes", "tensors"]

Values = Literal["small", "normal", "extreme", "special"]
Layout = Literal["contiguous", "transposed", "sliced", "expanded"]
Shape = tuple[int, ...]
VALUES: tuple[Values, ...] = get_args(Values)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
ODD = (1, 3, 7, 13, 31, 61, 127)  # sides that no tile or vector width divides


def shapes(
    min_dims: int = 0, max_dims: int = 3, max_side: int = 7, *, allow_empty: bool = True
) -> SearchStrategy[Shape]:
    """Shapes of min_dims to max_dims axes with every side from 1 to max_side; 1 and odd primes come often.

    allow_empty: sides of 0, too. Shrinks to the fewest axes, and each side to 1.
    """
    check_int("min_dims", min_dims, 0)
    check_int("max_dims", max_dims, min_dims)
    check_int("max_side", max_side, 1)
    side = st.sampled_from([*sides(max_side), *([0] * max(1, max_side // 4) if allow_empty else [])])
    return st.lists(side, min_size=min_dims, max_size=max_dims).map(tuple)


def sides(most: int) -> list[int]:
    """1 to most in order, the odd ones of ODD repeated until they are a half of all."""
    odd = [n for n in ODD if n <= most]
    return sorted([*range(1, most + 1), *odd * math.ceil(most / len(odd))])


def tensors(
    shape: Sequence[int] | SearchStrategy[Shape] | None = None,
    dtype: torch.dtype | Sequence[torch.dtype] | SearchStrategy[torch.dtype] = torch.float32,
    *,
    values: Values | Sequence[Values] = ("small", "normal"),
    layouts: Layout | Sequence[Layout] = "contiguous",
    device: torch.device | str | None = None,
) -> SearchStrategy[Tensor]:
    """Tensors of a drawn shape and dtype, with values of a drawn kind in a drawn layout.

    Args:
        shape: one shape, or a strategy of shapes; None: `shapes()`.
        dtype: one of FLOATS and INTEGERS, several, or a strategy.
        values: kinds from which one is drawn for each tensor.
            small: whole numbers from -4 to 4, exact in every dtype; seed 0 is all zeros and seed 1 all ones.
            normal: standard normal; integers from -100 to 100.
            extreme: finite numbers of any magnitude that the dtype has, in an even seed's tensor all multiplied by one
                power of two, in an odd seed's each by its own; integers of any number of bits.
            special: normal, with about a quarter of NaN, inf, -inf, 0, -0, the least subnormal and normal numbers and
                the largest, and at least one of these; integers: the least, the largest, 0, 1 and -1 among small ones.
            No value is negative where the dtype has none; a bool says whether a small number is odd.
        layouts: how the tensor lies in memory.
            transposed: axes in reverse order (from two axes on). sliced: every second element along each axis of a
            tensor whose other elements are NaN (integers: the largest), with an offset. expanded: one axis of more than
            one element has stride 0, so that its elements are one, and torch refuses to write to them.
        device: values are made on the CPU, so that they have the same bits everywhere, and moved.

    Shrinks to the first kind and layout given, and to seed 0.

    >>> from hypothesis import find
    >>> find(tensors(dtype=FLOATS), lambda x: x.numel() > 2)
    tensor([0., 0., 0.])
    """
    kinds = chosen("values", values, VALUES)
    some = chosen("layouts", layouts, LAYOUTS)
    if not isinstance(dtype, SearchStrategy):
        dtype = st.sampled_from(chosen("dtype", dtype, (*FLOATS, *INTEGERS)))
    return _tensors(shapes() if shape is None else one_or_strategy(shape), dtype, kinds, some, device)


@st.composite
def _tensors(
    draw: DrawFn,
    shape: SearchStrategy[Shape],
    dtype: SearchStrategy[torch.dtype],
    kinds: Sequence[Values],
    layouts: Sequence[Layout],
    device: torch.device | str | None,
) -> Tensor:
    size, kind = draw(shape), draw(dtype)
    x = drawn(draw(st.sampled_from(kinds)), draw(seeds()), 0, size, kind)
    return laid(x, draw(st.sampled_from(layouts)), draw(seeds()) if "expanded" in layouts else 0, device)


def seeds() -> SearchStrategy[int]:
    """Seeds of values, which shrink to 0."""
    return st.integers(0, 2**32 - 1)


def drawn(kind: Values, seed: int, number: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Values of a kind (see `tensors`) on the CPU, for leaf `number` of what has this seed."""
    key, at = random.key(seed), number << 32  # each leaf has counters of its own: less work than a key of its own
    return (_floats if dtype.is_floating_point else _integers)(kind, seed, key, at, tuple(shape), dtype)


def _floats(kind: Values, seed: int, key: random.Key, at: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    if kind == "small":
        return _small(seed, key, at, shape).to(dtype)
    if kind == "normal":
        return random.normal(key, shape, torch.float64, index=at).to(dtype)
    info = torch.finfo(dtype)
    if kind == "extreme":
        mantissa, exponent = random.bits(key, (2, *shape), index=at)
        low, high = (math.frexp(x)[1] for x in (info.tiny, info.max))
        e = exponent if seed % 2 else exponent.flatten()[:1].sum()
        power = torch.exp2((e % (high - low + 1) + (low - 1)).to(torch.float64))
        x = (1.0 + mantissa.to(torch.float64) / 2.0**32) * power
        return torch.where(mantissa % 2 == 0, x, -x).clamp(info.min, info.max).to(dtype)
    least = info.tiny * info.eps
    odd = [math.nan, math.inf, -math.inf, 0.0, -0.0, least, -least, info.tiny, -info.tiny, info.max, -info.max]
    x = random.normal(key, shape, torch.float64, index=at)
    return _mixed(seed, key, at, x, torch.tensor(odd, dtype=torch.float64)).to(dtype)


def _integers(kind: Values, seed: int, key: random.Key, at: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return _small(seed, key, at, shape) % 2 == 1
    info = torch.iinfo(dtype)
    if kind == "extreme":
        high, low = random.bits(key, (2, *shape), index=at)
        shift = 0 if seed % 2 else int(seed // 2 % 64)
        return (((high << 32) | low) >> shift).to(dtype)
    if kind == "normal":
        x = random.bits(key, shape, index=at) % 201 - 100
    else:
        x = _small(seed, key, at, shape)
        if kind == "special":
            x = _mixed(seed, key, at, x, torch.tensor([info.min, info.max, 0, 1, -1]))
    return (x if info.min < 0 else torch.where(x < 0, -(x + 1), x)).to(dtype)


def _small(seed: int, key: random.Key, at: int, shape: Shape) -> Tensor:
    return torch.full(shape, seed) if seed < 2 else random.bits(key, shape, index=at) % 9 - 4


def _mixed(seed: int, key: random.Key, at: int, x: Tensor, odd: Tensor) -> Tensor:
    """x with about a quarter of its elements, and one of them surely, taken from `odd`."""
    where, which = random.bits(key, (2, *x.shape), index=at + 2**31)
    taken = where % 4 == 0
    if x.numel():
        taken = taken | (torch.arange(x.numel()) == seed % x.numel()).view(x.shape)
    return torch.where(taken, odd[which % len(odd)], x)


def laid(x: Tensor, layout: Layout, seed: int, device: torch.device | str | None) -> Tensor:
    """x in this layout (see `tensors`) on this device; the seed says which axis is expanded."""
    x = x if device is None else x.to(device)
    if layout == "transposed":
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced":
        between = math.nan if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
        whole = torch.full([2 * n + 1 for n in x.shape] or [3], between, dtype=x.dtype, device=x.device)
        part = whole[tuple(slice(1, None, 2) for _ in x.shape) or 1]
        return part.copy_(x)
    if layout == "expanded" and (axes := [i for i, n in enumerate(x.shape) if n > 1]):
        return x.narrow(axes[seed % len(axes)], 0, 1).contiguous().expand(x.shape)
    return x


def keys(*, device: torch.device | str | None = None) -> SearchStrategy[random.Key]:
    """Keys of purelm.random, of every 64-bit seed; they shrink to random.key(0)."""
    return st.integers(-(2**63), 2**63 - 1).map(lambda seed: random.key(seed, device))
