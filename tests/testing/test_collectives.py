"""check_collective on two Gloo processes. Oracles: the library's collectives, and functions with one known fault each.

What each rank says is compared, too: the verdict must be one.
"""

from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from purelm import tree
from purelm.dist import conjugates
from purelm.dist.collectives import all_gather, all_reduce, broadcast, reduce, reduce_scatter, total
from purelm.dist.world import rank_of, size_of
from purelm.testing import LawError, without
from purelm.testing.collectives import COLLECTIVE_LAWS, check_collective
from tests.dist.processes import run

MEAN = partial(all_reduce, op="mean")


def writes_on_rank_1(x, group):
    y = all_reduce(x, group)
    with torch.no_grad():
        tree.map(lambda p: p.mul_(1.0) if rank_of(group) == 1 else p, x)
    return y


def draws(x, group):
    return tree.map(lambda p: p + 0 * torch.rand(()).to(p.dtype), all_reduce(x, group))


def in_fp64(x, group):
    return all_reduce(tree.cast(x, torch.float64), group)


def as_tuples(x, group):
    y = all_reduce(x, group)
    return {**y, "list": tuple(y["list"])}


def not_gathered_back(y, group):
    return reduce_scatter(y, group)


def saturates(x, group):
    """Values as a format of few bits has them: right up to 4, which the draws do not reach, but 2.5 x - z does."""
    return all_reduce(tree.map(lambda p: p.clamp(-4.0, 4.0), x), group)


def shifted(x, group):
    return tree.map(lambda p: p + 1.0, all_reduce(x, group))


