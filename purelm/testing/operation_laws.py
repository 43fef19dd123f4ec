"""The laws of an op, each a function of a `Case`. `check_op` says what they are for."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from purelm.testing.laws import assert_trees_equal, inner, require, unchanged
from purelm.testing.operation_case import (
    Case,
    Floats,
    Function,
    difference_step,
    floats,
    largest,
    layouts,
    norm,
    rounding,
    same_kind,
    within,
)
from purelm.transforms import remat
from purelm.transforms.boundary import own_cache

__all__ = ["OP_LAWS", "torchs_own_warnings"]


# The function and its first derivative.


def value(case: Case, where: str = "") -> None:
    """f is as near to the reference in float64 as the reference in f's dtype is, up to a factor of 2."""
    assert case.reference is not None
    found = floats_of(case, case.f, case.xs)
    exact = floats_of(case, case.reference, [x.double() for x in case.xs])
    same = floats_of(case, case.reference, case.xs)
    as_exact(case, found, exact, same, f"{where}the value", [f"result {i}" for i in range(len(exact))])


def gradient(case: Case, where: str = "") -> None:
    """The same for f's gradient by each argument."""
    assert case.reference is not None
    found = case.gradients(case.f, case.xs)
    exact = case.gradients(case.reference, [x.double() for x in case.xs])
    require(largest(exact) > 0, "the reference's gradient by every argument is 0: nothing is compared")
    same = case.gradients(case.reference, case.xs)
    as_exact(case, found, exact, same, f"{where}the gradient", case.names)


def slope(case: Case) -> None:
    """<gradient, direction> is the central difference along it, for each argument alone."""
    case = case.precise()
    f, gradients, directions = case.functional(case.f), case.gradients(case.f, case.xs), case.directions()
    seen = 0.0
    for i, (g, d, name) in enumerate(zip(gradients, directions, case.names, strict=True)):
        step = difference_step(d.dtype)
        with torch.no_grad():
            ends = [f(*moved(case.xs, i, s * step * d)).double() for s in (1, -1)]
        expected = float(ends[0] - ends[1]) / (2 * step)
        found = float(inner([g], [d]))
        # A difference of order h^2: 1e2 h^2 of what is summed, which leaves room for third derivatives of that size.
        allowed = 100 * step**2 * (largest(ends) + sum_of(case) + norm([g]) * norm([d]))
        require(
            abs(found - expected) <= allowed,
            f"{name}: the gradient's slope is {found:.6g} and the central difference {expected:.6g}, "
            f"{allowed:.3g} of difference allowed",
        )
        seen = max(seen, abs(expected))
    require(seen > 0, "f does not change along any direction: nothing is compared")


def each_gradient(case: Case) -> None:
    """The gradient by one argument alone, the others without requires_grad, is that of all together."""
    expected = case.gradients(case.f, case.xs)
    f = case.functional(case.f)
    for i, name in enumerate(case.names):
        leaf = case.xs[i].detach().requires_grad_()
        with torch.enable_grad():
            out = f(*(leaf if k == i else x for k, x in enumerate(case.xs)))
        if not out.requires_grad:
            require(largest([expected[i]]) == 0, f"{name}: no gradient if it alone requires one")
            continue
        (found,) = torch.autograd.grad(out, leaf, allow_unused=True, materialize_grads=True)
        case.close([found], [expected[i]], "the gradient by one alone", [name])


def pure(case: Case) -> None:
    """f writes to no argument, forwards or backwards, uses no global generator, and gives the same bits twice."""
    first = case.f(*case.args)
    with unchanged(*case.args):
        second = case.f(*case.args)
        case.gradients(case.f, case.xs)
    assert_trees_equal(second, first, "two results of the same call")


# Under torch.func.


def func_grad(case: Case) -> None:
    """torch.func.grad is torch.autograd.grad."""
    found = grad(case.functional(case.f), tuple(range(len(case.xs))))(*case.xs)
    case.close(found, case.gradients(case.f, case.xs), "torch.func.grad", case.names)


def vmap_(case: Case) -> None:
    """vmap is a loop: over each argument alone, from its first axis and its last, over all, and twice over all."""
    for what, stacked, in_dims in batches(case):
        found = vmap(lambda *xs: case.outputs(case.f, xs), in_dims)(*stacked)
        loop = [case.outputs(case.f, sample(stacked, in_dims, b)) for b in range(3)]
        case.close(found, [torch.stack(ys) for ys in zip(*loop, strict=True)], f"vmap over {what}")
    values = [[case.variants(v, 2) for v in case.variants(x)] for x in case.xs]  # [argument][outer][inner]
    found = vmap(vmap(lambda *xs: case.outputs(case.f, xs)))(
        *(torch.stack([torch.stack(v) for v in x]) for x in values)
    )
    inner_loops = [
        [
            torch.stack(ys)
            for ys in zip(*(case.outputs(case.f, [x[a][b] for x in values]) for b in range(2)), strict=True)
        ]
        for a in range(3)
    ]
    expected = [torch.stack(ys) for ys in zip(*inner_loops, strict=True)]
    case.close(found, expected, "vmap of vmap")


