"""Trees of tensors: nested dicts, lists, tuples and NamedTuples, over optree.

Dict keys are visited in sorted order. None is an absent leaf: it is kept where it stands and has no leaves.
Nothing here changes its arguments; tensors that need no change are returned as they are, not copied.
Inside torch.compile the walks are those of `traced`, which dynamo traces faster than optree's.
"""

from purelm.tree.flat import from_flat, to_flat
from purelm.tree.parts import (
    combine,
    partition,
    ravel,
)
from purelm.tree.stacks import stack, unstack
from purelm.tree.tensors import (
    all_finite,
    as_bytes,
    cast,
    global_norm,
    is_floating,
    n_bytes,
    n_params,
    to,
    zeros_like,
)
from purelm.tree.walks import (
    Tree,
    TreeDef,
    flatten,
    flatten_up_to,
    leaves,
    map,
    map_with_path,
    paths,
    reduce,
    structure,
    unflatten,
)

__all__ = [
    "Tree",
    "TreeDef",
    "all_finite",
    "as_bytes",
    "cast",
    "combine",
    "flatten",
    "flatten_up_to",
    "from_flat",
    "global_norm",
    "is_floating",
    "leaves",
    "map",
    "map_with_path",
    "n_bytes",
    "n_params",
    "partition",
    "paths",
    "ravel",
    "reduce",
    "stack",
    "structure",
    "to",
    "to_flat",
    "unflatten",
    "unstack",
    "zeros_like",
]
