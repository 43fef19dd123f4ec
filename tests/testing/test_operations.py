"""check_op finds each kind of wrong op. Oracle: ops with one known fault each, and the laws that this fault breaks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.function import once_differentiable

from purelm.ops import REFERENCE
from purelm.ops.rope import rope_tables
from purelm.testing import OP_LAWS, LawError, check_op, without


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


ARGS = (draw(4, 3), draw(3, seed=1))


def right(x, w):
    """The reference of all the ops below: nothing of it is linear, and its rows and columns differ."""
    return torch.tanh(x * w) * torch.arange(1.0, 4.0, dtype=x.dtype, device=x.device)


def slopes(x, w):
    """dy / d(x w)."""
    return (1 - torch.tanh(x * w) ** 2) * torch.arange(1.0, 4.0, dtype=x.dtype, device=x.device)


def made(backward=None, jvp=None, vmap=None):
    """`right` as an autograd.Function; what is not given is right."""

    class Op(torch.autograd.Function):
        generate_vmap_rule = vmap is None

        @staticmethod
        def forward(x, w):
            return right(x, w)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

    def plain_backward(ctx, g):
        x, w = ctx.saved_tensors
        d = g * slopes(x, w)
        return d * w, (d * x).reshape(-1, 3).sum(0)

    def plain_jvp(ctx, tx, tw):
        x, w = ctx.saved_tensors
        return slopes(x, w) * (tx * w + x * tw)

    Op.backward, Op.jvp = staticmethod(backward or plain_backward), staticmethod(jvp or plain_jvp)
    if vmap is not None:
        Op.vmap = staticmethod(vmap)
    # dynamo refuses a Function that has a jvp (torch 2.13).
    return lambda x, w: right(x, w) if torch.compiler.is_compiling() else Op.apply(x, w)


def test_right_ones_pass():
    """Every law, with a reference and without; backward and batching written by hand, and torch's own."""
    check_op(right, ARGS)
    check_op(right, ARGS, reference=right)
    check_op(made(), ARGS, reference=right)


AGAINST = ("value", "gradient", "dtypes")  # the laws that need a reference
DEAD = ("func_grad", "per_sample", "jvp", "jacrev", "double_backward", "hessian_product")


def wrong_factor(ctx, g):
    x, w = ctx.saved_tensors
    d = g * slopes(x, w)
    return d * w, 1.001 * (d * x).sum(0)


def wrong_if_alone(ctx, g):
    """Mistakes the needs of one argument for the other's."""
    x, w = ctx.saved_tensors
    d = g * slopes(x, w)
    return d * w, (d * x).reshape(-1, 3).sum(0) if ctx.needs_input_grad[0] else None


@once_differentiable
def first_only(ctx, g):
    x, w = ctx.saved_tensors
    d = g * slopes(x, w)
    return d * w, (d * x).reshape(-1, 3).sum(0)


def constant_factor(ctx, g):
    """dy/dx as a constant: the second derivative has no term of it."""
    x, w = ctx.saved_tensors
    d = g * slopes(x, w).detach()
    return d * w, (d * x).reshape(-1, 3).sum(0)


def reads_a_number(ctx, g):
    """`.item()` on the way: no batch of upstream gradients can pass."""
    x, w = ctx.saved_tensors
    d = g * slopes(x, w) * (1.0 if float(g.sum().item()) < 1e30 else 0.0)
    return d * w, (d * x).reshape(-1, 3).sum(0)


def doubled_tangent(ctx, tx, tw):
    x, w = ctx.saved_tensors
    return slopes(x, w) * (tx * w + 2 * x * tw)


def forgets_the_last_axis(info, in_dims, x, w):
    """A batching rule that takes every batch axis to be the first."""
    if in_dims[0] is not None and x.shape == (4, 3, info.batch_size):
        return right(x.movedim(-1, 0).flip(0), w), 0
    x = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
    w = w if in_dims[1] is None else w.movedim(in_dims[1], 0).unsqueeze(1)
    return right(x, w), 0


STATE = {"calls": 0}


def counts(x, w):
    STATE["calls"] += 1
    return right(x, w) + STATE["calls"] * x


def writes(x, w):
    if not torch._C._are_functorch_transforms_active() and not x.requires_grad and not torch.compiler.is_compiling():
        x.add_(1.0).sub_(1.0)
    return right(x, w)


def draws(x, w):
    torch.rand(1)
    return right(x, w)


def detached_under_func(x, w):
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return right(x, w.detach())
    return right(x, w)


def other_when_compiled(x, w):
    return right(x, w) * (1.01 if torch.compiler.is_compiling() else 1.0)


class Numbered:
    """A function with a number that changes at each call: to a compiler a constant, each time another."""

    def __init__(self):
        self.n = 0

    def __call__(self, x, w):
        self.n += 1
        return right(x, w) + 0.0 * self.n


def breaks_the_graph(x, w):
    print(end="")
    return right(x, w)


def once_contiguous(x, w):
    """Reads memory in the order of a contiguous tensor."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return right(x, w)
    return right(torch.as_strided(x, (4, 3), (3, 1)), w)


def in_half(x, w):
    """Sums of squares held in the dtype of the input."""
    total = torch.zeros_like(x[..., :1])
    for i in range(x.shape[-1]):
        total = total + x[..., i : i + 1] ** 2
    return x * torch.rsqrt(total / x.shape[-1] + 1e-5) * w


def widened(x, w):
    return right(x, w).float() if x.dtype == torch.bfloat16 else right(x, w)


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
    "draws": (draws, {"pure", "vmap", "per_sample"}, "pure: torch's global generator was used"),
    "counts": (counts, None, "pure: two results of the same call differ"),
    "func": (detached_under_func, {*DEAD} - {"double_backward"}, "func_grad: torch.func.grad, argument 1"),
    "compiled": (other_when_compiled, {"compile"}, "compiled: 12 of 12 elements"),
    "compiles again": (Numbered(), {"compile"}, "a second call with the same shapes compiled again: 2 graphs"),
    "graph break": (breaks_the_graph, {"compile"}, "compile: raised Unsupported"),
    "strides": (once_contiguous, {"strides", "vmap"}, "argument 0 transposed: "),
    "result dtype": (widened, {"dtypes"}, "in torch.bfloat16, the value, result 0: torch.float32 and not"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    op, broken, message = MUTANTS[name]
    with pytest.raises(LawError, match=message) as error:
        check_op(op, ARGS, reference=right)
    if broken is None:
        assert {"pure", "checkpoint"} <= {*error.value.failures}
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
    "no result": (lambda: check_op(lambda x: x > 0, ARGS[:1]), "f returns no floating tensor with elements"),
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
