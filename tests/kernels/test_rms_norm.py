"""rms_norm and add_rms_norm: the interpreted kernels against float64, and the ops under every transform.

Oracles: purelm.ops.rms_norm in float64, with the rule of rules.py; on the CPU, the reference itself, to the last bit.
"""

import math
from itertools import product

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from purelm.kernels import rms_norm as module
from purelm.kernels.rms_norm import add_rms_norm, rms_norm
from purelm.ops.rms_norm import rms_norm as reference
from tests.kernels import rules

# What dynamo does to trace a Function, and torch.compile's own import.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: see tests/gpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 7, 123), (1, 1, 1), (1, 33, 64), (2, 5, 768), (3, 1, 16), (1, 0, 8), (1, 2, 16400)]  # last: long rows


def numbers(seed, *shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def assert_as_exact(kernel, same_dtype, exact):
    """The rule, with the operations in a row: a square, sums over a row (in dw over rows), a root, three products."""
    rules.assert_as_exact(kernel, same_dtype, exact, roundings=5 + math.log2(DEPTH))


DEPTH = 16400  # of the longest sum


def by_group(x, weight, eps=0.1):  # not small: for D = 1 dx is a difference of equals but for eps
    return torch.stack([reference(a, b, eps) for a, b in zip(x, weight, strict=True)])


def gradients(f, xs, *upstream):
    """Gradients of sum_i <f(xs)_i, upstream_i>."""
    xs = [x.detach().requires_grad_() for x in xs]
    out = f(*xs)
    out = out if isinstance(out, tuple) else (out,)
    return torch.autograd.grad(out, xs, [u.to(y.dtype) for u, y in zip(upstream, out, strict=True)])


def cases(shapes):
    """Each shape in each dtype; long rows take the interpreter 5 s, and in 16 bits they go the way of fp32."""
    slow = {(shape, dtype) for shape in shapes for dtype in DTYPES[1:] if shape[-1] == DEPTH}
    return [
        pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=[pytest.mark.slow] if case in slow else [])
        for case in product(shapes, DTYPES)
    ]


@INTERPRETED
@pytest.mark.parametrize("shape,dtype", cases(SHAPES))
def test_kernels_are_as_exact_as_the_reference(shape, dtype):
    """Oracle: the reference in float64; weights of a group of their own."""
    from purelm.kernels import rms_norm_triton as kernels

    x, dy, w = numbers(0, shape, shape, (shape[0], shape[2]), dtype=dtype)
    y, _, rstd = kernels.forward(x, None, w, 0.1)
    assert_as_exact(y, by_group(x, w), by_group(x.double(), w.double()))
    dx, dw = kernels.backward(dy, None, x, w, rstd, True, True)
    same = gradients(by_group, (x, w), dy)
    exact = gradients(by_group, (x.double(), w.double()), dy.double())
    assert_as_exact(dx, same[0], exact[0])
    assert_as_exact(dw, same[1], exact[1])


@INTERPRETED
@pytest.mark.parametrize("shape,dtype", cases([(1, 7, 123), (2, 3, 64), (1, 1, 16400)]))
def test_fused_sum_is_as_exact_as_the_reference(shape, dtype):
    """Oracle: sum, then norm, in float64; the sum that is kept is rounded to the dtype first."""
    from purelm.kernels import rms_norm_triton as kernels

    def apart(x, r, w):
        total = x + r
        return by_group(total, w), total

    x, r, dy, dsum, w = numbers(1, shape, shape, shape, shape, (shape[0], shape[2]), dtype=dtype)
    y, total, rstd = kernels.forward(x, r, w, 0.1)
    wide = [t.double() for t in (x, r, w)]
    for got, same, exact in zip((y, total), apart(x, r, w), apart(*wide), strict=True):
        assert_as_exact(got, same, exact)
    dx, dw = kernels.backward(dy, dsum, total, w, rstd, True, True)
    same, exact = gradients(apart, (x, r, w), dy, dsum), gradients(apart, wide, dy.double(), dsum.double())
    assert_as_exact(dx, same[0], exact[0])
    assert_as_exact(dw, same[2], exact[2])


