"""linear and embedding against torch.nn.functional and a loop."""

import pytest
import torch
from torch.nn import functional as F

from purelm.ops.embedding import embedding
from purelm.ops.linear import linear


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (2, 1, 3, 7), (0, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_torchs(shape, bias):
    """Oracle: torch.nn.functional.linear."""
    x, w = torch.randn(shape, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    b = torch.randn(4, dtype=torch.float64) if bias else None
    torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b))


def test_linear_of_a_view():
    """Oracle: the contiguous copy."""
    x, w = torch.randn(7, 5, dtype=torch.float64).t(), torch.randn(14, 4, dtype=torch.float64)[::2].t()
    torch.testing.assert_close(linear(x, w), linear(x.contiguous(), w.contiguous()))


def test_embedding_picks_rows_and_its_gradient_counts_them():
    """Oracle: the rows themselves; a histogram."""
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 1, 4], [0, 1, 4]])
    y = embedding(ids, w)
    for i in range(2):
        for j in range(3):
            assert torch.equal(y[i, j], w[ids[i, j]])
    (g,) = torch.autograd.grad(y.sum(), w)
    assert torch.equal(g, torch.bincount(ids.flatten(), minlength=5).double()[:, None].expand(5, 3))


def test_embedding_outside_the_table_raises_on_a_cpu():
    for bad in (-1, 5):
        with pytest.raises(IndexError):
            embedding(torch.tensor([0, bad]), torch.zeros(5, 3))
