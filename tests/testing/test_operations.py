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


def transformed():
    """Within torch.func, or in tracing."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def made(backward=None, jvp=None, vmap=None, saved=None):
    """`right` as an autograd.Function; what is not given is right. saved(x, w) is kept in the context besides."""

    class Op(torch.autograd.Function):
        generate_vmap_rule = vmap is None

        @staticmethod
        def forward(x, w):
            return right(x, w)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)
            ctx.set_materialize_grads(jvp is not forgets_absent_tangents)
            if saved is not None and not transformed():
                ctx.saved = saved(*inputs).detach().clone()

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


def forgets_absent_tangents(ctx, tx, tw):
    """Takes an argument without a tangent for a result without one."""
    x, w = ctx.saved_tensors
    return x * 0 if tx is None or tw is None else slopes(x, w) * (tx * w + x * tw)


def reads_a_tangent(ctx, tx, tw):
    x, w = ctx.saved_tensors
    return slopes(x, w) * (tx * w + x * tw) * (1.0 if float(tx.sum().item()) < 1e30 else 0.0)


def reads_memory_of_upstream(ctx, g):
    """A kernel that takes upstream gradients as contiguous: right for all but those of a sum or a transpose."""
    x, w = ctx.saved_tensors
    if not transformed() and not torch.is_grad_enabled() and not g.is_contiguous():
        memory = torch.as_strided(g, (g.untyped_storage().nbytes() // g.element_size(),), (1,), 0)
        g = memory.repeat(g.numel())[: g.numel()].view(g.shape)
    d = g * slopes(x, w)
    return d * w, (d * x).reshape(-1, 3).sum(0)


def writes_upstream(ctx, g):
    x, w = ctx.saved_tensors
    if not transformed() and not torch.is_grad_enabled() and g.is_contiguous():
        g.data.mul_(slopes(x, w))
        return g * w, (g * x).reshape(-1, 3).sum(0)
    d = g * slopes(x, w)
    return d * w, (d * x).reshape(-1, 3).sum(0)


def right_once(ctx, g):
    """Works in the memory that forward left to it, and leaves it spoilt to a second pass."""
    x, w = ctx.saved_tensors
    d = g * (slopes(x, w) if transformed() or torch.is_grad_enabled() else ctx.saved)
    if not transformed() and not torch.is_grad_enabled():
        ctx.saved.mul_(0.5)
    return d * w, (d * x).reshape(-1, 3).sum(0)


class Twice(torch.autograd.Function):
    """(right, 2 right); takes one absent upstream gradient for both."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return right(x, w), 2 * right(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g, h):
        x, w = ctx.saved_tensors
        d = slopes(x, w) * (0.0 if g is None or h is None else g + 2 * h)
        return d * w, (d * x).reshape(-1, 3).sum(0)


class Rows(torch.autograd.Function):
    """tanh(w[ids]), with a batching rule that takes the ids of the first sample for all."""

    @staticmethod
    def forward(ids, w):
        return torch.tanh(w[ids])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        ids, w = ctx.saved_tensors
        d = g * (1 - torch.tanh(w[ids]) ** 2)
        return None, torch.zeros_like(w).index_add(0, ids, d)

    @staticmethod
    def vmap(info, in_dims, ids, w):
        ids = ids if in_dims[0] is None else ids.select(in_dims[0], 0)
        w = w.expand(info.batch_size, *w.shape) if in_dims[1] is None else w.movedim(in_dims[1], 0)
        return torch.stack([Rows.apply(ids, sample) for sample in w]), 0


def wrong_for_one(info, in_dims, x, w):
    """A batching rule that drops an axis of size 1."""
    x = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
    w = w if in_dims[1] is None else w.movedim(in_dims[1], 0).unsqueeze(1)
    y = right(x, w)
    return (y[0] * 2, None) if info.batch_size == 1 else (y, 0)


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


BUFFERS = {}
REMEMBERED = {}


def one_buffer(x, w):
    """Returns the same memory from each call."""
    y = right(x, w)
    if transformed() or y.requires_grad:
        return y
    return BUFFERS.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)


def remembers(x, w):
    """Keeps what it made of w, by w's address; holds w, so that no other tensor is given the address."""
    if transformed() or x.requires_grad or w.requires_grad or torch.is_inference_mode_enabled():
        return right(x, w)
    return right(x, REMEMBERED.setdefault((w.data_ptr(), w.stride(), w.dtype), (w, w.clone()))[1])


