"""Trees cut along axis 0. Oracles: slices of the whole; reduce_scatter and all_gather leaf by leaf; the dot product."""


import pytest
import torch
import torch.distributed as dist

from purelm import random, tree
from purelm.dist.collectives import all_reduce
from purelm.dist.sharding import gather_parts, part_of, part_shape, scatter_sums, shard, unshard
from purelm.dist.world import rank_of, size_of
from tests.dist.processes import run

SHAPES = [(4, 3), (5, 2), (1,), (), (0, 3), (3,), (2, 2, 2), (3, 0)]


def made(seed, dtype=torch.float64):
    return [random.normal(random.fold_in(random.key(seed), i), s, dtype=dtype) for i, s in enumerate(SHAPES)]


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
def test_parts_put_together_are_the_whole(n_ranks):
    for x in made(0):
        parts = [part_of(x, r, n_ranks) for r in range(n_ranks)]
        strided = [part_of(x.mT.contiguous().mT if x.ndim > 1 else x, r, n_ranks) for r in range(n_ranks)]
        assert all(p.shape == part_shape(x.shape, n_ranks) and p.is_contiguous() for p in [*parts, *strided])
        assert all(torch.equal(a, b) for a, b in zip(parts, strided, strict=True))
        whole = torch.cat(parts)
        n = x.numel() if x.ndim == 0 else len(x)
        assert torch.equal(whole[:n].view(x.shape), x) and not whole[n:].any()


def on_rank(dtypes):
    rank, N = rank_of(None), size_of(None)
    values = {"a": made(1), "b": made(2, dtypes), "none": None}
    parts = shard(values)
    again = unshard(parts, values)
    for x, y in zip(tree.leaves(values), tree.leaves(again), strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.shape == y.shape
    wholes = [x * (rank + 1) for x in made(3)]
    pending = scatter_sums(wholes)
    for got, x in zip(pending.wait(), made(3), strict=True):
        torch.testing.assert_close(got, part_of(x * 3, rank, N), rtol=1e-14, atol=0)
    assert pending.wait() is pending.wait()
    # cast as they are packed: what a cast before would give, in the message's dtype
    for got, x in zip(scatter_sums(wholes, dtype=torch.float32).wait(), wholes, strict=True):
        right = sum(part_of((x / (rank + 1) * (r + 1)).float(), rank, N) for r in range(N))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, right)
    # <gather p, y> = <p, scatter y>, p being zero where rows were filled up
    p = [part_of(x, rank, N) for x in made(4)]
    y = [torch.cos(x + rank) for x in made(5)]
    left = sum((a * b).sum() for a, b in zip(gather_parts(p, SHAPES).wait(), y, strict=True))
    right = sum((a * b).sum() for a, b in zip(p, scatter_sums(y).wait(), strict=True))
    left, right = all_reduce([left, right])
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)


def on_rank_strided():
    """What is not dense, and that nothing given is changed."""
    rank, N = rank_of(None), size_of(None)
    rows = [torch.arange(12.0, dtype=torch.float64).view(3, 4).t() + rank, torch.ones(5, 2, dtype=torch.float64)]
    columns = torch.arange(6.0, dtype=torch.float64).view(3, 2).t()
    assert torch.equal(gather_parts([columns + rank], [(4, 3)]).wait()[0], torch.cat([columns, columns + 1]))
    for x, got in zip(rows, scatter_sums(rows).wait(), strict=True):
        assert torch.equal(got, part_of(all_reduce(x), rank, N))
    assert torch.equal(rows[0], torch.arange(12.0, dtype=torch.float64).view(3, 4).t() + rank)


def test_strided_leaves():
    run(on_rank_strided)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_messages_of_many_leaves(dtype):
    run(on_rank, dtype)


def on_rank_of_no_group():
    group = dist.new_group([0])
    if rank_of(None) == 1:
        with pytest.raises(ValueError, match="not a member"):
            gather_parts([torch.ones(2)], [(4,)], group)
        with pytest.raises(ValueError, match="not a member"):
            scatter_sums([torch.ones(4)], group)


def test_who_is_not_a_member_is_told():
    run(on_rank_of_no_group)


def test_alone():
    values = made(1)
    parts = shard(values)
    for x, y in zip(values, unshard(parts, values), strict=True):
        assert torch.equal(x, y) and x.shape == y.shape
    for x, y in zip(scatter_sums(values).wait(), parts, strict=True):
        assert torch.equal(x, y)
    assert {x.dtype for x in scatter_sums(values, dtype=torch.bfloat16).wait()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="8 parts, but `like` has 7 leaves"):
        unshard(parts, values[1:])
