"""Many trees of one form as one tree of stacked leaves, and back: for torch.vmap over models, seeds or layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from purelm.tree.walks import Tree, leaves, map, map_with_path, paths

__all__ = ["stack", "unstack"]


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree whose leaf at each place is torch.stack of the leaves there: a new first axis, as long as `trees`.

    ValueError with the path where forms, shapes or dtypes differ, or where a leaf is no tensor; and for no trees.

    >>> params = stack([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
    >>> params["w"]
    tensor([[0., 0.],
            [1., 1.]])
    >>> torch.vmap(lambda p, x: p["w"] @ x, in_dims=(0, None))(params, torch.ones(2))
    tensor([0., 2.])
    """
    trees = list(trees)
    if not trees:
        raise ValueError("stack: trees is empty; one or more are needed")

    def stacked(path: str, *xs: Tensor) -> Tensor:
        for i, x in enumerate(xs):
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"stack: leaf {path!r} of trees[{i}] is of type {type(x).__name__}; tensors are needed"
                )
            if (x.shape, x.dtype) != (xs[0].shape, xs[0].dtype):
                kinds = [f"{tuple(y.shape)} {y.dtype} in trees[{j}]" for j, y in ((i, x), (0, xs[0]))]
                raise ValueError(f"stack: leaf {path!r} is {kinds[0]}, {kinds[1]}")
        return torch.stack(xs)

    return map_with_path(stacked, trees[0], *trees[1:])


def unstack(tree: Tree) -> list[Tree]:
    """The list of trees that `stack` made one of: tree i has leaf[i], a view, at each place.

    ValueError with the path where leaves have no first axis or another length of it; and for a tree without leaves,
    which does not say how many there were.

    >>> unstack({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    [{'w': tensor([1., 2.])}, {'w': tensor([3., 4.])}]
    """
    n = None
    for path, x in zip(paths(tree), leaves(tree), strict=True):
        if not isinstance(x, Tensor) or not x.ndim:
            given = "tensor of shape ()" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"unstack: leaf {path!r} is a {given}; tensors with a first axis are needed")
        n = x.shape[0] if n is None else n
        if x.shape[0] != n:
            raise ValueError(f"unstack: leaf {path!r} has a first axis of {x.shape[0]}, others of {n}")
    if n is None:
        raise ValueError("unstack: the tree has no leaves, so that the number of trees is not known")
    pieces = map(torch.unbind, tree)
    return [map(lambda x, cut, i=i: cut[i], tree, pieces) for i in range(n)]
