"""What the laws of `check_op` share: a function with its arguments as a function of their floating tensors alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.ops.precision import accumulator
from purelm.testing.laws import draw_like, require
from purelm.testing.operation_values import (
    Floats,
    ascending,
    finite,
    floats,
    largest,
    rounding,
    same_kind,
    varied,
    within,
)

__all__ = ["Case", "Function", "case_of", "floats_of", "sum_of", "tolerance"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """f and reference are functions of `args`; the laws see them as functions of the floating tensors in `args`."""

    f: Function
    args: tuple[Any, ...]
    reference: Function | None
    dtypes: tuple[torch.dtype, ...]
    rtol: float | None
    backend: str
    draws: dict[int, list[Tensor]] = field(default_factory=dict, init=False)  # what `drawn` has drawn, by the seed

    @cached_property
    def flat(self) -> tuple[list[Any], Any]:
        """(leaves of the arguments, their structure)."""
        return tree.flatten(self.args)

    @cached_property
    def at(self) -> list[int]:
        """Where the floating tensors are among the leaves."""
        return [i for i, x in enumerate(self.flat[0]) if isinstance(x, Tensor) and x.is_floating_point()]

    @cached_property
    def whole(self) -> list[int]:
        """Where the tensors of integers and booleans are, those of one number left out."""
        leaves = self.flat[0]
        return [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and i not in self.at and x.ndim]

    @cached_property
    def data(self) -> list[int]:
        """Those of `whole` that vmap batches: all but ascending vectors, which may be offsets (cumulative lengths). An
        op may read offsets as numbers, or read past its arguments if they are permuted."""
        leaves = self.flat[0]
        return [i for i in self.whole if leaves[i].ndim > 1 or not ascending(leaves[i])]

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

    def given(self, whole: Floats, at: Sequence[int]) -> Function:
        """f with these in place of the leaves at `at`."""

        def of(*args: Any) -> Any:
            leaves, form = tree.flatten(args)
            for i, x in zip(at, whole, strict=True):
                leaves[i] = x
            return self.f(*tree.unflatten(form, leaves))

        return of

    @cached_property
    def likes(self) -> list[Tensor]:
        """f's outputs for the case's own arguments."""
        with torch.no_grad():
            return self.outputs(self.f, self.xs)

    def drawn(self, seed: int) -> list[Tensor]:
        """A standard normal tensor for each of `likes`, the same each time."""
        if seed not in self.draws:
            self.draws[seed] = draw_like(self.likes, seed)
        return self.draws[seed]

    def functional(self, f: Function, seed: int = 0, curve: float = 0.0) -> Callable[..., Tensor]:
        """xs -> sum of c y + curve d y^2 / 2 over all elements of all outputs y, with c and d drawn by the seed.

        Each element so has an upstream gradient of its own, and with a curve a function that is linear has second
        derivatives too. Sums are held in fp32 for half dtypes.
        """
        c = self.drawn(seed)
        d = self.drawn(seed + 1) if curve else c

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
        require(all(finite(y) for y in expected), f"{what}: what it must equal is not finite, and cannot be compared")
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

        Not drawn anew: an argument that must be positive, or below a bound, stays so. See `variation` for other bounds.
        """
        return varied(x, n, *self.variation)

    def batched(self, n: int = 3) -> list[list[Tensor]]:
        """n values of each floating argument: one list an argument."""
        return [self.variants(x, n) for x in self.xs]

    @cached_property
    def variation(self) -> tuple[bool, float]:
        """(whether variants permute the values, by which part they shrink them): the first of three choices for which f
        is finite, since arguments may have to be symmetric, normalised or above a bound."""
        choices = [(True, 1 / 2), (False, 1 / 2), (False, 1 / 64)]
        for choice in choices[:-1]:
            values = [varied(x, 3, *choice) for x in self.xs]
            tried = [[v[b] for v in values] for b in (1, 2)]
            tried += [
                [v[b] if k == i else v[0] for k, v in enumerate(values)] for i in range(len(values)) for b in (1, 2)
            ]
            if all(self.defined(self.f, xs) for xs in tried):
                return choice
        return choices[-1]

    def data_batched(self, n: int = 3) -> list[list[Tensor]]:
        """n values of each of `data`: rolled, or the same n times if f is not finite at others."""
        own = [self.flat[0][i] for i in self.data]
        rolled = [[x.reshape(-1).roll(b).reshape(x.shape) for b in range(n)] for x in own]
        usual = all(self.defined(self.given([x[b] for x in rolled], self.data), self.xs) for b in range(1, n))
        return rolled if usual else [[x] * n for x in own]

    def defined(self, f: Function, xs: Floats) -> bool:
        """Whether f raises nothing and is finite at these."""
        try:
            with torch.no_grad():
                return all(finite(y) for y in self.outputs(f, xs))
        except Exception:  # anything that a user's function may raise
            return False

    def directions(self, seed: int = 11) -> list[Tensor]:
        """One for each floating argument, as large as its values: for an element x of an argument whose largest is m,
        standard normal times sqrt(m |x|) / 2, and m / 100 at least; small ones that must be positive stay so."""
        drawn = draw_like(self.xs, seed)
        sizes = [largest([x]) or 1.0 for x in self.xs]
        return [d * (x.abs() * m).sqrt().clamp(min=m / 50) / 2 for d, x, m in zip(drawn, self.xs, sizes, strict=True)]


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
    for name, function in {"f": f, "reference": reference}.items():
        if not callable(function) and (name == "f" or reference is not None):
            raise ValueError(f"check_op: {name} must be a function, got a {type(function).__name__}")
    if rtol is not None and not 0 < rtol < 1:
        raise ValueError(f"check_op: rtol must be above 0 and below 1, got {rtol}")
    if isinstance(dtypes, torch.dtype):
        raise ValueError(f"check_op: dtypes must be a list, got {dtypes}; pass [{dtypes}]")
    wrong = [d for d in dtypes if not isinstance(d, torch.dtype) or not d.is_floating_point]
    if wrong:
        raise ValueError(f"check_op: dtypes must be floating torch dtypes, got {wrong}")
    backends = torch._dynamo.list_backends(exclude_tags=())
    if backend not in backends:
        raise ValueError(f"check_op: backend must be one of {', '.join(backends)}; got {backend!r}")
    case = Case(f, tuple(args), reference, tuple(dtypes), rtol, backend)
    if not case.at:
        raise ValueError("check_op: args hold no floating tensor; there is nothing to differentiate")
    for name, x in zip(case.names, case.xs, strict=True):
        if not finite(x):
            raise ValueError(f"check_op: {name} is not finite; give a constant, as a mask of -inf, within f")
    with torch.no_grad():
        out = f(*case.arguments(case.xs))
    if any(isinstance(x, Tensor) and x.is_complex() for x in [*case.flat[0], *tree.leaves(out)]):
        raise ValueError("check_op: complex tensors are not checked; check f of real ones, as by torch.view_as_real")
    if not any(x.numel() for x in case.likes):
        kind = type(out).__name__
        raise ValueError(
            f"check_op: f returns no floating tensor with elements, but a {kind}; there is nothing to compare"
        )
    if not all(bool(x.isfinite().all()) for x in case.likes):
        raise ValueError("check_op: f's result is not finite; give arguments at which it is")
    return case


def floats_of(case: Case, f: Function, xs: Floats) -> list[Tensor]:
    """f's outputs, without a graph."""
    with torch.no_grad():
        return case.outputs(f, xs)


def tolerance(case: Case) -> float:
    """The relative one of the least exact argument's dtype."""
    return case.rtol if case.rtol is not None else max(rounding(x.dtype) for x in case.xs)


def sum_of(case: Case) -> float:
    """The size of what the functional adds up: its rounding is relative to this, and not to a sum that cancels."""
    return sum(float(y.abs().double().sum()) for y in case.likes)
