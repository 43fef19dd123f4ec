"""Attention of one new token over a cache. Oracles: `attention` on rows of their own length, in float64."""

import pytest
import torch

from purelm.ops.attention import attention
from purelm.ops.decode_attention import decode_attention_
from purelm.ops.rope import rope, rope_tables

B, S, H, G, K = 4, 20, 6, 2, 8
LENGTH = torch.tensor([0, 5, 12, 19])


def numbers(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def inputs(seed=0):
    return numbers(seed, (B, H, K), (B, G, K), (B, G, K), (B, S, G, K), (B, S, G, K))


@pytest.mark.parametrize("layout", ["interleaved", "half", None])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"scale": 0.7, "softcap": 2.0}], ids=str)
def test_it_is_attention_over_each_row(layout, options):
    """Oracle: a row's own keys in order, then its new one, under a causal mask; 1e-12 in float64."""
    q, k, v, keys, values = inputs()
    before = keys.clone(), values.clone()
    tables = {}
    if layout is not None:
        cos, sin = rope_tables(LENGTH, K, dtype=torch.float64)
        tables = {"cos_BJ": cos, "sin_BJ": sin, "layout": layout}
    got = decode_attention_(q, k, v, keys, values, LENGTH, **tables, **options)
    for b, n in enumerate(LENGTH.tolist()):
        q_1HK, k_1GK = q[b : b + 1], k[b : b + 1]
        if layout is not None:
            q_1HK, k_1GK = (rope(x, cos[b : b + 1], sin[b : b + 1], layout) for x in (q_1HK, k_1GK))
        own = torch.cat([before[0][b, :n], k_1GK]), torch.cat([before[1][b, :n], v[b : b + 1]])
        want = attention(q_1HK[None], own[0][None], own[1][None], **options)[0, 0]
        torch.testing.assert_close(got[b], want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(keys[b, n], k_1GK[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(values[b, n], v[b])
        for x, old in zip((keys, values), before, strict=True):
            others = torch.arange(S) != n
            assert torch.equal(x[b, others], old[b, others])


def test_what_lies_after_a_row_is_not_seen():
    """Exact: NaN in the slots after the new token changes nothing."""
    q, k, v, keys, values = inputs(1)
    want = decode_attention_(q, k, v, keys.clone(), values.clone(), LENGTH)
    for b, n in enumerate(LENGTH.tolist()):
        keys[b, n:], values[b, n:] = torch.nan, 0.0
    assert torch.equal(decode_attention_(q, k, v, keys, values, LENGTH), want)


def test_one_table_for_all_rows():
    """Exact: a table (1, J) is that of every row."""
    q, k, v, keys, values = inputs(2)
    level = torch.full((B,), 7)
    cos, sin = rope_tables(level[:1], K, dtype=torch.float64)
    one = decode_attention_(q, k, v, keys.clone(), values.clone(), level, cos_BJ=cos, sin_BJ=sin)
    each = decode_attention_(
        q, k, v, keys.clone(), values.clone(), level, cos_BJ=cos.expand(B, -1), sin_BJ=sin.expand(B, -1)
    )
    assert torch.equal(one, each)


def test_wrong_arguments(unchecked):
    """Each is named, and the cache is as it was."""
    q, k, v, keys, values = inputs(3)
    before = keys.clone()
    table = torch.ones(B, K // 2, dtype=torch.float64)

    def call(q=q, k=k, v=v, keys=keys, values=values, length=LENGTH, **options):
        return decode_attention_(q, k, v, keys, values, length, **options)

    for message, wrong in {
        "q must be": dict(q=q[0]),
        "must divide": dict(q=q[:, :5]),
        "k and v must be": dict(k=k[:, :1]),
        "length must be": dict(length=LENGTH[:2]),
        "int64": dict(length=LENGTH.int()),
        "both, or neither": dict(cos_BJ=table),
        "cos and sin must be": dict(cos_BJ=table[:2], sin_BJ=table[:2]),
        "window must": dict(window=-1),
        "scale must": dict(scale=0.0),
        "softcap must": dict(softcap=-1.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call(**wrong)
    with pytest.raises((IndexError, RuntimeError)):
        call(length=torch.full((B,), S))
    assert torch.equal(keys, before)
