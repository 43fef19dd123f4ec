"""attention and sdpa_attention against a loop over queries in float64, with exact zeros where they must be."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from purelm.ops import masks
from purelm.ops.attention import attention
from purelm.ops.sdpa import sdpa_attention

BOTH = pytest.mark.parametrize("attend", [attention, sdpa_attention])


def sees(t, s, T, S, causal, window, q_ids, kv_ids):
    """Whether query t sees key s, for one row, by the definition."""
    left, right = window if isinstance(window, tuple) else (window, None)
    own = t + S - T
    if causal and s > own:
        return False
    if left is not None and s < own - left:
        return False
    if right is not None and s > own + right:
        return False
    return q_ids is None or bool(q_ids[t] == kv_ids[s])


def loop(q, k, v, *, causal=True, window=None, segment_ids=None, scale=None, softcap=None):
    """The oracle: one query, one head, one list of visible keys at a time."""
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    out = torch.zeros(B, T, H, v.shape[-1], dtype=q.dtype)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        ids = (None, None) if segment_ids is None else (pair[0][b], pair[1][b])
        keys = [s for s in range(S) if sees(t, s, T, S, causal, window, *ids)]
        if not keys:
            continue
        g = h // (H // G)
        scores = (k[b, keys, g] @ q[b, t, h]) * (1 / math.sqrt(K) if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[b, t, h] = torch.softmax(scores, 0) @ v[b, keys, g]
    return out


def qkv(B=2, T=5, S=5, H=4, G=2, K=6, E=None, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, E or K))
    return [torch.randn(s, dtype=dtype, generator=g, requires_grad=True) for s in shapes]


def compare(attend, tensors, **kwargs):
    mine, theirs = attend(*tensors, **kwargs), loop(*tensors, **kwargs)
    torch.testing.assert_close(mine, theirs)
    do = torch.randn_like(mine)
    if not theirs.requires_grad:
        return
    for a, b in zip(
        torch.autograd.grad(mine, tensors, do),
        torch.autograd.grad(theirs, tensors, do, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@BOTH
@pytest.mark.parametrize(("T", "S"), [(1, 1), (7, 7), (3, 7), (1, 7), (7, 3)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 0, 2, (1, 2), (None, 1), (2, None), 100])
def test_lengths_causality_windows(attend, T, S, causal, window):
    """Oracle: the loop, value and gradients; T > S has queries that see nothing."""
    compare(attend, qkv(T=T, S=S), causal=causal, window=window)


@BOTH
@pytest.mark.parametrize(("H", "G"), [(1, 1), (4, 4), (4, 1), (6, 2)])
def test_heads(attend, H, G):
    """Oracle: the loop; values may be wider than keys."""
    compare(attend, qkv(H=H, G=G, E=3))


@BOTH
def test_grouped_equals_repeated(attend):
    """Law: shared heads are repeated ones."""
    q, k, v = qkv(H=6, G=2)
    k6, v6 = k.repeat_interleave(3, 2), v.repeat_interleave(3, 2)
    torch.testing.assert_close(attend(q, k, v), attend(q, k6, v6))


@BOTH
@pytest.mark.parametrize("window", [None, (1, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_segments(attend, window, causal):
    """Oracle: the loop; a pair for queries and keys, with rows that see nothing."""
    ids = torch.tensor([[1, 1, 2, 2, 0], [3, 3, 3, 3, 3]])
    compare(attend, qkv(), causal=causal, window=window, segment_ids=ids)
    kv_ids = torch.tensor([[0, 1, 1, 2, 2, 2, 5], [9, 9, 9, 9, 9, 9, 9]])
    compare(attend, qkv(S=7), causal=causal, window=window, segment_ids=(ids, kv_ids))
    compare(attend, qkv(), causal=causal, window=window, segment_ids=(ids, kv_ids[:, :5]))


@BOTH
def test_a_query_that_sees_nothing(attend):
    """Exact: zeros out, zero gradients in, no NaN anywhere; in fp32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = qkv(T=4, S=2, dtype=dtype)
        o = attend(q, k, v)
        assert torch.equal(o[:, :2], torch.zeros_like(o[:, :2]))
        grads = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
        assert torch.equal(grads[0][:, :2], torch.zeros_like(q[:, :2]))
        assert all(bool(g.isfinite().all()) for g in grads)