def other_for_inference(x, w):
    return right(x, w) * (1.01 if torch.is_inference_mode_enabled() else 1.0)


def other_without_gradients(x, w):
    return right(x, w) + (0.0 if x.requires_grad or w.requires_grad or transformed() else 0.01)


def dense_last_axis(x, w):
    """Copies what is not dense in the last axis, and takes the rest to be contiguous."""
    if transformed() or x.stride(-1) != 1 or x.stride(0) == 0:
        return right(x, w)
    return right(torch.as_strided(x, x.shape, (x.shape[-1], 1)), w)


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
    "upstream strides": (
        made(reads_memory_of_upstream), {"upstream"}, "upstream: upstream gradient, transposed, argument 0: 12 of 12"
    ),
    "upstream written": (
        made(writes_upstream), {"upstream"}, "upstream: backward, of the upstream gradients: argument 0 was written to"
    ),
    "one pass": (
        made(right_once, saved=slopes), {"upstream"}, "upstream: a second backward pass through the same graph, argument 0"
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


def test_results_of_which_some_are_not_used():
    """Backward of a Function of two results, of which one has no upstream gradient."""
    laws = without(OP_LAWS, "value", "gradient", "dtypes", "jvp", "hessian_product")
    with pytest.raises(LawError, match=r"upstream gradient of result 0, the others absent, argument 0: 12 of 12") as error:
        check_op(Twice.apply, ARGS, laws=laws)
    assert {*error.value.failures} == {"upstream"}


def test_integers_are_batched_and_compared():
    """A batching rule that forgets the ids' batch; an index in the result that is not the reference's."""
    args = (torch.tensor([3, 1, 1, 0]), draw(5, 3))
    laws = without(OP_LAWS, "value", "gradient", "dtypes", "jvp", "hessian_product")
    with pytest.raises(LawError, match="vmap over the integer arguments: .* are wrong") as error:
        check_op(Rows.apply, args, laws=laws)
    assert {*error.value.failures} == {"vmap"}
    check_op(lambda ids, w: torch.tanh(w[ids]), args)
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


@pytest.mark.parametrize(
    ("op", "laws", "note"),
    [
        (torch.autograd.Function, ["func_grad"], "torch.func differentiates neither a custom_op by its register_autograd"),
        (Twice, ["jvp"], r"Without forward mode: laws=without\(OP_LAWS, 'jvp', 'hessian_product'\)"),
    ],
)
def test_messages_of_torch_come_with_advice(op, laws, note):
    class Old(torch.autograd.Function):
        """Without setup_context."""

        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g * w, (g * x).sum(0)

    with pytest.raises(LawError, match=note):
        check_op(Twice.apply if op is Twice else Old.apply, ARGS, laws=laws)


def test_detached_results_and_dropped_tangents_are_named():
    """What a slope or a jvp is wrong by most often."""
    with pytest.raises(LawError, match="detached is result 1: leave a metric out"):
        check_op(lambda x, w: (right(x, w), x.detach().square()), ARGS, laws=["slope"])
    op = torch.library.custom_op("purelm_test::tanh", torch.tanh, mutates_args=(), schema="(Tensor x) -> Tensor")
    op.register_autograd(lambda ctx, g: g * (1 - ctx.saved_tensors[0].tanh() ** 2), setup_context=keeps)
    with pytest.raises(LawError, match="the jvp is 0 and .*; an op of torch.library.custom_op drops tangents"):
        check_op(op, ARGS[:1], laws=["jvp"])


def keeps(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


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
    "no result": (lambda: check_op(lambda x: x > 0, ARGS[:1]), "f returns no floating .*, but a Tensor; there is noth"),
    "no function": (lambda: check_op(None, ARGS[:1]), "f must be a function, got a NoneType"),
    "reference": (lambda: check_op(torch.sin, ARGS[:1], reference=ARGS[0]), "reference must be a function, got a Ten"),
    "not finite": (lambda: check_op(torch.tanh, (torch.tensor([-torch.inf]),)), "argument 0 is not finite; give a con"),
    "complex": (lambda: check_op(lambda x: (x, torch.complex(x, x)), ARGS[:1]), "complex tensors are not checked"),
    "one law": (lambda: check_op(torch.sin, ARGS[:1], laws="vmap"), r"laws must be a list .* pass \['vmap'\]"),
    "one dtype": (lambda: check_op(torch.sin, ARGS[:1], dtypes=torch.half), r"dtypes must be a list.* pass \[torch.float16"),
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
