"""What the checks of models and losses compare by: tolerances, and derivatives of a scalar function of parameters.

Legend: p parameters, g gradient, d direction, h step.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import random, tree
from purelm.testing.laws import draw_like, inner, require
from purelm.transforms import grad
from purelm.tree import Tree

__all__ = [
    "Opened",
    "Tolerance",
    "check_jvp",
    "check_metrics",
    "check_per_sample",
    "check_slope",
    "close",
    "closeness",
    "detached",
    "gradient",
    "in_order",
    "opened",
    "others",
    "some_gradient",
    "tolerance_of",
]

Scalar = Callable[[Tree], Tensor]  # params -> 0-d


class Tolerance(NamedTuple):
    """|found - expected| <= atol scale + rtol |expected|."""

    rtol: float
    atol: float
    # atol is in units of the largest expected value, unless it was given: rounding is as large as the largest summand.
    relative: bool
    eps: float  # of the parameters' dtype, the coarsest of them


def tolerance_of(who: str, params: Tree, rtol: float | None, atol: float | None) -> Tolerance:
    """The tolerance of a check: the caller's, or eps^(2/3) of the parameters' dtype for both.

    Two thirds of the digits must agree (fp64: 4e-11, fp32: 2e-5, bf16: 4e-2): the other third is left to the order of
    sums, which differs between two ways to compute the same number. ValueError for one of two tolerances, a negative
    one, and params without a floating tensor.
    """
    dtypes = {x.dtype for x in tree.leaves(params) if tree.is_floating(x)}
    if not dtypes:
        raise ValueError(f"{who}: params must hold a floating tensor, got none among {len(tree.leaves(params))} leaves")
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    if rtol is None and atol is None:
        return Tolerance(eps ** (2 / 3), eps ** (2 / 3), True, eps)
    if rtol is None or atol is None or not (rtol >= 0 and atol >= 0):
        raise ValueError(f"{who}: rtol and atol must be given together, both at least 0; got {rtol} and {atol}")
    return Tolerance(rtol, atol, False, eps)


def close(found: Tree, expected: Tree, what: str, tolerance: Tolerance, axes: Sequence[str] = ()) -> None:
    """AssertionError, naming path and place, unless the trees have one structure and close values; NaN is never close.

    axes: what the axes of a lone tensor are called, to name the place: ("row", "position").
    """
    a, b = tree.structure(found), tree.structure(expected)
    require(a == b, f"{what} differ in structure: {a} and not {b}")
    scale = max((float(y.abs().max()) for y in tree.leaves(expected) if _compared(y)), default=0.0)
    for path, x, y in zip(tree.paths(expected), tree.leaves(found), tree.leaves(expected), strict=True):
        at = f" at {path}" if path else ""
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            require(type(x) is type(y) and x == y, f"{what} differ{at}: {x!r} and not {y!r}")
            continue
        require(x.shape == y.shape, f"{what} differ in shape{at}: {tuple(x.shape)} and not {tuple(y.shape)}")
        if not y.numel():
            continue
        limit = tolerance.atol * (scale if tolerance.relative else 1.0) + tolerance.rtol * y.detach().double().abs()
        apart = (x.detach().double() - y.detach().double()).abs()
        wrong = ~(apart <= limit)
        if bool(wrong.any()):
            # The largest difference is named, a NaN before any number.
            worst = int(torch.where(wrong, apart.nan_to_num(float("inf"), float("inf")), -1.0).argmax())
            place = _place(worst, y.shape, axes)
            u, v, d, most = (float(z.detach().reshape(-1)[worst]) for z in (x, y, apart, limit))
            raise AssertionError(
                f"{what} differ{at}{place}: {u:.6g} and not {v:.6g}, {d:.2g} apart where {most:.2g} is allowed "
                f"({int(wrong.sum())} of {wrong.numel()} elements differ)"
            )


def _compared(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() > 0 and not x.is_complex()


def _place(flat: int, shape: Sequence[int], axes: Sequence[str]) -> str:
    if not shape:
        return ""
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), tuple(shape))]
    if not axes:
        return f" in element {tuple(index)}"
    return " in " + ", ".join(f"{name} {i}" for name, i in zip(axes, index, strict=False))


def closeness(found: Tensor, expected: Tensor, tolerance: Tolerance) -> bool:
    """Whether `close` holds."""
    try:
        close(found, expected, "", tolerance)
    except AssertionError:
        return False
    return True


def detached(values: Tree) -> Tree:
    """The tree with tensors that share memory with its own and require no grad."""
    return tree.map(lambda x: x.detach() if isinstance(x, Tensor) else x, values)


def in_order(table: Iterable[str], laws: Iterable[str] | None) -> Iterable[str] | None:
    """The laws in the order of the table, whose first is "pure": a call before it may have left its marks already."""
    if laws is None or isinstance(laws, str):
        return laws
    order = {name: i for i, name in enumerate(table)}
    return sorted(laws, key=lambda name: order.get(name, len(order)))


class Opened(NamedTuple):
    """A tree as a list of its floating leaves, which torch.func can take (it takes no None and no integers)."""

    floats: list[Tensor]
    paths: list[str]
    closed: Callable[[Sequence[Tensor]], Tree]  # the tree with other floating leaves


def opened(params: Tree) -> Opened:
    """The floating leaves of params, their paths, and the function that puts others in their place."""
    flat, form = tree.flatten(params)
    paths = tree.paths(params)
    at = [i for i, x in enumerate(flat) if tree.is_floating(x)]

    def closed(xs: Sequence[Tensor]) -> Tree:
        new = list(flat)
        for i, x in zip(at, xs, strict=True):
            new[i] = x
        return tree.unflatten(form, new)

    return Opened([flat[i] for i in at], [paths[i] for i in at], closed)


def gradient(f: Scalar, params: Tree) -> dict[str, Tensor]:
    """path -> gradient of f, of each floating leaf of params."""
    return dict(zip(opened(params).paths, tree.leaves(grad(f)(params)), strict=True))


def some_gradient(f: Scalar, params: Tree, what: str = "the loss") -> dict[str, Tensor]:
    """`gradient`; AssertionError where it is not finite, or zero at all leaves, so that nothing could be compared."""
    g = gradient(f, params)
    bad = [path for path, x in g.items() if not bool(torch.isfinite(x).all())]
    require(not bad, f"the gradient of {what} is not finite at {', '.join(bad[:3])}")
    require(any(bool(x.any()) for x in g.values()), f"the gradient of {what} is zero at all parameters")
    return g


def _direction(params: Tree) -> list[Tensor]:
    """A direction, random and of norm 1 in each floating leaf, so that small leaves count as large ones do."""
    drawn = draw_like(opened(params).floats, seed=11)
    return [d / torch.linalg.vector_norm(d) if d.numel() else d for d in drawn]


def check_slope(f: Scalar, params: Tree, tolerance: Tolerance, what: str = "the loss") -> None:
    """<g, d> = (f(p + h d) - f(p - h d)) / 2h along a random direction d; AssertionError names the leaves that fail.

    The step h is eps^(1/3), where the quotient's errors h^2 and eps / h are alike, and eps^(1/3) / 8 if that fails: a
    kink (relu, a maximum) between p - h d and p + h d spoils the quotient of one step, and a wrong gradient is
    wrong at both. AssertionError where parameters are of 16 bits or less, whose sums p + h d are p.
    """
    eps = tolerance.eps
    require(
        eps < 1e-5,
        f"difference quotients of {what} need parameters in float32 or float64, got a dtype of eps {eps:.2g}",
    )
    g = list(some_gradient(f, params, what).values())
    d = _direction(params)
    leaves, norm = opened(params), float(tree.global_norm(g))

    def fault(chosen: Sequence[int]) -> str | None:
        """What differs along the part of d in the chosen leaves; None: nothing."""
        part = [x if i in chosen else torch.zeros_like(x) for i, x in enumerate(d)]
        slope = float(inner(g, part))
        for h in (eps ** (1 / 3), eps ** (1 / 3) / 8):
            after, before = (
                float(f(leaves.closed([p.detach() + s * x for p, x in zip(leaves.floats, part, strict=True)])).detach())
                for s in (h, -h)
            )
            quotient = (after - before) / (2 * h)
            # Half of the digits, of what |g| |d| could be; and the rounding of a few operations, divided by h.
            limit = eps**0.5 * norm * len(chosen) ** 0.5 + 4 * eps * max(abs(after), abs(before)) / h
            if not tolerance.relative:
                limit = tolerance.atol + tolerance.rtol * abs(quotient)
            if abs(slope - quotient) <= limit:
                return None
        return f"{slope:.6g} and not {quotient:.6g}, {abs(slope - quotient):.2g} apart where {limit:.2g} is allowed"

    if whole := fault(range(len(d))):
        wrong = [f"at {path} {text}" for i, path in enumerate(leaves.paths) if (text := fault([i]))]
        where = "; ".join(wrong[:3]) + (f"; and at {len(wrong) - 3} leaves more" if len(wrong) > 3 else "")
        raise AssertionError(f"gradients of {what} are not its slopes: {where or f'along all leaves {whole}'}")


def check_metrics(metrics: Any) -> None:
    """AssertionError unless metrics, of a loss of parameters that require grad, are a dict of detached 0-d tensors."""
    require(isinstance(metrics, Mapping), f"metrics must be a dict of tensors, got {type(metrics).__name__}")
    for name, x in metrics.items():
        told = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        require(isinstance(x, Tensor) and x.ndim == 0, f"metric {name} must be a 0-d tensor, got {told}")
        require(not x.requires_grad, f"metric {name} must be detached: it holds the graph of the loss")


def check_jvp(f: Scalar, params: Tree, tolerance: Tolerance, what: str = "the loss") -> None:
    """torch.func.jvp's slope along a random direction is <g, d>."""
    g = list(some_gradient(f, params, what).values())
    d = _direction(params)
    leaves = opened(params)
    with warnings.catch_warnings():
        # torch imports its table of forward formulas with a deprecated function of its own.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script", category=DeprecationWarning)
        slope = torch.func.jvp(lambda *xs: f(leaves.closed(xs)), tuple(leaves.floats), tuple(d))[1]
    expected, bound = inner(g, d), float(tree.global_norm(g)) * len(d) ** 0.5
    limit = tolerance.atol * (bound if tolerance.relative else 1.0) + tolerance.rtol * abs(float(expected))
    apart = abs(float(slope) - float(expected))
    require(
        apart <= limit,
        f"forward-mode slope of {what} is {float(slope):.6g} and <gradient, direction> {float(expected):.6g}, "
        f"{apart:.2g} apart where {limit:.2g} is allowed",
    )


