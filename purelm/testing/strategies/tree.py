"""Strategies of trees, and of several trees of one structure.

    @given(alike(trees(none=False), n=2))
    def test_my_optimizer(params_and_grads): ...

A structure is drawn leaf by leaf, so that it shrinks; `like` fills a structure that is there with one seed.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from purelm import tree
from purelm.data.checks import check_int
from purelm.testing.strategies.choices import chosen
from purelm.testing.strategies.tensor import (
    FLOATS,
    LAYOUTS,
    VALUES,
    Layout,
    Values,
    drawn,
    laid,
    seeds,
    shapes,
    tensors,
)
from purelm.tree import Tree

__all__ = ["Container", "Pair", "alike", "like", "trees"]

Container = Literal["dict", "list", "tuple", "namedtuple"]
CONTAINERS: tuple[Container, ...] = get_args(Container)


class Pair(NamedTuple):
    """The NamedTuple that `trees` draws."""

    first: Any
    second: Any


def trees(
    leaves: SearchStrategy[Any] | None = None,
    *,
    containers: Container | Sequence[Container] = CONTAINERS,
    names: SearchStrategy[str] | None = None,
    none: bool = True,
    empty: bool = True,
    max_leaves: int = 12,
) -> SearchStrategy[Tree]:
    """Trees of up to max_leaves leaves, in dicts, lists, tuples and `Pair`s; a tree may be a leaf by itself.

    Args:
        leaves: of which each leaf is drawn; None: tensors of up to two axes in all of FLOATS, mixed.
        names: of which keys of dicts are drawn; None: one to three of the letters a, b, c, x, y and z.
        none: None may stand for a leaf that is absent.
        empty: containers may be empty. With none=False and empty=False every tree has a leaf.

    Shrinks to few leaves, and these to their simplest.

    >>> from hypothesis import find
    >>> find(trees(), lambda t: isinstance(t, dict) and len(tree.leaves(t)) == 2)
    {'a': tensor(0.), 'b': tensor(0.)}
    """
    some = chosen("containers", containers, CONTAINERS)
    check_int("max_leaves", max_leaves, 1)
    if leaves is None:
        leaves = tensors(shapes(max_dims=2, max_side=3), FLOATS)
    if names is None:
        names = st.text("abcxyz", min_size=1, max_size=3)
    least = 0 if empty else 1

    def around(children: SearchStrategy[Any]) -> SearchStrategy[Any]:
        makers: dict[Container, SearchStrategy[Any]] = {
            "dict": st.dictionaries(names, children, min_size=least, max_size=4),
            "list": st.lists(children, min_size=least, max_size=4),
            "tuple": st.lists(children, min_size=least, max_size=3).map(tuple),
            "namedtuple": st.builds(Pair, children, children),
        }
        return st.one_of([makers[container] for container in some])

    return st.recursive(leaves | st.none() if none else leaves, around, max_leaves=max_leaves)


def like(
    example: Tree,
    *,
    values: Values | Sequence[Values] = ("small", "normal"),
    layouts: Layout | Sequence[Layout] = "contiguous",
    dtype: torch.dtype | None = None,
) -> SearchStrategy[Tree]:
    """Trees of the example's structure with other values in the floating leaves; other leaves are the example's own.

    Shapes and devices are the example's; so are dtypes, unless `dtype` gives one for all floating leaves. Values and
    layouts are drawn as for `tensors`, one kind and one layout for the whole tree. Shrinks to zeros.

    >>> from hypothesis import find
    >>> find(like({"w": torch.ones(2), "n": 3}), lambda t: True)
    {'w': tensor([0., 0.]), 'n': 3}
    """
    if dtype is not None:
        chosen("dtype", dtype, FLOATS)
    return _like(example, chosen("values", values, VALUES), chosen("layouts", layouts, LAYOUTS), dtype)


@st.composite
def _like(
    draw: DrawFn, example: Tree, kinds: Sequence[Values], layouts: Sequence[Layout], dtype: torch.dtype | None
) -> Tree:
    kind, seed, layout = draw(st.sampled_from(kinds)), draw(seeds()), draw(st.sampled_from(layouts))
    leaves, form = tree.flatten(example)

    def other(i: int, x: Any) -> Any:
        if not isinstance(x, Tensor) or not tree.is_floating(x):
            return x
        return laid(drawn(kind, seed, i, x.shape, dtype or x.dtype), layout, seed + i, x.device)

    return tree.unflatten(form, [other(i, x) for i, x in enumerate(leaves)])


def alike(
    first: SearchStrategy[Tree],
    n: int = 2,
    *,
    values: Values | Sequence[Values] = ("small", "normal"),
    layouts: Layout | Sequence[Layout] = "contiguous",
) -> SearchStrategy[tuple[Tree, ...]]:
    """Tuples of n trees: one of `first`, then trees `like` it; such as parameters and gradients."""
    check_int("n", n, 1)
    like(None, values=values, layouts=layouts)  # refuses what it does not know now, and not when something is drawn
    return first.flatmap(
        lambda t: st.tuples(st.just(t), *[like(t, values=values, layouts=layouts) for _ in range(n - 1)])
    )
