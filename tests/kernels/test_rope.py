"""rope and rope_qk: the interpreted kernel against float64, and the ops under every transform.

Oracles: purelm.ops.rope in float64, with the rule of rules.py; on the CPU, the reference itself.
"""

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from purelm.kernels import rope as module
from purelm.kernels.rope import rope, rope_qk
from purelm.ops.rope import rope as reference
from purelm.ops.rope import rope_tables
from tests.kernels.rules import assert_as_exact, largest

# What dynamo does to trace a Function, and torch.compile's own import.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled here: see tests/gpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["interleaved", "half"]


def numbers(seed, *shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def tables(T, K, B=None, dtype=torch.float32):
    positions = torch.arange(T) if B is None else torch.arange(T) + 5 * torch.arange(B)[:, None]
    return rope_tables(positions, K, dtype=dtype)


@INTERPRETED
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape,per_row",
    [
        ((2, 7, 3, 10), True),
        ((1, 1, 1, 2), False),
        ((3, 5, 4, 64), False),
        ((1, 3, 40, 128), True),
        ((2, 0, 1, 4), False),
    ],
    ids=str,
)
def test_kernel_is_as_exact_as_the_reference(shape, per_row, dtype, layout):
    """Oracle: the reference in float64, forward and backward (which is the kernel with the angles reversed)."""
    from purelm.kernels import rope_triton as kernels

    B, T, _, K = shape
    cos, sin = tables(T, K, B if per_row else None)
    op_tables = [t if per_row else t[None] for t in (cos, sin)]
    x, dy = numbers(0, shape, shape, dtype=dtype)
    y, none = kernels.turn(x, None, *op_tables, layout == "interleaved", False)
    exact_x = x.double().requires_grad_()
    exact = reference(exact_x, cos.double(), sin.double(), layout)
    assert none.numel() == 0 and y.is_contiguous()
    # Two products and their difference, which may be small.
    assert_as_exact(y, reference(x, cos, sin, layout), exact.detach(), roundings=3, scale=largest(x))
    dx, _ = kernels.turn(dy, None, *op_tables, layout == "interleaved", True)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    same_x = x.clone().requires_grad_()
    (same_dx,) = torch.autograd.grad(reference(same_x, cos, sin, layout), same_x, dy)
    assert_as_exact(dx, same_dx, exact_dx, roundings=3, scale=largest(dy))


@INTERPRETED
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("H,G", [(4, 4), (6, 2), (1, 3), (40, 1)])
def test_both_in_one_launch(H, G, layout):
    """Oracle: the kernel on each alone, bit for bit; views of one joint projection, tables of another dtype."""
    from purelm.kernels import rope_triton as kernels

    B, T, K = 2, 3, 12
    (qkv,) = numbers(1, (B, T, (H + 2 * G) * K))
    q, k, _ = (x.unflatten(-1, (-1, K)) for x in qkv.split([H * K, G * K, G * K], -1))
    cos, sin = tables(T, K, B)
    for flags in ((layout == "interleaved", False), (layout == "interleaved", True)):
        a, b = kernels.turn(q, k, cos, sin, *flags)
        assert torch.equal(a, kernels.turn(q.contiguous(), None, cos, sin, *flags)[0])
        assert torch.equal(b, kernels.turn(k.contiguous(), None, cos, sin, *flags)[0])
    b = kernels.turn(q, k, cos, sin, layout == "interleaved", False)[1]
    torch.testing.assert_close(b, reference(k, cos, sin, layout))
    narrow = [t.bfloat16() for t in (cos, sin)]
    a, _ = kernels.turn(q, None, *narrow, layout == "interleaved", False)
    torch.testing.assert_close(a, reference(q, *narrow, layout))


@INTERPRETED
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_reads_views(layout):
    """Oracle: the kernel on contiguous copies, bit for bit: axes in any order, gaps, repeats, a strided last axis."""
    from purelm.kernels import rope_triton as kernels

    (x,) = numbers(2, (3, 4, 5, 8))
    cos, sin = (t[None] for t in tables(4, 8))
    views = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.permute(2, 1, 0, 3),
        x[:1].expand(3, 4, 5, 8),
        x[:, :, ::2],
        x.mT.contiguous().mT,
        x.flip(1)[:, :, :, :],
    ]
    for view in views:
        y, _ = kernels.turn(view, None, cos, sin, layout == "interleaved", False)
        assert torch.equal(y, kernels.turn(view.contiguous(), None, cos, sin, layout == "interleaved", False)[0])
        assert y.is_contiguous()
    wide = [torch.stack((t, t), -1).flatten(-2)[..., ::2] for t in (cos, sin)]
    y = kernels.turn(x, None, *wide, layout == "interleaved", False)[0]
    assert torch.equal(y, kernels.turn(x, None, cos, sin, layout == "interleaved", False)[0])


