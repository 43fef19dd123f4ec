"""Masked sums and means. Oracles: the chosen elements picked out and summed; numpy's masked arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.masked import masked_mean, masked_normalize, masked_sum
from purelm.testing import check_op, without
from purelm.testing import strategies as plm
from purelm.testing.operations import OP_LAWS

pairs = plm.shapes(max_dims=3, max_side=5).flatmap(
    lambda shape: st.tuples(
        plm.tensors(shape, torch.float64), plm.tensors(shape, torch.bool), st.sampled_from([None, *range(len(shape))])
    )
)


@given(pairs)
def test_sum_and_mean(drawn):
    x, mask, dim = drawn
    chosen = np.ma.array(x.numpy(), mask=~mask.numpy())
    wanted = np.ma.filled(chosen.sum(axis=dim), 0.0)
    torch.testing.assert_close(masked_sum(x, mask, dim), torch.as_tensor(wanted), check_dtype=False)
    mean = np.ma.filled(chosen.mean(axis=dim), -3.0) if mask.any() else np.full(np.shape(wanted), -3.0)
    torch.testing.assert_close(masked_mean(x, mask, dim, empty=-3.0), torch.as_tensor(mean), check_dtype=False)
    torch.testing.assert_close(masked_normalize(x, mask, 7.0, dim), torch.as_tensor(wanted / 7), check_dtype=False)


@given(pairs)
def test_parts_with_the_whole_denominator_add_up(drawn):
    """Any division along the first axis; weights that are not 0 and 1, too."""
    x, mask, _ = drawn
    weights = mask.to(torch.float64) * 0.5
    if not x.ndim or not bool(mask.any()):
        return
    whole = masked_mean(x, weights)
    parts = [
        masked_mean(a, b, denominator=weights.sum()) for a, b in zip(x.split(2), weights.split(2), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_masked_has_no_influence(bad):
    """Exact: value and gradient; also through a function whose derivative is not finite there."""
    x = torch.tensor([1.0, 2.0, 0.0, bad], requires_grad=True)
    mask = torch.tensor([1, 1, 0, 0])
    value = masked_mean(x.log(), mask)
    assert torch.equal(value, torch.tensor([1.0, 2.0]).log().mean())
    (g,) = torch.autograd.grad(masked_mean(x, mask), x)
    assert g.tolist() == [0.5, 0.5, 0.0, 0.0]


def test_empty():
    x, mask = torch.ones(2, 3), torch.zeros(2, 3)
    assert masked_mean(x, mask).item() == 0.0 and masked_mean(x, mask, empty=float("nan")).isnan()
    assert masked_mean(x, mask, 1).tolist() == [0.0, 0.0] and masked_sum(x, mask).item() == 0.0


def test_as_an_op():
    """check_op: every transform; the mask is an integer argument."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).sin()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])
    laws = without(OP_LAWS, "compile")
    check_op(masked_mean, (x, mask), reference=lambda x, m: (x * m).sum() / m.sum(), laws=laws)
    by_row = lambda x, m: masked_normalize(x, m, 3.0, 1)  # noqa: E731
    check_op(by_row, (x, mask), reference=lambda x, m: (x * m).sum(1) / 3, laws=laws)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: masked_mean(x, torch.ones(3)), r"mask must be a tensor of x's shape \(2, 3\), got \(3,\)"),
        (lambda x: masked_sum(x, [1, 2]), "mask must be a tensor of x's shape .*, got list"),
        (lambda x: masked_normalize(x, torch.ones(2, 3), 0.0), "the denominator must be above 0 and finite, got 0.0"),
        (lambda x: masked_mean(x, torch.ones(2, 3), denominator=-1), "the denominator must be above 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3))
