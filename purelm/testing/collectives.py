"""Laws of linear maps between the ranks of a group: functions f(tree, group) -> tree, each with its adjoint.

`check_collective` is called on every rank. A law that fails on one rank fails on all of them, with the same words
(`ranks` says how they tell each other).

What can be guaranteed. Wrong results, and errors that all ranks raise: no rank waits for another, and all laws run.
An error on some ranks alone, before f has sent all its messages: the others wait in f for as long as the group's
timeout lets them, then f raises there, too; all ranks name the rank that failed first, and the laws that are left are
not run, since the group is out of step. For a function that may do so give a group with a short timeout:
dist.new_group(timeout=timedelta(seconds=10)). With NCCL, torch's watchdog ends a process that waits too long.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.dist.world import Group, device_of, rank_of, size_of
from purelm.testing.laws import (
    Law,
    assert_trees_close,
    assert_trees_equal,
    draw_like,
    inner,
    require,
    run_laws,
    unchanged,
)
from purelm.testing.ranks import Raised, Ranks, by_rank, list_of_ranks
from purelm.tree import Tree

__all__ = ["COLLECTIVE_LAWS", "check_collective"]

Collective = Callable[..., Tree]

# Relative error of sums over a few ranks, for the least precise dtype among the leaves: some hundreds of its eps, and
# far below what a wrong summand or a wrong factor makes.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def check_collective(
    f: Collective,
    adjoint: Collective,
    x: Tree = None,
    *,
    group: Group = None,
    laws: Iterable[str] | None = None,
    replicated: bool | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
) -> None:
    """LawError on every rank of the group, naming each law that f breaks, unless f is linear and has this adjoint.

    Called on every rank with the same laws. f and adjoint are called as f(tree, group=group). The laws, <a, b> being
    the sum over ranks, leaves and elements of a b (COLLECTIVE_LAWS has their names):

        pure            neither f nor the adjoint writes to its argument, or draws from torch's global generator
        structure       the result has the argument's structure, dtypes and devices; the adjoint gives back its shapes
        linear          f(2.5 x - z) = 2.5 f(x) - f(z)
        adjoint         <f(x), y> = <x, adjoint(y)>, y being another tree on each rank
        derivative      autograd's gradient of <f(x), y> by x is adjoint(y)
        deterministic   the same bits twice; results that ranks share are equal to the last bit

    Args:
        x: a tree of floating tensors as f is given it on this rank. Its form counts, its values are drawn anew,
            others on each rank. None: a tree of fp64 leaves whose axis 0 all ranks can divide, a transposed and an
            empty one and a None among them.
        replicated: True where all ranks must hold the same result, as after an all_reduce. None: leaves that are equal
            on two ranks up to rounding must be equal.
        rtol, atol: relative to |x| and |y|, and absolute; by default `TOLERANCES` of the least precise dtype.
        seed: of the draws.

    ValueError on every rank for an argument that cannot be checked on one of them, such as an x that has leaves of
    integers, and where ranks give different laws. What happens where f fails on some ranks alone is said at the top of
    this file.

    >>> from purelm.dist.collectives import all_gather, reduce_scatter
    >>> check_collective(all_gather, reduce_scatter)  # on each of the ranks that torchrun started, or alone
    """
    names = laws if laws is None or isinstance(laws, str) else tuple(laws)
    like = _example(size_of(group), device_of(group)) if x is None else x
    case = _Case(f, adjoint, like, group, replicated, rtol, atol, seed, Ranks(group))
    _agree(case, names)
    run_laws("check_collective", COLLECTIVE_LAWS, names, case)


@dataclass
class _Case:
    f: Collective
    star: Collective
    like: Tree
    group: Group
    replicated: bool | None
    rtol: float | None
    atol: float | None
    seed: int
    ranks: Ranks

    def drawn(self, number: int, like: Tree = None) -> Tree:
        """The tree number `number` of this rank: of the form of x or of `like`, with its strides, in new memory."""
        form = self.like if like is None else like
        seed = (self.seed * 16 + number) * 65536 + rank_of(self.group)
        return tree.map(lambda a, b: torch.empty_like(a).copy_(b), form, draw_like(form, seed))

    def call(self, f: Collective, x: Tree) -> Tree:
        """f(x); what f raises comes as Raised, which no law's own AssertionError is taken for."""
        try:
            return f(x, group=self.group)
        except Exception as error:  # anything that a user's function may raise
            name = "f" if f is self.f else "the adjoint"
            raise Raised(f"{name} raised {type(error).__name__}: {error}") from error

    @property
    def relative(self) -> float:
        if self.rtol is not None:
            return self.rtol
        return max(TOLERANCES.get(x.dtype, 1e-2) for x in tree.leaves(self.like))

    @property
    def absolute(self) -> float:
        return self.relative if self.atol is None else self.atol


