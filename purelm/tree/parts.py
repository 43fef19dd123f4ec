"""Trees cut in two and put together again, and trees as one vector."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purelm.tree import traced
from purelm.tree.walks import Tree, flatten, map, map_with_path, paths, unflatten

__all__ = [
    "combine",
    "partition",
    "ravel",
]


def partition(predicate: Callable[[str, Any], bool], tree: Tree) -> tuple[Tree, Tree]:
    """(yes, no), two trees of the form of `tree`: a leaf is in `yes` where predicate(path, leaf), else in `no`.

    The other one has None there.

    `combine(yes, no)` is the tree again.

    >>> partition(lambda path, x: path.endswith("weight"), {"weight": 1, "bias": 2})
    ({'weight': 1, 'bias': None}, {'weight': None, 'bias': 2})
    """
    chosen = map_with_path(lambda path, x: bool(predicate(path, x)), tree)
    yes = map(lambda x, c: x if c else None, tree, chosen)
    no = map(lambda x, c: None if c else x, tree, chosen)
    return yes, no


def combine(*trees: Tree) -> Tree:
    """The tree that has, at each place, the one leaf that is not None among `trees`.

    None where all are None. A None in place of a whole subtree stands for one without leaves: another tree's subtree is
    taken as it is. ValueError with the path where two trees both have a leaf, or where forms differ.

    >>> combine({"encoder": {"w": 1, "b": None}, "head": None}, {"encoder": {"w": None, "b": 2}, "head": {"w": 3}})
    {'encoder': {'w': 1, 'b': 2}, 'head': {'w': 3}}
    """
    if not trees:
        raise ValueError("combine: no tree given; one or more are needed")
    result = trees[0]
    for other in trees[1:]:
        result = traced.merge("", result, other)
    return result


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves as one new 1-D tensor, and the function that cuts such a tensor back into the tree.

    Leaves of several floating dtypes are promoted to their common dtype, which is exact, and `unravel` restores
    each leaf's own. Mixing floating with other dtypes would not be exact: ValueError.
    `unravel` returns views of its argument where the dtype needs no change; another size is a ValueError.

    >>> vector, unravel = ravel({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
    >>> vector, unravel(10 * vector)
    (tensor([1., 2., 3.]), {'a': tensor([10., 20.]), 'b': tensor(30.)})
    """
    flat, treedef = flatten(tree)
    # The number of each leaf, in a tree: unlike a treedef, it can be mapped over inside torch.compile.
    index_tree = unflatten(treedef, range(len(flat)))
    shapes = [x.shape for x in flat]
    dtypes = [x.dtype for x in flat]
    sizes = [x.numel() for x in flat]
    common = dtypes[0] if dtypes else torch.float32
    for path, dtype in zip(paths(tree), dtypes, strict=True):
        if dtype != common and not (dtype.is_floating_point and common.is_floating_point):
            raise ValueError(
                f"ravel: leaf {path!r} has dtype {dtype}, others have {common}; "
                "only floating dtypes can be mixed (partition the tree first)"
            )
        common = torch.promote_types(common, dtype)
    total = sum(sizes)
    vector = torch.cat([x.reshape(-1).to(common) for x in flat]) if flat else torch.zeros(0)

    def unravel(vector: Tensor) -> Tree:
        if vector.shape != (total,):
            raise ValueError(f"unravel: vector has shape {tuple(vector.shape)}, the tree needs ({total},)")
        pieces = torch.split(vector, sizes) if sizes else ()
        return map(lambda i: pieces[i].reshape(shapes[i]).to(dtypes[i]), index_tree)

    return vector, unravel
