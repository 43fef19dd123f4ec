"""What holds for optimizers under transformations of the update: vmap, compilation, writing in place, derivatives."""

from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.optim.base import apply_updates, step_of
from purelm.testing.laws import assert_trees_close, require, unchanged
from purelm.testing.optimizer_case import Case
from purelm.transforms import jit
from purelm.tree import Tree

__all__ = ["compiled", "differentiable", "step_", "vmapped"]


def vmapped(c: Case) -> None:
    """Oracle: a loop over three models, each with its own parameters, gradients and lr."""
    members = []
    for i in range(3):
        params, rate = c.drawn(10 + i), c.rate((i + 1) / 3)
        members.append((c.drawn(20 + i), c.begun(params), params, rate))
    expected = [c.optimizer.update(*member) for member in members]
    form, result = tree.structure(members[0]), tree.structure(expected[0])

    def one(*leaves: Tensor) -> tuple[Tensor, ...]:  # of leaves, since torch.vmap takes no None
        found, form_of_found = tree.flatten(c.optimizer.update(*tree.unflatten(form, leaves)))
        require(form_of_found == result, f"under vmap results have structure {form_of_found} and not {result}")
        return tuple(found)

    columns = [torch.stack(xs) for xs in zip(*map(tree.leaves, members), strict=True)]
    stacked = torch.vmap(one, randomness="different")(*columns)  # draws are for the law pure to forbid
    for i, right in enumerate(expected):
        found = tree.unflatten(result, [x[i] for x in stacked])
        _assert_close(c, found, right, f"updates and state of member {i} by vmap and by a loop")


def compiled(c: Case) -> None:
    """Oracle: the eager function. The arguments of a step are those that jit compiles a training step with."""
    import torch._dynamo  # takes as long to import as torch

    def step(params: Tree, state: Any, grads: Tree, lr: Tensor) -> tuple[Tree, Any]:
        updates, state = c.optimizer.update(grads, state, params, lr)
        return apply_updates(params, updates), state

    fast = jit(step, fullgraph=True, backend="aot_eager")
    found = right = (c.params, c.optimizer.init(c.params))
    for i in range(3):
        grads, lr = c.drawn(i), c.rate(1 / (i + 1))
        right = step(*right, grads, lr)
        try:
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                found = fast(*found, grads, lr)
        except torch._dynamo.exc.RecompileError as error:
            text = " ".join(str(error).split())
            raise AssertionError(f"step {i + 1}, with another lr, is compiled again: {text}") from error
        _assert_close(c, found, right, f"parameters and state after step {i + 1}, compiled and eager,")


def step_(c: Case) -> None:
    """Oracle: update and apply_updates. One gradient is None in the second step."""
    write = step_of(c.optimizer)
    assert write is not None
    copied = lambda t: tree.map(lambda x: x.detach().clone(), t)  # noqa: E731
    right = c.params, c.optimizer.init(c.params)
    mine = copied(right)
    for i in range(3):
        grads = c.drawn(i)
        if i == 1:
            first = next(path for path, p in zip(tree.paths(grads), tree.leaves(grads), strict=True) if p.numel())
            grads = tree.map_with_path(lambda path, g, first=first: None if path == first else g, grads)
        updates, state = c.optimizer.update(grads, right[1], right[0], c.lr)
        right = apply_updates(right[0], updates), state
        old = [x.data_ptr() for x in tree.leaves(mine)]
        with unchanged(grads):
            mine = write(grads, mine[1], mine[0], c.lr)
        _assert_close(c, mine, right, f"parameters and state after step {i + 1}, by step_ and by update,")
        for path, x, at in zip(tree.paths(mine), tree.leaves(mine), old, strict=True):
            require(x.data_ptr() == at, f"step_ returns a new tensor at {path}, and not the memory of the old one")


def differentiable(c: Case) -> None:
    """Oracle: central differences in fp64 of <r, new parameters>, r being drawn."""
    params = tree.cast(c.params, torch.float64)
    state, grads, toward, weights = c.begun(params), *(c.drawn(i, params) for i in (1, 2, 3))

    def value(lr: Tensor, move: Tensor) -> Tensor:
        moved = tree.map(lambda g, d: g + move * d, grads, toward)
        updates, _ = c.optimizer.update(moved, state, params, lr)
        (ps, us, ws), _ = tree.flatten_up_to(params, updates, weights)
        terms = [(w * (p + u)).sum() for p, u, w in zip(ps, us, ws, strict=True) if u is not None]
        require(bool(terms), "no parameter has an update")
        return torch.stack(terms).sum()

    at = [c.rate(dtype=torch.float64).requires_grad_(), c.rate(0.0, torch.float64).requires_grad_()]
    names = ("lr", "the gradients")[: 1 + c.smooth]
    result = value(*at)
    found = torch.autograd.grad(result, at, allow_unused=True) if result.requires_grad else (None, None)
    for i, (name, derivative) in enumerate(zip(names, found, strict=False)):
        # Differences are off by h^2 f''' / 6, and by 1e-16 |f| / h.
        h = 1e-3 * c.lr if i == 0 else 1e-5
        ends = [value(*[x.detach() + sign * h * (j == i) for j, x in enumerate(at)]) for sign in (1, -1)]
        difference = float((ends[0] - ends[1]) / (2 * h))
        advice = " (smooth=False leaves this out)" if i else ""
        zero = 1e-8 * abs(float(result.detach())) * (1 / c.lr if i == 0 else c.lr)
        require(abs(difference) > zero, f"new parameters do not depend on {name}, by differences{advice}")
        if derivative is None:
            raise AssertionError(f"autograd finds no path from new parameters to {name}{advice}")
        numbers = f"{float(derivative):.6g} by autograd and {difference:.6g} by differences"
        close = abs(float(derivative) - difference) <= 1e-4 * abs(difference)
        require(close, f"the derivative by {name} is {numbers}{advice}")


def _assert_close(c: Case, found: Tree, expected: Tree, what: str) -> None:
    """Within the check's tolerances, or a few roundings of a leaf's own dtype where that is coarser."""
    a, b = tree.structure(found), tree.structure(expected)
    require(a == b, f"{what} differ in structure: {a} and not {b}")
    for path, x, y in zip(tree.paths(expected), tree.leaves(found), tree.leaves(expected), strict=True):
        rounding = 4 * torch.finfo(y.dtype).eps if tree.is_floating(y) else 0.0
        assert_trees_close(x, y, f"{what} at {path},", rtol=max(c.rtol, rounding), atol=max(c.atol, rounding))