@BOTH
@pytest.mark.parametrize("T", [1, 5])
def test_future_and_far_past_have_exactly_no_influence(attend, T):
    """Exact: gradients of o_t towards keys and values outside t-2..t are 0."""
    q, k, v = qkv(T=T, S=5, dtype=torch.float32)
    o = attend(q, k, v, window=2)
    for t in range(T):
        gk, gv = torch.autograd.grad(o[:, t].sum(), (k, v), retain_graph=True)
        own = t + 5 - T
        for s in range(5):
            inside = own - 2 <= s <= own
            assert bool((gv[:, s] != 0).any()) == inside
            if not inside:
                assert not bool(gk[:, s].any())


def test_softcap_and_scale():
    """Oracle: the loop."""
    compare(attention, qkv(), softcap=0.7)
    compare(attention, qkv(), softcap=0.7, scale=2.0, window=1)
    compare(sdpa_attention, qkv(), scale=2.0)


@pytest.mark.parametrize("T", [1, 7, 123])
def test_equals_torch(T):
    """Oracle: F.scaled_dot_product_attention itself, no loop."""
    q, k, v = qkv(H=3, G=3, T=T, S=T)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(attention(q, k, v), theirs.transpose(1, 2))


def test_gradcheck():
    """Oracle: finite differences, second order too."""
    tensors = qkv(B=1, T=3, S=3, H=2, G=1, K=2)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, softcap=2.0), tensors)
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x, window=1), tensors)


@BOTH
def test_bf16(attend):
    """Oracle: float64; twice the error of the textbook line with every step in bf16 (scores are bf16 here too)."""
    q, k, v = (x.detach().bfloat16() for x in qkv(B=2, T=33, S=33, H=4, G=4, K=16))
    exact = attention(q.double(), k.double(), v.double())
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    scores = (qh @ kh.mT / 4.0).masked_fill(torch.ones(33, 33).triu(1).bool(), -torch.inf)
    plain = (torch.softmax(scores, -1) @ vh).transpose(1, 2)
    o = attend(q, k, v)
    assert o.dtype == torch.bfloat16
    assert (o.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


def test_between_the_products_all_is_fp32():
    """Exact: the same steps spelled out, scores widened before they are scaled."""
    q, k, v = (x.detach().bfloat16() for x in qkv(T=9, S=9, H=2, G=2))
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    p = torch.softmax((qh @ kh.mT).float() * 0.37, -1).bfloat16()
    assert torch.equal(attention(q, k, v, causal=False, scale=0.37), (p @ vh).transpose(1, 2))


@BOTH
def test_non_contiguous_and_one_tensor_thrice(attend):
    """Oracle: contiguous copies."""
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64).transpose(1, 2)
    y = x.contiguous()
    torch.testing.assert_close(attend(x, x, x), attend(y, y.clone(), y.clone()))


SIDES = st.integers(0, 7) | st.none()


@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), SIDES, SIDES)
def test_span_drops_only_limits_that_cut_nothing(T, S, causal, left, right):
    """Oracle: the definition for each pair."""
    mask = masks.visible(T, S, causal=causal, window=(left, right), segment_ids=None, device=torch.device("cpu"))
    expected = torch.tensor([[sees(t, s, T, S, causal, (left, right), None, None) for s in range(S)] for t in range(T)])
    if mask is None:
        assert bool(expected.all())
    else:
        assert torch.equal(mask, expected)


