"""Trees of tensors: nested dicts, lists, tuples and NamedTuples, over optree.

Dict keys are visited in sorted order. None is an absent leaf: it is kept where it stands and has no leaves.
Nothing here changes its arguments; tensors that need no change are returned as they are, not copied.
Inside torch.compile the walks are those of `_tree_traced`, which dynamo traces faster than optree's.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch
from torch import Tensor

from purelm import _tree_traced

Tree = Any
TreeDef = Any  # compared with ==; an optree.PyTreeSpec, or _tree_traced.Structure inside torch.compile

__all__ = [
    "Tree",
    "TreeDef",
    "all_finite",
    "cast",
    "combine",
    "flatten",
    "flatten_up_to",
    "global_norm",
    "leaves",
    "map",
    "map_with_path",
    "n_bytes",
    "n_params",
    "partition",
    "paths",
    "ravel",
    "structure",
    "to",
    "unflatten",
    "zeros_like",
]


def flatten(tree: Tree) -> tuple[list[Any], TreeDef]:
    """The leaves in order, and the structure that `unflatten` needs to rebuild the tree.

    >>> flatten({"b": 2, "a": [1, None]})[0]
    [1, 2]
    """
    if torch.compiler.is_compiling():
        return _tree_traced.flatten(tree)
    return optree.tree_flatten(tree)


def flatten_up_to(tree: Tree, *rest: Tree) -> tuple[list[list[Any]], TreeDef]:
    """([leaves of tree, what stands there in each of rest ...], structure of tree): what `map` maps over.

    >>> flatten_up_to({"w": 1, "b": 2}, {"w": [3, 4], "b": None})[0]
    [[2, 1], [None, [3, 4]]]
    """
    if torch.compiler.is_compiling():
        columns: list[list[Any]] = [[] for _ in range(1 + len(rest))]

        def visit(path: str, *xs: Any) -> None:
            for column, x in zip(columns, xs, strict=True):
                column.append(x)

        _tree_traced.walk(visit, "", tree, rest)
        return columns, _tree_traced.flatten(tree)[1]
    flat, treedef = optree.tree_flatten(tree)
    try:
        return [flat, *[treedef.flatten_up_to(r) for r in rest]], treedef
    except ValueError:
        _tree_traced.walk(lambda path, *xs: None, "", tree, rest)  # the same check; it names the path
        raise


def unflatten(treedef: TreeDef, leaves: Iterable[Any]) -> Tree:
    """The tree of structure `treedef` with these leaves; ValueError when their number is another."""
    if isinstance(treedef, _tree_traced.Structure):
        return _tree_traced.unflatten(treedef, list(leaves))
    return optree.tree_unflatten(treedef, leaves)


def structure(tree: Tree) -> TreeDef:
    """The structure of the tree without its leaves; equal (==) for trees of equal form."""
    return flatten(tree)[1]


def leaves(tree: Tree) -> list[Any]:
    """The leaves in order."""
    if torch.compiler.is_compiling():
        return _tree_traced.leaves(tree)
    return optree.tree_leaves(tree)


def paths(tree: Tree) -> list[str]:
    """The path of each leaf: dict keys, list indices and NamedTuple fields joined by dots.

    >>> paths({"layers": [{"ln1": {"weight": 1}}], "bias": 2})
    ['bias', 'layers.0.ln1.weight']
    """
    if torch.compiler.is_compiling():
        found: list[str] = []
        _tree_traced.walk(lambda path, leaf: found.append(path), "", tree, ())
        return found
    return list(_paths_of(optree.tree_structure(tree)))


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """f(leaf, *leaves of rest) at each leaf of `tree`, in a tree of the same structure.

    A tree of `rest` may go deeper than `tree`: f then gets what stands there where `tree` has a leaf (None
    included: so absent gradients reach f). Any other difference of form is a ValueError with the path.

    >>> map(lambda a, b: a + b, {"w": 1, "b": None}, {"w": 10, "b": None})
    {'w': 11, 'b': None}
    """
    if torch.compiler.is_compiling():
        return _tree_traced.map(f, tree, *rest)
    columns, treedef = flatten_up_to(tree, *rest)
    return treedef.unflatten([f(*xs) for xs in zip(*columns, strict=True)])


def map_with_path(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """f(path, leaf, *leaves of rest) at each leaf of `tree`; otherwise as `map`.

    >>> map_with_path(lambda path, x: path, {"layers": [1, 2]})
    {'layers': ['layers.0', 'layers.1']}
    """
    if torch.compiler.is_compiling():
        return _tree_traced.walk(f, "", tree, rest)
    columns, treedef = flatten_up_to(tree, *rest)
    return treedef.unflatten([f(*xs) for xs in zip(_paths_of(treedef), *columns, strict=True)])


def partition(predicate: Callable[[str, Any], bool], tree: Tree) -> tuple[Tree, Tree]:
    """(yes, no): two trees of the same form; predicate(path, leaf) says which has the leaf, the other has None.

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

    None where all are None. ValueError with the path where two trees both have a leaf, or where forms differ.
    """
    if not trees:
        raise ValueError("combine: no tree given; one or more are needed")
    result = trees[0]
    for other in trees[1:]:
        result = _tree_traced.merge("", result, other)
    return result


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves as one new 1-D tensor, and the function that cuts such a tensor back into the tree.

    Leaves of several floating dtypes are promoted to their common dtype, which is exact, and `unravel` restores
    each leaf's own. Mixing floating with other dtypes would not be exact: ValueError.
    `unravel` returns views of its argument where the dtype needs no change; another size is a ValueError.
    """
    flat, treedef = flatten(tree)
    # Not the treedef itself: an index at each leaf can be mapped over inside torch.compile too.
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


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Floating leaves in `dtype`; integers, booleans and what is no tensor stay as they are."""
    return map(lambda x: x.to(dtype) if is_floating(x) else x, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Each tensor on `device`; what is no tensor stays as it is."""
    return map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def zeros_like(tree: Tree) -> Tree:
    """Zeros of each tensor's shape, dtype and device."""
    return map(torch.zeros_like, tree)


