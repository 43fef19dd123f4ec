"""Batch-invariant ops: the interpreted kernels against float64, and bits of rows in different batches.

Oracles: the references in float64, with the rule of rules.py; the same rows in another batch, bit for bit; on the CPU
the public functions are the references. That sampler and trainer agree to the last bit is shown in tests/gpu.
"""

import inspect
import math

import pytest
import torch

from purelm.kernels.invariant import INVARIANT
from purelm.kernels.invariant_linear import invariant_linear
from purelm.ops import REFERENCE
from purelm.ops.linear import linear as reference
from purelm.ops.log_probs import log_probs as reference_log_probs
from tests.kernels.rules import assert_as_exact

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: see tests/gpu")


def numbers(seed, *shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 64), (65, 33, 100), (130, 5, 128), (0, 4, 8), (5, 6, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_as_exact_as_the_reference(shape, bias, dtype):
    """A sum of K products, plus a bias: log2(K) + 1 roundings."""
    from purelm.kernels import invariant_linear_triton as kernels

    M, N, K = shape
    x, w, b = numbers(0, (M, K), (N, K), (N,), dtype=dtype)
    b = b if bias else None
    exact = reference(x.double(), w.double(), None if b is None else b.double())
    rounds = math.log2(max(K, 1)) + 2
    assert_as_exact(kernels.linear(x, w, b), reference(x, w, b), exact, roundings=rounds, scale=math.sqrt(max(K, 1)))


@INTERPRETED
def test_a_row_has_the_same_bits_in_every_batch_and_beside_any_features():
    """Exact: alone, in parts, and with more features, as joined projections have."""
    from purelm.kernels import invariant_linear_triton as kernels

    x, w = numbers(1, (70, 96), (40, 96))
    whole = kernels.linear(x, w, None)
    for part in (slice(0, 1), slice(3, 40), slice(69, 70)):
        assert torch.equal(kernels.linear(x[part].clone(), w, None), whole[part])
    assert torch.equal(kernels.linear(x, w[5:12], None), whole[:, 5:12])
    dense = kernels.linear(x[:, :50].clone(), w[:, :50].clone(), None)
    assert torch.equal(kernels.linear(x[:, :50], w[:, :50], None), dense)


@INTERPRETED
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_rows_are_those_that_drawing_notes(temperature):
    """Exact: the same logits, drawn from and looked up; and near float64."""
    from purelm.generate.rows import begin
    from purelm.kernels import draw_triton, log_prob_rows_triton

    (logits,) = numbers(2, (12, 5000))
    logits = 5 * logits
    u = torch.rand(12, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = begin([1] * 12, u)
    draw_triton.draw_(logits, rows, temperature, torch.zeros(5000, dtype=torch.bool))
    found = log_prob_rows_triton.log_probs(logits, rows.token_B, temperature)
    assert torch.equal(found.double(), rows.logprobs_BN[:, 0])
    exact = torch.log_softmax(logits.double() / temperature, -1).gather(1, rows.token_B[:, None])[:, 0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=4e-6)
    assert torch.equal(log_prob_rows_triton.log_probs(logits[3:4], rows.token_B[3:4], temperature), found[3:4])


def test_on_a_cpu_they_are_the_references():
    """Exact, gradients too."""
    x, w, b = (t.requires_grad_() for t in numbers(4, (2, 3, 8), (5, 8), (5,)))
    got, want = invariant_linear(x, w, b), reference(x, w, b)
    assert torch.equal(got, want)
    for g, h in zip(torch.autograd.grad(got.sum(), (x, w, b)), torch.autograd.grad(want.sum(), (x, w, b)), strict=True):
        assert torch.equal(g, h)
    targets = torch.tensor([[0, 1, 4], [2, 2, 3]])
    for g, h in zip(INVARIANT.log_probs(x, w, targets), reference_log_probs(x, w, targets), strict=True):
        assert torch.equal(g, h)
    q, k = numbers(5, (1, 4, 2, 8), (1, 4, 1, 8))
    assert torch.equal(INVARIANT.attention(q, k, k, window=2), REFERENCE.attention(q, k, k, window=2))


@pytest.mark.parametrize("name", ["linear", "unembed", "attention", "log_probs"])
def test_signatures_are_those_of_the_references(name):
    """Oracle: order, names, kinds and defaults of all arguments that the op has."""
    op, wanted = (inspect.signature(getattr(ops, name)).parameters for ops in (INVARIANT, REFERENCE))
    assert [*op] == [*wanted][: len(op)]
    for key, parameter in op.items():
        assert (parameter.kind, parameter.default) == (wanted[key].kind, wanted[key].default)
