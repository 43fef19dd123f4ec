"""rms_norm and layer_norm against torch.nn.functional, in each dtype, and their invariances."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from purelm.ops.layer_norm import layer_norm
from purelm.ops.rms_norm import rms_norm


def torchs(name, x, w, b, eps):
    if name == "rms":
        return F.rms_norm(x, x.shape[-1:], w, eps)
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def ours(name, x, w, b, eps):
    return rms_norm(x, w, eps) if name == "rms" else layer_norm(x, w, b, eps)


@pytest.mark.parametrize("name", ["rms", "layer"])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 123), (3, 1, 8), (0, 4)])
@pytest.mark.parametrize("affine", [False, True])
def test_equals_torch(name, shape, affine):
    """Oracle: torch.nn.functional in float64, value and gradients."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True) if affine else None
    b = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True) if affine and name == "layer" else None
    y, z = ours(name, x, w, b, 1e-5), torchs(name, x, w, b, 1e-5)
    torch.testing.assert_close(y, z)
    inputs = [t for t in (x, w, b) if t is not None]
    g = torch.randn_like(y)
    for a, c in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(z, inputs, g), strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_gradcheck(name):
    """Oracle: finite differences."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (5,), (5,)))
    assert torch.autograd.gradcheck(lambda *a: ours(name, *a, 1e-3), (x, w, b) if name == "layer" else (x, w, None))


@pytest.mark.parametrize("name", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_fp32(name, dtype):
    """Oracle: float64; the error may be twice torch's in the same dtype, whose kernels accumulate in fp32 too."""
    torch.manual_seed(0)
    x, w, b = torch.randn(64, 123), torch.randn(123), torch.randn(123)
    x, w, b = ((t * 3).to(dtype) for t in (x, w, b))
    exact = torchs(name, x.double(), w.double(), b.double(), 1e-5)
    y = ours(name, x, w, b, 1e-5)
    assert y.dtype == dtype
    error, theirs = ((t.double() - exact).abs().max() for t in (y, torchs(name, x, w, b, 1e-5)))
    assert error <= 2 * theirs


def test_large_half_values_do_not_overflow():
    """Oracle: closed form. 300^2 overflows float16, whose largest number is 65504."""
    assert torch.equal(rms_norm(torch.full((4,), 300.0, dtype=torch.float16)), torch.ones(4, dtype=torch.float16))


@given(st.integers(1, 9), st.floats(0.1, 1e3), st.integers(0, 2**31))
def test_scale_invariance(n, scale, seed):
    """Law: without eps, n(c x) = n(x) for c > 0; layer_norm does not see a shift either."""
    x = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rms_norm(scale * x, eps=0.0), rms_norm(x, eps=0.0))
    torch.testing.assert_close(layer_norm(scale * x + scale, eps=0.0), layer_norm(x, eps=0.0))


def test_non_contiguous():
    """Oracle: the contiguous copy."""
    x = torch.randn(6, 4, 5).transpose(0, 2)
    torch.testing.assert_close(rms_norm(x), rms_norm(x.contiguous()))
    torch.testing.assert_close(layer_norm(x), layer_norm(x.contiguous()))