def test_no_mask_where_none_is_needed(monkeypatch):
    """The paths of sdpa_attention: is_causal, no mask, mask."""
    seen = []

    def spy(q, k, v, **kwargs):
        seen.append((kwargs.get("attn_mask") is not None, kwargs.get("is_causal", False)))
        return q

    monkeypatch.setattr("purelm.ops.sdpa.scaled_dot_product_attention", spy)
    sdpa_attention(*qkv())
    sdpa_attention(*qkv(), window=9)
    sdpa_attention(*qkv(T=1))
    sdpa_attention(*qkv(), causal=False)
    sdpa_attention(*qkv(), window=1)
    sdpa_attention(*qkv(), segment_ids=torch.ones(2, 5, dtype=torch.int64))
    assert seen == [(False, True), (False, True), (False, False), (False, False), (True, False), (True, False)]


@BOTH
def test_bad_arguments(attend, unchecked):
    q, k, v = qkv()
    for args, kwargs, message in (
        ((q[0], k, v), {}, "equally many axes"),
        ((q[0, 0], k[0, 0], v[0, 0]), {}, "equally many axes"),
        ((q, k[..., :4], v), {}, "must be"),
        ((q, k[:, :4], v), {}, "must be"),
        ((q[:1], k, v), {}, "must be"),
        ((q[:, :, :3], k, v), {}, "2 heads of k and v must divide the 3 of q"),
        ((q, k, v), {"window": (-1, 0)}, "window must have sides of at least 0"),
        ((q, k, v), {"window": -1}, "window must have sides of at least 0"),
        ((q, k, v), {"segment_ids": torch.ones(2, 4, dtype=torch.int64)}, "segment_ids must have 5 ids for queries"),
        ((q, k, v), {"segment_ids": torch.ones(2, 5)}, "segment_ids must be integers, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(*args, **kwargs)


def test_sdpa_has_no_softcap():
    with pytest.raises(ValueError, match="softcap must be None"):
        sdpa_attention(*qkv(), softcap=1.0)


@pytest.mark.parametrize("scale", [None, 0.3, 1.5])
def test_fp16_scores_that_overflow_before_they_are_scaled(scale):
    """Oracle: the same fp16 numbers in float64. q k^T is beyond 65504, scale q k^T far below it."""
    g = torch.Generator().manual_seed(0)
    centres = (30.0, 40.0) if scale != 1.5 else (3.0, 4.0)
    q, k = (torch.randn(1, 4, 1, 64, generator=g) * 2 + centre for centre in centres)
    q, k, v = (x.half() for x in (q, k, torch.randn(1, 4, 1, 64, generator=g)))
    exact = attention(q.double(), k.double(), v.double(), scale=scale)
    scores = (q.double() @ k.double().mT).abs().max()
    assert (scores > 65504) == (scale != 1.5) and scores * (scale or 0.125) < 65504
    # Scores of 10^4 have a spacing of 8 in fp16: two roundings of them decide which key wins.
    assert (attention(q, k, v, scale=scale).double() - exact).abs().max() < 2e-2


def test_fp16_scores_have_the_bits_that_they_had():
    """Oracle: scaled after the product, written out. A power of two in front of it changes nothing else."""
    q, k, v = (x.half() for x in qkv(dtype=torch.float32))
    q, k, v = (x[:, :, :2] for x in (q, k, v))
    s = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).float() * (1.0 / math.sqrt(q.shape[-1]))
    expected = (torch.softmax(s, -1).half() @ v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, causal=False), expected, rtol=0, atol=2**-11)


@BOTH
def test_no_queries(attend):
    """Oracle: an empty result. And a query that has no keys to see gives zeros, as one that sees none of them."""
    empty, q = torch.zeros(1, 0, 2, 4), torch.ones(1, 3, 2, 4)
    assert attend(empty, empty, empty).shape == (1, 0, 2, 4)
    assert attend(empty, q, q).shape == (1, 0, 2, 4)
    assert torch.equal(attention(q, empty, empty), torch.zeros(1, 3, 2, 4))
