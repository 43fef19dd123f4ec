"""Batches of prompts and responses. Oracles: the definition, token by token; each pair by itself through a model."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random
from purelm.align.responses import packed_responses, response_batch, tokenize_prompt_and_output
from purelm.models import transformer

ids = st.lists(st.integers(0, 28), max_size=6)
pairs = st.lists(st.tuples(ids, ids), min_size=1, max_size=5)


@given(pairs, st.integers(1, 4))
def test_every_position(drawn, multiple_of):
    """Position t predicts row[t + 1], and counts if that is a token of the response."""
    prompts, responses = [p for p, _ in drawn], [r for _, r in drawn]
    batch = response_batch(prompts, responses, pad_id=28, multiple_of=multiple_of)
    T = batch["tokens"].shape[1]
    assert T % multiple_of == 0 and T - multiple_of < max(max(len(p + r) for p, r in drawn) - 1, 1) <= T
    for b, (p, r) in enumerate(drawn):
        row = [*p, *r] + [28] * (T + 1 - len(p + r))
        assert batch["tokens"][b].tolist() == row[:-1] and batch["targets"][b].tolist() == row[1:]
        counts = [len(p) <= t + 1 < len(p + r) for t in range(T)]
        assert batch["weights"][b].tolist() == [float(c) for c in counts]
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64 and batch["weights"].dtype == torch.float32


def test_the_course_s_rows():
    """Shifted after padding: a shorter row keeps its last token among its tokens, and predicts padding from it."""
    words = {"Hello": [1, 2], "world": [3], "a": [4], "b c": [5, 6, 7]}
    batch = tokenize_prompt_and_output(["Hello", "a"], ["world", "b c"], words.__getitem__, pad_id=0)
    assert batch["tokens"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["targets"].tolist() == [[2, 3, 0], [5, 6, 7]]
    assert batch["weights"].tolist() == [[0, 1, 0], [1, 1, 1]]


def test_overlong():
    pairs = ([[1, 2], [1, 2, 3, 4]], [[3, 4, 5], [5]])
    with pytest.raises(ValueError, match="row 0: its prompt and response has 5 tokens, more than max_length 4 allows"):
        response_batch(*pairs, pad_id=0, max_length=4)
    with pytest.raises(ValueError, match="row 1: its prompt has 4 tokens, more than max_length 4 allows"):
        response_batch(*pairs, pad_id=0, max_length=4, overlong="truncate")
    cut = response_batch([[1, 2]], [[3, 4, 5]], pad_id=0, max_length=4, overlong="truncate")
    assert cut["targets"].tolist() == [[2, 3, 4]]
    with pytest.raises(ValueError, match="no pair of a prompt and a response is left"):
        response_batch(*pairs, pad_id=0, max_length=4, overlong="drop")


CFG = transformer.Config(vocab_size=29, context_length=32, d_model=16, n_layers=1, n_heads=2)
PARAMS = transformer.init(random.key(0), CFG, dtype=torch.float64)


@given(st.lists(st.tuples(ids.filter(len), ids), min_size=1, max_size=6))
def test_packed_pairs_have_the_losses_of_each_alone(drawn):
    """Sum of losses and number of targets, by the model; and no pair is divided or lost."""
    rows = list(packed_responses([p for p, _ in drawn], [r for _, r in drawn], 12, pad_id=28))
    alone = [transformer.loss(PARAMS, {**_double(response_batch([p], [r], pad_id=28)), **ONE}, CFG) for p, r in drawn]
    counted = sum(int(row["weights"].sum()) for row in rows)
    assert counted == sum(len(r) for _, r in drawn)
    if rows:
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        assert int(batch["tokens"].max()) <= 28 and int(batch["targets"].max()) <= 28
        packed, _ = transformer.loss(PARAMS, {**_double(batch), **ONE}, CFG)
        torch.testing.assert_close(packed, sum(loss for loss, _ in alone))


ONE = {"denominator": torch.ones((), dtype=torch.float64)}


def _double(batch):
    return {**batch, "weights": batch["weights"].double()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: response_batch([[1]], [[1], [2]], pad_id=0), "1 prompts and 2 responses"),
        (lambda: response_batch([[1.5]], [[1]], pad_id=0), r"prompts\[0\]: ids must be a list of integers, got dt"),
        (lambda: response_batch([[1]], [[-1]], pad_id=0), r"responses\[0\]: holds the id -1"),
        (lambda: response_batch([[1]], [[1]], pad_id=0, max_length=1), "max_length must be at least 2, got 1"),
        (lambda: response_batch([[1]], [[1]], pad_id=0, overlong="cut"), "overlong must be error, truncate or drop"),
        (lambda: response_batch([[1]], [[1]], pad_id=0, multiple_of=0), "multiple_of must be at least 1, got 0"),
        (lambda: tokenize_prompt_and_output("ab", ["c"], list, 0), "prompts must be a list of texts, got one text"),
        (lambda: list(packed_responses([[1] * 9], [[2] * 9], 12)), "pair 0 has 18 tokens; a row of context_len"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