@INTERPRETED
def test_kernel_reads_views_and_skips_what_is_not_needed():
    """Oracle: the kernel on contiguous copies, bit for bit; and the same again run after run."""
    from purelm.kernels import rms_norm_triton as kernels

    (wide, w) = numbers(2, (2, 40, 48), (1, 16))
    for x in (wide[:, :, 16:32], wide[:, :32].mT[:, :, ::2], wide[:1, :1, :16].expand(2, 9, 16)):
        weight = w.expand(2, 16)
        y, _, rstd = kernels.forward(x, None, weight, 0.1)
        y2, _, rstd2 = kernels.forward(x.contiguous(), None, weight.contiguous(), 0.1)
        assert y.is_contiguous() and torch.equal(y, y2) and torch.equal(rstd, rstd2)
        dx, dw = kernels.backward(x, None, x, weight, rstd, True, True)
        again = kernels.backward(x.contiguous(), None, x.contiguous(), weight.contiguous(), rstd, True, True)
        assert torch.equal(dx, again[0]) and torch.equal(dw, again[1])
        only_dx, none = kernels.backward(x, None, x, weight, rstd, True, False)
        assert torch.equal(only_dx, dx) and none.numel() == 0
        none, only_dw = kernels.backward(x, None, x, weight, rstd, False, True)
        assert torch.equal(only_dw, dw) and none.numel() == 0
    y, _, rstd = kernels.forward(wide, None, None, 0.1)
    torch.testing.assert_close(y, reference(wide, eps=0.1))
    dx, none = kernels.backward(wide, None, wide, None, rstd, True, True)
    torch.testing.assert_close(dx, gradients(lambda t: reference(t, eps=0.1), (wide,), wide)[0])
    assert none.numel() == 0


@INTERPRETED
def test_weight_of_another_dtype():
    """Oracle: the reference in float64; fp32 weights with bf16 rows, as mixed precision has them."""
    from purelm.kernels import rms_norm_triton as kernels

    (x, dy), (w,) = numbers(3, (1, 9, 24), (1, 9, 24), dtype=torch.bfloat16), numbers(4, (1, 24))
    y, _, rstd = kernels.forward(x, None, w, 0.1)
    assert_as_exact(y, by_group(x, w), by_group(x.double(), w.double()))
    dx, dw = kernels.backward(dy, None, x, w, rstd, True, True)
    exact = gradients(by_group, (x.double(), w.double()), dy.double())
    same = gradients(by_group, (x, w), dy)
    assert dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    assert_as_exact(dx, same[0], exact[0])
    assert_as_exact(dw, same[1], exact[1])


# The public functions on the CPU.

OPS = {
    "rms_norm": (rms_norm, reference, [(2, 5, 8), (8,)]),
    "no_weight": (lambda x: rms_norm(x, eps=0.1), lambda x: reference(x, eps=0.1), [(2, 5, 8)]),
    "add": (
        lambda x, r, w: torch.cat(add_rms_norm(x, r, w)),
        lambda x, r, w: torch.cat((reference(x + r, w), x + r)),
        [(2, 5, 8), (2, 5, 8), (8,)],
    ),
    "same_twice": (
        lambda x: torch.cat(add_rms_norm(x, x)),
        lambda x: torch.cat((reference(x + x), x + x)),
        [(2, 5, 8)],
    ),
}


def scalar(f):
    return lambda *xs: f(*xs).sin().sum()  # sin: upstream gradients that differ from place to place


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients(name, dtype):
    """Oracle: the reference; values to the last bit, gradients to rounding."""
    mine, plain, shapes = OPS[name]
    xs = numbers(5, *shapes, dtype=dtype)
    assert torch.equal(mine(*xs), plain(*xs))
    if dtype in (torch.float32, torch.float64):
        a, b = (torch.autograd.grad(scalar(f)(*(t := [x.requires_grad_() for x in xs])), t) for f in (mine, plain))
        for g, h in zip(a, b, strict=True):
            torch.testing.assert_close(g, h)


