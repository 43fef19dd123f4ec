"""Laws of an op: a function of tensors that must be right under every transform of torch."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from purelm.testing.laws import LawError, run_laws, without
from purelm.testing.operation_case import case_of
from purelm.testing.operation_laws import OP_LAWS, torchs_own_warnings

__all__ = ["OP_LAWS", "check_op"]

_OF_REFERENCE = ("value", "gradient", "dtypes")
# what a message of torch says -> what to do
_ADVICE = {
    "setup_context": "torch.func differentiates neither a custom_op by its register_autograd nor an autograd.Function "
    "without setup_context. Write a Function with setup_context and generate_vmap_rule = True (or vmap), and call the "
    "custom ops, each with a register_vmap, in its forward and backward.",
    "jvp function": "Without forward mode: laws=without(OP_LAWS, 'jvp', 'hessian_product').",
    "forward AD": "Without forward mode: laws=without(OP_LAWS, 'jvp', 'hessian_product').",
    "BFloat16": "Without bfloat16: dtypes=[torch.float32].",
}


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

    args may be trees; all floating tensors in them are differentiated. vmap batches integer tensors too, except numbers
    and ascending vectors, which may be offsets; close over those that are no data: `lambda x: f(x, table)`. f returns a
    tensor or a tree of them; its floating tensors are compared, and all of them must be differentiable: of a function
    that also returns detached metrics, check `lambda *args: f(*args)[0]`.

    `OP_LAWS`, each run in the dtype and on the device of args (give float64 where f takes it: tolerances follow):

        value, gradient    f and its gradient equal the reference's in float64; only with a reference
        pure               no argument is written to, no global generator used, twice the same bits, nothing kept
        modes              the same value where gradients are required, under no_grad and in inference mode
        slope              <gradient, direction> equals a central difference, for each argument
        each_gradient      the gradient by one argument alone is that of all together
        upstream           upstream gradients in other strides, expanded or of one result alone; backward twice, and
                           after results were written to
        func_grad          torch.func.grad equals torch.autograd.grad
        vmap               equals a loop: each argument batched alone, at its first axis and its last, and all; nested
        per_sample         vmap(grad) equals a loop, with arguments of the sample's own and shared
        jvp                <c, jvp> equals <gradient, direction>; under vmap too
        jacrev             its rows are gradients
        double_backward    by torch.autograd, against differences of the gradient
        hessian_product    by torch.func, jvp of grad and grad of grad, against the same
        checkpoint         rematerialised, the same gradients
        compile            fullgraph, the same values and gradients, and no second graph for other values
        strides            transposed, sliced and expanded arguments give what contiguous copies give
        dtypes             value and gradient again, with the arguments in each of `dtypes`; only with a reference

    What f lacks on purpose is left out by name: `laws=without(OP_LAWS, "jvp", "hessian_product")`.

    f must be smooth near args: no kink (as of relu at 0) and no tie within eps^(1/3) of the largest value, 1e-5 in
    float64 and 1e-2 in fp32. Else take other args, or leave out "slope", "double_backward" and "hessian_product".
    f must be defined near args in all directions: of matrices that must be symmetric, check `lambda a: f(a + a.mT)`.
    Faults at sizes, values or lengths that are not in args are not found: check odd ones too, one element, ties.
    Of a torch.library.custom_op run torch.library.opcheck too: its schema, and its register_fake at other sizes.

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
    if reference is None and not isinstance(laws, str):
        laws = without(OP_LAWS, *_OF_REFERENCE) if laws is None else tuple(laws)
        for law in _OF_REFERENCE:
            if law in laws:
                raise ValueError(f"check_op: the law {law!r} needs reference=, a function of the same arguments")
    case = case_of(f, args, reference, dtypes, rtol, backend)
    with torchs_own_warnings():
        try:
            run_laws("check_op", OP_LAWS, laws, case)
        except LawError as error:
            raised = "\n".join(str(e) for e in error.failures.values())
            for advice in dict.fromkeys(a for said, a in _ADVICE.items() if said in raised):
                error.add_note(advice)
            raise
