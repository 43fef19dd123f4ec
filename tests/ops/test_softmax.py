"""softmax and log_softmax against torch, at extremes, and where nothing is possible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.ops.softmax import log_softmax, softmax

ROWS = st.lists(st.floats(-200, 200, allow_nan=False), min_size=1, max_size=9)


@given(ROWS)
def test_equals_torch(row):
    """Oracle: torch in float64."""
    x = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(softmax(x), torch.softmax(x, 0))
    torch.testing.assert_close(log_softmax(x), torch.log_softmax(x, 0))


@given(ROWS, st.floats(-1e4, 1e4))
def test_a_constant_changes_nothing(row, c):
    """Law: softmax(x + c) = softmax(x); rounding of x + c in float64 is below 1e-11."""
    x = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(softmax(x + c), softmax(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_dim_and_extremes(dim):
    """Oracle: torch. exp(1e4) overflows float32."""
    x = torch.randn(3, 5) * 1e4
    torch.testing.assert_close(softmax(x, dim), torch.softmax(x, dim))
    torch.testing.assert_close(log_softmax(x, dim), torch.log_softmax(x, dim))


def test_derivatives():
    """Oracle: finite differences, first and second order; the maximum is a constant at both."""
    x = torch.tensor([[0.3, -1.0, 2.0], [1.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    for f in (softmax, log_softmax):
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


def test_impossible_rows():
    """Exact: zeros and -inf, and zero gradients; +inf and NaN still show."""
    x = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]], requires_grad=True)
    p = softmax(x)
    assert torch.equal(p, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    (g,) = torch.autograd.grad((p * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum(), x)
    assert torch.equal(g, torch.zeros(2, 2))
    assert torch.equal(log_softmax(x.detach()), torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]]))
    assert bool(softmax(torch.tensor([0.0, torch.nan])).isnan().any())
    assert bool(softmax(torch.tensor([0.0, torch.inf])).isnan().any())


def test_bf16_sums_in_fp32():
    """Oracle: torch in float64, rounded once: 2^-9 relative."""
    x = torch.randn(4, 3000).bfloat16()
    assert softmax(x).dtype == torch.bfloat16
    torch.testing.assert_close(softmax(x).double(), torch.softmax(x.double(), -1), rtol=2**-8, atol=0)
    torch.testing.assert_close(log_softmax(x).double(), torch.log_softmax(x.double(), -1), rtol=2**-8, atol=0)
