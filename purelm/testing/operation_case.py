"""What the laws of `check_op` share: a function with its arguments as a function of their floating tensors alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.ops.precision import accumulator
from purelm.testing.laws import draw_like, require

__all__ = ["Case", "Floats", "case_of", "difference_step", "rounding"]

Floats = Sequence[Tensor]
Function = Callable[..., Any]


def rounding(dtype: torch.dtype) -> float:
    """What sums of some hundred terms in another order may differ by, relative to the largest: 64 eps of what they are
    held in, and one eps of what they are stored in."""
    return 64 * torch.finfo(accumulator(dtype)).eps + 2 * torch.finfo(dtype).eps


def difference_step(dtype: torch.dtype) -> float:
    """The step of a central difference: eps^(1/3), where the rounding eps / h and the bend h^2 are alike."""
    return torch.finfo(dtype).eps ** (1 / 3)


@dataclass(frozen=True)
class Case:
    """f and reference are functions of `args`; the laws see them as functions of the floating tensors in `args`."""

    f: Function
    args: tuple[Any, ...]
    reference: Function | None
    dtypes: tuple[torch.dtype, ...]
    rtol: float | None
    backend: str

    @cached_property
    def flat(self) -> tuple[list[Any], Any]:
        """(leaves of the arguments, their structure)."""
        return tree.flatten(self.args)

    @cached_property
    def at(self) -> list[int]:
        """Where the floating tensors are among the leaves."""
        return [i for i, x in enumerate(self.flat[0]) if isinstance(x, Tensor) and x.is_floating_point()]

    @cached_property
    def names(self) -> list[str]:
        """What the floating tensors are called in messages."""
        paths = tree.paths(self.args)
        return [f"argument {paths[i]}" for i in self.at]

    @cached_property
    def xs(self) -> list[Tensor]:
        """The floating tensors, without a graph."""
        return [self.flat[0][i].detach() for i in self.at]

    def outputs(self, f: Function, xs: Floats) -> list[Tensor]:
        """The floating tensors that f returns for these in place of the case's own."""
        return floats(f(*self.arguments(xs)))

    def arguments(self, xs: Floats) -> tuple[Any, ...]:
        """All arguments, with these floating tensors in place of the case's own."""
        leaves = list(self.flat[0])
        for i, x in zip(self.at, xs, strict=True):
            leaves[i] = x
        return tuple(tree.unflatten(self.flat[1], leaves))

    @cached_property
    def likes(self) -> list[Tensor]:
        """f's outputs for the case's own arguments."""
        with torch.no_grad():
            return self.outputs(self.f, self.xs)

    def functional(self, f: Function, seed: int = 0, curve: float = 0.0) -> Callable[..., Tensor]:
        """xs -> sum of c y + curve d y^2 / 2 over all elements of all outputs y, with c and d drawn by the seed.

        Each element so has an upstream gradient of its own, and with a curve a function that is linear has second
        derivatives too. Sums are held in fp32 for half dtypes.
        """
        c, d = draw_like(self.likes, seed), draw_like(self.likes, seed + 1)

        def of(*xs: Tensor) -> Tensor:
            total: Any = 0.0
            ys = self.outputs(f, xs)
            found, expected = ([tuple(y.shape) for y in them] for them in (ys, c))
            require(found == expected, f"floating results have the shapes {found} and not {expected}")
            for y, a, b in zip(ys, c, d, strict=True):
                y = y.to(torch.promote_types(accumulator(y.dtype), accumulator(a.dtype)))
                weighted = a.to(y.dtype) * y
                if curve:
                    weighted = weighted + curve / 2 * b.to(y.dtype) * y * y
                total = total + weighted.sum()
            return total

        return of

    def gradients(self, f: Function, xs: Floats, seed: int = 0, curve: float = 0.0) -> list[Tensor]:
        """Of the functional of f, by torch.autograd; zeros where an output does not depend on an argument."""
        leaves = [x.detach().requires_grad_() for x in xs]
        with torch.enable_grad():
            value = self.functional(f, seed, curve)(*leaves)
            require(value.requires_grad, "the result has no gradient by any argument: it was detached on the way")
            return list(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))

    def close(self, found: Floats, expected: Floats, what: str, names: Sequence[str] | None = None) -> None:
        """AssertionError unless |found - expected| <= rtol (|expected| + the largest of all that is expected)."""
        names = names or ([""] if len(expected) == 1 else [f"result {i}" for i in range(len(expected))])
        require(len(found) == len(expected), f"{what}: {len(found)} tensors and not {len(expected)}")
        scale = largest(expected)
        for x, y, name in zip(found, expected, names, strict=True):
            same_kind(x, y, f"{what}{', ' if name else ''}{name}")
            rtol = self.rtol if self.rtol is not None else rounding(y.dtype)
            error = (x.double() - y.double()).abs()
            within(error, rtol * (y.double().abs() + scale), f"{what}{', ' if name else ''}{name}")

    def in_dtype(self, dtype: torch.dtype) -> "Case":
        """The same with all floating arguments rounded to the dtype."""
        return replace(self, args=self.arguments([x.to(dtype) for x in self.xs]))

    def precise(self) -> "Case":
        """The same in fp32 at least, for differences."""
        halves = any(x.dtype in (torch.float16, torch.bfloat16) for x in self.xs)
        return self.in_dtype(torch.float32) if halves else self

    def variants(self, x: Tensor, n: int = 3) -> list[Tensor]:
        """n tensors of x's values in another order and size, so that no two are mistaken for each other.

        Not drawn anew: an argument that must be positive, or below a bound, stays so.
        """
        return [x.reshape(-1).roll(b).reshape(x.shape) * (1 - b / (2 * n)) for b in range(n)]

    def batched(self, n: int = 3) -> list[list[Tensor]]:
        """n values of each floating argument: one list an argument."""
        return [self.variants(x, n) for x in self.xs]

    def directions(self, seed: int = 11) -> list[Tensor]:
        """One for each floating argument, about as large as its values."""
        drawn = draw_like(self.xs, seed)
        return [d * max(largest([x]), 1e-3) / 2 for d, x in zip(drawn, self.xs, strict=True)]