@pytest.mark.parametrize("name", OPS)
def test_torch_func(name):
    """Oracle: the same transforms of the reference: grad, jacrev, vmap, per-sample gradients, nested vmap."""
    mine, plain, shapes = OPS[name]
    xs = numbers(6, *shapes, dtype=torch.float64)
    argnums = tuple(range(len(xs)))
    torch.testing.assert_close(grad(scalar(mine), argnums)(*xs), grad(scalar(plain), argnums)(*xs))
    torch.testing.assert_close(jacrev(mine, argnums)(*xs), jacrev(plain, argnums)(*xs))
    batched = numbers(7, *[(*s[:1], 3, *s[1:]) for s in shapes], dtype=torch.float64)
    per_sample = [vmap(f, in_dims=1) for f in (mine, plain)]
    torch.testing.assert_close(per_sample[0](*batched), per_sample[1](*batched))
    shared = (1, *(None for _ in xs[1:]))  # one weight for all samples, a gradient of it for each
    for in_dims, args in ((1, batched), (shared, (batched[0], *xs[1:]))):
        a, b = (vmap(grad(scalar(f), argnums), in_dims)(*args) for f in (mine, plain))
        torch.testing.assert_close(a, b)
    twice = numbers(8, *[(2, 3, *s) for s in shapes], dtype=torch.float64)
    a, b = (vmap(vmap(grad(scalar(f), argnums)))(*twice) for f in (mine, plain))
    torch.testing.assert_close(a, b)


def test_only_what_requires_a_gradient():
    """Oracle: the reference, with the weight or the rows alone differentiated."""
    x, w = numbers(9, (3, 8), (8,))
    for at in (0, 1):
        results = []
        for f in (rms_norm, reference):
            xs = [t.clone().requires_grad_(i == at) for i, t in enumerate((x, w))]
            results.append(torch.autograd.grad(f(*xs).sin().sum(), xs[at]))
        torch.testing.assert_close(*results)
    w.requires_grad_()
    y, total = add_rms_norm(x, x.clone().requires_grad_(), w)
    assert torch.autograd.grad(total.sum() + y.sum(), w)[0].shape == w.shape


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (1,), (7,), (2, 1, 1)], ids=str)
def test_small_and_empty(shape):
    """Oracle: the reference."""
    (x, w) = numbers(10, shape, shape[-1:])
    x.requires_grad_(), w.requires_grad_()
    assert torch.equal(rms_norm(x, w), reference(x, w))
    for g, h in zip(*(torch.autograd.grad(f(x, w).sum(), (x, w)) for f in (rms_norm, reference)), strict=True):
        torch.testing.assert_close(g, h)


def test_checkpoint():
    """Oracle: the same without."""
    x, w = (t.requires_grad_() for t in numbers(11, (3, 8), (8,)))
    plain = torch.autograd.grad(rms_norm(x, w).sin().sum(), (x, w))
    again = torch.autograd.grad(checkpoint(rms_norm, x, w, use_reentrant=False).sin().sum(), (x, w))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.compile
@pytest.mark.parametrize("name", OPS)
def test_compiled_equals_eager(name):
    """Oracle: eager, in one graph, values and gradients; repeated inputs, too."""
    f, _, shapes = OPS[name]
    xs = [x.requires_grad_() for x in numbers(12, *shapes)]
    torch._dynamo.reset()
    compiled = torch.compile(scalar(f), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*xs), scalar(f)(*xs))
    a, b = (torch.autograd.grad(g(*xs), xs) for g in (compiled, scalar(f)))
    for g, h in zip(a, b, strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("weighted", [True, False])
def test_opcheck(weighted):
    """Oracle: torch.library.opcheck: schema, fake tensors and their strides, ahead-of-time dispatch."""
    x, r, dy, w = numbers(13, (2, 5, 8), (2, 5, 8), (2, 5, 8), (2, 8))
    w, rstd = w if weighted else None, torch.ones(2, 5)
    torch.library.opcheck(module._fwd_op, (x, w, 1e-5))
    torch.library.opcheck(module._fwd_op, (x.mT.contiguous().mT, w, 1e-5))
    torch.library.opcheck(module._add_fwd_op, (x, r, w, 1e-5))
    for dsum in (None, r):
        for need in ((True, True), (False, True), (True, False)):
            torch.library.opcheck(module._bwd_op, (dy, dsum, x, w, rstd, *need))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((torch.ones(()),), "x must be floating with at least one axis"),
        ((torch.ones(3, dtype=torch.int64),), "x must be floating"),
        ((torch.ones(2, 3), torch.ones(2)), r"weight must be \(3,\) on cpu, got \(2,\) torch.float32 on cpu"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(*arguments)


def test_bad_residual():
    with pytest.raises(ValueError, match=r"residual must be like x, \(2, 3\) torch.float32 on cpu, got \(3,\)"):
        add_rms_norm(torch.ones(2, 3), torch.ones(3))
