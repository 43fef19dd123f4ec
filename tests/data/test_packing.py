"""Packing: every prediction of the corpus exactly once, in order, none across documents, none on padding."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.data.packing import pack, packed_rows

documents_strategy = st.lists(st.lists(st.integers(0, 99), max_size=25), max_size=15)


def number(documents):
    """Give every token of the corpus its own id, so that where it lands can be followed."""
    at, numbered = 0, []
    for document in documents:
        numbered.append(list(range(at + 1, at + 1 + len(document))))
        at += len(document)
    return numbered


@given(
    documents=documents_strategy, length=st.integers(1, 12), method=st.sampled_from(["first_fit", "sequential"]),
    open_rows=st.integers(1, 4),
)  # fmt: skip
def test_each_prediction_once(documents, length, method, open_rows):
    """Oracle: the list of adjacent pairs of each document."""
    documents = number(documents)
    rows = list(packed_rows(documents, length, method=method, open_rows=open_rows, pad_id=-5))
    pairs = []
    for row in rows:
        assert all(value.shape == (length,) for value in row.values())
        real = row["weights"] == 1
        assert (real == (row["segment_ids"] > 0)).all()
        assert (row["tokens"][~real] == -5).all() and (row["targets"][~real] == -5).all()
        n = real.sum()
        assert real[:n].all() and n > 0  # padding only at the end, no empty row
        segments = row["segment_ids"][:n]
        # 1, 2, ... in runs; within a run each token's target is the next token, and they are of one document
        assert segments[0] == 1 and set(np.diff(segments)) <= {0, 1}
        same = np.diff(segments) == 0
        assert (row["targets"][: n - 1][same] == row["tokens"][1:n][same]).all()
        pairs += zip(row["tokens"][real].tolist(), row["targets"][real].tolist(), strict=True)
        assert (np.diff(row["tokens"][:n]) > 0).all()  # pieces in the order in which they came
    expected = [pair for document in documents for pair in itertools.pairwise(document)]
    assert sorted(pairs) == expected
    if method == "sequential":
        assert pairs == expected
        assert all(row["weights"].all() for row in rows[:-1])  # padding in the last row only


@given(documents=documents_strategy, length=st.integers(1, 30))
def test_first_fit_keeps_documents_whole(documents, length):
    """Oracle: counting. A document of up to T predictions is one segment; longer ones are ceil((k - 1) / T)."""
    documents = number(documents)
    rows = list(packed_rows(documents, length))
    n_segments = sum(int(row["segment_ids"].max()) for row in rows)
    assert n_segments == sum(-(-(len(d) - 1) // length) for d in documents if len(d) > 1)


def test_first_fit_by_hand():
    """Oracle: first fit done by hand: sizes 3, 3, 2, 2, 4 into rows of 5, all rows open, and then only one."""
    documents = [np.arange(size + 1) for size in (3, 3, 2, 2, 4)]
    sizes = [[int((r["segment_ids"] == s).sum()) for s in (1, 2)] for r in packed_rows(documents, 5)]
    assert sizes == [[3, 2], [3, 2], [4, 0]]
    sizes = [[int((r["segment_ids"] == s).sum()) for s in (1, 2)] for r in packed_rows(documents, 5, open_rows=1)]
    assert sizes == [[3, 0], [3, 2], [2, 0], [4, 0]]


def test_streams():
    """Rows come while documents are still read, so a corpus needs no memory."""
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield [1, 2, 3, 4]

    for method in ("first_fit", "sequential"):
        rows = packed_rows(endless(), 5, method=method, open_rows=2)
        for _ in range(10):
            next(rows)
    assert len(taken) < 60


def test_pack_stacks():
    """Oracle: np.stack of the rows; dtypes of the batch contract."""
    documents = [[1, 2, 3], [4, 5], [6], [], [7, 8, 9, 10, 11, 12]]
    batch = pack(documents, 4, method="sequential")
    rows = list(packed_rows(documents, 4, method="sequential"))
    for name, value in batch.items():
        assert value.dtype == (torch.float32 if name == "weights" else torch.int64)
        assert np.array_equal(value.numpy(), np.stack([row[name] for row in rows]))


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "nothing to predict"),
        ([[1], []], {}, "nothing to predict"),
        ([[1, 2]], {"context_length": 0}, "context_length=0"),
        ([[1, 2]], {"open_rows": 0}, "open_rows=0"),
        ([[1, 2]], {"method": "best"}, "method='best'"),
        ([[1.0, 2.0]], {}, "dtype float64"),
        ([[[1, 2]]], {}, r"shape \(1, 2\)"),
    ],
)
def test_arguments(documents, options, message):
    """Bad arguments and empty corpora are refused."""
    with pytest.raises(ValueError, match=message):
        pack(documents, **({"context_length": 4} | options))


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ("text", {}, "documents is str; give an iterable"),
        (5, {}, "documents is int"),
        ([[1, 2, -3]], {}, "one holds the id -3"),
        ([1, 2], {}, "1-d integers are needed"),
        ([[1, 2]], {"context_length": 2.0}, "context_length=2.0"),
        ([[1, 2]], {"open_rows": True}, "open_rows=True"),
        ([[1, 2]], {"pad_id": None}, "pad_id=None"),
    ],
)
def test_wrong_kinds_of_arguments(documents, options, message):
    """One line that names the argument; a generator is as good as a list."""
    with pytest.raises(ValueError, match=message):
        pack(documents, **{"context_length": 4, **options})
    rows = pack((ids for ids in [[1, 2, 3], [4, 5]]), 4)
    assert rows["tokens"].tolist() == pack([[1, 2, 3], [4, 5]], 4)["tokens"].tolist()