def check_per_sample(
    f: Callable[[Tree, Tree], Tensor], params: Tree, batch: Tree, size: int, tolerance: Tolerance
) -> None:
    """torch.func.vmap of torch.func.grad over groups of `size` rows is a loop over these groups, sample by sample.

    f: (params, batch) -> 0-d. The batch's tensors are divided along axis 0, its 0-d and other leaves passed whole.
    """
    leaves = opened(params)
    flat, form = tree.flatten(batch)
    at = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.ndim]
    stacked = [flat[i].unflatten(0, (-1, size)) for i in at]

    def of_sample(xs: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        new = list(flat)
        for i, x in zip(at, rows, strict=True):
            new[i] = x
        return f(leaves.closed(xs), tree.unflatten(form, new))

    found = torch.func.vmap(torch.func.grad(of_sample), (None, 0))(leaves.floats, stacked)
    n = stacked[0].shape[0]
    seen = False
    for i in range(n):
        sample = [x[i] for x in stacked]

        def alone(p: Tree, sample: list[Tensor] = sample) -> Tensor:
            return of_sample(opened(p).floats, sample)

        expected = gradient(alone, params)
        seen = seen or any(bool(x.any()) for x in expected.values())
        what = f"gradients of {'row' if size == 1 else 'group'} {i} by vmap and alone"
        close(dict(zip(leaves.paths, [x[i] for x in found], strict=True)), expected, what, tolerance)
    require(seen, "the gradient is zero in all rows")


def others(key: random.Key, ids: Tensor, n: int) -> Tensor:
    """For each id another id below n: (id + r) mod n, r drawn from 1..n-1."""
    step = random.randint(key, tuple(ids.shape), 1, n).to(ids.device)
    return ((ids + step) % n).to(ids.dtype)
