"""Collectives on two Gloo processes. Oracles: stacked tensors of all ranks in one process, and the dot-product test."""

from functools import partial

import pytest
import torch

from purelm import random, tree
from purelm.dist.agreement import check_equal, check_same, check_same_kind, fingerprint, non_finite_ranks
from purelm.dist.collectives import all_gather, all_reduce, broadcast, reduce, reduce_scatter
from purelm.dist.world import rank_of, size_of, start
from purelm.testing.collectives import check_collective
from tests.dist.processes import RankError, run

SHAPES = {"w": (4, 3), "list": [(2,), (6, 0)], "odd": (2, 5, 1)}
MEAN = partial(all_reduce, op="mean")
# name -> (function, adjoint, what the ranks hold afterwards as a function of what they held: the oracle)
COLLECTIVES = {
    "broadcast": (broadcast, reduce, lambda xs: [xs[0]] * len(xs)),
    "broadcast_from_1": (partial(broadcast, src=1), partial(reduce, dst=1), lambda xs: [xs[1]] * len(xs)),
    "reduce": (reduce, broadcast, lambda xs: [total(xs)] + [torch.zeros_like(x) for x in xs[1:]]),
    "all_reduce": (all_reduce, all_reduce, lambda xs: [total(xs)] * len(xs)),
    "mean": (MEAN, MEAN, lambda xs: [total(xs) / len(xs)] * len(xs)),
    "all_gather": (all_gather, reduce_scatter, lambda xs: [torch.cat(xs)] * len(xs)),
    "reduce_scatter": (reduce_scatter, all_gather, lambda xs: list(total(xs).chunk(len(xs)))),
}
REPLICATED = ("broadcast", "broadcast_from_1", "all_reduce", "mean", "all_gather")  # one result on all ranks


def total(xs):
    return torch.stack(xs).sum(0)


def made(seed, rank, dtype=torch.float64):
    """The tree that this rank holds; every rank can make everyone's."""
    key = random.fold_in(random.key(seed), rank)
    shapes = [(4, 3), (2,), (6, 0), (2, 5, 1)]
    w, a, b, odd = (random.normal(random.fold_in(key, i), s, dtype=dtype) for i, s in enumerate(shapes))
    return {"w": w, "list": [a, b, None], "odd": odd}


