"""Bits per byte. Oracles: the entropy of a known distribution, and a loop in float64."""

import math

import pytest
import torch

from purelm.evals import Score, bits_per_byte, score


def uniform_loss(params, batch):
    nll = torch.full(batch["targets"].shape, math.log(4.0))
    weights = batch.get("weights", torch.ones_like(nll))
    return (nll * weights).sum() / batch["denominator"], {}


def test_a_uniform_model_over_four_letters_needs_two_bits_a_letter():
    batches = [{"targets": torch.zeros(3, 5, dtype=torch.int64)}, {"targets": torch.zeros(1, 5, dtype=torch.int64)}]
    result = score(uniform_loss, None, batches, n_bytes=20)
    assert result.n_tokens == 20
    assert result.bits_per_byte == pytest.approx(2.0, rel=1e-6)
    assert result.perplexity == pytest.approx(4.0, rel=1e-6)
    # The same text in tokens of two letters each: half the tokens, the same bits a byte would need twice the nats.
    assert score(uniform_loss, None, batches, n_bytes=40).bits_per_byte == pytest.approx(1.0, rel=1e-6)


def test_weights_leave_out_padding_and_batches_of_any_size_add_up():
    g = torch.Generator().manual_seed(0)
    table = torch.rand(50, generator=g)
    weights = (torch.rand(50, generator=g) > 0.3).float()

    def loss_fn(params, batch):
        return (table[batch["targets"]] * batch["weights"]).sum() / batch["denominator"], {}

    expected = float((table.double() * weights.double()).sum())
    for cut in (1, 7, 50):
        ids = torch.arange(50).split(cut)
        batches = [{"targets": i[None], "weights": weights[i][None]} for i in ids]
        result = score(loss_fn, None, batches, n_bytes=100)
        assert result.nats == pytest.approx(expected, rel=1e-6)  # float32 sums inside a batch
        assert result.n_tokens == float(weights.sum())


def test_no_gradient_is_recorded_and_bytes_must_be_positive():
    p = torch.ones(2, requires_grad=True)

    def loss_fn(params, batch):
        out = (params * batch["targets"]).sum() / batch["denominator"]
        assert not out.requires_grad
        return out, {}

    assert score(loss_fn, p, [{"targets": torch.ones(2)}], 8).nats == 2.0
    with pytest.raises(ValueError, match="n_bytes must be positive, got 0"):
        bits_per_byte(1.0, 0)


def test_nothing_measured_and_an_infinite_loss_are_no_numbers():
    """Oracle: the definition. 0 / 0 was a perplexity of 1, the best there is; inf was one of e^700."""
    none = [{"targets": torch.ones(1, 2), "weights": torch.zeros(1, 2)}]
    for batches in ([], none):
        with pytest.raises(ValueError, match="batches must have targets of weights above 0"):
            score(lambda params, batch: (torch.zeros(()), {}), None, batches, 8)
    assert math.isnan(Score(0.0, 0.0, 8).perplexity)
    assert Score(math.inf, 2.0, 8).perplexity == math.inf == Score(1e6, 2.0, 8).perplexity
