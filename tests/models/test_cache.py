"""Cached decoding: chunks, padding, memory, limits. That it equals the full forward pass is a law of each axis
(test_laws.py)."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm import random, tree
from purelm.models import transformer
from purelm.models.cache_rows import insert, insert_, keep, take
from purelm.models.transformer import Config, apply, decode, decode_, init_cache, prefill
from purelm.ops import REFERENCE
from purelm.ops.sdpa import sdpa_attention

CFG = Config(
    vocab_size=29, context_length=16, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, window=(3, None)
)
PARAMS = transformer.init(random.key(0), CFG, dtype=torch.float64)
TOKENS = torch.randint(0, 29, (2, 16), generator=torch.Generator().manual_seed(0))


def empty(cfg, batch=2, max_len=16, dtype=torch.float64):
    return init_cache(cfg, batch, max_len, dtype)


@pytest.mark.parametrize("window", [None, 2])
def test_bidirectional_models_have_none(window):
    with pytest.raises(ValueError, match=r"cfg.causal must be True for cached decoding"):
        empty(replace(CFG, causal=False, window=window))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_chunks(sizes):
    """Law: a prompt may come in chunks of any sizes."""
    n = min(sum(sizes), 16)
    full = apply(PARAMS, TOKENS[:, :n], CFG)
    cache, at = empty(CFG), 0
    for size in sizes:
        chunk = TOKENS[:, at : min(at + size, n)]
        if chunk.shape[1]:
            logits, cache = prefill(PARAMS, chunk, cache, CFG)
            at += chunk.shape[1]
            torch.testing.assert_close(logits, full[:, at - 1])


@functools.cache
def of_position(position):
    """Config, parameters and the logits of both rows of TOKENS: what comes later changes nothing before it."""
    cfg = replace(CFG, position=position)
    params = transformer.init(random.key(0), cfg, dtype=torch.float64)
    return cfg, params, apply(params, TOKENS[:2], cfg)


@settings(max_examples=20)  # of 36 lengths, 3 positions and 2 ops
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(["rope", "learned", "none"]), st.booleans())
def test_rows_of_different_lengths(n0, n1, position, use_sdpa):
    """Law: rows of different lengths in one batch give what each gives alone; with windows; padding may be any id."""
    cfg, params, full = of_position(position)
    ops = REFERENCE._replace(attention=sdpa_attention) if use_sdpa else REFERENCE
    prompts = padded([TOKENS[0, :n0], TOKENS[1, :n1]])
    logits, cache = prefill(params, prompts, empty(cfg), cfg, ops=ops, lengths=torch.tensor([n0, n1]))
    for j in range(8):
        assert cache.length.tolist() == [n0 + j, n1 + j]
        for b, n in enumerate((n0, n1)):
            torch.testing.assert_close(logits[b], full[b][n - 1 + j])
        next_tokens = torch.stack([TOKENS[b, n + j] for b, n in enumerate((n0, n1))])
        if j % 2:
            logits, cache = decode(params, next_tokens, cache, cfg, ops=ops)
        else:  # a chunk of one token
            logits, cache = prefill(params, next_tokens[:, None], cache, cfg, ops=ops)


def padded(rows, value=3):
    longest = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, torch.full((longest - len(row),), value)]) for row in rows])


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any), min_size=2, max_size=5),
    st.sampled_from(["rope", "learned", "none"]),
    st.booleans(),
)
def test_chunks_of_different_lengths(chunks, position, use_sdpa):
    """Law: each row's prompt may be cut in its own way, and chunks' padding may reach beyond the last slot."""
    cfg, params, full = of_position(position)
    ops = REFERENCE._replace(attention=sdpa_attention) if use_sdpa else REFERENCE
    at = [0, 0]
    first, total = (1, 1), [1 + sum(c[b] for c in chunks) for b in (0, 1)]
    cache = empty(cfg, max_len=min(max(total) + 1, 16))
    for sizes in (first, *chunks):
        sizes = [min(n, 15 - at[b]) for b, n in enumerate(sizes)]
        if not any(sizes):
            continue
        chunk = padded([TOKENS[b, at[b] : at[b] + n] for b, n in enumerate(sizes)])
        logits, cache = prefill(params, chunk, cache, cfg, ops=ops, lengths=torch.tensor(sizes))
        at = [a + n for a, n in zip(at, sizes, strict=True)]
        assert cache.length.tolist() == at
        for b, n in enumerate(sizes):
            if n:
                torch.testing.assert_close(logits[b], full[b, at[b] - 1])
    logits, _ = decode(params, torch.stack([TOKENS[b, at[b]] for b in (0, 1)]), cache, cfg, ops=ops)
    for b in (0, 1):
        torch.testing.assert_close(logits[b], full[b, at[b]])


def test_logits_of_all_positions_of_a_padded_chunk():
    """Oracle: apply, at the positions that are not padding."""
    full = apply(PARAMS, TOKENS, CFG)
    logits, cache = prefill(PARAMS, TOKENS[:, :5], empty(CFG), CFG, lengths=torch.tensor([2, 5]), last_only=False)
    torch.testing.assert_close(logits[0, :2], full[0, :2])
    torch.testing.assert_close(logits[1], full[1, :5])
    chunk = torch.stack([TOKENS[0, 2:6], TOKENS[1, 5:9]])
    logits, _ = prefill(PARAMS, chunk, cache, CFG, lengths=torch.tensor([4, 1]), last_only=False)
    torch.testing.assert_close(logits[0], full[0, 2:6])
    torch.testing.assert_close(logits[1, :1], full[1, 5:6])


def test_rows_move_between_caches():
    """Oracle: apply. A row that was inserted, taken or repeated goes on as it would have; what was there is gone."""
    full = apply(PARAMS, TOKENS, CFG)
    _, old = prefill(PARAMS, TOKENS[[1, 0, 1]][:, :9], empty(CFG, 3), CFG, lengths=torch.tensor([9, 4, 2]))
    _, new = prefill(PARAMS, TOKENS[:1, :3], empty(CFG, 1), CFG)
    before = tree.map(torch.clone, old)
    for put in (insert, insert_):
        cache = put(old, [0, 2], take(new, [0, 0]))
        assert cache.length.tolist() == [3, 4, 3]
        if put is insert:
            assert all(map(torch.equal, tree.leaves(before), tree.leaves(old)))
        for n in (3, 4):
            logits, cache = decode(PARAMS, TOKENS[0, [n, n + 1, n]], cache, CFG)
            torch.testing.assert_close(logits, full[0, [n, n + 1, n]])
    emptied = keep(cache, torch.tensor([True, False, True]))
    assert emptied.length.tolist() == [5, 0, 5]
    logits, _ = decode(PARAMS, TOKENS[0, [5, 0, 5]], emptied, CFG)
    torch.testing.assert_close(logits, full[0, [5, 0, 5]])


def test_rows_that_do_not_fit():
    _, cache = prefill(PARAMS, TOKENS[:, :3], empty(CFG), CFG)
    with pytest.raises(ValueError, match=r"rows must be in 0..1, got 2"):
        take(cache, [0, 2])
    with pytest.raises(ValueError, match=r"rows must be distinct, got \[1, 1\]"):
        insert(cache, [1, 1], cache)
    with pytest.raises(ValueError, match=r"other must be a cache of 1 rows \(one for each of `rows`\) with as many"):
        insert(cache, [1], cache)
    with pytest.raises(ValueError, match=r"got leaves of \(2, 9, 2, 6\) float64, \(2,\) int64 for \(2, 16, 2, 6\)"):
        insert(cache, [0, 1], empty(CFG, max_len=9))
    with pytest.raises(ValueError, match=r"rows must be row numbers \(N,\) in int64, got torch.bool"):
        take(cache, torch.tensor([True, False]))


def test_decode_is_pure_and_decode_in_place_is_equal():
    """Exact: the given cache keeps its bits; decode_ gives the same results, in the given memory."""
    _, cache = prefill(PARAMS, TOKENS[:, :5], empty(CFG), CFG)
    before = tree.map(torch.clone, cache)
    logits, after = decode(PARAMS, TOKENS[:, 5], cache, CFG)
    for a, b in zip(tree.leaves(before), tree.leaves(cache), strict=True):
        assert torch.equal(a, b)
    logits_, after_ = decode_(PARAMS, TOKENS[:, 5], cache, CFG)
    assert torch.equal(logits, logits_)
    for a, b in zip(tree.leaves(after), tree.leaves(after_), strict=True):
        assert torch.equal(a, b)
    assert all(x is y for x, y in zip(tree.leaves(cache.layers), tree.leaves(after_.layers), strict=True))
    assert int(cache.length) == 5
    assert not logits_.requires_grad


def test_prefill_is_pure():
    """Exact: the empty cache stays empty."""
    cache = empty(CFG)
    prefill(PARAMS, TOKENS[:, :5], cache, CFG, lengths=torch.tensor([2, 5]))
    assert not any(bool(x.any()) for x in tree.leaves(cache.layers))
    assert int(cache.length) == 0
    assert cache.length.ndim == 0


@pytest.mark.parametrize("lengths", [None, [3, 5]])
def test_masked_reads_are_those_of_known_length(lengths, monkeypatch):
    """Law: where the length is not known on the host, as under compile, all slots are read through a mask, and what
    is in unused slots does not count."""
    lengths = None if lengths is None else torch.tensor(lengths)
    _, cache = prefill(PARAMS, TOKENS[:, :5], empty(CFG), CFG, lengths=lengths)
    junk = torch.randn(2, 11, 2, 6).double()
    cache = cache._replace(layers=tuple(kv._replace(k=torch.cat([kv.k[:, :5], junk], 1)) for kv in cache.layers))
    known, after = decode(PARAMS, TOKENS[:, 5], cache, CFG, used=5)
    assert not any(bool((x.k[:, 6:] != junk[:, 1:]).any()) for x in after.layers)
    found, _ = decode(PARAMS, TOKENS[:, 5], cache, CFG)
    assert torch.equal(known, found)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    masked, after_masked = decode(PARAMS, TOKENS[:, 5], cache, CFG)
    torch.testing.assert_close(masked, known)
    torch.testing.assert_close(after_masked, after)
    if lengths is not None:  # and where the host knows no more than that no row is longer than this
        bounded, _ = decode(PARAMS, TOKENS[:, 5], cache, CFG, used=6)
        torch.testing.assert_close(bounded, known)


def test_differentiable():
    """Oracle: gradients through apply."""
    params = tree.map(lambda x: x.clone().requires_grad_(), PARAMS)
    logits, cache = prefill(params, TOKENS[:, :3], empty(CFG), CFG)
    logits, _ = decode(params, TOKENS[:, 3], cache, CFG)
    g = torch.randn_like(logits)
    got = torch.autograd.grad(logits, tree.leaves(params), g)
    expected = torch.autograd.grad(apply(params, TOKENS[:, :4], CFG)[:, -1], tree.leaves(params), g)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_cache():
    """Oracle: the fp32 cache, to the rounding of keys and values to 8 bits."""
    params = tree.cast(PARAMS, torch.float32)
    wide, half = (
        decode(params, TOKENS[:, 5], prefill(params, TOKENS[:, :5], empty(CFG, dtype=d), CFG)[1], CFG)
        for d in (torch.float32, torch.bfloat16)
    )
    assert half[1].layers[0].k.dtype == torch.bfloat16
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half[0], wide[0], rtol=0, atol=0.1)


def test_full_cache():
    """One clear error, before anything is written."""
    cache = empty(CFG, max_len=6)
    with pytest.raises(ValueError, match="cache: 7 tokens do not fit, 0 of 6 slots are in use"):
        prefill(PARAMS, TOKENS[:, :7], cache, CFG)
    _, cache = prefill(PARAMS, TOKENS[:, :6], cache, CFG)
    for step in (decode, decode_):
        with pytest.raises(ValueError, match="cache: full, all of its 6 slots are in use"):
            step(PARAMS, TOKENS[:, 6], cache, CFG)
    with pytest.raises(ValueError, match="cache: 1 tokens do not fit, 6 of 6 slots are in use"):
        prefill(PARAMS, TOKENS[:, :1], cache, CFG)
    _, cache = prefill(PARAMS, TOKENS[:, :5], empty(CFG, max_len=6), CFG, lengths=torch.tensor([5, 2]))
    with pytest.raises(ValueError, match="cache: 2 tokens of row 0 do not fit, 5 of 6 slots are in use"):
        prefill(PARAMS, TOKENS[:, :4], cache, CFG, lengths=torch.tensor([2, 4]))
    prefill(PARAMS, TOKENS[:, :4], cache, CFG, lengths=torch.tensor([1, 4]))


def test_bad_arguments(unchecked):
    _, cache = prefill(PARAMS, TOKENS[:, :4], empty(CFG), CFG)
    with pytest.raises(ValueError, match="used must be the cache's length 4, got 3"):
        decode(PARAMS, TOKENS[:, 4], cache, CFG, used=3)
    with pytest.raises(ValueError, match="tokens must have the 2 rows of the cache, got 1"):
        decode(PARAMS, TOKENS[:1, 4], cache, CFG)
    with pytest.raises(ValueError, match="tokens must have the 2 rows of the cache, got 1"):
        prefill(PARAMS, TOKENS[:1, :4], cache, CFG)
    for lengths, message in (
        ([0, 4], r"lengths must be in 1..4 in row 0, which has 0 tokens, got \[0, 4\]"),
        ([1, 5], r"lengths must be in 1..4 in row 1, which has 0 tokens, got \[1, 5\]"),
        ([1.0, 4.0], "lengths must be one integer for each of 2 rows"),
        ([1], "lengths must be one integer for each of 2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill(PARAMS, TOKENS[:, :4], empty(CFG), CFG, lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match=r"lengths must be in 0..4 in row 0, which has 4 tokens, got \[-1, 4\]"):
        prefill(PARAMS, TOKENS[:, :4], cache, CFG, lengths=torch.tensor([-1, 4]))
    with pytest.raises(ValueError, match="batch and max_len must be at least 1"):
        empty(CFG, max_len=0)


def test_learned_positions_end():
    """A row longer than the context is refused, a padded one that is not is not."""
    cfg = replace(CFG, position="learned", context_length=6)
    params = transformer.init(random.key(0), cfg, dtype=torch.float64)
    _, cache = prefill(params, TOKENS[:, :6], empty(cfg), cfg)
    for step in (decode, decode_):
        with pytest.raises(ValueError, match="a row of 7 tokens is longer than context_length 6"):
            step(params, TOKENS[:, 6], cache, cfg)
    with pytest.raises(ValueError, match="a row of 8 tokens is longer than context_length 6"):
        prefill(params, TOKENS[:, :8], empty(cfg), cfg)
    prefill(params, TOKENS[:, :8], empty(cfg), cfg, lengths=torch.tensor([6, 1]))
