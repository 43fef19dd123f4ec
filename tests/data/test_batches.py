"""Batches: windows are what slicing gives, epochs are exact, ranks share one global batch, evaluation counts once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random
from purelm.data.batches import (
    BLOCK,
    eval_batch,
    eval_windows,
    n_eval_batches,
    random_windows,
    shuffled_indices,
    shuffled_rows,
    shuffled_windows,
    windows_per_epoch,
)
from purelm.data.shuffle import permuted
from purelm.data.tokens import TokenWriter, open_tokens

KEY = random.key(7)


def starts_of(batch):
    """Of windows over arange: the first token is the start; also checks that each window is a run."""
    tokens, targets = batch["tokens"], batch["targets"]
    assert tokens.dtype == targets.dtype == torch.int64 and tokens.is_contiguous() and targets.is_contiguous()
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(tokens.shape[1]))
    assert torch.equal(targets, tokens + 1)
    return tokens[:, 0].tolist()


def test_random_windows_cover_all_starts():
    """Oracle: the uniform distribution over n - T starts; none outside, each met, chi squared below its 1e-5 tail."""
    n, length = 25, 5
    starts = [s for step in range(40) for s in starts_of(random_windows(np.arange(n), KEY, step, 50, length))]
    counts = np.bincount(starts, minlength=n - length)
    assert len(counts) == n - length == 20
    assert ((counts - 100) ** 2 / 100).sum() < 58  # 19 degrees of freedom


@pytest.mark.parametrize("make", [random_windows, shuffled_windows])
def test_pure_in_key_and_step(make):
    """Equal (key, step) give equal batches, another key or step gives another; the tokens are not touched."""
    tokens = np.arange(1000, dtype=np.uint16)
    tokens.flags.writeable = False
    batches = [make(tokens, random.key(k), s, 8, 16)["tokens"] for k, s in [(0, 0), (0, 0), (1, 0), (0, 1)]]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2]) and not torch.equal(batches[0], batches[3])


@given(
    n=st.integers(2, 200), length=st.integers(1, 20), batch=st.integers(1, 40), jitter=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_each_window_once_an_epoch(n, length, batch, jitter, seed):
    """Oracle: a set. Any run of windows_per_epoch windows from an epoch's start is disjoint and equally spaced."""
    if n < (2 * length if jitter else length + 1):
        with pytest.raises(ValueError, match="needs at least"):
            windows_per_epoch(n, length, jitter=jitter)
        return
    per_epoch = windows_per_epoch(n, length, jitter=jitter)
    starts, step = [], 0
    while len(starts) < 3 * per_epoch:
        starts += starts_of(
            shuffled_windows(np.arange(n), random.key(seed), step, batch, length, jitter=jitter)
        )
        step += 1
    for epoch in range(3):
        found = sorted(starts[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert found == [found[0] + i * length for i in range(per_epoch)]
        assert found[0] < length if jitter else found[0] == 0
        assert found[-1] + length <= n - 1


@pytest.mark.parametrize("n", [5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_order_does_not_depend_on_how_it_is_asked_for(n):
    """Oracle: `permuted` of all places at once. Batches that reach over blocks and epochs, in any order of steps."""
    whole = [permuted(random.fold_in(random.fold_in(KEY, epoch), 0), n, torch.arange(n)) for epoch in range(2)]
    sequence = torch.cat(whole)
    for size in (3, 1000, 2 * BLOCK + 5):
        steps = [len(sequence) // size - 1, 0, BLOCK // size, BLOCK // size, n // size]
        for step in (s for s in steps if s >= 0 and (s + 1) * size <= 2 * n):
            got = shuffled_indices(n, KEY, step, size)
            assert torch.equal(got, sequence[step * size : (step + 1) * size])
            got.zero_()  # what is kept is not what the caller has


def test_epochs_differ():
    """A new order each epoch, and with jitter new cuts; every offset is met."""
    tokens = np.arange(1001)
    orders = [starts_of(shuffled_windows(tokens, KEY, step, 100, 10)) for step in range(3)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(0, 1000, 10))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    offsets = [starts_of(shuffled_windows(tokens, KEY, step, 99, 10, jitter=True))[0] % 10 for step in range(100)]
    assert set(offsets) == set(range(10))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_global_batch(world_size):
    """Oracle: the batch of one process. Concatenated over ranks every kind of batch is that batch."""
    tokens, options = np.arange(101), {"batch_size": 12, "context_length": 5}
    rows = {"tokens": torch.arange(7)[:, None].expand(7, 3)}
    for step in range(3):
        for make in (
            lambda step, **kw: random_windows(tokens, KEY, step, **options, **kw),
            lambda step, **kw: shuffled_windows(tokens, KEY, step, **options, **kw),
            lambda step, **kw: shuffled_windows(tokens, KEY, step, **options, jitter=True, **kw),
            lambda step, **kw: shuffled_rows(rows, KEY, step, batch_size=12, **kw),
            lambda step, **kw: eval_batch(tokens, step, **options, stride=2, **kw),
        ):
            whole = make(step)
            parts = [make(step, rank=rank, world_size=world_size) for rank in range(world_size)]
            for name in whole:
                assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_windows_of_files(tmp_path):
    """Oracle: the same call on the array. np.memmap, TokenFile, shards and a 2**32-id file give equal batches."""
    ids = np.random.default_rng(0).integers(0, 70000, 500)
    for shard_tokens in (None, 33):
        path = tmp_path / f"{shard_tokens}.bin"
        with TokenWriter(path, 70000, shard_tokens=shard_tokens) as writer:
            writer.append(ids)
        opened = open_tokens(path)
        for tokens in (opened, opened.tokens):
            for make in (random_windows, shuffled_windows):
                for name, value in make(tokens, KEY, 3, 8, 40).items():
                    assert torch.equal(value, make(ids, KEY, 3, 8, 40)[name])
            for got, expected in zip(eval_windows(tokens, 4, 40), eval_windows(ids, 4, 40), strict=True):
                assert all(torch.equal(got[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"33\.bin: 500 tokens; context_length=500 needs at least 501"):
        random_windows(open_tokens(tmp_path / "33.bin"), KEY, 0, 1, 500)


def test_starts_beyond_32_bits():
    """A corpus of 2**34 tokens: starts reach beyond 2**33 and below 2**31, and nothing but the windows is read."""

    class Huge:
        def __len__(self):
            return 2**34

        def __getitem__(self, index):
            return np.arange(index.start, index.stop)

    for make in (random_windows, shuffled_windows):
        starts = starts_of(make(Huge(), KEY, 0, 64, 8))
        assert max(starts) > 2**33 and min(starts) < 2**31 and len(set(starts)) == 64


@given(n=st.integers(2, 120), length=st.integers(1, 30), batch=st.integers(1, 7), data=st.data())
def test_evaluation_counts_each_target_once(n, length, batch, data):
    """Oracle: the list 1..n-1. Weighted targets are it exactly; context is as long as promised; shapes are equal."""
    stride = data.draw(st.integers(1, length))
    batches = list(eval_windows(np.arange(n), batch, length, stride=stride))
    assert len(batches) == n_eval_batches(n, batch, length, stride=stride)
    counted = []
    for b in batches:
        assert b["tokens"].shape == b["targets"].shape == b["weights"].shape == (batch, length)
        assert b["weights"].dtype == torch.float32 and set(b["weights"].unique().tolist()) <= {0.0, 1.0}
        mask = b["weights"] > 0
        counted += b["targets"][mask].tolist()
        assert torch.equal(b["targets"][mask], b["tokens"][mask] + 1)
        assert torch.equal(b["tokens"], torch.where(mask.any(1, keepdim=True), b["tokens"], 0))  # rows of filling
        position = torch.arange(length).expand(batch, length)[mask]
        later = b["targets"][mask] > length
        assert bool((position[later] >= length - stride).all())
    assert counted == list(range(1, n))
    last = batches[-1]["targets"][(n_windows := -(-max(0, n - 1 - length) // stride)) % batch]
    assert n_windows == 0 or last.tolist() == list(range(n - length, n))  # moved back to end at the last token


def test_rows_once_an_epoch():
    """Oracle: sorting. Rows of a dict come each once an epoch, all fields together."""
    rows = {"tokens": torch.arange(10).reshape(5, 2), "weights": torch.arange(5.0)}
    got = [shuffled_rows(rows, KEY, step, 2) for step in range(5)]
    weights = torch.cat([b["weights"] for b in got])
    assert weights[:5].sort().values.tolist() == weights[5:].sort().values.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(torch.cat([b["tokens"] for b in got])[:, 0], 2 * weights.long())
    assert torch.equal(shuffled_indices(5, KEY, 2, 2), weights[4:6].long())


def test_device_argument():
    """A named device is honoured; on the CPU nothing else changes."""
    plain = random_windows(np.arange(50), KEY, 0, 4, 8)
    moved = random_windows(np.arange(50), KEY, 0, 4, 8, "cpu")
    assert all(torch.equal(plain[name], moved[name]) for name in plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: random_windows(t, KEY, 0, 4, 10), "tokens: 10 tokens; context_length=10 needs at least 11"),
        (lambda t: random_windows(t, KEY, 0, 4, 0), "context_length=0"),
        (lambda t: random_windows(t, KEY, 0, 0, 4), "batch_size=0"),
        (lambda t: random_windows(t, KEY, 0, 4, 4, world_size=3), "batch_size=4 .*world_size=3 must divide"),
        (lambda t: random_windows(t, KEY, 0, 4, 4, rank=2, world_size=2), "rank=2: allowed is 0 to 1"),
        (lambda t: shuffled_windows(t, KEY, 0, 4, 10), "needs at least 11"),
        (lambda t: shuffled_windows(t, KEY, 0, 4, 6, jitter=True), "context_length=6 needs at least 12"),
        (lambda t: shuffled_windows(t, KEY, -1, 4, 6), "step=-1"),
        (lambda t: eval_batch(t, 0, 4, 4, stride=5), "stride=5: allowed is 1 to context_length=4"),
        (lambda t: eval_batch(t, 0, 4, 4, stride=0), "stride=0: allowed is 1 or more"),
        (lambda t: n_eval_batches(20, 0, 4), "batch_size=0: allowed is 1 or more"),
        (lambda t: random_windows(t, KEY, 0, 2.0, 4), "batch_size=2.0: allowed is 1 to"),
        (lambda t: random_windows(t, KEY, 0, 10**12, 4), "batch_size=1000000000000"),
        (lambda t: random_windows(t, KEY, 0, True, 4), "batch_size=True"),
        (lambda t: random_windows(t, KEY, -1, 4, 4), "step=-1: allowed is 0 or more"),
        (lambda t: random_windows(t, KEY, 0, 4, 2.5), "context_length=2.5"),
        (lambda t: random_windows(t / 2, KEY, 0, 4, 4), "tokens are float64 with 1 axes; integers"),
        (lambda t: random_windows(t[None], KEY, 0, 1, 4), "tokens: 1 tokens|with 2 axes"),
        (lambda t: shuffled_windows([0.5] * 20, KEY, 0, 4, 4), "tokens are float64"),
        (lambda t: eval_batch("a text of letters", 0, 4, 4), "tokens are <U1 with 0 axes"),
        (lambda t: eval_batch(t, 1, 4, 4), "step=1: allowed is 0 to 0"),
        (lambda t: eval_batch(t[:1], 0, 4, 4), "1 tokens"),
        (lambda t: shuffled_rows({}, KEY, 0, 4), "first axes"),
        (lambda t: shuffled_rows({"a": torch.zeros(2), "b": torch.zeros(3)}, KEY, 0, 4), "first axes"),
        (lambda t: shuffled_indices(0, KEY, 0, 4), "n=0"),
    ],
)
def test_arguments(call, message):
    """Requests that cannot be met are refused with the argument's name and what is allowed."""
    with pytest.raises(ValueError, match=message):
        call(np.arange(10))