def per_sample(case: Case) -> None:
    """vmap(grad(f)) is a loop of gradients, where a sample has all arguments of its own, and where it has one."""
    f, numbers = case.functional(case.f), tuple(range(len(case.xs)))
    for what, stacked, in_dims in batches(case, last=False):
        found = vmap(grad(f, numbers), in_dims)(*stacked)
        loop = [case.gradients(case.f, sample(stacked, in_dims, b)) for b in range(3)]
        expected = [torch.stack(gs) for gs in zip(*loop, strict=True)]
        case.close(found, expected, f"per-sample gradients, samples of {what}", case.names)


def jvp_(case: Case) -> None:
    """<c, jvp along d> is <gradient of <c, f>, d>, for each argument alone and for all."""
    gradients, directions = case.gradients(case.f, case.xs), case.directions()
    f = case.functional(case.f)
    choices = [[i] for i in range(len(case.xs))] + ([list(range(len(case.xs)))] if len(case.xs) > 1 else [])
    for chosen in choices:
        tangents = tuple(d if i in chosen else torch.zeros_like(d) for i, d in enumerate(directions))
        found = jvp(f, tuple(case.xs), tangents)[1]
        expected = float(inner(gradients, tangents))
        allowed = tolerance(case) * (norm(gradients) * norm(tangents) + sum_of(case))
        name = case.names[chosen[0]] if len(chosen) == 1 else "all arguments"
        require(
            abs(float(found) - expected) <= allowed,
            f"{name}: the jvp is {float(found):.6g} and <gradient, direction> {expected:.6g}, {allowed:.3g} allowed",
        )


def jacrev_(case: Case) -> None:
    """Each row of torch.func.jacrev, which is vmap over backward, is a gradient."""
    functionals = [case.functional(case.f, seed) for seed in (0, 1, 2)]
    numbers = tuple(range(len(case.xs)))
    found = jacrev(lambda *xs: torch.stack([f(*xs) for f in functionals]), numbers)(*case.xs)
    rows = [case.gradients(case.f, case.xs, seed) for seed in (0, 1, 2)]
    case.close(found, [torch.stack(gs) for gs in zip(*rows, strict=True)], "jacrev", case.names)


# Second derivatives.


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


# Around it, and what it is given.


def checkpoint(case: Case) -> None:
    """Under rematerialisation (torch.utils.checkpoint) value and gradients are the same."""
    wrapped = remat(case.f)
    case.close(case.gradients(wrapped, case.xs), case.gradients(case.f, case.xs), "checkpointed", case.names)


def compile_(case: Case) -> None:
    """torch.compile makes one graph, with f's values and gradients, and another call with other values makes none."""
    graphs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(case.backend)(graph, inputs)

    # A fresh code object for each check: dynamo counts recompilations by it, and refuses the ninth.
    compiled = torch.compile(own_cache(case.f), fullgraph=True, backend=counting)
    for xs in (case.xs, [v[1] for v in case.batched()]):
        leaves = [x.detach().requires_grad_() for x in xs]
        with torch.enable_grad():
            out = floats(compiled(*case.arguments(leaves)))
            case.close([y.detach() for y in out], case.outputs(case.f, xs), "compiled")
            of_it = case.functional(lambda *_, out=out: out)(*xs)
            found = torch.autograd.grad(of_it, leaves, allow_unused=True, materialize_grads=True)
        case.close(found, case.gradients(case.f, xs), "compiled, the gradient", case.names)
    require(graphs == 1, f"a second call with the same shapes compiled again: {graphs} graphs")


def strides(case: Case) -> None:
    """Values and gradients are those of contiguous copies, each argument alone in other strides and all transposed."""
    tried: list[tuple[str, list[Tensor]]] = []
    for i, (x, name) in enumerate(zip(case.xs, case.names, strict=True)):
        tried += [(f"{name} {how}", [y if k == i else z for k, z in enumerate(case.xs)]) for how, y in layouts(x)]
    tried.append(("all arguments in other strides", [next(layouts(x))[1] for x in case.xs]))
    for what, xs in tried:
        copies = [x.contiguous().clone(memory_format=torch.contiguous_format) for x in xs]
        case.close(floats_of(case, case.f, xs), floats_of(case, case.f, copies), what)
        found, expected = case.gradients(case.f, xs), case.gradients(case.f, copies)
        case.close(found, expected, f"{what}, the gradient", case.names)