def case_of(
    f: Function,
    args: Sequence[Any],
    reference: Function | None,
    dtypes: Sequence[torch.dtype],
    rtol: float | None,
    backend: str,
) -> Case:
    """The case of `check_op`'s arguments; ValueError where nothing could be compared."""
    if isinstance(args, Tensor) or not isinstance(args, (tuple, list)):
        kind = type(args).__name__
        raise ValueError(f"check_op: args must be a tuple of f's arguments, (x,) for one; got a {kind}")
    if rtol is not None and not 0 < rtol < 1:
        raise ValueError(f"check_op: rtol must be above 0 and below 1, got {rtol}")
    wrong = [d for d in dtypes if not isinstance(d, torch.dtype) or not d.is_floating_point]
    if wrong:
        raise ValueError(f"check_op: dtypes must be floating torch dtypes, got {wrong}")
    backends = torch._dynamo.list_backends(exclude_tags=())
    if backend not in backends:
        raise ValueError(f"check_op: backend must be one of {', '.join(backends)}; got {backend!r}")
    case = Case(f, tuple(args), reference, tuple(dtypes), rtol, backend)
    if not case.at:
        raise ValueError("check_op: args hold no floating tensor; there is nothing to differentiate")
    if not any(x.numel() for x in case.likes):
        raise ValueError("check_op: f returns no floating tensor with elements; there is nothing to compare")
    if not all(bool(x.isfinite().all()) for x in case.likes):
        raise ValueError("check_op: f's result is not finite; give arguments at which it is")
    return case


def floats(out: Any) -> list[Tensor]:
    """The floating tensors of a result."""
    return [x for x in tree.leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]


def largest(xs: Floats) -> float:
    """The largest absolute value of all."""
    return max((float(x.detach().abs().max()) for x in xs if x.numel()), default=0.0)


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
    if x.ndim >= 1:
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        sliced = wide[..., 1::2]
        sliced.copy_(x)
        yield "every second element, from the second on", sliced
        if x.shape[0] > 1:
            yield "one row expanded", x[:1].expand_as(x)
    else:
        yield "an element of a vector", torch.stack([x + 1, x])[1]


def norm(xs: Floats) -> float:
    """Euclidean, of all together."""
    return math.sqrt(sum(float(x.detach().double().square().sum()) for x in xs))
