"""check_op with arguments and results of all kinds: bounds, integers, trees, shapes, and what it refuses. Oracles as in
test_operations: right ops pass, and ops with one known fault break its law."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.ops import REFERENCE
from purelm.ops.rope import rope_tables
from purelm.testing import OP_LAWS, LawError, check_op, without
from tests.testing.faulty_operations import ARGS, Rows, Twice, draw, made, right, rows_of_contiguous_ids, slopes


def test_results_of_which_some_are_not_used():
    """Backward of a Function of two results, of which one has no upstream gradient."""
    laws = without(OP_LAWS, "value", "gradient", "dtypes", "jvp", "hessian_product")
    with pytest.raises(LawError, match=r"upstream gradient of result 0, the others absent, argument 0: ") as error:
        check_op(Twice.apply, ARGS, laws=laws)
    assert {*error.value.failures} == {"upstream"}


def test_integers_are_batched_and_compared():
    """A batching rule that forgets the ids' batch; an index in the result that is not the reference's."""
    args = (torch.tensor([3, 1, 1, 0]), draw(5, 3))
    laws = without(OP_LAWS, "value", "gradient", "dtypes", "jvp", "hessian_product")
    with pytest.raises(LawError, match=r"vmap over the integer arguments: .* are wrong") as error:
        check_op(Rows.apply, args, laws=laws)
    assert {*error.value.failures} == {"vmap"}
    check_op(lambda ids, w: torch.tanh(w[ids]), args)
    with pytest.raises(LawError, match=r"strides: argument 0 transposed: .* are wrong") as error:
        check_op(rows_of_contiguous_ids, (torch.tensor([[3, 1], [2, 0]]), args[1]))
    assert {*error.value.failures} == {"strides"}
    check_op(lambda ends, x: x[: int(ends[1])].sin(), (torch.tensor([0, 2, 4]), draw(4, 3)))  # offsets: not batched
    with pytest.raises(LawError, match="value: the integers in the result differ at 0: ") as error:
        check_op(lambda x: (x.sin(), x.argmin(-1)), ARGS[:1], reference=lambda x: (x.sin(), x.argmax(-1)))
    assert {*error.value.failures} == {"value"}


def test_arguments_with_bounds():
    """Above 1, near 0, in (0, 1), symmetric, far apart in size: the values that laws make of them keep the bounds."""
    spread = torch.tensor([1e-7, 1e-6, 2e-5], dtype=torch.float64)
    laws = without(OP_LAWS, "value", "gradient", "dtypes", "compile")
    check_op(torch.acosh, (draw(5).abs() + 1.1,), laws=laws)
    check_op(torch.log, (spread,), laws=laws)
    check_op(torch.atanh, (torch.tensor([0.5, 0.99, -0.999], dtype=torch.float64),), laws=laws)
    check_op(torch.logit, (torch.sigmoid(draw(4, 3)),), laws=laws)
    check_op(lambda a: torch.linalg.cholesky((a + a.mT) / 2), (torch.eye(3).double() * 3 + draw(3, 3) / 9,), laws=laws)
    check_op(torch.linalg.solve, (draw(3, 3), draw(3, 2)), laws=laws)  # expanded, it is singular
    check_op(lambda x, w: (1e6 * torch.tanh(x * w), 1e-6 * torch.sin(x)), ARGS, laws=laws)


def test_slope_in_fp32_finds_one_percent_of_one_element():
    """As on a GPU, where kernels take no float64."""

    def last_element(ctx, g):
        x, w = ctx.saved_tensors
        d = g * slopes(x, w)
        one = torch.ones_like(d)
        one[-1, -1] = 1.01
        return d * w * one, (d * x).sum(0)

    with pytest.raises(LawError, match="slope: argument 0: the gradient's slope is"):
        check_op(made(last_element), [x.float() for x in ARGS], laws=["slope"])


def test_messages_of_torch_come_with_advice():
    """What to write, or what to leave out."""

    class Old(torch.autograd.Function):
        """Without setup_context."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return g * 2 * ctx.saved_tensors[0]

    with pytest.raises(LawError, match=r"torch.func differentiates neither a custom_op by its register_autograd"):
        check_op(Old.apply, ARGS[:1], laws=["func_grad"])
    with pytest.raises(LawError, match=r"Without forward mode: laws=without\(OP_LAWS, 'jvp', 'hessian_product'\)"):
        check_op(Twice.apply, ARGS, laws=["jvp"])
    with pytest.raises(LawError, match=r"Without bfloat16: dtypes=\[torch.float32\]"):
        check_op(torch.linalg.inv, (draw(3, 3),), reference=torch.linalg.inv, laws=["dtypes"])


