"""Activations and gated units against torch.nn.functional."""

import pytest
import torch
from torch.nn import functional as F

from purelm.ops.activations import gelu, relu2, silu
from purelm.ops.glu import geglu, swiglu

PAIRS = {
    "silu": (silu, F.silu),
    "gelu": (gelu, F.gelu),
    "gelu_tanh": (lambda x: gelu(x, True), lambda x: F.gelu(x, approximate="tanh")),
    "relu2": (relu2, lambda x: F.relu(x) ** 2),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch(name):
    """Oracle: torch.nn.functional in float64, first and second derivatives too; gradcheck."""
    mine, theirs = PAIRS[name]
    x = torch.cat([torch.linspace(-30, 30, 121), torch.tensor([0.0, 1e-9, -1e-9])]).double().requires_grad_()
    torch.testing.assert_close(mine(x), theirs(x))
    for f, g in ((mine, theirs),):
        (a,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        (b,) = torch.autograd.grad(g(x).sum(), x, create_graph=True)
        torch.testing.assert_close(a, b)
    y = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mine, y)


@pytest.mark.parametrize("name", PAIRS)
def test_bf16(name):
    """Oracle: float64; written out, each of up to 8 steps rounds by 2^-9 relative to the largest of its terms."""
    mine, theirs = PAIRS[name]
    x = torch.linspace(-8, 8, 999).bfloat16()
    y = mine(x)
    assert y.dtype == torch.bfloat16
    error = (y.double() - theirs(x.double())).abs()
    assert bool((error <= 8 * 2**-9 * (x.double().abs() + theirs(x.double()).abs())).all())


@pytest.mark.parametrize(("f", "act"), [(swiglu, F.silu), (geglu, F.gelu)])
def test_gated(f, act):
    """Oracle: torch.nn.functional and a product; gradcheck."""
    a, b = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(f(a, b), act(a) * b)
    assert torch.autograd.gradcheck(f, (a, b))


def test_geglu_tanh():
    """Oracle: torch.nn.functional."""
    a, b = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(geglu(a, b, True), F.gelu(a, approximate="tanh") * b)
