"""Which tokens of a conversation the assistant wrote, by a model's chat template: what fine-tuning on chats trains.

    encode = lambda messages, prompt: encode_chat(bpe, chat, messages, prompt)
    ids, mask = assistant_tokens(encode, [{"role": "user", ...}, {"role": "assistant", ...}, ...])
    batch = masked_batch([ids], [mask], pad_id=0)          # purelm.align.responses
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["assistant_tokens"]

Message = Mapping[str, Any]
# (messages, whether the opening of an answer follows) -> ids
Encode = Callable[[Sequence[Message], bool], Any]


def assistant_tokens(
    encode: Encode, messages: Sequence[Message], ends: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """(ids of the conversation, bool of each: whether the assistant wrote it), both (T,).

    Message k's tokens are those by which the conversation of k + 1 messages is longer than that of k with the opening
    of an answer; so the first is what the model is asked to sample, and the opening is not trained.

    Args:
        ends: ids that end an answer, such as that of <|im_end|>. What the template writes after the last of them in a
            message, a new line say, is not trained, since no sampled answer goes on beyond it.
    ValueError for a conversation without a message of the assistant, and for a template that writes the beginning
    otherwise when more follows (some leave out earlier reasoning): which tokens are whose could not be told.

    >>> def encode(messages, prompt):  # 1, a message, 2; an answer is opened by 1 9
    ...     ids = [x for m in messages for x in (1, *((9,) if m["role"] == "assistant" else ()), *m["content"], 2)]
    ...     return ids + [1, 9] if prompt else ids
    >>> ids, mask = assistant_tokens(encode, [dict(role="user", content=[5]), dict(role="assistant", content=[6, 7])])
    >>> ids.tolist(), mask.astype(int).tolist()
    ([1, 5, 2, 1, 9, 6, 7, 2], [0, 0, 0, 0, 0, 1, 1, 1])
    """
    whole = np.asarray(encode(messages, False), np.int64)
    mask = np.zeros(len(whole), bool)
    numbers = [k for k, message in enumerate(messages) if message.get("role") == "assistant"]
    if not numbers:
        raise ValueError("messages: none is the assistant's, so there is nothing to learn")
    for k in numbers:
        opened = np.asarray(encode(messages[:k], True), np.int64)
        closed = np.asarray(encode(messages[: k + 1], False), np.int64)
        for part, what in ((opened, "before it"), (closed, "up to it")):
            if not np.array_equal(whole[: len(part)], part):
                raise ValueError(
                    f"messages[{k}]: the chat template writes what is {what} otherwise when more messages follow, so "
                    "its tokens cannot be told: make a conversation that ends there an example of its own"
                )
        stops = [i for i in range(len(opened), len(closed)) if whole[i] in ends]
        mask[len(opened) : stops[-1] + 1 if stops else len(closed)] = True
    return whole, mask