# The public functions on the CPU.

COS, SIN = tables(4, 6, dtype=torch.float64)
ROW_COS, ROW_SIN = tables(4, 6, 2, dtype=torch.float64)


def both(f):
    return lambda q, k, cos, sin, layout: tuple(f(x, cos, sin, layout) for x in (q, k))


def flat(f):
    return lambda *xs: torch.cat([y.flatten() for y in f(*xs)])


OPS = {  # name -> (kernel's, reference's, shapes); x is (B, T, H, K) = (2, 4, 3, 6)
    "rope": (
        lambda x: rope(x, COS.to(x.dtype), SIN.to(x.dtype)),
        lambda x: reference(x, COS.to(x.dtype), SIN.to(x.dtype)),
        [(2, 4, 3, 6)],
    ),
    "rows_half": (
        lambda x: rope(x, ROW_COS.to(x.dtype), ROW_SIN.to(x.dtype), "half"),
        lambda x: reference(x, ROW_COS.to(x.dtype), ROW_SIN.to(x.dtype), "half"),
        [(2, 4, 3, 6)],
    ),
    "qk": (
        flat(lambda q, k: rope_qk(q, k, ROW_COS.to(q.dtype), ROW_SIN.to(q.dtype), "half")),
        flat(lambda q, k: both(reference)(q, k, ROW_COS.to(q.dtype), ROW_SIN.to(q.dtype), "half")),
        [(2, 4, 3, 6), (2, 4, 1, 6)],
    ),
    "twice": (
        flat(lambda x: rope_qk(x, x, COS.to(x.dtype), SIN.to(x.dtype))),
        flat(lambda x: both(reference)(x, x, COS.to(x.dtype), SIN.to(x.dtype), "interleaved")),
        [(2, 4, 3, 6)],
    ),
}


def scalar(f):
    return lambda *xs: f(*xs).sin().sum()  # sin: upstream gradients that differ from place to place


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients(name, dtype):
    """Oracle: the reference; values to the last bit, gradients to rounding."""
    mine, plain, shapes = OPS[name]
    xs = numbers(3, *shapes, dtype=dtype)
    assert torch.equal(mine(*xs), plain(*xs))
    if dtype in (torch.float32, torch.float64):
        leaves = [x.requires_grad_() for x in xs]
        a, b = (torch.autograd.grad(scalar(f)(*leaves), leaves) for f in (mine, plain))
        for g, h in zip(a, b, strict=True):
            torch.testing.assert_close(g, h)


@pytest.mark.parametrize("name", OPS)
def test_torch_func(name):
    """Oracle: the same transforms of the reference: grad, jacrev, vmap, per-sample gradients, nested vmap."""
    mine, plain, shapes = OPS[name]
    xs = numbers(4, *shapes, dtype=torch.float64)
    argnums = tuple(range(len(xs)))
    torch.testing.assert_close(grad(scalar(mine), argnums)(*xs), grad(scalar(plain), argnums)(*xs))
    torch.testing.assert_close(jacrev(mine, argnums)(*xs), jacrev(plain, argnums)(*xs))
    batched = numbers(5, *[(*s[:2], 5, *s[2:]) for s in shapes], dtype=torch.float64)
    a, b = (vmap(grad(scalar(f), argnums), 2)(*batched) for f in (mine, plain))
    torch.testing.assert_close(a, b)
    twice = numbers(6, *[(2, 3, *s) for s in shapes], dtype=torch.float64)
    a, b = (vmap(vmap(f))(*twice) for f in (mine, plain))
    torch.testing.assert_close(a, b)
    if len(xs) == 2:  # one k for all samples
        a, b = (vmap(grad(scalar(f), argnums), (2, None))(batched[0], xs[1]) for f in (mine, plain))
        torch.testing.assert_close(a, b)


