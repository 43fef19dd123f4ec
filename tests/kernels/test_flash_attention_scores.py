"""flash_attention with a bias, a mask, and its log-sum-exp. Oracles and tolerances: test_flash_attention.py."""

import math

import pytest
import torch
from torch.func import grad

from purelm.kernels.flash_attention import (
    checked_arguments,
    flash_attention,
    flash_attention_with_lse,
)
from purelm.kernels.flash_attention_launch import Request, backward, backward_of_bias, forward
from purelm.kernels.flash_attention_reference import tiled_backward, tiled_forward
from purelm.ops.attention import attention, attention_with_lse
from tests.kernels.rules import assert_as_exact, attention_scales
from tests.kernels.test_flash_attention import SMALL, arguments, ids, interpreter, scores_of, tensors, with_gradients

# (sizes, options, shape of the bias, shape of the mask); B 2, H 4, and the shapes of T and S of the sizes.
EXTRAS = {
    "bias": (dict(T=37, S=41), {}, (2, 4, 37, 41), None),
    "bias_shared": (dict(T=37), dict(causal=False), (1, 4, 37, 37), None),
    "bias_of_positions": (dict(T=37), {}, (1, 1, 37, 37), None),
    "bias_of_keys": (dict(T=37), dict(causal=False, window=9), (2, 1, 1, 37), None),
    "bias_of_queries": (dict(T=37), {}, (1, 4, 37, 1), None),
    "bias_of_heads": (dict(T=20), {}, (1, 4, 1, 1), None),
    "bias_softcap": (dict(T=37, S=20, G=1), dict(softcap=0.7, scale=0.9), (2, 4, 37, 20), None),
    "mask": (dict(T=37, S=41), {}, None, (2, 4, 37, 41)),
    "mask_shared": (dict(T=40), dict(causal=False), None, (1, 1, 40, 40)),
    "both": (dict(T=40), dict(window=20), (1, 4, 40, 40), (2, 1, 40, 40)),
    "everything": (
        dict(T=40, K=10, E=6), dict(softcap=2.0, window=30, segment_ids=ids(2, 40)), (1, 4, 40, 40), (2, 4, 1, 40)
    ),
}  # fmt: skip


SOME_EXTRAS = ("bias_shared", "everything")


EXTRA_DTYPES = {
    "fp32": (torch.float32, EXTRAS), "fp16": (torch.float16, SOME_EXTRAS), "bf16": (torch.bfloat16, SOME_EXTRAS)
}  # fmt: skip


@interpreter
@pytest.mark.parametrize("name,dtype", [(n, d) for d, names in EXTRA_DTYPES.values() for n in names], ids=str)
def test_kernels_with_bias_and_mask_against_float64(name, dtype):
    """Oracle: the reference op in float64, dbias too; the reference in the same dtype sets the tolerance."""
    size, options, bias_shape, mask_shape = EXTRAS[name]
    q, k, v, do = tensors(**size, dtype=dtype)
    bias = None if bias_shape is None else scores_of(bias_shape, "bias", dtype)
    mask = None if mask_shape is None else scores_of(mask_shape, "mask")
    if mask is not None and mask.shape[-2] == 1:
        mask = mask | (torch.arange(mask.shape[-1]) % 2 == 0)
    leaves = [q, k, v] if bias is None else [q, k, v, bias]

    def f(q, k, v, b=None):
        return attention(q, k, v, bias=b, mask=mask, **options)

    exact = with_gradients(f, [x.double() for x in leaves], do.double())
    same = with_gradients(f, leaves, do)
    found = checked_arguments(q, k, v, *arguments(options), sinks=None, precision="ieee", bias=bias, mask=mask)
    *pair, sinks, bias, mask, left, right, scale, cap, _ = found
    segments = None if pair[0] is None else (pair[0].contiguous(), pair[1].contiguous())
    request = Request(left, right, scale, cap)
    o, lse = forward(q, k, v, segments, sinks, request, SMALL, bias=bias, mask=mask)
    *grads, delta = backward(do, None, q, k, v, o, lse, segments, request, SMALL, SMALL, bias=bias, mask=mask)
    mine = [o, *grads]
    scales, score = attention_scales(q, k, v, do, scale)
    if bias is not None:
        mine.append(backward_of_bias(do, q, k, v, lse, delta, segments, request, bias, mask, SMALL))
        score += float(bias.abs().max())
        # dbias is a sum of ds = p (dp - delta) over what shares a number, each of the size of dp at most.
        n_summed = q.shape[0] * 4 * q.shape[1] * k.shape[1] // bias.numel()
        scales.append(scales[1] / float(k.abs().max()) / scale * n_summed**0.5)
    for x, reference, wanted, size in zip(mine, same, exact, scales, strict=True):
        # Scores, exp, sums over keys and features, a quotient, products.
        roundings = score + math.log2(k.shape[1] * k.shape[3]) + 4
        assert_as_exact(x, reference, wanted, roundings=roundings, scale=size)