def _pure(c: _Case) -> None:
    fx = c.ranks.together(lambda: _guarded(c, c.f, c.drawn(0), "f"))
    y = c.drawn(1, fx)
    c.ranks.together(lambda: _guarded(c, c.star, y, "the adjoint"))


def _guarded(c: _Case, f: Collective, x: Tree, name: str) -> Tree:
    try:
        with unchanged(x):
            return c.call(f, x)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


def _structure(c: _Case) -> None:
    def kept(x: Tree) -> Tree:
        fx = c.call(c.f, x)
        a, b = tree.structure(fx), tree.structure(x)
        require(a == b, f"the result of f has structure {a}, its argument {b}")
        for path, p, q in zip(tree.paths(x), tree.leaves(fx), tree.leaves(x), strict=True):
            require(isinstance(p, Tensor), f"the result of f has a {type(p).__name__} at {path}")
            kinds = [f"{z.dtype} on {z.device}" for z in (p, q)]
            require(kinds[0] == kinds[1], f"the result of f at {path or 'the root'} is {kinds[0]}, not {kinds[1]}")
        return fx

    x = c.drawn(0)
    fx = c.ranks.together(lambda: kept(x))
    c.ranks.together(lambda: kept(tree.cast(x, torch.float32)))
    y = c.drawn(1, fx)

    def back() -> None:
        found = c.call(c.star, y)
        for path, p, q in zip(tree.paths(x), tree.leaves(found), tree.leaves(x), strict=True):
            require(
                p.shape == q.shape and p.dtype == q.dtype,
                f"the adjoint gives {tuple(p.shape)} {p.dtype} at {path or 'the root'}, where f's argument is "
                f"{tuple(q.shape)} {q.dtype}",
            )

    c.ranks.together(back)


def _linear(c: _Case) -> None:
    combine = lambda a, b: tree.map(lambda p, q: 2.5 * p - q, a, b)  # noqa: E731

    def work() -> None:
        whole = c.call(c.f, combine(c.drawn(0), c.drawn(1)))
        parts = combine(c.call(c.f, c.drawn(0)), c.call(c.f, c.drawn(1)))
        assert_trees_close(whole, parts, "f(2.5 x - z) and 2.5 f(x) - f(z)", rtol=c.relative, atol=c.absolute)

    c.ranks.together(work)


def _adjoint(c: _Case) -> None:
    fx = c.ranks.together(lambda: c.call(c.f, c.drawn(0)))
    y = c.drawn(1, fx)
    fy = c.ranks.together(lambda: c.call(c.star, c.drawn(1, fx)))
    x = c.drawn(0)

    def parts() -> tuple[float, ...]:
        """This rank's part of <f(x), y>, <x, f*(y)>, and of the squares of both factors of each."""
        pairs = ((fx, y), (_like(x, fy), x), (fx, fx), (y, y), (fy, fy), (x, x))
        return tuple(float(inner(a, b)) for a, b in pairs)

    found = c.ranks.exchange(c.ranks.together(parts))
    left, right, *squares = (sum(column) for column in zip(*found, strict=True))
    sizes = [square**0.5 for square in squares]
    scale = max(sizes[0] * sizes[1], sizes[2] * sizes[3])
    require(scale > 0.0, "nothing was compared: f(x) and adjoint(y) are zero on all ranks")
    allowed = c.absolute + c.relative * scale
    require(
        abs(left - right) <= allowed,
        f"<f(x), y> is {left:.6g} and <x, adjoint(y)> is {right:.6g}, summed over {c.ranks.size} ranks; they may "
        f"differ by {allowed:.1g}",
    )


def _like(x: Tree, found: Tree) -> Tree:
    """The leaves of `found` in the structure of x, so that this law does not fail by structure."""
    return tree.unflatten(tree.structure(x), tree.leaves(found))