def on_rank_matches(name, dtype):
    f, _, oracle = COLLECTIVES[name]
    everyone = [made(0, r, dtype) for r in range(size_of(None))]
    mine = everyone[rank_of(None)]
    kept = tree.map(torch.clone, mine)
    got = f(mine)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(mine), tree.leaves(kept), strict=True))  # not written to
    for i, x in enumerate(tree.leaves(got)):
        expected = oracle([tree.leaves(one)[i] for one in everyone])[rank_of(None)]
        torch.testing.assert_close(x, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
    assert tree.structure(got) == tree.structure(mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_results_are_those_of_stacked_tensors(name, dtype):
    run(on_rank_matches, name, dtype)


def on_rank_laws(name, seed):
    f, adjoint, _ = COLLECTIVES[name]
    # Sums of two terms, the same ones in the same order on either side.
    check_collective(f, adjoint, tree.map(torch.clone, made(seed, rank_of(None))), seed=seed, rtol=1e-13, atol=1e-13)
    # Between the leaves of the tree that the check makes for itself one is transposed.
    check_collective(f, adjoint, seed=seed, replicated=name in REPLICATED or None)


@pytest.mark.parametrize("seed", [1, 20])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_laws(name, seed):
    """Purity, structure, linearity, the adjoint by <A x, y> = <x, A* y>, the derivative, the same bits."""
    run(on_rank_laws, name, seed)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_alone_they_are_the_identity(name):
    x = made(3, 0)
    assert COLLECTIVES[name][0](x) is x
    assert size_of(None) == 1 and rank_of(None) == 0


def test_alone_everything_agrees():
    x = {"a": torch.tensor([1.0, float("nan")])}
    check_same_kind(x)
    check_equal(x)
    assert non_finite_ranks(x) == [0] and non_finite_ranks({"a": torch.ones(1)}) == []
    for device in ("tpu", "meta", "cuda:7"):
        with pytest.raises(ValueError, match=f"device must be .* got '{device}'"), start(device):
            pass
    with start("cpu") as w:
        assert w == (0, 1, torch.device("cpu"))


def on_rank_views():
    """Transposed, expanded and empty leaves, integers, and a subgroup of one."""
    rank = rank_of(None)
    x = torch.arange(6.0).view(2, 3).T * (rank + 1)
    assert torch.equal(all_reduce(x), torch.arange(6.0).view(2, 3).T * 3)
    assert torch.equal(all_reduce(torch.tensor([rank]).expand(4)), torch.tensor([1] * 4))
    assert all_gather(torch.tensor([rank, rank])).tolist() == [0, 0, 1, 1]
    assert all_reduce({}) == {} and all_reduce(torch.zeros(0, 3)).shape == (0, 3)
    groups = [torch.distributed.new_group([r]) for r in range(2)]
    assert all_reduce(x, groups[rank]) is x
    with pytest.raises(ValueError, match="not a member"):
        rank_of(groups[1 - rank])
    with pytest.raises(ValueError, match=r"axis 0 of .* is not divisible by the 2 ranks"):
        reduce_scatter(torch.zeros(3))
    with pytest.raises(ValueError, match="0-d leaf"):
        all_gather(torch.zeros(()))
    with pytest.raises(ValueError, match="op must be"):
        all_reduce(x, op="max")


def test_views_and_groups():
    run(on_rank_views)


def on_rank_differs(kind):
    rank = rank_of(None)
    x = {"a": torch.zeros(2), "b": {"w": torch.zeros(3, 4)}}
    if rank == 1 and kind == "shape":
        x["b"]["w"] = torch.zeros(4, 3)
    if rank == 1 and kind == "dtype":
        x["b"]["w"] = x["b"]["w"].half()
    if rank == 1 and kind == "leaf":
        x["b"]["v"] = torch.zeros(1)
    if rank == 1 and kind == "none":
        x["b"]["w"] = None
    all_reduce(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", r"all_reduce: ranks differ at b.w: (3, 4) float32 on rank 0; (4, 3) float32 on rank 1"),
        ("dtype", r"all_reduce: ranks differ at b.w: (3, 4) float32 on rank 0; (3, 4) float16 on rank 1"),
        ("leaf", r"all_reduce: ranks differ at b.v: no such leaf on rank 0; (1,) float32 on rank 1"),
        ("none", r"all_reduce: ranks differ at b.w: (3, 4) float32 on rank 0; no such leaf on rank 1"),
    ],
)
def test_a_rank_that_differs_is_named_on_all_ranks(kind, message):
    """And the processes work on: the error came before anything was out of step."""
    with pytest.raises(RankError) as error:
        run(on_rank_differs, kind)
    assert error.value.errors == {0: f"ValueError: {message}", 1: f"ValueError: {message}"}
    run(on_rank_differs, "nothing")


def on_rank_equal(change):
    rank = rank_of(None)
    x = {"a": torch.ones(2), "b": [torch.arange(3), torch.tensor(0.5, dtype=torch.bfloat16)]}
    if rank == 1 and change:
        x["b"][1] = x["b"][1] + 0.25
    check_equal(x, what="parameters")
    return fingerprint(x)


def test_equal_to_the_bit():
    first, second = run(on_rank_equal, False)
    assert first == second
    with pytest.raises(RankError) as error:
        run(on_rank_equal, True)
    message = "ValueError: parameters: b.1 differs on rank 1 from rank 0"
    assert error.value.errors == {0: message, 1: message}


def on_rank_nan(bad):
    x = {"a": torch.ones(2), "b": torch.ones(1)}
    if rank_of(None) == bad:
        x["b"] = x["b"] / 0
    return non_finite_ranks(x)


@pytest.mark.parametrize("bad", [0, 1, None])
def test_ranks_with_an_inf_are_named(bad):
    assert run(on_rank_nan, bad) == [[bad] if bad is not None else []] * 2


def on_rank_started(change):
    values = {"seed": "0", "data": "5f1d", "text": "x" * 100}
    check_same({**values, **change} if rank_of(None) == 1 else values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "1"}, "ranks differ: seed is '0' on rank 0; '1' on rank 1. Start all ranks with the same settings"),
        (
            {"data": "", "lr": "1e-3"},
            "ranks differ: data is '5f1d' on rank 0; '' on rank 1. lr is absent on rank 0; '1e-3' on rank 1. "
            "Start all ranks with the same settings",
        ),
    ],
)
def test_what_ranks_were_started_with_is_compared(change, message):
    """Oracle: the values themselves; all ranks name the field and its values, and work on."""
    with pytest.raises(RankError) as error:
        run(on_rank_started, change)
    assert error.value.errors == {0: f"ValueError: {message}", 1: f"ValueError: {message}"}
    run(on_rank_started, {})


def test_long_values_that_begin_alike_do_not_look_equal():
    with pytest.raises(RankError, match=r"'x{80}'... \(SHA-256 \w{8}\) on rank 0; .* on rank 1"):
        run(on_rank_started, {"text": "x" * 99 + "y"})
    check_same({"seed": "0"})
    with pytest.raises(ValueError, match="names to text, got 'seed': 0"):
        check_same({"seed": 0})
