"""Laws of an op under transforms of first order, those of torch.func, torch.utils.checkpoint and torch.compile."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from purelm.testing.laws import inner, require
from purelm.testing.operation_case import Case, sum_of, tolerance
from purelm.testing.operation_values import Floats, floats, norm
from purelm.transforms import remat
from purelm.transforms.boundary import own_cache

__all__ = ["checkpoint", "compile_", "func_grad", "jacrev_", "jvp_", "per_sample", "vmap_"]

InDims = tuple[Sequence[int | None], Sequence[int | None]]
NO_TANGENT = "; an op of torch.library.custom_op drops tangents, and needs an autograd.Function with jvp around it"


def func_grad(case: Case) -> None:
    """torch.func.grad is torch.autograd.grad."""
    found = grad(case.functional(case.f), tuple(range(len(case.xs))))(*case.xs)
    case.close(found, case.gradients(case.f, case.xs), "torch.func.grad", case.names)


def vmap_(case: Case) -> None:
    """vmap is a loop: over each argument alone, from its first axis and its last, over all, over a batch of one, over
    integers too, and twice over all."""

    def run(xs: Floats, whole: Floats) -> list[Tensor]:
        return case.outputs(case.given(whole, case.data), xs)

    for what, stacked, whole, in_dims in batches(case):
        found = vmap(run, in_dims)(stacked, whole)
        loop = [run(*sample(stacked, whole, in_dims, b)) for b in range(samples(stacked, whole, in_dims))]
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
    numbers = tuple(range(len(case.xs)))

    def run(xs: Floats, whole: Floats) -> tuple[Tensor, ...]:
        return grad(case.functional(case.given(whole, case.data)), numbers)(*xs)

    for what, stacked, whole, in_dims in batches(case, last=False):
        found = vmap(run, in_dims)(stacked, whole)
        each = [sample(stacked, whole, in_dims, b) for b in range(samples(stacked, whole, in_dims))]
        loop = [case.gradients(case.given(ids, case.data), xs) for xs, ids in each]
        expected = [torch.stack(gs) for gs in zip(*loop, strict=True)]
        case.close(found, expected, f"per-sample gradients, samples of {what}", case.names)


def jvp_(case: Case) -> None:
    """<c, jvp along d> is <gradient of <c, f>, d>, for each argument alone and for all; under vmap over d too."""
    gradients, directions = case.gradients(case.f, case.xs), case.directions()
    f = case.functional(case.f)
    every = list(range(len(case.xs)))
    for chosen in [[i] for i in every] + ([every] if len(every) > 1 else []):

        def along(*tangents: Tensor, chosen: list[int] = chosen) -> Tensor:
            """The others are no dual numbers at all: not the same as to have a tangent of zeros."""

            def of(*some: Tensor) -> Tensor:
                xs = list(case.xs)
                for i, x in zip(chosen, some, strict=True):
                    xs[i] = x
                return f(*xs)

            return jvp(of, tuple(case.xs[i] for i in chosen), tangents)[1]

        tangents = [directions[i] for i in chosen]
        alone = along(*tangents)
        batch = vmap(along)(*(torch.stack([t, -2 * t]) for t in tangents))
        expected = float(inner([gradients[i] for i in chosen], tangents))
        allowed = tolerance(case) * (norm(gradients) * norm(tangents) + sum_of(case))
        name = case.names[chosen[0]] if len(chosen) == 1 else "all arguments"
        each = [("the jvp", alone, 1), ("vmap over jvp", batch[0], 1), ("vmap over jvp", batch[1], -2)]
        for what, found, times in each:
            require(
                abs(float(found) - times * expected) <= abs(times) * allowed,
                f"{name}: {what} is {float(found):.6g} and <gradient, direction> {times * expected:.6g}, "
                f"{abs(times) * allowed:.3g} allowed{NO_TANGENT if float(found) == 0 else ''}",
            )


def jacrev_(case: Case) -> None:
    """Each row of torch.func.jacrev, which is vmap over backward, is a gradient."""
    functionals = [case.functional(case.f, seed) for seed in (0, 1, 2)]
    numbers = tuple(range(len(case.xs)))
    found = jacrev(lambda *xs: torch.stack([f(*xs) for f in functionals]), numbers)(*case.xs)
    rows = [case.gradients(case.f, case.xs, seed) for seed in (0, 1, 2)]
    case.close(found, [torch.stack(gs) for gs in zip(*rows, strict=True)], "jacrev", case.names)


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


# Helpers.


def sample(stacked: Floats, whole: Floats, in_dims: InDims, b: int) -> tuple[list[Tensor], list[Tensor]]:
    """The b-th of what vmap sees."""
    xs, ids = (
        [x if d is None else x.select(d, b) for x, d in zip(them, dims, strict=True)]
        for them, dims in zip((stacked, whole), in_dims, strict=True)
    )
    return xs, ids


def samples(stacked: Floats, whole: Floats, in_dims: InDims) -> int:
    """How many vmap sees."""
    dims = zip([*stacked, *whole], [*in_dims[0], *in_dims[1]], strict=True)
    return next(x.shape[d] for x, d in dims if d is not None)


def batches(case: Case, last: bool = True) -> Iterator[tuple[str, list[Tensor], list[Tensor], InDims]]:
    """(which are batched, floating arguments, integer tensors, in_dims of both): each floating argument alone, from its
    first axis and its last, all, all in a batch of one, the integers, and all with the integers."""
    values, whole, n = case.batched(), [case.flat[0][i] for i in case.data], len(case.xs)
    every, none = [torch.stack(v) for v in values], [None for _ in whole]
    for i, name in enumerate(case.names):
        for dim in (0, -1) if last and case.xs[i].ndim else (0,):
            xs = [torch.stack(values[i], dim) if k == i else x for k, x in enumerate(case.xs)]
            yield f"{name}, axis {dim}", xs, whole, ([dim if k == i else None for k in range(n)], none)
    if n > 1:
        yield "all arguments", every, whole, ([0] * n, none)
    yield "all arguments, a batch of one", [x[1:2] for x in every], whole, ([0] * n, none)
    if whole:
        ids = [torch.stack(v) for v in case.data_batched()]
        yield "the integer arguments", case.xs, ids, ([None] * n, [0] * len(ids))
        yield "all arguments, integers too", every, ids, ([0] * n, [0] * len(ids))