def dtypes(case: Case) -> None:
    """In each dtype f is as near to float64 as the reference in that dtype is, and returns the same dtypes."""
    for dtype in case.dtypes:
        value(case.in_dtype(dtype), f"in {dtype}, ")
        gradient(case.in_dtype(dtype), f"in {dtype}, ")


OP_LAWS = {
    "value": value,
    "gradient": gradient,
    "slope": slope,
    "each_gradient": each_gradient,
    "pure": pure,
    "func_grad": func_grad,
    "vmap": vmap_,
    "per_sample": per_sample,
    "jvp": jvp_,
    "jacrev": jacrev_,
    "double_backward": double_backward,
    "hessian_product": hessian_product,
    "checkpoint": checkpoint,
    "compile": compile_,
    "strides": strides,
    "dtypes": dtypes,
}


# Helpers.


def floats_of(case: Case, f: Function, xs: Floats) -> list[Tensor]:
    """f's outputs, without a graph."""
    with torch.no_grad():
        return case.outputs(f, xs)


def as_exact(case: Case, found: Floats, exact: Floats, same: Floats, what: str, names: list[str]) -> None:
    """AssertionError unless max|found - exact| <= 2 max|same - exact| + rounding of the largest, result by result."""
    require(len(found) == len(exact), f"{what}: {len(found)} floating tensors and not {len(exact)}")
    for x, y, z, name in zip(found, exact, same, names, strict=True):
        require(x.shape == y.shape, f"{what}, {name}: shape {tuple(x.shape)} and not {tuple(y.shape)}")
        require(x.dtype == z.dtype, f"{what}, {name}: {x.dtype} and not {z.dtype}")
        rtol = case.rtol if case.rtol is not None else rounding(x.dtype)
        allowed = 2 * largest([z.double() - y]) + rtol * largest(exact)
        within((x.double() - y).abs(), allowed, f"{what}, {name}")


def tolerance(case: Case) -> float:
    """The relative one of the least exact argument's dtype."""
    return case.rtol if case.rtol is not None else max(rounding(x.dtype) for x in case.xs)


def sum_of(case: Case) -> float:
    """The size of what the functional adds up: its rounding is relative to this, and not to a sum that cancels."""
    return sum(float(y.abs().double().sum()) for y in case.likes)


def sum_(terms: Iterable[Tensor]) -> Tensor:
    """Their sum as a tensor, also of one term."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def moved(xs: Floats, i: int, by: Tensor) -> list[Tensor]:
    """xs with `by` added to the i-th."""
    return [x + by if k == i else x for k, x in enumerate(xs)]


def sample(stacked: Floats, in_dims: tuple[int | None, ...], b: int) -> list[Tensor]:
    """The b-th of what vmap sees."""
    return [x if d is None else x.select(d, b) for x, d in zip(stacked, in_dims, strict=True)]


def batches(case: Case, last: bool = True) -> Iterator[tuple[str, list[Tensor], tuple[int | None, ...]]]:
    """(which arguments are batched, the arguments, in_dims): each alone, from its first axis and its last, and all."""
    values = case.batched()
    for i, name in enumerate(case.names):
        for dim in (0, -1) if last and case.xs[i].ndim else (0,):
            xs = [torch.stack(values[i], dim) if k == i else x for k, x in enumerate(case.xs)]
            yield f"{name}, axis {dim}", xs, tuple(dim if k == i else None for k in range(len(xs)))
    if len(values) > 1:
        yield "all arguments", [torch.stack(v) for v in values], (0,) * len(values)


def bend(case: Case) -> list[Tensor]:
    """The central difference of the curved functional's gradient along the directions."""
    directions, step = case.directions(), max(difference_step(x.dtype) for x in case.xs)
    ends = [
        case.gradients(case.f, [x + s * step * d for x, d in zip(case.xs, directions, strict=True)], curve=1.0)
        for s in (1, -1)
    ]
    found = [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)]
    require(largest(found) > 0, "the gradient does not change along the directions: nothing is compared")
    return found


def bends(case: Case, found: Floats, expected: Floats, what: str) -> None:
    """AssertionError unless two forms of the second derivative agree to the order h^2 of a central difference."""
    step = max(difference_step(x.dtype) for x in case.xs)
    allowed = 300 * step**2 * (largest(expected) + largest(case.gradients(case.f, case.xs, curve=1.0)))
    for x, y, name in zip(found, expected, case.names, strict=True):
        same_kind(x, y, f"{what}, {name}")
        within((x - y).abs().double(), allowed, f"{what}, {name}")


@contextlib.contextmanager
def torchs_own_warnings() -> Iterator[None]:
    """Without those of torch itself: its forward-mode formulas use what it deprecates, some have no batching rule, and
    dynamo makes an object of every autograd.Function that it traces."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
        warnings.filterwarnings("ignore", ".*Function'> should not be instantiated", DeprecationWarning)
        yield
