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
from purelm.ops.decode_attention import decode_attention_ as reference_decode
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


@INTERPRETED
def test_one_path_and_the_last_key_of_rows():
    """Oracles: attention in float64 (the rule of rules.py); a causal sequence's own rows, which read the same keys."""
    from purelm.kernels.flash_attention_launch import Request, forward

    q, k, v = numbers(6, (2, 80, 4, 16), (2, 80, 2, 16), (2, 80, 2, 16))
    for window in (None, 20):
        request = Request(window, 0, 0.25, None, "ieee")
        whole, _ = forward(q, k, v, None, None, request, one_path=True)
        exact = REFERENCE.attention(*(x.double() for x in (q, k, v)), window=window)
        same = REFERENCE.attention(q, k, v, window=window)
        assert_as_exact(whole, same, exact, roundings=20)
        last = torch.tensor([70, 80])  # the second row is full, and has no such key
        garbage = k.clone(), v.clone()
        for x in garbage:
            x[0, 71:] = 1e3
        one, _ = forward(
            q[:, 70:71], *garbage, None, None, request._replace(right=None), one_path=True, last=last
        )  # fmt: skip
        torch.testing.assert_close(one[0, 0], whole[0, 70], rtol=1e-6, atol=1e-6)
        assert one[1].isnan().all()


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_keys_and_values_are_put_into_their_slots(dtype):
    """Oracle: assignment. A row that is full, and all other slots, are left as they are."""
    from purelm.kernels.invariant_decode_triton import put_

    k, v, keys, values = numbers(8, (3, 2, 12), (3, 5, 12), (3, 7, 2, 12), (3, 7, 2, 12), dtype=dtype)
    v = v[:, 1:3]  # a view, as of joined projections
    last = torch.tensor([0, 7, 6])
    want_k, want_v = keys.clone(), values.clone()
    for b in (0, 2):
        want_k[b, last[b]], want_v[b, last[b]] = k[b], v[b]
    put_(k, v, keys, values, last)
    assert torch.equal(keys, want_k) and torch.equal(values, want_v)
    put_(k[:0], v[:0], keys[:0], values[:0], last[:0])


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


@pytest.mark.parametrize("name", ["linear", "unembed", "attention", "log_probs", "decode_attention_"])
def test_signatures_are_those_of_the_references(name):
    """Oracle: order, names, kinds and defaults of all arguments that the op has."""
    functions = [getattr(ops, name) for ops in (INVARIANT, REFERENCE)]
    op, wanted = (inspect.signature(f or reference_decode).parameters for f in functions)
    assert [*op] == [*wanted][: len(op)]
    for key, parameter in op.items():
        assert (parameter.kind, parameter.default) == (wanted[key].kind, wanted[key].default)
