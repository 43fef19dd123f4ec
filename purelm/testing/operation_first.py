"""Laws of an op: its value, its first derivative, and what it does besides computing them."""

from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.testing.laws import assert_trees_equal, draw_like, inner, require, unchanged
from purelm.testing.operation_case import Case, floats_of, sum_of
from purelm.testing.operation_values import (
    Floats,
    dense,
    difference_step,
    finite,
    largest,
    layouts,
    norm,
    rounding,
    within,
)

__all__ = ["each_gradient", "gradient", "modes", "pure", "slope", "upstream", "value"]


def value(case: Case, where: str = "") -> None:
    """f is as near to the reference in float64 as the reference in f's dtype is, up to a factor of 2."""
    assert case.reference is not None
    found = floats_of(case, case.f, case.xs)
    exact = floats_of(case, case.reference, [x.double() for x in case.xs])
    same = floats_of(case, case.reference, case.xs)
    as_exact(case, found, exact, same, f"{where}the value", [f"result {i}" for i in range(len(exact))])
    if not where:  # in fewer digits two values may be equal, and another index the largest
        with torch.no_grad():
            whole, expected = (integers(g(*case.arguments(case.xs))) for g in (case.f, case.reference))
        assert_trees_equal(whole, expected, f"{where}the integers in the result")


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
            ends = [f(*moved(case.xs, i, s * step * d)).double() for s in (1, -1, 2, -2)]
        expected, wider = float(ends[0] - ends[1]) / (2 * step), float(ends[2] - ends[3]) / (4 * step)
        found = float(inner([g], [d]))
        # Rounding: eps / step = step^2 of what is summed, times 10, and some eps of the gradient's. Bend: with
        # twice the step a difference is off by 4 times as much, and differs from this one by 3 times its error.
        allowed = 10 * step**2 * (largest(ends) + sum_of(case)) + rounding(d.dtype) * norm([g]) * norm([d])
        allowed += abs(wider - expected)
        require(
            abs(found - expected) <= allowed,
            f"{name}: the gradient's slope is {found:.6g} and the central difference {expected:.6g}, "
            f"{allowed:.3g} of difference allowed{detached(case)}",
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


def upstream(case: Case) -> None:
    """Backward takes any upstream gradients: not contiguous, expanded as that of a sum is, or of one result alone; it
    writes to none of them; a second pass through the same graph gives the same, and one after results were written to
    gives the same or raises."""
    leaves = [x.detach().requires_grad_() for x in case.xs]
    with torch.enable_grad():
        ys = [y for y in case.outputs(case.f, leaves) if y.requires_grad]
    require(bool(ys), "the result has no gradient by any argument: it was detached on the way")

    def back(results: Floats, cs: Floats) -> list[Tensor]:
        return list(
            torch.autograd.grad(results, leaves, cs, retain_graph=True, allow_unused=True, materialize_grads=True)
        )

    cs = draw_like([y.detach() for y in ys], 0)
    first = draw_like([y.detach() for y in ys], 0)
    try:
        with unchanged(*cs):
            expected = back(ys, cs)
    except AssertionError as error:
        said = str(error).replace("argument", "that of result")
        raise AssertionError(f"in backward, of the upstream gradients {said}") from None
    require(largest(expected) > 0, "the gradient by every argument is 0: nothing is compared")
    case.close(back(ys, first), expected, "a second backward pass through the same graph", case.names)
    for i, c in enumerate(first):
        of = f"upstream gradient of result {i}" if len(first) > 1 else "upstream gradient"
        for how, other in [*layouts(c), ("one number expanded", c.reshape(-1)[:1].expand(c.numel()).view(c.shape))]:
            found, same = (back(ys, [v if k == i else z for k, z in enumerate(first)]) for v in (other, dense(other)))
            case.close(found, same, f"{of}, {how}", case.names)
        if len(first) > 1:
            zeros = [c if k == i else torch.zeros_like(z) for k, z in enumerate(first)]
            case.close(back([ys[i]], [c]), back(ys, zeros), f"{of}, the others absent", case.names)
    own = [x.clone().requires_grad_() for x in case.xs]
    try:
        with torch.enable_grad():
            written = [y.mul_(2.0) for y in case.outputs(case.f, own) if y.requires_grad]
        after = torch.autograd.grad(written, own, first, allow_unused=True, materialize_grads=True)
    except RuntimeError:
        return  # torch refuses: the result is needed in backward, or shares memory with an argument
    what = "backward after the results were doubled in place (save results by ctx.save_for_backward alone)"
    case.close(after, [2 * g for g in expected], what, case.names)


def modes(case: Case) -> None:
    """The value is the same where gradients are required, under no_grad, and in inference mode."""
    expected = case.likes
    leaves = [x.detach().requires_grad_() for x in case.xs]
    with torch.enable_grad():
        found = [y.detach() for y in case.outputs(case.f, leaves)]
    case.close(found, expected, "the value where gradients are required, against that under no_grad")
    with torch.inference_mode():
        case.close(case.outputs(case.f, case.xs), expected, "the value in inference mode")


def pure(case: Case) -> None:
    """f writes to no argument, forwards or backwards, uses no global generator, gives the same bits twice, and keeps
    nothing from call to call: no buffer of results, and no values of an argument by its address."""
    first = tree.leaves(case.f(*case.args))
    kept = [x.detach().clone() if isinstance(x, Tensor) else x for x in first]
    with unchanged(*case.args):
        second = tree.leaves(case.f(*case.args))
        case.gradients(case.f, case.xs)
    assert_trees_equal(second, kept, "two results of the same call")
    others = [v[1] for v in case.batched()]
    expected = [y.clone() for y in floats_of(case, case.f, [x.clone() for x in others])]
    assert_trees_equal(first, kept, "a result, before and after a call with other values (it shares their memory),")
    same = [dense(x) for x in case.xs]
    floats_of(case, case.f, same)
    for x, y in zip(same, others, strict=True):
        x.copy_(y)
    found = floats_of(case, case.f, same)
    case.close(found, expected, "a call after new values were written into the same tensors (f keeps old ones)")


# Helpers.


def as_exact(case: Case, found: Floats, exact: Floats, same: Floats, what: str, names: list[str]) -> None:
    """AssertionError unless max|found - exact| <= 2 max|same - exact| + rounding of the largest, result by result."""
    require(len(found) == len(exact), f"{what}: {len(found)} floating tensors and not {len(exact)}")
    for x, y, z, name in zip(found, exact, same, names, strict=True):
        require(x.shape == y.shape, f"{what}, {name}: shape {tuple(x.shape)} and not {tuple(y.shape)}")
        require(x.dtype == z.dtype, f"{what}, {name}: {x.dtype} and not {z.dtype}")
        rtol = case.rtol if case.rtol is not None else rounding(x.dtype)
        require(
            finite(y) and finite(z), f"{what}, {name}: the reference is not finite; give other arguments, or dtypes="
        )
        allowed = 2 * largest([z.double() - y]) + rtol * largest(exact)
        within((x.double() - y).abs(), allowed, f"{what}, {name}")


def moved(xs: Floats, i: int, by: Tensor) -> list[Tensor]:
    """xs with `by` added to the i-th."""
    return [x + by if k == i else x for k, x in enumerate(xs)]


def integers(out: Any) -> list[Tensor]:
    """The other tensors of a result."""
    return [x for x in tree.leaves(out) if isinstance(x, Tensor) and not x.is_floating_point()]


def detached(case: Case) -> str:
    """What to say of results without a graph, which may be why a slope is wrong."""
    leaves = [x.detach().requires_grad_() for x in case.xs]
    with torch.enable_grad():
        without = [i for i, y in enumerate(case.outputs(case.f, leaves)) if not y.requires_grad]
    said = ", ".join(map(str, without))
    return f"; detached is result {said}: leave a metric out, as by lambda *args: f(*args)[0]" if without else ""
