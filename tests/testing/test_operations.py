"""check_op finds each kind of wrong op. Oracle: ops with one known fault each, and the laws that this fault breaks."""

import pytest

from purelm.ops import REFERENCE
from purelm.testing import OP_LAWS, LawError, check_op, without
from tests.testing.faulty_operations import (
    ARGS,
    Numbered,
    breaks_the_graph,
    constant_factor,
    counts,
    dense_last_axis,
    detached_under_func,
    doubled_tangent,
    draw,
    draws,
    first_only,
    forgets_absent_tangents,
    forgets_the_last_axis,
    in_half,
    made,
    once_contiguous,
    one_buffer,
    other_for_inference,
    other_when_compiled,
    other_without_gradients,
    reads_a_number,
    reads_a_tangent,
    reads_memory_of_upstream,
    remembers,
    right,
    right_once,
    slopes,
    slopes_of_result,
    widened,
    writes,
    writes_upstream,
    wrong_factor,
    wrong_for_one,
    wrong_if_alone,
)


def test_right_ones_pass():
    """Every law, with a reference and without; backward and batching written by hand, and torch's own."""
    check_op(right, ARGS)
    check_op(right, ARGS, reference=right)
    check_op(made(), ARGS, reference=right)


AGAINST = ("value", "gradient", "dtypes")  # the laws that need a reference
DEAD = ("func_grad", "per_sample", "jvp", "jacrev", "double_backward", "hessian_product")


# name -> (op, the laws that it breaks, a message of the first)
MUTANTS = {
    "constant": (lambda x, w: right(x, w) + 1e-6, {"value"}, "value: the value, result 0: 12 of 12 elements are wrong"),
    "shape": (lambda x, w: right(x, w)[None], {*AGAINST}, r"result 0: shape \(1, 4, 3\) and not \(4, 3\)"),
    "two results": (lambda x, w: (right(x, w), x * 0), {*AGAINST}, "the value: 2 floating tensors and not 1"),
    "gradient": (
        made(wrong_factor), {"gradient", "slope", "jvp", "double_backward", "hessian_product", "compile", "dtypes"},
        "gradient: the gradient, argument 1: 3 of 3",
    ),
    "alone": (made(wrong_if_alone), {"each_gradient"}, "argument 1: 3 of 3 elements are wrong"),
    "first derivatives alone": (made(first_only), {"double_backward", "hessian_product"}, "double_backward: "),
    "second derivative": (
        made(constant_factor), {"double_backward", "hessian_product"}, "double backward, argument 0: 12 of 12"
    ),
    "number": (made(reads_a_number), {"per_sample", "jacrev"}, "raised RuntimeError: vmap: It looks like"),
    "jvp": (made(jvp=doubled_tangent), {"jvp", "hessian_product"}, "argument 1: the jvp is"),
    "vmap": (made(vmap=forgets_the_last_axis), {"vmap"}, "vmap over argument 0, axis -1: "),
    "writes": (writes, {"pure", "compile", "strides"}, "pure: argument 0 was written to"),
    "draws": (draws, {"pure", "vmap", "per_sample", "jvp"}, "pure: torch's global generator was used"),
    "counts": (counts, None, "pure: two results of the same call differ"),
    "func": (detached_under_func, {*DEAD} - {"double_backward"}, "func_grad: torch.func.grad, argument 1"),
    "upstream strides": (
        made(reads_memory_of_upstream), {"upstream"}, "upstream: upstream gradient, transposed, argument 0: 10 of 12"
    ),
    "upstream written": (
        made(writes_upstream), {"upstream"}, "in backward, of the upstream gradients that of result 0 was written to"
    ),
    "one pass": (
        made(right_once, saved=lambda x, w, y: slopes(x, w).detach()), {"upstream"}, "a second backward pass through"
    ),
    "result written": (
        made(slopes_of_result, saved=lambda x, w, y: y.detach()), {"upstream"}, "after the results were doubled"
    ),
    "absent tangent": (made(jvp=forgets_absent_tangents), {"jvp"}, "jvp: argument 0: the jvp is 0 and"),
    "tangent": (made(jvp=reads_a_tangent), {"jvp"}, "jvp: raised RuntimeError: vmap: It looks like"),
    "batch of one": (made(vmap=wrong_for_one), {"vmap"}, "vmap over all arguments, a batch of one: 12 of 12"),
    "buffer": (one_buffer, None, "pure: a result, before and after a call with other values"),
    "remembers": (remembers, {"pure"}, "pure: a call after new values were written into the same tensors"),
    "inference": (other_for_inference, {"modes"}, "modes: the value in inference mode: 12 of 12"),
    "no gradients": (other_without_gradients, None, "modes: the value where gradients are required"),
    "rows": (dense_last_axis, {"strides"}, "strides: argument 0 columns of a wider tensor: "),
    "compiled": (other_when_compiled, {"compile"}, "compiled: 12 of 12 elements"),
    "compiles again": (Numbered(), {"compile"}, "a second call with the same shapes compiled again: 2 graphs"),
    "graph break": (breaks_the_graph, {"compile"}, "compile: raised Unsupported"),
    "strides": (once_contiguous, {"strides", "vmap"}, "argument 0 transposed: "),
    "result dtype": (widened, {"dtypes"}, "in torch.bfloat16, the value, result 0: torch.float32 and not"),
}  # fmt: skip


# Of mutants that break much, and not the same from run to run: what they break at least.
NAMED = {"counts": {"pure", "checkpoint"}, "buffer": {"pure"}, "no gradients": {"modes", "value"}}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    op, broken, message = MUTANTS[name]
    with pytest.raises(LawError, match=message) as error:
        check_op(op, ARGS, reference=right)
    if broken is None:
        assert NAMED[name] <= {*error.value.failures}
    else:
        assert {*error.value.failures} == broken, error.value
        check_op(op, ARGS, reference=right, laws=without(OP_LAWS, *broken))


def test_every_law_has_a_mutant():
    assert {*OP_LAWS} == {"dtypes", "checkpoint"}.union(*(broken or () for _, broken, _ in MUTANTS.values()))


def test_sums_held_in_half_are_found():
    """In bf16, 512 squares one after the other: right in the dtype of the arguments, wrong in `dtypes` alone."""
    args = (draw(3, 512), draw(512))
    check_op(REFERENCE.rms_norm, args, reference=REFERENCE.rms_norm, laws=["value", "gradient", "dtypes"])
    with pytest.raises(LawError, match=r"dtypes: in torch.bfloat16, the value, result 0: ") as error:
        check_op(in_half, args, reference=REFERENCE.rms_norm, laws=["value", "gradient", "dtypes"])
    assert {*error.value.failures} == {"dtypes"}
