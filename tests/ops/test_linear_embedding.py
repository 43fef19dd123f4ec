"""linear and embedding against torch.nn.functional and a loop."""

import pytest
import torch
from torch.nn import functional as F

from purelm.ops import few_rows
from purelm.ops.embedding import embedding
from purelm.ops.linear import linear
from purelm.testing import check_op

BOTH = pytest.mark.parametrize("f", [linear, few_rows.linear], ids=["linear", "few_rows"])


@BOTH
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 1, 7), (4, 7), (3, 5, 7), (2, 1, 3, 7), (0, 7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_out", [8, 4, 6, 5])
def test_linear_is_torchs(f, shape, bias, n_out):
    """Oracle: torch.nn.functional.linear."""
    x, w = torch.randn(shape, dtype=torch.float64), torch.randn(n_out, 7, dtype=torch.float64)
    b = torch.randn(n_out, dtype=torch.float64) if bias else None
    torch.testing.assert_close(f(x, w, b), F.linear(x, w, b))
    assert f(torch.ones(shape, dtype=torch.bfloat16), w.bfloat16()).dtype == torch.bfloat16


@BOTH
def test_linear_of_a_view(f):
    """Oracle: the contiguous copy."""
    x, w = torch.randn(7, 3, dtype=torch.float64).t(), torch.randn(14, 4, dtype=torch.float64)[::2].t()
    torch.testing.assert_close(f(x, w), F.linear(x.contiguous(), w.contiguous()))


@pytest.mark.compile
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_few_rows_under_transforms(rows):
    """Oracle: the laws of an op, with linear as reference; of 5 rows it is linear itself."""
    args = torch.randn(rows, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    check_op(few_rows.linear, args, reference=linear)


def test_no_features():
    """Oracle: the empty sum."""
    assert torch.equal(few_rows.linear(torch.ones(1, 0), torch.ones(8, 0)), torch.zeros(1, 8))


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
