"""What the laws of `check_op` compare, and by which tolerances: tensors in other layouts and with other values."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.ops.precision import accumulator
from purelm.testing.laws import require

__all__ = [
    "Floats",
    "ascending",
    "dense",
    "difference_step",
    "finite",
    "floats",
    "largest",
    "layouts",
    "norm",
    "rounding",
    "same_kind",
    "varied",
    "within",
]

Floats = Sequence[Tensor]


def rounding(dtype: torch.dtype) -> float:
    """What sums of some hundred terms in another order may differ by, relative to the largest: 64 eps of what they are
    held in, and one eps of what they are stored in."""
    return 64 * torch.finfo(accumulator(dtype)).eps + 2 * torch.finfo(dtype).eps


def difference_step(dtype: torch.dtype) -> float:
    """The step of a central difference: eps^(1/3), where the rounding eps / h and the bend h^2 are alike."""
    return torch.finfo(dtype).eps ** (1 / 3)


def floats(out: Any) -> list[Tensor]:
    """The floating tensors of a result."""
    return [x for x in tree.leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]


def finite(x: Tensor) -> bool:
    """Whether all elements are."""
    return bool(x.isfinite().all())


def ascending(x: Tensor) -> bool:
    """Whether no element is below the one before it."""
    return not bool((x[1:] < x[:-1]).any())


def varied(x: Tensor, n: int, permuted: bool, part: float) -> list[Tensor]:
    """n tensors: the b-th is x times 1 - part b / n, with its elements rolled by b places."""
    return [(x.reshape(-1).roll(b).reshape(x.shape) if permuted else x) * (1 - part * b / n) for b in range(n)]


def largest(xs: Floats) -> float:
    """The largest absolute value of all."""
    return max((float(x.detach().abs().max()) for x in xs if x.numel()), default=0.0)


def norm(xs: Floats) -> float:
    """Euclidean, of all together."""
    return math.sqrt(sum(float(x.detach().double().square().sum()) for x in xs))


def same_kind(found: Tensor, expected: Tensor, what: str) -> None:
    """AssertionError unless shape and dtype are equal."""
    require(
        found.shape == expected.shape and found.dtype == expected.dtype,
        f"{what}: {tuple(found.shape)} {found.dtype} and not {tuple(expected.shape)} {expected.dtype}",
    )


def within(error: Tensor, allowed: Tensor | float, what: str) -> None:
    """AssertionError, with the place of the worst, unless error <= allowed everywhere; NaN is an error."""
    bad = ~(error <= allowed)
    if not bool(bad.any()):
        return
    limits = torch.as_tensor(allowed, dtype=error.dtype, device=error.device).expand_as(error)
    excess = torch.where(error.isnan(), torch.inf, error / limits.clamp(min=1e-300))
    place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), error.shape)) if error.ndim else ()
    limit = limits[place]
    at = f" at {place}" if place else ""
    raise AssertionError(
        f"{what}: {int(bad.sum())} of {error.numel()} elements are wrong; off by {float(error[place]):.3g}{at}, "
        f"{float(limit):.3g} allowed"
    )


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, a tensor of x's values, or for "expanded" of one of its rows, in other strides)."""
    if x.ndim >= 2:
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
        # With neighbouring elements in the last axis, as kernels that copy all other layouts still take them.
        yield (
            "columns of a wider tensor",
            torch.cat([torch.ones_like(x), x, torch.ones_like(x)], -1).narrow(-1, x.shape[-1], x.shape[-1]),
        )
    if x.ndim >= 3:
        yield "first axes swapped", x.transpose(0, 1).contiguous().transpose(0, 1)
    if x.ndim >= 4:
        yield "middle axes swapped", x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if x.ndim >= 1:
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        sliced = wide[..., 1::2]
        sliced.copy_(x)
        yield "every second element, from the second on", sliced
        if x.shape[0] > 1:
            yield "one row expanded", x[:1].expand_as(x)
    else:
        yield "an element of a vector", torch.stack([torch.ones_like(x), x])[1]


def dense(x: Tensor) -> Tensor:
    """A contiguous copy of its own, whatever the strides of x."""
    return x.clone(memory_format=torch.contiguous_format)
