"""Rollouts as batches. Oracles: the trainer's log-probabilities of the sampled tokens; hand-made rows."""

import numpy as np
import pytest
import torch

from purelm import random
from purelm.align.rollouts import Rollouts, joined, of_generation, rollout_batch, take
from purelm.generate import Sampling, Stop, generate
from purelm.models import transformer

CFG = transformer.Config(vocab_size=11, context_length=24, d_model=16, n_layers=2, n_heads=2)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_has_the_samplers_log_probs(temperature):
    """Two functions of one tree. fp64 parameters; the sampler's are kept in fp32, so 1e-6."""
    model = transformer.make(CFG)
    params = transformer.init(random.key(0), CFG, dtype=torch.float64)
    out = generate(
        model, params, PROMPTS, random.key(1), max_new_tokens=4, n_samples=4, batch_size=5,
        sampling=Sampling(temperature=temperature), stop=Stop((10, 3)),
    )  # fmt: skip
    rollouts = of_generation(PROMPTS, out, range(12), n_samples=4)
    assert {"stop_id", "length"} == set(rollouts.finish_reasons)
    batch = rollout_batch(rollouts, pad_id=0)
    sampler = batch.pop("sampler_log_probs")
    assert int(batch["weights"].sum()) == sum(len(t) for t in out.tokens)
    log_p, _ = model.log_probs(params, batch, temperature=temperature)
    torch.testing.assert_close(sampler.double(), log_p.double(), rtol=0, atol=1e-6)
    assert torch.equal(rollouts.rewards_B, torch.arange(12.0))
    assert [p.tolist() for p in rollouts.prompts[4:8]] == [PROMPTS[1]] * 4


def test_rows_by_hand():
    """An empty prompt leaves out the first response token; an empty response has no weight."""
    rows = Rollouts(
        [np.array([], int), np.array([7, 8])], [np.array([1, 2, 3]), np.array([], int)],
        [np.array([-1.0, -2.0, -3.0], np.float32), np.array([], np.float32)], ["length", "length"],
        torch.tensor([1.0, 0.5]),
    )  # fmt: skip
    batch = rollout_batch(rows, pad_id=0, multiple_of=4)
    assert batch["weights"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["sampler_log_probs"].tolist() == [[-2, -3, 0, 0], [0, 0, 0, 0]]
    swapped = take(rows, [1, 0, 0])
    assert swapped.rewards_B.tolist() == [0.5, 1, 1] and swapped.responses[2].tolist() == [1, 2, 3]
    again = joined([take(rows, [0]), take(rows, [1])])
    assert [x.tolist() for x in again.responses] == [x.tolist() for x in rows.responses]
    assert torch.equal(again.rewards_B, rows.rewards_B) and again.finish_reasons == rows.finish_reasons


def test_bad_arguments():
    out = generate(
        transformer.make(CFG), transformer.init(random.key(0), CFG), PROMPTS, random.key(1), max_new_tokens=1
    )
    with pytest.raises(ValueError, match="rewards has 2 rows; 3 prompts of 1 samples need 3"):
        of_generation(PROMPTS, out, [1, 2], n_samples=1)
    with pytest.raises(ValueError, match=r"generation\.tokens has 3 rows; 3 prompts of 2 samples need 6"):
        of_generation(PROMPTS, out, [1] * 6, n_samples=2)
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan; rewards must be finite"):
        of_generation(PROMPTS, out, [1, float("nan"), 0], n_samples=1)
