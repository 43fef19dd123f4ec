"""Laws of an op: its second derivatives."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.func import grad, jvp

from purelm.testing.laws import require
from purelm.testing.operation_case import Case
from purelm.testing.operation_values import Floats, difference_step, largest, same_kind, within

__all__ = ["double_backward", "hessian_product"]

Bend = tuple[Tensor, Tensor]


def double_backward(case: Case) -> None:
    """autograd's derivative of <gradient, d> by each argument is the central difference of the gradient along d."""
    case = case.precise()
    directions, expected = case.directions(), bend(case)
    leaves = [x.detach().requires_grad_() for x in case.xs]
    with torch.enable_grad():
        out = case.functional(case.f, curve=1.0)(*leaves)
        first = torch.autograd.grad(out, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        along = sum_((g * d).sum() for g, d in zip(first, directions, strict=True))
        require(along.requires_grad, "the gradient has no graph under create_graph=True")
        found = torch.autograd.grad(along, leaves, allow_unused=True, materialize_grads=True)
    bends(case, found, expected, "double backward")


def hessian_product(case: Case) -> None:
    """The same by torch.func: jvp of grad, and grad of <grad, d>."""
    case = case.precise()
    directions, expected = case.directions(), bend(case)
    numbers = tuple(range(len(case.xs)))
    first = grad(case.functional(case.f, curve=1.0), numbers)

    def along(*xs: Tensor) -> Tensor:
        return sum_((g * d).sum() for g, d in zip(first(*xs), directions, strict=True))

    bends(case, grad(along, numbers)(*case.xs), expected, "grad of <grad, direction>")
    found = jvp(first, tuple(case.xs), tuple(directions))[1]
    bends(case, found, expected, "jvp of grad")


# Helpers.


def sum_(terms: Iterable[Tensor]) -> Tensor:
    """Their sum as a tensor, also of one term."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def bend(case: Case) -> list[Bend]:
    """For each argument the central difference of the curved functional's gradient along the directions, and how much
    the one over twice the step differs: 3 times its error by the bend."""
    directions, step = case.directions(), max(difference_step(x.dtype) for x in case.xs)
    ends = [
        case.gradients(case.f, [x + s * step * d for x, d in zip(case.xs, directions, strict=True)], curve=1.0)
        for s in (1, -1, 2, -2)
    ]
    found = [(a - b) / (2 * step) for a, b in zip(*ends[:2], strict=True)]
    wider = [(a - b) / (4 * step) for a, b in zip(*ends[2:], strict=True)]
    require(largest(found) > 0, "the gradient does not change along the directions: nothing is compared")
    return [(x, (x - y).abs()) for x, y in zip(found, wider, strict=True)]


def bends(case: Case, found: Floats, expected: Sequence[Bend], what: str) -> None:
    """AssertionError unless two forms of the second derivative agree to the order h^2 of a central difference."""
    step = max(difference_step(x.dtype) for x in case.xs)
    sizes = largest([y for y, _ in expected]) + largest(case.gradients(case.f, case.xs, curve=1.0))
    for x, (y, error), name in zip(found, expected, case.names, strict=True):
        same_kind(x, y, f"{what}, {name}")
        within((x - y).abs().double(), 300 * step**2 * sizes + error.double(), f"{what}, {name}")
