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
def test_left_padding(n0, n1, position, use_sdpa):
    """Law: rows of different lengths in one batch give what each gives alone; with windows; padding may be any id."""
    cfg, params, full = of_position(position)
    ops = REFERENCE._replace(attention=sdpa_attention) if use_sdpa else REFERENCE
    lengths, longest = torch.tensor([n0, n1]), max(n0, n1)
    rows = [TOKENS[0, : n0 + 8], TOKENS[1, : n1 + 8]]
    padding = [torch.full((longest - n,), 3) for n in (n0, n1)]
    prompts = torch.stack([torch.cat([padding[0], rows[0][:n0]]), torch.cat([padding[1], rows[1][:n1]])])
    logits, cache = prefill(params, prompts, empty(cfg), cfg, ops=ops, lengths=lengths)
    for j in range(8):
        for b, n in enumerate((n0, n1)):
            torch.testing.assert_close(logits[b], full[b][n - 1 + j])
        next_tokens = torch.stack([rows[b][n + j] for b, n in enumerate((n0, n1))])
        if j % 2:
            logits, cache = decode(params, next_tokens, cache, cfg, ops=ops)
        else:  # a chunk after a padded one
            logits, cache = prefill(params, next_tokens[:, None], cache, cfg, ops=ops)


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
    assert cache.start is None


@pytest.mark.parametrize("lengths", [None, [3, 5]])
def test_masked_reads_are_those_of_known_length(lengths, monkeypatch):
    """Law: where the length is not known on the host, as under compile, all slots are read through a mask, and what
    is in unused slots does not count."""
    lengths = None if lengths is None else torch.tensor(lengths)
    _, cache = prefill(PARAMS, TOKENS[:, :5], empty(CFG), CFG, lengths=lengths)
    junk = torch.randn(2, 11, 2, 6).double()
    cache = cache._replace(layers=tuple(kv._replace(k=torch.cat([kv.k[:, :5], junk], 1)) for kv in cache.layers))
    known, after = decode(PARAMS, TOKENS[:, 5], cache, CFG, used=5)
    found, _ = decode(PARAMS, TOKENS[:, 5], cache, CFG)
    assert torch.equal(known, found)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    masked, after_masked = decode(PARAMS, TOKENS[:, 5], cache, CFG)
    torch.testing.assert_close(masked, known)
    torch.testing.assert_close(after_masked, after)


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


def test_bad_arguments():
    _, cache = prefill(PARAMS, TOKENS[:, :4], empty(CFG), CFG)
    with pytest.raises(ValueError, match="used must be the cache's length 4, got 3"):
        decode(PARAMS, TOKENS[:, 4], cache, CFG, used=3)
    with pytest.raises(ValueError, match="tokens must have the 2 rows of the cache, got 1"):
        decode(PARAMS, TOKENS[:1, 4], cache, CFG)
    with pytest.raises(ValueError, match="tokens must have the 2 rows of the cache, got 1"):
        prefill(PARAMS, TOKENS[:1, :4], cache, CFG)
    with pytest.raises(ValueError, match="lengths must be None unless the cache is empty"):
        prefill(PARAMS, TOKENS[:, :4], cache, CFG, lengths=torch.tensor([1, 2]))
    for lengths in (torch.tensor([0, 4]), torch.tensor([5, 4])):
        with pytest.raises(ValueError, match=r"lengths must be one number in 1..4 for each row"):
            prefill(PARAMS, TOKENS[:, :4], empty(CFG), CFG, lengths=lengths)
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
