"""Batches as pure functions of (tokens, key, step): the position in the data is (key, step), with no other state.

`tokens` is a 1-d array of ids: np.memmap, np.ndarray, TokenFile or ShardedTokens; only the batch's own windows are
read. A batch is a dict of "tokens" and "targets", int64 (batch, context_length), where targets are the tokens one to
the right; evaluation adds "weights". batch_size is that of the whole world: rank r of world_size gets rows
r B / W to (r + 1) B / W of the same global batch, whatever W is.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from purelm import random
from purelm.caches import memo
from purelm.data.checks import check_int
from purelm.data.shuffle import permuted
from purelm.random import Key

__all__ = [
    "eval_batch",
    "eval_windows",
    "n_eval_batches",
    "random_windows",
    "shuffled_indices",
    "shuffled_rows",
    "shuffled_windows",
    "windows_per_epoch",
]

BLOCK = 2**12  # places of an epoch's order that are computed together
MOST_ROWS = 2**31  # of a batch; a larger number must be a mistake
Batch = dict[str, Tensor]
Tokens = Any  # a sequence with len and slices: see the head of this file


def random_windows(
    tokens: Tokens,
    key: Key,
    step: int,
    batch_size: int,
    context_length: int,
    device: torch.device | str | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """batch_size windows at uniformly random places, with replacement: the course's get_batch (assignment 1, 5.1).

    Starts are uniform on 0..n - context_length - 1, so that every start has all its targets.

    >>> batch = random_windows(np.arange(100), random.key(0), 0, batch_size=4, context_length=8)
    >>> batch["tokens"].shape, torch.equal(batch["targets"], batch["tokens"] + 1)
    (torch.Size([4, 8]), True)
    """
    n = _check_length(tokens, context_length, context_length + 1)
    check_int("step", step, 0)
    first, last = _rows_of_rank(batch_size, rank, world_size)
    # 64 random bits: with 32, some starts in a corpus of 2**31 tokens or more would be likelier than others.
    # `index` draws this rank's part of the global batch.
    folded = random.fold_in(key.cpu(), step)
    starts = random.randint(folded, (last - first,), 0, n - context_length, n_bits=64, index=first)
    return _to_device(_windows(tokens, starts.tolist(), context_length), device)


def shuffled_windows(
    tokens: Tokens,
    key: Key,
    step: int,
    batch_size: int,
    context_length: int,
    device: torch.device | str | None = None,
    *,
    jitter: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """Disjoint windows in a random order: each exactly once an epoch, and a new order in each epoch.

    The windows of all epochs form one sequence, `windows_per_epoch` in each epoch. Step s takes numbers s B to
    (s + 1) B - 1 of it, so a batch may hold the end of one epoch and the beginning of the next. Window i begins at
    token offset + i * context_length. The offset is 0; with jitter it is drawn anew in each epoch, uniformly from
    0..context_length - 1, so that epochs cut the text at different places (and may have one window less).
    """
    _check_length(tokens, context_length, 0)
    n_windows = windows_per_epoch(len(tokens), context_length, jitter=jitter)
    starts = []
    for epoch, index in _epochs(n_windows, key.cpu(), step, batch_size, rank, world_size):
        offset = 0
        if jitter:
            offset = int(random.randint(_epoch_key(key.cpu(), epoch, 1), (), 0, context_length))
        starts.extend((offset + index * context_length).tolist())
    return _to_device(_windows(tokens, starts, context_length), device)


def windows_per_epoch(n_tokens: int, context_length: int, *, jitter: bool = False) -> int:
    """Windows of context_length in one epoch of `shuffled_windows`: at least 1, else ValueError."""
    needed = 2 * context_length if jitter else context_length + 1
    _check_length(range(n_tokens), context_length, needed)
    # The last target is token n - 1, and jitter may move all windows by up to context_length - 1 tokens.
    return (n_tokens - context_length if jitter else n_tokens - 1) // context_length


def shuffled_rows(
    rows: Mapping[str, Tensor],
    key: Key,
    step: int,
    batch_size: int,
    device: torch.device | str | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """batch_size rows of a dict of tensors with equal first axes (such as `packing.pack` makes), epoch by epoch.

    Each row comes exactly once an epoch, in a new random order in each.
    """
    sizes = {name: len(value) for name, value in rows.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"rows have first axes {sizes}; they must be equal and not 0")
    index = shuffled_indices(next(iter(sizes.values())), key, step, batch_size, rank=rank, world_size=world_size)
    return _to_device({name: value[index] for name, value in rows.items()}, device)


def shuffled_indices(
    n: int, key: Key, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1
) -> Int[Tensor, " batch"]:
    """Elements step * B to (step + 1) * B - 1 of an endless sequence: one random order of 0..n-1 after another."""
    return torch.cat([i for _, i in _epochs(n, key.cpu(), step, batch_size, rank, world_size)])


def eval_batch(
    tokens: Tokens,
    step: int,
    batch_size: int,
    context_length: int,
    device: torch.device | str | None = None,
    *,
    stride: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """Batch `step` of the windows that together predict every token but the first exactly once.

    Windows begin every `stride` tokens (default context_length: no overlap). Each target is counted in the first
    window that has it: weights, float32 (B, T), are 1 there and 0 elsewhere. So with stride < context_length every
    counted target, except in the first window, has at least context_length - stride tokens of context. The last window
    is moved back so that it ends at the last token. All batches have the same shape: the last one is filled up with
    rows of zeros of weight 0, and so is a text shorter than one window.
    """
    n = _check_length(tokens, context_length, 2)
    stride = _check_stride(stride, context_length)
    first, last = _rows_of_rank(batch_size, rank, world_size)
    n_windows = _n_eval_windows(n, context_length, stride)
    if not 0 <= step < -(-n_windows // batch_size):
        raise ValueError(f"step={step}: allowed is 0 to {-(-n_windows // batch_size) - 1}, the batches of this text")
    ids = np.zeros((last - first, context_length + 1), np.int64)
    weights = np.zeros((last - first, context_length), np.float32)
    for row, window in enumerate(range(step * batch_size + first, min(step * batch_size + last, n_windows))):
        start = max(0, min(window * stride, n - 1 - context_length))
        piece = np.asarray(tokens[start : start + context_length + 1])
        ids[row, : len(piece)] = piece
        # The previous window predicted the tokens up to (window - 1) * stride + context_length.
        counted = 0 if window == 0 else (window - 1) * stride + context_length - start
        weights[row, counted : len(piece) - 1] = 1
    return _to_device(
        {"tokens": _tensor(ids[:, :-1]), "targets": _tensor(ids[:, 1:]), "weights": _tensor(weights)}, device
    )


def n_eval_batches(n_tokens: int, batch_size: int, context_length: int, *, stride: int | None = None) -> int:
    """How many batches `eval_batch` has for a text of n_tokens."""
    _check_length(range(n_tokens), context_length, 2)
    check_int("batch_size", batch_size, 1)
    n_windows = _n_eval_windows(n_tokens, context_length, _check_stride(stride, context_length))
    return -(-n_windows // batch_size)


def eval_windows(
    tokens: Tokens,
    batch_size: int,
    context_length: int,
    device: torch.device | str | None = None,
    *,
    stride: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """All batches of `eval_batch`, in order."""
    for step in range(n_eval_batches(len(tokens), batch_size, context_length, stride=stride)):
        yield eval_batch(
            tokens, step, batch_size, context_length, device, stride=stride, rank=rank, world_size=world_size
        )


def _n_eval_windows(n: int, context_length: int, stride: int) -> int:
    return 1 + max(0, -(-(n - 1 - context_length) // stride))


def _epochs(
    n: int, key: Key, step: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[int, Int[Tensor, " some"]]]:
    """This rank's part of batch `step`, as pieces (epoch, indices in 0..n-1) in order."""
    check_int("n", n, 1)
    check_int("step", step, 0)
    first, last = _rows_of_rank(batch_size, rank, world_size)
    position, end = step * batch_size + first, step * batch_size + last
    while position < end:
        epoch, index = divmod(position, n)
        length = min(end - position, n - index)
        if length < BLOCK:
            block, start = divmod(index, BLOCK)
            length = min(length, BLOCK - start)
            yield epoch, _ordered(tuple(key.tolist()), epoch, n, block)[start : start + length]
        else:
            yield epoch, permuted(_epoch_key(key, epoch, 0), n, torch.arange(index, index + length))
        position += length


