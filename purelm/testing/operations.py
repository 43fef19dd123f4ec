"""Laws of an op: a function of tensors that must be right under every transform of torch."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from purelm.testing.laws import run_laws, without
from purelm.testing.operation_case import case_of
from purelm.testing.operation_laws import OP_LAWS, torchs_own_warnings

__all__ = ["OP_LAWS", "check_op"]

_OF_REFERENCE = ("value", "gradient", "dtypes")


def check_op(
    f: Callable[..., Any],
    args: Sequence[Any],
    *,
    reference: Callable[..., Any] | None = None,
    laws: Iterable[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    rtol: float | None = None,
    backend: str = "aot_eager",
) -> None:
    """LawError unless f(*args) obeys the laws of an op; ValueError where nothing could be compared.

    args may be trees; all floating tensors in them are differentiated, everything else is passed as it is. f returns a
    tensor or a tree of them; its floating tensors are compared, and all of them must be differentiable: of a function
    that also returns detached metrics, check `lambda *args: f(*args)[0]`.

    `OP_LAWS`, each run in the dtype and on the device of args (give float64 where f takes it: tolerances follow):

        value, gradient    f and its gradient equal the reference's in float64; only with a reference
        slope              <gradient, direction> equals a central difference, for each argument
        each_gradient      the gradient by one argument alone is that of all together
        pure               no argument is written to, no global generator used, and twice the same bits
        func_grad          torch.func.grad equals torch.autograd.grad
        vmap               equals a loop: each argument batched alone, at its first axis and its last, and all; nested
        per_sample         vmap(grad) equals a loop, with arguments of the sample's own and shared
        jvp                <c, jvp> equals <gradient, direction>
        jacrev             its rows are gradients
        double_backward    by torch.autograd, against differences of the gradient
        hessian_product    by torch.func, jvp of grad and grad of grad, against the same
        checkpoint         rematerialised, the same gradients
        compile            fullgraph, the same values and gradients, and no second graph for other values
        strides            transposed, sliced and expanded arguments give what contiguous copies give
        dtypes             value and gradient again, with the arguments in each of `dtypes`; only with a reference

    Args:
        reference: a plainly right form of f, of the same arguments, that takes float64.
        laws: names of those to run; None for all that the arguments allow.
        dtypes: of the law `dtypes`, which rounds all floating arguments to them.
        rtol: allowed difference relative to the largest value compared; None: 64 eps of the dtype in which sums are
            held (fp32 for half dtypes) and 2 eps of the one in which results are stored.
        backend: of torch.compile. "aot_eager" traces and differentiates ahead of time; "inductor" generates code too,
            which takes some seconds an op.

    >>> x, w = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3), torch.tensor([0.5, 1.0, 2.0]).double()
    >>> check_op(lambda x, w: torch.tanh(x * w), (x, w), laws=["slope", "vmap", "double_backward"])
    """
    if reference is None:
        laws = without(OP_LAWS, *_OF_REFERENCE) if laws is None else tuple(laws)
        for law in _OF_REFERENCE:
            if law in laws:
                raise ValueError(f"check_op: the law {law!r} needs reference=, a function of the same arguments")
    case = case_of(f, args, reference, dtypes, rtol, backend)
    with torchs_own_warnings():
        run_laws("check_op", OP_LAWS, laws, case)
