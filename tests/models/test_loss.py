"""loss: against torch's cross_entropy, and invariant to padding and to any split of the batch."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from purelm import random, tree
from purelm.models import transformer
from purelm.models.transformer import Config, apply, loss
from purelm.testing.losses import check_loss

CFG = Config(vocab_size=29, context_length=16, d_model=24, n_layers=1, n_heads=4, d_ff=40)
PARAMS = tree.map(lambda x: x.requires_grad_(), transformer.init(random.key(0), CFG, dtype=torch.float64))
LEAVES = tree.leaves(PARAMS)


def make_batch(B, T, seed=0, *, weights=True):
    g = torch.Generator().manual_seed(seed)
    batch = {k: torch.randint(0, 29, (B, T), generator=g) for k in ("tokens", "targets")}
    if weights:
        batch["weights"] = torch.rand(B, T, dtype=torch.float64, generator=g)
    return batch


def assert_same_gradients(a, b, **tolerance):
    torch.testing.assert_close(a, b, **tolerance)
    for x, y in zip(torch.autograd.grad(a, LEAVES), torch.autograd.grad(b, LEAVES), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("weights", [False, True])
def test_equals_torch(weights):
    """Oracle: F.cross_entropy of apply's logits."""
    batch = make_batch(3, 5, weights=weights)
    value, metrics = loss(PARAMS, batch, CFG)
    logits = apply(PARAMS, batch["tokens"], CFG).flatten(0, 1)
    nll = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
    w = batch["weights"].flatten() if weights else torch.ones(15, dtype=torch.float64)
    torch.testing.assert_close(value, (nll * w).sum() / w.sum())
    assert metrics.keys() == {"nll", "n_targets"}
    assert torch.equal(metrics["nll"], value)
    assert not any(m.requires_grad or m.ndim for m in metrics.values())
    torch.testing.assert_close(metrics["n_targets"].double(), w.sum())


def test_z_loss_and_softcap():
    """Oracle: the formula on apply's logits; the metric nll is without the z term."""
    cfg = replace(CFG, logit_softcap=2.0)
    batch = make_batch(2, 4, weights=False)
    logits = apply(PARAMS, batch["tokens"], cfg)
    log_z = logits.logsumexp(-1)
    nll = log_z - logits.gather(-1, batch["targets"][..., None])[..., 0]
    value, metrics = loss(PARAMS, batch, cfg, z_loss=0.01)
    torch.testing.assert_close(value, (nll + 0.01 * log_z**2).mean())
    torch.testing.assert_close(metrics["nll"], nll.mean())


@pytest.mark.parametrize("T", [1, 2, 7])
def test_laws_of_a_loss(T):
    """Laws: those of check_loss; among them that parts of a batch add up to the whole, however it is split."""
    check_loss(partial(transformer.make(CFG).loss, z_loss=0.1), PARAMS, make_batch(4, T))


@given(st.integers(0, 5), st.integers(1, 7), st.integers(0, 28), st.integers(0, 2**31))
def test_padding(n_pad, T, filler, seed):
    """Law: positions of weight 0 after the text, whatever their tokens and targets, change nothing."""
    batch = make_batch(2, T, seed)

    def pad(x, value):
        return F.pad(x, (0, n_pad), value=value)

    padded = {
        "tokens": pad(batch["tokens"], filler),
        "targets": pad(batch["targets"], -100),
        "weights": pad(batch["weights"], 0.0),
    }
    assert_same_gradients(loss(PARAMS, padded, CFG)[0], loss(PARAMS, batch, CFG)[0])


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunk_is_no_choice_of_result(chunk):
    """Law: chunked and whole losses agree, with gradients."""
    batch = make_batch(3, 5)
    assert_same_gradients(loss(PARAMS, batch, CFG, z_loss=0.1, chunk=chunk)[0], loss(PARAMS, batch, CFG, z_loss=0.1)[0])


def test_packed_batch():
    """Law: two documents in one row cost what they cost in two rows."""
    batch = make_batch(2, 5)
    ids = torch.tensor([[1] * 5 + [2] * 5])
    packed = {**{k: v.reshape(1, 10) for k, v in batch.items()}, "segment_ids": ids}
    assert_same_gradients(loss(PARAMS, packed, CFG)[0], loss(PARAMS, batch, CFG)[0])


def test_nothing_but_padding():
    """Exact: loss 0 and zero gradients, no NaN."""
    batch = make_batch(2, 3)
    batch["weights"] = torch.zeros(2, 3)
    value, _ = loss(PARAMS, batch, CFG)
    assert value == 0.0
    assert not any(bool(g.any()) for g in torch.autograd.grad(value, LEAVES))


def test_bf16_loss_is_fp32():
    """Oracle: float64; only the logits are bf16, the sum over tokens is not."""
    params = tree.cast(PARAMS, torch.bfloat16)
    batch = make_batch(4, 16, weights=False)
    value, _ = loss(params, batch, CFG)
    assert value.dtype == torch.float32
    exact, _ = loss(tree.cast(params, torch.float64), batch, CFG)
    assert abs(value.double() - exact) < 0.02  # logits of size 3 rounded to 2^-9, averaged over 64 targets