class _MeanForward(torch.autograd.Function):
    """A mean, taken for a sum in backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return total(x, group) / size_of(group)

    @staticmethod
    def backward(ctx, dy):
        return total(dy, ctx.group), None


def mean_with_the_backward_of_a_sum(x, group):
    return tree.map(lambda p: _MeanForward.apply(p, group), x)


def gathered_in_another_order(x, group):
    return tree.map(lambda p: torch.cat(p.chunk(size_of(group))[::-1]), all_gather(x, group))


def summed_without_backward(x, group):
    """For one loss that every rank computes, which is not the convention of a sum over ranks."""
    return tree.map(lambda p: conjugates.leave(p, group), x)


def detached(x, group):
    return all_reduce(tree.map(lambda p: p.detach(), x), group)


def own_part_first(x, group):
    """A sum in another order of rounding on each rank."""
    rank = rank_of(group)

    def one(mine, everyone):
        rest = [p for i, p in enumerate(everyone.chunk(size_of(group))) if i != rank]
        return mine + torch.stack(rest).sum(0) * 0.1 * 10

    return tree.map(one, x, all_gather(x, group))


CALLS = [0]


def another_each_time(x, group):
    CALLS[0] += 1
    return tree.map(lambda p: p * (1 + 2.0**-50 * (CALLS[0] % 2)), all_reduce(x, group))


# name -> (f, adjoint, what the error says of each law that fails)
MUTANTS = {
    "writes": (writes_on_rank_1, all_reduce, {"pure": "on rank 1: f: argument 0.list.0 was written to"}),
    "writes back": (all_reduce, writes_on_rank_1, {"pure": "on rank 1: the adjoint: argument 0.list.0 was written to"}),
    "draws": (draws, all_reduce, {"pure": "on ranks 0, 1: f: torch's global generator was used"}),
    "in fp64": (
        in_fp64,
        all_reduce,
        {"structure": "on ranks 0, 1: the result of f at list.0 is torch.float64 on cpu, not torch.float32 on cpu"},
    ),
    "as tuples": (as_tuples, all_reduce, {"structure": "on ranks 0, 1: the result of f has structure PyTreeSpec("}),
    "saturates": (saturates, all_reduce, {"linear": "f(2.5 x - z) and 2.5 f(x) - f(z) differ at "}),
    # Not linear, and so without an adjoint.
    "shifted": (
        shifted,
        all_reduce,
        {"linear": "f(2.5 x - z) and 2.5 f(x) - f(z) differ at ", "adjoint": "<f(x), y> is "},
    ),
    "mean": (mean_with_the_backward_of_a_sum, all_reduce, {"adjoint": "summed over 2 ranks; they may differ by "}),
    # The derivative of a linear map is its adjoint: another adjoint is another derivative.
    "order": (
        gathered_in_another_order,
        reduce_scatter,
        {"adjoint": "<f(x), y> is ", "derivative": "the gradient of <f(x), y> and adjoint(y) differ at list.0: "},
    ),
    "shape": (
        all_reduce,
        not_gathered_back,
        {
            "structure": "the adjoint gives (1,) torch.float64 at list.0, where f's argument is (2,)",
            "adjoint": "",
            "derivative": "",
        },
    ),
    "no backward": (
        summed_without_backward,
        all_reduce,
        {"derivative": "the gradient of <f(x), y> and adjoint(y) differ at list.0: "},
    ),
    "detached": (
        detached,
        all_reduce,
        {"derivative": "on ranks 0, 1: autograd finds no path from f(x) to x at list.0"},
    ),
    "own first": (own_part_first, all_reduce, {"deterministic": "results at "}),
    "each time": (
        another_each_time,
        all_reduce,
        {"deterministic": "results of f, called twice with one argument, differ"},
    ),
}


def verdict(f, adjoint, x=None, **options):
    """law -> what check_collective says on this rank."""
    try:
        check_collective(f, adjoint, x, **options)
    except LawError as error:
        return {law: str(found) for law, found in error.failures.items()}
    return {}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail_their_laws_alike_on_both_ranks(name):
    f, adjoint, expected = MUTANTS[name]
    first, second = run(verdict, f, adjoint)
    assert first == second
    assert [*first] == [*expected]
    for law, text in expected.items():
        assert text in first[law], first[law]


def test_every_law_has_a_mutant_of_its_own():
    alone = {next(iter(expected)) for *_, expected in MUTANTS.values() if len(expected) == 1}
    assert alone == {*COLLECTIVE_LAWS}


RIGHT = {
    "all_reduce": (all_reduce, all_reduce),
    "mean": (MEAN, MEAN),
    "broadcast": (partial(broadcast, src=1), partial(reduce, dst=1)),
    "all_gather": (all_gather, reduce_scatter),
    "reduce_scatter": (reduce_scatter, all_gather),
}


def on_rank_right(name):
    f, adjoint = RIGHT[name]
    x = {"half": torch.zeros(2, 4, dtype=torch.bfloat16).T, "one": torch.ones(6, 2), "none": None}
    kept = tree.map(torch.clone, x)
    found = [verdict(f, adjoint, seed=5), verdict(f, adjoint, x, replicated="scatter" not in name or None)]
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(x), tree.leaves(kept), strict=True))
    return found


@pytest.mark.parametrize("name", RIGHT)
def test_the_library_passes_in_every_dtype(name):
    assert run(on_rank_right, name) == [[{}, {}], [{}, {}]]


def on_rank_groups():
    """A group of one rank, a group of all, and results that are declared to be replicated, but are not."""
    alone = [dist.new_group([rank]) for rank in range(2)][rank_of(None)]
    everyone = dist.new_group([0, 1])
    return [
        verdict(all_gather, reduce_scatter, group=alone),
        verdict(all_gather, reduce_scatter, group=everyone),
        verdict(reduce_scatter, all_gather, replicated=True),
        verdict(shifted, all_reduce, laws=["pure", "linear"], group=alone),
    ]


def test_groups():
    first, second = run(on_rank_groups)
    assert first[:3] == second[:3]
    assert first[:2] == [{}, {}]
    assert "results at list.0 of rank 1 and rank 0 differ: 1 of 1 elements" in first[2]["deterministic"]
    for found in (first, second):  # each rank is rank 0 of its own group
        assert found[3]["linear"].startswith("on rank 0: f(2.5 x - z)") and [*found[3]] == ["linear"]


def raises_everywhere(x, group):
    raise ValueError("not today")


def test_an_error_of_all_ranks_is_one_for_every_law():
    """They stay in step, so all laws run."""
    first, second = run(verdict, raises_everywhere, all_reduce)
    assert first == second == dict.fromkeys(COLLECTIVE_LAWS, "on ranks 0, 1: f raised ValueError: not today")
    assert run(verdict, all_reduce, all_reduce) == [{}, {}]


def raises_on_rank_0(x, group):
    assert rank_of(group) != 0, "no rank 0 here"  # an AssertionError of the function's own is no verdict
    return all_reduce(x, group, check=False)


def on_rank_raises():
    """The other rank waits in all_reduce, for as long as the group says."""
    all_reduce(torch.ones(1))  # ranks come here together, so that the short timeout is spent on nothing else
    group = dist.new_group(timeout=timedelta(seconds=5))
    found = verdict(raises_on_rank_0, all_reduce, laws=["pure", "linear"], group=group)
    return found, float(all_reduce(torch.ones(1)))  # the group of all is as it was


def test_no_rank_hangs_where_another_fails_before_it_sends():
    (first, one), (second, two) = run(on_rank_raises)
    assert first == second and one == two == 2.0
    assert first["pure"].startswith("on rank 0: f raised AssertionError: no rank 0 here; on rank 1: f raised ")
    assert first["linear"] == "not run: the ranks are out of step since an error on ranks 0, 1"


def on_rank_arguments(kind):
    rank = rank_of(None)
    given = {
        "tree": {"x": {"w": torch.tensor([1 + rank]) if rank else torch.ones(2)}},
        "empty": {"x": {"w": None}},
        "laws": {"laws": ["pure", "linear"][: 1 + rank]},
        "seed": {"seed": rank},
        "rtol": {"rtol": -1.0},
        "replicated": {"replicated": True if rank else None},
    }
    try:
        check_collective(all_reduce, all_reduce, **given[kind])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tree", "on rank 1: x must have floating tensors alone, got torch.int64 at w"),
        ("empty", "on ranks 0, 1: x has no element, so nothing would be compared"),
        ("rtol", "on ranks 0, 1: rtol must be at least 0, got -1.0"),
        *[
            (kind, "laws, seed and replicated must be the same on all ranks; those of rank 1 are not those of rank 0")
            for kind in ("laws", "seed", "replicated")
        ],
    ],
)
def test_arguments_are_refused_on_both_ranks(kind, message):
    assert run(on_rank_arguments, kind) == [f"check_collective: {message}"] * 2


def test_alone_the_same_laws_hold():
    """A group of one: the identity, which is its own adjoint."""
    check_collective(all_gather, reduce_scatter)
    check_collective(lambda x, group: x, lambda y, group: y, torch.zeros(3))
    with pytest.raises(LawError, match="check_collective: linear: on rank 0: f") as error:
        check_collective(shifted, all_reduce, laws=without(COLLECTIVE_LAWS, "adjoint"))
    assert [*error.value.failures] == ["linear"]
    with pytest.raises(LawError, match=r"adjoint: nothing was compared: f\(x\) and adjoint\(y\) are zero"):
        zero = lambda x, group: tree.map(torch.zeros_like, x)  # noqa: E731
        check_collective(zero, zero, laws=["adjoint"])


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((None, all_reduce), {}, r"f must be a function of \(tree, group\), got NoneType"),
        ((all_reduce, 3), {}, "adjoint must be a function of"),
        ((all_reduce, all_reduce), {"laws": ["order"]}, "laws must be some of pure, .*; got order"),
        ((all_reduce, all_reduce), {"laws": "pure"}, "got the string 'pure'"),
        ((all_reduce, all_reduce), {"atol": float("nan")}, "atol must be at least 0, got nan"),
        ((all_reduce, all_reduce), {"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_arguments_alone(args, options, message):
    with pytest.raises(ValueError, match=message):
        check_collective(*args, **options)