@interpreter
def test_kernels_hide_keys_at_minus_infinity_and_read_views_of_bias_and_mask():
    """Oracle: the mask that says the same; dense copies, bit for bit."""
    q, k, v, do = tensors(2, 20, dtype=torch.float32)
    request = Request(None, 0, 0.25)
    bias, mask = scores_of((2, 4, 20, 20), "bias"), scores_of((2, 4, 20, 20), "mask")
    hidden = torch.where(mask, bias, -torch.inf)

    def run(bias, mask):
        o, lse = forward(q, k, v, None, None, request, SMALL, bias=bias, mask=mask)
        *grads, delta = backward(do, None, q, k, v, o, lse, None, request, SMALL, SMALL, bias=bias, mask=mask)
        return o, lse, *grads, backward_of_bias(do, q, k, v, lse, delta, None, request, bias, mask, SMALL)

    plain = run(bias, mask)
    for x, y in zip(run(hidden, None), plain, strict=True):
        assert torch.equal(x, y)
    views = [x.movedim(1, 3).contiguous().movedim(3, 1) for x in (bias, mask)]
    assert all(torch.equal(x, y) for x, y in zip(run(*views), plain, strict=True))
    wide = [x[..., :1].expand(2, 4, 20, 20) for x in (bias, mask)]
    dense = [x.contiguous() for x in wide]
    assert all(torch.equal(x, y) for x, y in zip(run(*wide), run(*dense), strict=True))


def merge(parts):
    """Attention over all keys from (o, lse) of parts of them: o = sum_i exp(lse_i - lse) o_i."""
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    shares = [torch.exp(part - lse).transpose(1, 2).unsqueeze(-1) for _, part in parts]
    return sum(share * o for share, (o, _) in zip(shares, parts, strict=True)), lse


@pytest.mark.parametrize("f", [flash_attention_with_lse, attention_with_lse])
def test_halves_of_the_keys_merge_to_the_whole(f):
    """Oracle: `attention` over all keys, value and gradients through both results; bias, mask and softcap included."""
    q, k, v, do = tensors(2, 9, 20)
    bias, mask = scores_of((4, 9, 20), "bias", torch.float64), scores_of((2, 1, 9, 20), "mask")
    mask[..., :1], mask[..., 11:12] = True, True  # no half is without a key: there exp(-inf - -inf) has no meaning

    def merged(q, k, v, b):
        return merge(
            [
                f(q, k[:, at], v[:, at], causal=False, bias=b[..., at], mask=mask[..., at], softcap=2.0)
                for at in (slice(0, 11), slice(11, 20))
            ]
        )[0]

    def whole(q, k, v, b):
        return attention(q, k, v, causal=False, bias=b, mask=mask, softcap=2.0)

    found, wanted = (with_gradients(g, [q, k, v, bias], do) for g in (merged, whole))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


LSE_OPTIONS = {
    "causal": {},
    "all": dict(window=6, segment_ids=ids(2, 20), softcap=2.0, scale=0.4),
    "bias": dict(causal=False, bias=scores_of((4, 20, 20), "bias", torch.float64), mask=scores_of((20, 20), "mask")),
}


@pytest.mark.parametrize("name", LSE_OPTIONS)
def test_with_lse_against_the_reference(name):
    """Oracle: `attention_with_lse`, both results, gradients of both, and of lse alone; torch.func, second order."""
    q, k, v, do = tensors(2, 20)
    options = LSE_OPTIONS[name]
    blind = attention_with_lse(q, k, v, **options)[1] == -torch.inf
    dlse = torch.randn(2, 4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def scalar(f, w):
        def total(q, k, v):
            o, lse = f(q, k, v, **options)
            return (o * do).sum() * w + (torch.where(blind, 0.0, lse) * dlse).sum()

        return total

    mine, theirs = flash_attention_with_lse(q, k, v, **options), attention_with_lse(q, k, v, **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for w in (1.0, 0.0):
        a, b = (grad(scalar(f, w), (0, 1, 2))(q, k, v) for f in (flash_attention_with_lse, attention_with_lse))
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    a, b = (
        grad(lambda q, f=f: grad(scalar(f, 1.0))(q, k, v).sin().sum())(q)
        for f in (flash_attention_with_lse, attention_with_lse)
    )
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert flash_attention_with_lse(q[0], k[0], v[0])[1].shape == (4, 20)


@interpreter
def test_gradient_of_lse_in_the_kernel_of_the_bias():
    """Oracle: the tiled code in float64."""
    q, k, v, do = tensors(1, 30, 25, dtype=torch.float32)
    bias, dlse = scores_of((1, 4, 30, 25), "bias"), torch.randn(1, 4, 30, generator=torch.Generator().manual_seed(2))
    request = Request(6, 0, 0.25, 3.0)
    o, lse = forward(q, k, v, None, None, request, SMALL, bias=bias)
    *grads, delta = backward(do, dlse, q, k, v, o, lse, None, request, SMALL, SMALL, bias=bias)
    found = [*grads, delta, backward_of_bias(do, q, k, v, lse, delta, None, request, bias, None, SMALL)]
    wide = [x.double() for x in (q, k, v)]
    b = bias.double()
    o2, lse2 = tiled_forward(*wide, None, None, 6, 0, 0.25, 3.0, b, tile=7)
    wanted = tiled_backward(do.double(), dlse.double(), *wide, o2, lse2, None, 6, 0, 0.25, 3.0, b, None, True, tile=7)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_gradient_of_a_bias():
    """Oracle: eager; one graph."""
    q, k, v, do = tensors(2, 12)
    leaves = [q, k, v, scores_of((1, 4, 12, 12), "bias", torch.float64)]

    def f(q, k, v, bias):
        return flash_attention(q, k, v, bias=bias * 2)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for x, y in zip(with_gradients(compiled, leaves, do), with_gradients(f, leaves, do), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