def test_detached_results_and_dropped_tangents_are_named():
    """What a slope or a jvp is wrong by most often."""
    with pytest.raises(LawError, match="detached is result 1: leave a metric out"):
        check_op(lambda x, w: (right(x, w), x.detach().square()), ARGS, laws=["slope"])
    op = torch.library.custom_op("purelm_test::tanh", torch.tanh, mutates_args=(), schema="(Tensor x) -> Tensor")
    op.register_autograd(lambda ctx, g: g * (1 - ctx.saved_tensors[0].tanh() ** 2), setup_context=keeps)
    with pytest.raises(LawError, match=r"the jvp is 0 and .*; an op of torch.library.custom_op drops tangents"):
        check_op(op, ARGS[:1], laws=["jvp"])


def keeps(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def test_trees_integers_options_and_several_results():
    """Arguments that are trees with absent leaves, ids and plain numbers; results in a dict."""

    def op(params, ids, factor, x):
        y = params["table"][ids] + factor * x @ params["layers"][0]
        return {"y": y, "ids": ids, "sum": (y.square().mean(), None)}

    params = {"table": draw(7, 4), "layers": [draw(2, 4), None]}
    args = (params, torch.tensor([[1, 0, 6]]), 0.5, draw(1, 3, 2))
    check_op(op, args, reference=op)
    with pytest.raises(LawError, match=r"gradient: the gradient, argument 0.table: ") as error:
        check_op(lambda p, i, f, x: op({**p, "table": p["table"].detach()}, i, f, x), args, reference=op)
    assert "each_gradient" not in error.value.failures


def test_an_op_of_the_library_in_each_dtype_of_arguments():
    """Tolerances follow the dtype: the same op passes with its arguments in fp32 and bf16, where CPUs have it."""
    tables = rope_tables(torch.arange(5), 6)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        args = (draw(2, 5, 3, 6).to(dtype),)
        check_op(lambda x: REFERENCE.rope(x, *tables), args, reference=lambda x: REFERENCE.rope(x, *tables))


@given(st.lists(st.integers(1, 5), max_size=3), st.integers(0, 99))
def test_any_shape(shape, seed):
    """Also 0-d; as a user's own property test would."""
    args = (draw(*shape, seed=seed), draw(*shape[-1:], seed=seed + 1))
    check_op(lambda x, w: torch.sin(x * w + x), args, laws=without(OP_LAWS, "value", "gradient", "dtypes", "compile"))


NOTHING = {
    "no tuple": (lambda: check_op(torch.sin, ARGS[0]), r"args must be a tuple of f's arguments, \(x,\) for one"),
    "no floats": (lambda: check_op(lambda i: i + 1, (torch.tensor([1]),)), "args hold no floating tensor"),
    "no result": (lambda: check_op(lambda x: x > 0, ARGS[:1]), "f returns no floating .*, but a Tensor; there is noth"),
    "no function": (lambda: check_op(None, ARGS[:1]), "f must be a function, got a NoneType"),
    "reference": (lambda: check_op(torch.sin, ARGS[:1], reference=ARGS[0]), "reference must be a function, got a Ten"),
    "not finite": (lambda: check_op(torch.tanh, (torch.tensor([-torch.inf]),)), "argument 0 is not finite; give a con"),
    "complex": (lambda: check_op(lambda x: (x, torch.complex(x, x)), ARGS[:1]), "complex tensors are not checked"),
    "one law": (lambda: check_op(torch.sin, ARGS[:1], laws="vmap"), r"laws must be a list .* pass \['vmap'\]"),
    "one dtype": (lambda: check_op(torch.sin, ARGS[:1], dtypes=torch.half), r"a list, got .*; pass \[torch.float16\]"),
    "empty": (lambda: check_op(torch.sin, (torch.zeros(0, 3),)), "f returns no floating tensor with elements"),
    "infinite": (lambda: check_op(torch.log, (torch.zeros(3),)), "f's result is not finite"),
    "no reference": (lambda: check_op(torch.sin, ARGS[:1], laws=["value"]), "the law 'value' needs reference="),
    "unknown": (lambda: check_op(torch.sin, ARGS[:1], laws=["vmapp"]), "laws must be some of value, gradient, "),
    "rtol": (lambda: check_op(torch.sin, ARGS[:1], rtol=0.0), "rtol must be above 0 and below 1, got 0"),
    "dtypes": (lambda: check_op(torch.sin, ARGS[:1], dtypes=[torch.int32]), "dtypes must be floating torch dtypes"),
    "backend": (lambda: check_op(torch.sin, ARGS[:1], backend="inducter"), "backend must be one of .*inducter"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_could_be_compared(name):
    call, message = NOTHING[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("op", "laws", "message"),
    [
        (lambda x: x.detach() * 2, ["slope"], "the result has no gradient by any argument: it was detached"),
        (lambda x: torch.ones_like(x) + 0 * x, ["slope"], "f does not change along any direction"),
        (lambda x: torch.ones_like(x) + 0 * x, ["gradient"], "gradient by every argument is 0: nothing is compared"),
        (lambda x: torch.ones_like(x) + 0 * x, ["double_backward"], "the gradient does not change along the"),
    ],
)
def test_constants_are_not_differentiable_enough(op, laws, message):
    """A law that compares nothing fails by name."""
    with pytest.raises(LawError, match=message):
        check_op(op, ARGS[:1], reference=op, laws=laws)