@memo(16)
def _ordered(key: tuple[int, ...], epoch: int, n: int, block: int) -> Int[Tensor, " some"]:
    """Places block BLOCK to (block + 1) BLOCK - 1 of the epoch's order; not to be written to.

    An order takes some 1,000 short operations for one place and for thousands alike, 4 ms: more than many a step of a
    small model takes on a GPU.
    """
    index = torch.arange(block * BLOCK, min((block + 1) * BLOCK, n))
    return permuted(_epoch_key(torch.tensor(key), epoch, 0), n, index)


def _epoch_key(key: Key, epoch: int, use: int) -> Key:
    return random.fold_in(random.fold_in(key, epoch), use)


def _windows(tokens: Tokens, starts: list[int], context_length: int) -> Batch:
    ids = np.empty((len(starts), context_length + 1), np.int64)
    for row, start in enumerate(starts):
        ids[row] = tokens[start : start + context_length + 1]
    return {"tokens": _tensor(ids[:, :-1]), "targets": _tensor(ids[:, 1:])}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _to_device(batch: Batch, device: torch.device | str | None) -> Batch:
    if device is None:
        return batch
    if torch.device(device).type == "cuda":  # from pinned memory, copying overlaps with the previous step
        return {name: value.pin_memory().to(device, non_blocking=True) for name, value in batch.items()}
    return {name: value.to(device) for name, value in batch.items()}


def _rows_of_rank(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    check_int("batch_size", batch_size, 1, MOST_ROWS)
    check_int("world_size", world_size, 1)
    if batch_size % world_size:
        raise ValueError(f"batch_size={batch_size} is that of all ranks: world_size={world_size} must divide it")
    check_int("rank", rank, 0, world_size - 1)
    size = batch_size // world_size
    return rank * size, (rank + 1) * size


def _check_length(tokens: Tokens, context_length: int, needed: int) -> int:
    check_int("context_length", context_length, 1)
    n = len(tokens)
    # Floats would be truncated and further axes misread, silently. A range is accepted for its length alone.
    first = np.asarray(tokens[0:1])
    if first.ndim != 1 or (n and first.dtype.kind not in "iu"):
        raise ValueError(f"tokens are {first.dtype} with {first.ndim} axes; integers with one axis are needed")
    if n < needed:
        name = os.fspath(tokens.path) if hasattr(tokens, "path") else "tokens"
        raise ValueError(f"{name}: {n} tokens; context_length={context_length} needs at least {needed}")
    return n


def _check_stride(stride: int | None, context_length: int) -> int:
    stride = check_int("stride", context_length if stride is None else stride, 1)
    if stride > context_length:
        raise ValueError(f"stride={stride}: allowed is 1 to context_length={context_length}")
    return stride