def global_norm(tree: Tree) -> Tensor:
    """sqrt(sum of squares) over the floating leaves, 0-d; accumulated in fp32 (fp64 if a leaf is fp64)."""
    floats = [x for x in leaves(tree) if is_floating(x)]
    if not floats:
        return torch.zeros(())
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32
    if floats[0].is_cuda and not torch.compiler.is_compiling() and not torch._C._functorch.peek_interpreter_stack():
        # A few launches; one a leaf keeps the host busy for a millisecond.
        norms = list(torch._foreach_norm(floats, 2, dtype))
    else:
        norms = [torch.linalg.vector_norm(x, dtype=dtype) for x in floats]
    return torch.linalg.vector_norm(torch.stack(norms))


def all_finite(tree: Tree) -> Tensor:
    """0-d bool tensor: no floating leaf holds inf or nan."""
    found = [_is_finite(x) for x in leaves(tree) if is_floating(x) and x.numel()]
    return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool)


def _is_finite(x: Tensor) -> Tensor:
    """One pass and no memory: an inf is the least or the greatest, and of a nan both are nan."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):  # fp8: no order there
        return torch.isfinite(x.to(torch.float32)).all()
    least, greatest = torch.aminmax(x)
    return torch.isfinite(least) & torch.isfinite(greatest)


def n_params(tree: Tree) -> int:
    """Number of elements over all tensors."""
    return sum(x.numel() for x in leaves(tree) if isinstance(x, Tensor))


def n_bytes(tree: Tree) -> int:
    """Bytes of the elements of all tensors; one that stands in two places counts twice."""
    return sum(x.numel() * x.element_size() for x in leaves(tree) if isinstance(x, Tensor))


def is_floating(x: Any) -> bool:
    """Whether x is a tensor of a floating dtype: what gradients and casts apply to."""
    return isinstance(x, Tensor) and x.dtype.is_floating_point


@functools.lru_cache(maxsize=128)
def _paths_of(treedef: optree.PyTreeSpec) -> tuple[str, ...]:
    """Kept, since an optimizer with a mask asks in every step: 290 paths take 2 ms to put together."""
    found: list[str] = []
    _tree_traced.walk(lambda path, leaf: found.append(path), "", treedef.unflatten(range(treedef.num_leaves)), ())
    return tuple(found)
