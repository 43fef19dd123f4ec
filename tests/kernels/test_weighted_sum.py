"""weighted_sum, the kernel to learn from: the interpreted kernels against float64, the op under every transform.

Oracles: the plain-torch reference in float64, with the rule of rules.py; on the CPU, the reference itself.
"""

import math

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from purelm.kernels import weighted_sum as module
from purelm.kernels.weighted_sum import reference, weighted_sum
from tests.kernels.rules import assert_as_exact

# What dynamo does to trace a Function, and torch.compile's own import.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: see tests/gpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(seed, *shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def by_group(x, weight):
    return torch.stack([reference(a, b) for a, b in zip(x, weight, strict=True)])


def gradients(x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(by_group(x, weight), (x, weight), dy)


@INTERPRETED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 123), (2, 70, 64), (3, 5, 1100), (1, 300, 3), (1, 0, 4)], ids=str)
def test_kernels_are_as_exact_as_the_reference(shape, dtype):
    """Oracle: the reference in float64."""
    from purelm.kernels import weighted_sum_triton as kernels

    x, w, dy = numbers(0, shape, shape[::2], shape[:2], dtype=dtype)
    exact = [t.double() for t in (x, w, dy)]
    rule = {"roundings": 1 + math.log2(max(*shape))}  # a product, and sums over a row or over rows
    assert_as_exact(kernels.forward(x, w), by_group(x, w), by_group(*exact[:2]), **rule)
    got = kernels.backward(dy, x, w, True, True)
    for a, b, c in zip(got, gradients(x, w, dy), gradients(*exact), strict=True):
        assert_as_exact(a, b, c, **rule)


@INTERPRETED
def test_kernel_reads_views_and_skips_what_is_not_needed():
    """Oracle: the kernel on contiguous copies, bit for bit; and the same again run after run."""
    from purelm.kernels import weighted_sum_triton as kernels

    (wide, w) = numbers(1, (2, 80, 48), (1, 16))
    for x in (wide[:, :, 16:32], wide[:, :48].mT[:, :, ::3], wide[:1, :1, :16].expand(2, 9, 16)):
        weight, dy = w.expand(2, 16), torch.ones(()).expand(2, x.shape[1])
        assert torch.equal(kernels.forward(x, weight), kernels.forward(x.contiguous(), weight.contiguous()))
        dx, dw = kernels.backward(dy, x, weight, True, True)
        again = kernels.backward(dy.contiguous(), x.contiguous(), weight.contiguous(), True, True)
        assert torch.equal(dx, again[0]) and torch.equal(dw, again[1])
        only_dx, none = kernels.backward(dy, x, weight, True, False)
        assert torch.equal(only_dx, dx) and none.numel() == 0
        none, only_dw = kernels.backward(dy, x, weight, False, True)
        assert torch.equal(only_dw, dw) and none.numel() == 0


def scalar(f):
    return lambda *xs: f(*xs).sin().sum()  # sin: upstream gradients that differ from place to place


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 5, 7), (0, 3), (2, 0, 3), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_values_and_gradients(shape, dtype):
    """Oracle: the reference; values to the last bit, gradients to rounding."""
    x, w = (t.requires_grad_() for t in numbers(2, shape, shape[-1:], dtype=dtype))
    assert torch.equal(weighted_sum(x, w), reference(x, w))
    a, b = (torch.autograd.grad(scalar(f)(x, w), (x, w)) for f in (weighted_sum, reference))
    for g, h in zip(a, b, strict=True):
        torch.testing.assert_close(g, h)
    for leaf, at in ((x, 0), (w, 1)):
        args = [t if t is leaf else t.detach() for t in (x, w)]
        assert torch.equal(torch.autograd.grad(scalar(weighted_sum)(*args), leaf)[0], a[at])


def test_torch_func():
    """Oracle: the same transforms of the reference: grad, jacrev, vmap, per-sample gradients, nested vmap."""
    x, w, ws = numbers(3, (2, 3, 5, 4), (4,), (3, 4), dtype=torch.float64)
    both = (0, 1)
    for transform, args in (
        (lambda f: grad(scalar(f), both), (x, w)),
        (lambda f: jacrev(f, both), (x[0], w)),
        (lambda f: vmap(f, (1, None), out_dims=1), (x, w)),
        (lambda f: vmap(f, (None, 0)), (x, ws)),
        (lambda f: vmap(grad(scalar(f), both), (1, None)), (x, w)),
        (lambda f: vmap(grad(scalar(f), both), (1, 0)), (x, ws)),
        (lambda f: vmap(vmap(grad(scalar(f), both), (0, None)), (0, None)), (x, w)),
        (lambda f: vmap(vmap(grad(scalar(f), 1), (0, 0)), (0, None)), (x, ws)),
    ):
        torch.testing.assert_close(transform(weighted_sum)(*args), transform(reference)(*args))


def test_checkpoint_and_one_tensor_twice():
    """Oracle: the same without; the reference."""
    x = torch.randn(5, requires_grad=True)
    a, b, c = (
        torch.autograd.grad(f(x, x), x)[0]
        for f in (weighted_sum, reference, lambda *xs: checkpoint(weighted_sum, *xs, use_reentrant=False))
    )
    torch.testing.assert_close(a, b)
    assert torch.equal(a, c)


@pytest.mark.compile
@pytest.mark.parametrize("twice", [False, True])
def test_compiled_equals_eager(twice):
    """Oracle: eager, in one graph, values and gradients; repeated inputs, too."""
    xs = [x.requires_grad_() for x in numbers(4, *([(8,)] if twice else [(3, 8), (8,)]))]
    f = scalar(lambda x: weighted_sum(x, x)) if twice else scalar(weighted_sum)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*xs), f(*xs))
    for g, h in zip(torch.autograd.grad(compiled(*xs), xs), torch.autograd.grad(f(*xs), xs), strict=True):
        torch.testing.assert_close(g, h)


def test_opcheck():
    """Oracle: torch.library.opcheck: schema, fake tensors and their strides, ahead-of-time dispatch."""
    x, w, dy = numbers(5, (2, 3, 4), (2, 4), (2, 3))
    for rows in (x, x.mT.contiguous().mT, x[:, :1].expand(2, 3, 4)):
        torch.library.opcheck(module._fwd, (rows, w))
        for need in ((True, True), (False, True), (True, False)):
            torch.library.opcheck(module._bwd, (dy, rows, w, *need))


@pytest.mark.parametrize(
    "x,w,message",
    [
        (torch.ones(()), torch.ones(1), "x must be floating with at least one axis"),
        (torch.ones(3).long(), torch.ones(3), "x must be floating"),
        (torch.ones(2, 3), torch.ones(2), r"weight must be \(3,\) on cpu, got \(2,\) on cpu"),
        (torch.ones(2, 3), torch.ones(3, device="meta"), r"weight must be \(3,\) on cpu, got \(3,\) on meta"),
    ],
)
def test_bad_arguments(x, w, message):
    with pytest.raises(ValueError, match=message):
        weighted_sum(x, w)
