"""The laws of an op, each a function of a `Case`. `check_op` says what they are for."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.testing.operation_case import Case, floats_of
from purelm.testing.operation_first import each_gradient, gradient, modes, pure, slope, upstream, value
from purelm.testing.operation_second import double_backward, hessian_product
from purelm.testing.operation_transforms import checkpoint, compile_, func_grad, jacrev_, jvp_, per_sample, vmap_
from purelm.testing.operation_values import Floats, dense, finite, layouts

__all__ = ["OP_LAWS", "torchs_own_warnings"]


def strides(case: Case) -> None:
    """Values and gradients are those of contiguous copies, each argument alone in other strides, integers too, and all
    floating ones transposed."""
    tried: list[tuple[str, list[Tensor]]] = []
    for i, (x, name) in enumerate(zip(case.xs, case.names, strict=True)):
        tried += [(f"{name} {how}", [y if k == i else z for k, z in enumerate(case.xs)]) for how, y in layouts(x)]
    tried.append(("all arguments in other strides", [next(layouts(x))[1] for x in case.xs]))
    for what, xs in tried:
        copies = [dense(x) for x in xs]
        if "expanded" in what and not defined(case, copies):
            continue  # equal rows are other values: a matrix of them is singular
        case.close(floats_of(case, case.f, xs), floats_of(case, case.f, copies), what)
        found, expected = case.gradients(case.f, xs), case.gradients(case.f, copies)
        case.close(found, expected, f"{what}, the gradient", case.names)
    paths = tree.paths(case.args)
    for i in case.whole:
        for how, ids in layouts(case.flat[0][i]):
            if how == "one row expanded":
                continue  # other values: equal rows may be no lengths and no permutation
            f, g = case.given([ids], [i]), case.given([dense(ids)], [i])
            what = f"argument {paths[i]} {how}"
            case.close(floats_of(case, f, case.xs), floats_of(case, g, case.xs), what)
            found, expected = case.gradients(f, case.xs), case.gradients(g, case.xs)
            case.close(found, expected, f"{what}, the gradient", case.names)


def defined(case: Case, xs: Floats) -> bool:
    """Whether f and its gradient are finite at these values."""
    return case.defined(case.f, xs) and all(finite(g) for g in case.gradients(case.f, xs))


def dtypes(case: Case) -> None:
    """In each dtype f is as near to float64 as the reference in that dtype is, and returns the same dtypes."""
    for dtype in case.dtypes:
        value(case.in_dtype(dtype), f"in {dtype}, ")
        gradient(case.in_dtype(dtype), f"in {dtype}, ")


OP_LAWS = {
    "value": value,
    "gradient": gradient,
    "pure": pure,
    "modes": modes,
    "slope": slope,
    "each_gradient": each_gradient,
    "upstream": upstream,
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


@contextlib.contextmanager
def torchs_own_warnings() -> Iterator[None]:
    """Without those of torch itself: its forward-mode formulas use what it deprecates, some have no batching rule, and
    dynamo makes an object of every autograd.Function that it traces."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
        warnings.filterwarnings("ignore", ".*Function'> should not be instantiated", DeprecationWarning)
        # Those of a custom_op without register_vmap come from C++, one a call.
        warn: Any = torch._C._functorch
        warn._set_vmap_fallback_warning_enabled(False)
        try:
            yield
        finally:
            warn._set_vmap_fallback_warning_enabled(True)
