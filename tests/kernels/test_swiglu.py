"""swiglu: the interpreted kernels against float64, and the op under every transform.

Oracles: purelm.ops.glu.swiglu in float64, with the rule of rules.py; on the CPU, the reference itself.
"""

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from purelm.kernels import swiglu as module
from purelm.kernels.swiglu import swiglu
from purelm.ops.glu import swiglu as reference
from tests.kernels.rules import assert_as_exact, largest

# What dynamo does to trace a Function, and torch.compile's own import.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: see tests/gpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(seed, *shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype) for s in shapes]


def gradients(f, xs, dy):
    xs = [x.detach().requires_grad_() for x in xs]
    return torch.autograd.grad(f(*xs), xs, dy)


@INTERPRETED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 123), (3, 0), (2, 3, 1024), (4096,), (4097,)], ids=str)
def test_kernels_are_as_exact_as_the_reference(shape, dtype):
    """Oracle: the reference in float64."""
    from purelm.kernels import swiglu_triton as kernels

    gate, up, dy = numbers(0, shape, shape, shape, dtype=dtype)
    rule = {"roundings": 6 + largest(gate)}  # an exp, a quotient, a difference, three products
    assert_as_exact(kernels.forward(gate, up), reference(gate, up), reference(gate.double(), up.double()), **rule)
    same = gradients(reference, (gate, up), dy)
    exact = gradients(reference, (gate.double(), up.double()), dy.double())
    for got, a, b in zip(kernels.backward(dy, gate, up), same, exact, strict=True):
        assert_as_exact(got, a, b, **rule)


@INTERPRETED
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's; a GPU gives inf
def test_far_from_zero():
    """Closed form: silu(x) is x far right and 0 far left; nothing overflows."""
    from purelm.kernels import swiglu_triton as kernels

    gate, up = torch.tensor([1e4, -1e4, 100.0, -100.0]), torch.full((4,), 2.0)
    assert torch.equal(kernels.forward(gate, up), torch.tensor([2e4, 0.0, 200.0, 0.0]))
    dgate, dup = kernels.backward(torch.ones(4), gate, up)
    assert torch.equal(dgate, torch.tensor([2.0, 0.0, 2.0, 0.0]))
    assert torch.equal(dup, torch.tensor([1e4, 0.0, 100.0, 0.0]))


@INTERPRETED
def test_kernel_reads_views():
    """Oracle: contiguous copies, bit for bit: a slice, a transpose, an expanded gradient."""
    from purelm.kernels import swiglu_triton as kernels

    (both,) = numbers(1, (6, 20))
    gate, up = both.chunk(2, -1)
    assert torch.equal(kernels.forward(gate, up), kernels.forward(gate.contiguous(), up.contiguous()))
    assert kernels.forward(gate.mT, up.mT).is_contiguous()
    dy = torch.ones(()).expand(6, 10)
    for a, b in zip(
        kernels.backward(dy, gate, up),
        kernels.backward(dy.contiguous(), gate.contiguous(), up.contiguous()),
        strict=True,
    ):
        assert a.is_contiguous() and torch.equal(a, b)


def scalar(f):
    return lambda *xs: f(*xs).sin().sum()  # sin: upstream gradients that differ from place to place


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_values_and_gradients(dtype):
    """Oracle: the reference; values to the last bit, gradients to rounding."""
    xs = numbers(2, (3, 7), (3, 7), dtype=dtype)
    assert torch.equal(swiglu(*xs), reference(*xs))
    if dtype in (torch.float32, torch.float64):
        leaves = [x.requires_grad_() for x in xs]
        a, b = (torch.autograd.grad(scalar(f)(*leaves), leaves) for f in (swiglu, reference))
        for g, h in zip(a, b, strict=True):
            torch.testing.assert_close(g, h)
        (one,) = torch.autograd.grad(scalar(swiglu)(leaves[0], xs[1].detach()), leaves[0])
        assert torch.equal(one, a[0])


def test_torch_func():
    """Oracle: the same transforms of the reference: grad, jacrev, vmap, per-sample gradients, nested vmap."""
    gate, up = numbers(3, (2, 3, 5), (2, 3, 5), dtype=torch.float64)
    both = (0, 1)
    for transform, args in (
        (lambda f: grad(scalar(f), both), (gate, up)),
        (lambda f: jacrev(f, both), (gate, up)),
        (lambda f: vmap(f, in_dims=1, out_dims=1), (gate, up)),
        (lambda f: vmap(grad(scalar(f), both), (2, 0)), (gate, up.movedim(2, 0))),
        (lambda f: vmap(grad(scalar(f), both), (0, None)), (gate, up[0])),
        (lambda f: vmap(vmap(f)), (gate, up)),
    ):
        torch.testing.assert_close(transform(swiglu)(*args), transform(reference)(*args))


def test_the_same_tensor_twice():
    """Oracle: the reference."""
    (x,) = numbers(4, (3, 4))
    x.requires_grad_()
    a, b = (torch.autograd.grad(scalar(f)(x, x), x)[0] for f in (swiglu, reference))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3)], ids=str)
def test_small_and_empty(shape):
    """Oracle: the reference."""
    gate, up = (x.requires_grad_() for x in numbers(5, shape, shape))
    assert torch.equal(swiglu(gate, up), reference(gate, up))
    assert torch.autograd.grad(swiglu(gate, up).sum(), gate)[0].shape == shape


def test_checkpoint():
    """Oracle: the same without."""
    gate, up = (x.requires_grad_() for x in numbers(6, (3, 8), (3, 8)))
    plain = torch.autograd.grad(scalar(swiglu)(gate, up), (gate, up))
    again = torch.autograd.grad(checkpoint(scalar(swiglu), gate, up, use_reentrant=False), (gate, up))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.compile
@pytest.mark.parametrize("twice", [False, True])
def test_compiled_equals_eager(twice):
    """Oracle: eager, in one graph, values and gradients; repeated inputs, too."""
    xs = [x.requires_grad_() for x in numbers(7, *[(3, 8)] * (1 if twice else 2))]
    f = scalar(lambda x: swiglu(x, x)) if twice else scalar(swiglu)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*xs), f(*xs))
    for g, h in zip(torch.autograd.grad(compiled(*xs), xs), torch.autograd.grad(f(*xs), xs), strict=True):
        torch.testing.assert_close(g, h)


def test_opcheck():
    """Oracle: torch.library.opcheck: schema, fake tensors and their strides, ahead-of-time dispatch."""
    gate, up, dy = numbers(8, (2, 5), (2, 5), (2, 5))
    for args in ((gate, up), (gate.T, up.T)):
        torch.library.opcheck(module._fwd_op, args)
    for args in ((dy, gate, up), (dy[:1].expand(2, 5), gate, up), (dy.T, gate.T, up.T)):
        torch.library.opcheck(module._bwd_op, args)


@pytest.mark.parametrize(
    "gate,up,message",
    [
        (torch.ones(2), torch.ones(3), r"up must be like gate, \(2,\) torch.float32 on cpu, got \(3,\)"),
        (torch.ones(2), torch.ones(2).half(), "up must be like gate"),
        (torch.ones(2).long(), torch.ones(2).long(), "gate must be floating, got torch.int64"),
    ],
)
def test_bad_arguments(gate, up, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up)