def test_vmap_over_tables():
    """Oracle: the reference; tables of each sample, of shapes (T, J) and (B, T, J), with x shared or not."""
    (x,) = numbers(7, (3, 2, 4, 3, 6), dtype=torch.float64)
    for cos, sin in (tables(4, 6, 3, torch.float64), [t.expand(3, 2, 4, 3) for t in tables(4, 6, 2, torch.float64)]):
        for in_dims, args in (
            ((0, 0, 0), (x, cos, sin)),
            ((None, 0, 0), (x[0], cos, sin)),
            ((0, None, 0), (x, cos[0], sin)),
        ):
            a, b = (vmap(f, in_dims)(*args) for f in (rope, reference))
            torch.testing.assert_close(a, b)


def test_only_what_requires_a_gradient():
    """Oracle: the reference, with q or k alone differentiated."""
    xs = numbers(8, (2, 4, 3, 6), (2, 4, 1, 6), dtype=torch.float64)
    for at in (0, 1):
        q, k = (x.clone().requires_grad_(i == at) for i, x in enumerate(xs))
        results = [
            torch.autograd.grad(sum(y.sin().sum() for y in f(q, k, COS, SIN, "half")), (q, k)[at])[0]
            for f in (rope_qk, both(reference))
        ]
        torch.testing.assert_close(*results)


def test_keeps_nothing_but_the_tables():
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(x, COS, SIN)
    assert [t.untyped_storage().data_ptr() for t in saved] == [t.untyped_storage().data_ptr() for t in (COS, SIN)]


def test_checkpoint():
    """Oracle: the same without."""
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    f = scalar(OPS["rope"][0])
    (plain,), (again,) = (torch.autograd.grad(y, x) for y in (f(x), checkpoint(f, x, use_reentrant=False)))
    assert torch.equal(plain, again)


@pytest.mark.compile
@pytest.mark.parametrize("name", OPS)
def test_compiled_equals_eager(name):
    """Oracle: eager, in one graph, values and gradients; repeated inputs, too."""
    f, _, shapes = OPS[name]
    xs = [x.requires_grad_() for x in numbers(9, *shapes)]
    torch._dynamo.reset()
    compiled = torch.compile(scalar(f), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*xs), scalar(f)(*xs))
    for g, h in zip(torch.autograd.grad(compiled(*xs), xs), torch.autograd.grad(scalar(f)(*xs), xs), strict=True):
        torch.testing.assert_close(g, h)


def test_opcheck():
    """Oracle: torch.library.opcheck: schema, fake tensors and their strides, ahead-of-time dispatch."""
    q, k = numbers(10, (2, 4, 3, 6), (2, 4, 1, 6))
    shared, rows = [t[None].float() for t in (COS, SIN)], [t.float() for t in (ROW_COS, ROW_SIN)]
    for x in (q, q.mT.contiguous().mT, q[:, :, :1].expand(2, 4, 3, 6)):
        torch.library.opcheck(module._rope_op, (x, *shared, True, False))
    torch.library.opcheck(module._rope_op, (q, *rows, False, True))
    torch.library.opcheck(module._rope_qk_op, (q, k, *rows, True, True))


def test_tables_have_no_gradient_and_say_so():
    x, cos = torch.ones(2, 4, 3, 6, dtype=torch.float64), COS.clone().requires_grad_()
    with pytest.raises(ValueError, match="cos requires a gradient, which the kernel does not give"):
        rope(x, cos, SIN)
    with pytest.raises(ValueError, match="sin requires a gradient"):
        grad(lambda s: rope_qk(x, x, COS, s)[0].sum())(SIN)


@pytest.mark.parametrize(
    "x,cos,layout,message",
    [
        (torch.ones(2, 4, 6), COS, "half", r"x must be \(..., T, H, K\) .*, got x \(2, 4, 6\)"),
        (torch.ones(2, 4, 3, 7), COS, "half", "even K"),
        (torch.ones(2, 4, 3, 6).long(), COS, "half", "x must be floating"),
        (torch.ones(2, 5, 3, 6), COS, "half", r"cos must be \(5, 3\) or \(2, 5, 3\), got \(4, 3\)"),
        (torch.ones(2, 4, 3, 6), COS.expand(3, 4, 3), "half", "cos must be"),
        (torch.ones(2, 4, 3, 6), COS, "halves", "layout must be one of interleaved, half, got 'halves'"),
    ],
)
def test_bad_arguments(x, cos, layout, message):
    with pytest.raises(ValueError, match=message):
        rope(x, cos, cos, layout)


def test_bad_pair():
    with pytest.raises(ValueError, match=r"k must have q's shape but for axis 2, \(2, 4, 3, 6\), got \(1, 4, 3, 6\)"):
        rope_qk(torch.ones(2, 4, 3, 6), torch.ones(1, 4, 3, 6), COS, SIN)
