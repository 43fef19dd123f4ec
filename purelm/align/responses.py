"""Pairs of prompts and responses as batches of a model: predictions of response tokens count, those of prompts do not.

    batch = response_batch(encode_all(prompts), encode_all(responses), pad_id=2)
    loss, metrics = model.loss(params, batch)              # mean over the response tokens of the batch
    log_p_BT, entropy_BT = model.log_probs(params, batch)  # 0 where the weights are 0; no logits are held

The weights lie in the coordinates of targets: weights[b, t] is 1 where targets[b, t] is a token of the response. The
course's `tokenize_prompt_and_output` returns the same three tensors as input_ids, labels and response_mask.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from purelm.data.packing import packed_rows

__all__ = [
    "masked_batch",
    "packed_masked",
    "packed_responses",
    "packed_windows",
    "response_batch",
    "tokenize_prompt_and_output",
]

Ids = Sequence[int] | np.ndarray
Overlong = Literal["error", "truncate", "drop"]


def response_batch(
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    *,
    pad_id: int,
    max_length: int | None = None,
    overlong: Overlong = "error",
    multiple_of: int = 1,
) -> dict[str, Tensor]:
    """{"tokens", "targets", "weights"}, each (B, T): rows prompt + response, padded on the right, then shifted by one.

    T is one less than the longest row. tokens = row[:-1], targets = row[1:]; so the last token of a shorter row is
    among its tokens, with padding as its target. weights, fp32, are 1 on response tokens: those at T >= len(prompt) - 1
    and before the row's end. With an empty prompt the first response token is predicted from nothing, and is left out.
    An empty response has no weight at all: the row counts for nothing.

    Args:
        max_length: most tokens of a row, prompt and response together; None: any.
        overlong: what becomes of longer rows: "error" names the first, "truncate" cuts the end of the response (an
            error where the prompt alone is too long), "drop" leaves them out.
        multiple_of: T is rounded up to a multiple of it, for fewer shapes to compile for.

    >>> batch = response_batch([[5, 6], [5]], [[7, 8], [9]], pad_id=0)
    >>> batch["tokens"].tolist(), batch["targets"].tolist()
    ([[5, 6, 7], [5, 9, 0]], [[6, 7, 8], [9, 0, 0]])
    >>> batch["weights"].tolist()
    [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    rows = list(_rows(prompts, responses, max_length, overlong))
    if not rows:
        raise ValueError("no pair of a prompt and a response is left")
    masks = [np.arange(len(ids)) >= n_prompt for ids, n_prompt in rows]
    return masked_batch([ids for ids, _ in rows], masks, pad_id=pad_id, multiple_of=multiple_of)


def masked_batch(
    rows: Sequence[Ids], masks: Sequence[Sequence[bool] | np.ndarray], *, pad_id: int, multiple_of: int = 1
) -> dict[str, Tensor]:
    """`response_batch` of rows in which any tokens are trained, such as several answers of one conversation.

    masks: for each row, which of its tokens have weight 1. The first token of a row is predicted from nothing, and has
    none.

    >>> masked_batch([[5, 6, 7]], [[True, False, True]], pad_id=0)["weights"].tolist()
    [[0.0, 1.0]]
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    if len(rows) != len(masks) or not rows:
        raise ValueError(f"{len(rows)} rows and {len(masks)} masks; one of each is needed, and at least one")
    longest = max(max(len(ids) for ids in rows) - 1, 1)
    T = -(-longest // multiple_of) * multiple_of
    padded = np.full((len(rows), T + 1), pad_id, np.int64)
    weights = np.zeros((len(rows), T), np.float32)
    for b, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        ids = _ids(row, f"rows[{b}]")
        padded[b, : len(ids)] = ids
        weights[b, : max(len(ids) - 1, 0)] = _mask(mask, ids, b)[1:]
    tokens = torch.from_numpy(padded)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "targets": tokens[:, 1:].contiguous(),
        "weights": torch.from_numpy(weights),
    }


def tokenize_prompt_and_output(
    prompts: Sequence[str], outputs: Sequence[str], encode: Callable[[str], Ids], pad_id: int, **options: Any
) -> dict[str, Tensor]:
    """`response_batch` of texts, each of which is encoded by itself and without special tokens of its own.

    encode: text -> ids, such as `partial(tokenizer.encode, bpe)`. options: those of `response_batch`.
    """
    for name, texts in (("prompts", prompts), ("outputs", outputs)):
        if isinstance(texts, str):
            raise ValueError(f"{name} must be a list of texts, got one text")
    return response_batch(
        [encode(text) for text in prompts], [encode(text) for text in outputs], pad_id=pad_id, **options
    )


def packed_responses(
    prompts: Iterable[Ids], responses: Iterable[Ids], context_length: int, *, pad_id: int = 0, open_rows: int = 64
) -> Iterator[dict[str, np.ndarray]]:
    """Rows of one length that hold several pairs each, told apart by segment_ids: `data.packed_rows` with weights.

    Each row has "tokens", "targets", "segment_ids" int64 (T,) and "weights" float32 (T,), 1 on response tokens. Pairs
    stay whole. ValueError names a pair of more than context_length predictions.
    """
    pairs = ((np.asarray(p, np.int64), np.asarray(r, np.int64)) for p, r in zip(prompts, responses, strict=True))
    rows = ((np.concatenate([p, r]), np.arange(len(p) + len(r)) >= len(p)) for p, r in pairs)
    return packed_masked(rows, context_length, pad_id=pad_id, open_rows=open_rows, what="pair")


def packed_masked(
    rows: Iterable[tuple[Ids, Sequence[bool] | np.ndarray]],
    context_length: int,
    *,
    pad_id: int = 0,
    open_rows: int = 64,
    what: str = "row",
) -> Iterator[dict[str, np.ndarray]]:
    """`packed_responses` of (ids, mask) in which any tokens are trained (`masked_batch`). what: how an error calls one.

    >>> row, = packed_masked([([5, 6, 7], [False, True, False]), ([8, 9], [False, True])], 4)
    >>> row["targets"].tolist(), row["weights"].tolist()
    ([6, 7, 9, 0], [1.0, 0.0, 1.0, 0.0])
    """

    def documents() -> Iterator[np.ndarray]:
        for i, (row, mask) in enumerate(rows):
            ids = _ids(row, f"{what} {i}")
            if len(ids) - 1 > context_length:
                most = f"a row of context_length {context_length} holds {context_length + 1}"
                raise ValueError(f"{what} {i} has {len(ids)} tokens; {most}")
            if len(ids) < 2:
                continue
            # The packer moves ids about and does not look at them, so an offset carries the mark through it.
            yield ids + _RESPONSE * _mask(mask, ids, i)

    for row in packed_rows(documents(), context_length, open_rows=open_rows, pad_id=pad_id):
        of_response = row["targets"] >= _RESPONSE
        row["weights"] = of_response.astype(np.float32)
        for name in ("tokens", "targets"):
            row[name] = np.where(row[name] >= _RESPONSE, row[name] - _RESPONSE, row[name])
        yield row


def packed_windows(documents: Iterable[Ids], context_length: int) -> dict[str, Tensor]:
    """{"tokens", "targets"}, each (N, T): all documents, one after the other, cut into windows of T = context_length.

    Every token but the first is a target once, also across the borders of windows and of documents; of n tokens in all
    N = floor((n - 1) / T), and what is left at the end is dropped. Documents see each other: the course's packing.
    `data.packing` and `packed_responses` keep them apart.

    >>> rows = packed_windows([[1, 2, 3], [4, 5], [6]], 2)
    >>> rows["tokens"].tolist(), rows["targets"].tolist()
    ([[1, 2], [3, 4]], [[2, 3], [4, 5]])
    """
    if not isinstance(context_length, int) or context_length < 1:
        raise ValueError(f"context_length must be an integer of at least 1, got {context_length!r}")
    given = [_ids(document, f"documents[{i}]") for i, document in enumerate(documents)]
    ids = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *given]))
    n = max(len(ids) - 1, 0) // context_length
    if not n:
        raise ValueError(f"documents: {len(ids)} tokens, and a window and its targets take {context_length + 1}")
    end = n * context_length
    return {"tokens": ids[:end].view(n, -1), "targets": ids[1 : end + 1].view(n, -1)}


_RESPONSE = 2**40  # no id is as large


def _mask(mask: Sequence[bool] | np.ndarray, ids: np.ndarray, number: int) -> np.ndarray:
    found = np.asarray(mask)
    if found.shape != ids.shape or found.dtype != np.bool_:
        raise ValueError(f"mask {number} must be {len(ids)} bools, one a token, got {found.dtype} {found.shape}")
    return found


def _rows(
    prompts: Sequence[Ids], responses: Sequence[Ids], max_length: int | None, overlong: Overlong
) -> Iterator[tuple[np.ndarray, int]]:
    """(ids of the row, how many of them are the prompt's)."""
    if overlong not in ("error", "truncate", "drop"):
        raise ValueError(f"overlong must be error, truncate or drop, got {overlong!r}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses; one response a prompt is needed")
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = np.concatenate([_ids(prompt, f"prompts[{i}]"), _ids(response, f"responses[{i}]")])
        if max_length is not None and len(ids) > max_length:
            if overlong == "drop":
                continue
            if overlong == "error" or len(prompt) >= max_length:
                what = "prompt" if len(prompt) >= max_length else "prompt and response"
                n = len(prompt) if len(prompt) >= max_length else len(ids)
                raise ValueError(f"row {i}: its {what} has {n} tokens, more than max_length {max_length} allows")
            ids = ids[:max_length]
        yield ids, len(prompt)


def _ids(ids: Ids, what: str) -> np.ndarray:
    x = np.asarray(ids)
    if x.ndim != 1 or (x.size and x.dtype.kind not in "iu"):
        raise ValueError(f"{what}: ids must be a list of integers, got dtype {x.dtype} and shape {x.shape}")
    if x.size and int(x.min()) < 0:
        raise ValueError(f"{what}: holds the id {int(x.min())}; ids are 0 or more")
    return x.astype(np.int64)
