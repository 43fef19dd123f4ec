"""Whose tokens are whose. Oracles: a template that is a list, read by hand; the mask moved by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.chats import assistant_tokens
from purelm.align.responses import masked_batch, packed_masked

USER, ASSISTANT, OPEN, END, NEW_LINE = 100, 101, 102, 103, 104


def encode(messages, opens):
    ids = []
    for message in messages:
        ids += [OPEN, USER if message["role"] == "user" else ASSISTANT, *message["content"], END, NEW_LINE]
    return [*ids, OPEN, ASSISTANT] if opens else ids


content = st.lists(st.integers(0, 99), max_size=4)
conversations = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), content), min_size=1, max_size=6)


@given(conversations)
def test_tokens_of_the_assistant(turns):
    messages = [{"role": role, "content": ids} for role, ids in turns]
    if all(role == "user" for role, _ in turns):
        with pytest.raises(ValueError, match="messages: none is the assistant's"):
            assistant_tokens(encode, messages, [END])
        return
    ids, mask = assistant_tokens(encode, messages, [END])
    assert ids.tolist() == encode(messages, False)
    expected = []
    for role, own in turns:
        expected += [False, False, *[role == "assistant"] * (len(own) + 1), False]
    assert mask.tolist() == expected
    # Without ends the new line after them is trained too.
    assert assistant_tokens(encode, messages)[1].sum() == mask.sum() + sum(role == "assistant" for role, _ in turns)


def test_a_template_that_writes_earlier_answers_otherwise():
    def forgetful(messages, opens):
        kept = [m if i == len(messages) - 1 else {**m, "content": m["content"][-1:]} for i, m in enumerate(messages)]
        return encode(kept, opens)

    talk = [dict(role="user", content=[1]), dict(role="assistant", content=[2, 3])]
    assert assistant_tokens(forgetful, talk, [END])[1].sum() == 3
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template writes what is up to it otherwise"):
        assistant_tokens(forgetful, [*talk, *talk], [END])


rows_strategy = st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=7), min_size=1)


@given(rows_strategy, st.integers(1, 4))
def test_masks_move_with_the_targets(rows, multiple_of):
    """Oracle: target t of a row is token t + 1, and so is its weight; packed, each row's targets in their order."""
    ids, masks = [[i for i, _ in row] for row in rows], [[m for _, m in row] for row in rows]
    batch = masked_batch(ids, masks, pad_id=77, multiple_of=multiple_of)
    for b, row in enumerate(rows):
        n = len(row) - 1
        assert batch["targets"][b, :n].tolist() == ids[b][1:] and batch["tokens"][b, : n + 1].tolist()[:n] == ids[b][:n]
        assert batch["weights"][b].tolist() == [*map(float, masks[b][1:]), *[0.0] * (batch["weights"].shape[1] - n)]
    found = []
    for packed in packed_masked(zip(ids, masks, strict=True), 8):
        for segment in range(1, packed["segment_ids"].max() + 1):
            inside = packed["segment_ids"] == segment
            found.append((packed["targets"][inside].tolist(), packed["weights"][inside].tolist()))
        assert not packed["weights"][packed["segment_ids"] == 0].any()
    expected = [(i[1:], list(map(float, m[1:]))) for i, m in zip(ids, masks, strict=True) if len(i) > 1]
    assert sorted(found) == sorted(expected)


def test_bad_masks():
    for mask in ([True], np.ones(2), [[True, False]]):
        with pytest.raises(ValueError, match="mask 0 must be 2 bools, one a token"):
            masked_batch([[1, 2]], [mask], pad_id=0)
    with pytest.raises(ValueError, match="1 rows and 2 masks"):
        masked_batch([[1]], [[True], [True]], pad_id=0)
    with pytest.raises(ValueError, match="row 1 has 4 tokens; a row of context_length 2 holds 3"):
        list(packed_masked([([1], [True]), ([1, 2, 3, 4], [True] * 4)], 2))