def _derivative(c: _Case) -> None:
    x = tree.map(lambda p: p.requires_grad_(), c.drawn(0))
    leaves = tree.leaves(x)
    fx = c.ranks.together(lambda: c.call(c.f, x))
    y = c.drawn(1, tree.map(lambda p: p.detach(), fx))

    def work() -> None:
        terms = zip(tree.leaves(fx), tree.leaves(y), strict=True)
        total = sum((p * q).sum() for p, q in terms if p.requires_grad)
        grads: Any = [None] * len(leaves)
        if isinstance(total, Tensor):  # every rank comes here: an f that has no gradient has none on any rank
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        expected = c.call(c.star, y)
        for path, p, g in zip(tree.paths(x), leaves, grads, strict=True):
            require(g is not None or not p.numel(), f"autograd finds no path from f(x) to x at {path or 'the root'}")
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
        what = "the gradient of <f(x), y> and adjoint(y)"
        assert_trees_close(_like(x, found), _like(x, expected), what, rtol=c.relative, atol=c.absolute)

    c.ranks.together(work)


def _deterministic(c: _Case) -> None:
    def twice() -> list[Any]:
        first, second = c.call(c.f, c.drawn(0)), c.call(c.f, c.drawn(0))
        assert_trees_equal(second, first, "results of f, called twice with one argument,")
        return [p.detach().cpu() for p in tree.leaves(first)]

    mine = c.ranks.together(twice)
    everyone = c.ranks.exchange(mine)
    paths = tree.paths(c.like)
    for b, theirs in enumerate(everyone):
        for a, others in enumerate(everyone[:b]):
            for path, p, q in zip(paths, others, theirs, strict=True):
                if c.replicated or (c.replicated is None and _close(p, q)):
                    assert_trees_equal(q, p, f"results at {path or 'the root'} of rank {b} and rank {a}")


def _close(p: Tensor, q: Tensor) -> bool:
    """Equal up to rounding, in any dtype: far closer than two draws are."""
    return p.shape == q.shape and p.dtype == q.dtype and torch.allclose(p.double(), q.double(), rtol=1e-4, atol=1e-4)


COLLECTIVE_LAWS: dict[str, Law] = {
    "pure": _pure,
    "structure": _structure,
    "linear": _linear,
    "adjoint": _adjoint,
    "derivative": _derivative,
    "deterministic": _deterministic,
}


def _example(size: int, device: torch.device) -> Tree:
    """A tree whose axis 0 a group of that size can divide."""
    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)  # noqa: E731
    return {"w": zeros(3, 2 * size).T, "list": [zeros(size), zeros(3 * size, 0), None], "odd": zeros(size, 5, 1)}


def _agree(c: _Case, laws: Any) -> None:
    """ValueError on every rank unless the arguments are what they must be on all of them."""
    found = c.ranks.exchange((_wrong_argument(c), laws, c.seed, c.replicated))
    wrong = {rank: text for rank, (text, *_) in enumerate(found) if text}
    if wrong:
        raise ValueError(f"check_collective: {by_rank(wrong)}")
    others = [rank for rank, (_, *rest) in enumerate(found) if rest != list(found[0][1:])]
    if others:
        raise ValueError(
            "check_collective: laws, seed and replicated must be the same on all ranks; those of "
            f"{list_of_ranks(others)} are not those of rank 0"
        )


def _wrong_argument(c: _Case) -> str:
    """What is wrong with an argument; empty if nothing is."""
    for name, f in (("f", c.f), ("adjoint", c.star)):
        if not callable(f):
            return f"{name} must be a function of (tree, group), got {type(f).__name__}"
    for name, value in (("rtol", c.rtol), ("atol", c.atol)):
        if value is not None and not value >= 0.0:
            return f"{name} must be at least 0, got {value}"
    if not isinstance(c.seed, int) or c.seed < 0:
        return f"seed must be an integer of at least 0, got {c.seed!r}"
    for path, p in zip(tree.paths(c.like), tree.leaves(c.like), strict=True):
        if not tree.is_floating(p):
            kind = f"{p.dtype}" if isinstance(p, Tensor) else type(p).__name__
            return f"x must have floating tensors alone, got {kind} at {path or 'the root'}"
    return "" if any(p.numel() for p in tree.leaves(c.like)) else "x has no element, so nothing would be compared"
