"""What is done to all tensors of a tree, and asked of them.

Sizes, norms and finiteness are refused (ValueError) where a leaf could hide tensors: a dataclass, a module, a set or an
array of numpy is one opaque leaf, which would count as nothing. Numbers, strings, dtypes, devices and shapes may stand
in a tree beside tensors.
"""

import numbers
from typing import Any

import torch
from torch import Tensor

from purelm.tree.walks import Tree, leaves, map, paths

__all__ = [
    "all_finite",
    "as_bytes",
    "cast",
    "global_norm",
    "n_bytes",
    "n_params",
    "to",
    "zeros_like",
]


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Floating leaves in `dtype`; integers, booleans and what is no tensor stay as they are.

    >>> cast({"w": torch.ones(1), "step": torch.tensor(3)}, torch.bfloat16)
    {'w': tensor([1.], dtype=torch.bfloat16), 'step': tensor(3)}
    """
    return map(lambda x: x.to(dtype) if is_floating(x) else x, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Each tensor on `device`; what is no tensor stays as it is."""
    return map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def zeros_like(tree: Tree) -> Tree:
    """Zeros of each tensor's shape, dtype and device."""
    return map(torch.zeros_like, tree)


def global_norm(tree: Tree) -> Tensor:
    """sqrt(sum of squares) over the floating leaves, 0-d; accumulated in fp32 (fp64 if a leaf is fp64).

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0]), "step": torch.tensor(7)})
    tensor(5.)
    """
    floats = [x for x in _plain_leaves("global_norm", tree) if is_floating(x)]
    if not floats:
        return torch.zeros(())
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32
    if floats[0].is_cuda and not torch.compiler.is_compiling() and not torch._C._functorch.peek_interpreter_stack():
        # A few launches in all: one for each leaf would keep the host busy for a millisecond.
        norms = list(torch._foreach_norm(floats, 2, dtype))
    else:
        norms = [torch.linalg.vector_norm(x, dtype=dtype) for x in floats]
    return torch.linalg.vector_norm(torch.stack(norms))


def all_finite(tree: Tree) -> Tensor:
    """0-d bool tensor: no floating leaf holds inf or nan.

    >>> all_finite({"a": torch.tensor([1.0, float("inf")])})
    tensor(False)
    """
    found = [_is_finite(x) for x in _plain_leaves("all_finite", tree) if is_floating(x) and x.numel()]
    return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool)


def _is_finite(x: Tensor) -> Tensor:
    """Whether no element is inf or nan, in one pass and without a temporary.

    An inf is the least or the greatest element; where there is a nan, both the least and the greatest are nan.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):  # fp8: no order there
        return torch.isfinite(x.to(torch.float32)).all()
    least, greatest = torch.aminmax(x)
    return torch.isfinite(least) & torch.isfinite(greatest)


def n_params(tree: Tree) -> int:
    """Number of elements over all tensors.

    >>> n_params({"w": torch.zeros(2, 3), "b": torch.zeros(3), "name": "linear"})
    9
    """
    return sum(x.numel() for x in _plain_leaves("n_params", tree) if isinstance(x, Tensor))


def n_bytes(tree: Tree) -> int:
    """Bytes of the elements of all tensors; one that stands in two places counts twice.

    >>> n_bytes({"w": torch.zeros(2, 3), "step": torch.tensor(0)})
    32
    """
    return sum(x.numel() * x.element_size() for x in _plain_leaves("n_bytes", tree) if isinstance(x, Tensor))


def is_floating(x: Any) -> bool:
    """Whether x is a tensor of a floating dtype: what gradients and casts apply to."""
    return isinstance(x, Tensor) and x.dtype.is_floating_point


PLAIN = (numbers.Number, str, bytes, torch.dtype, torch.device, torch.Size)  # what holds no tensor


def _plain_leaves(who: str, tree: Tree) -> list[Any]:
    """The leaves; ValueError with the path where one is neither a tensor nor plain data."""
    found = leaves(tree)
    if torch.compiler.is_compiling():
        return found
    for i, x in enumerate(found):
        if not isinstance(x, Tensor) and not isinstance(x, PLAIN):
            raise ValueError(
                f"{who}: {paths(tree)[i] or 'the root'} is of type {type(x).__name__}, whose tensors trees do not see; "
                "tensors, numbers and None are leaves, dicts, lists, tuples and NamedTuples are nodes (vars(x) is a "
                "dataclass or an object as a dict)"
            )
    return found


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of x's elements in order, uint8 (n,): a view of x where it is dense, for hashes and exact comparison.

    >>> as_bytes(torch.tensor([1, 256], dtype=torch.int16))
    tensor([1, 0, 0, 1], dtype=torch.uint8)
    """
    flat = x.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    # An axis of size 1 may have any stride, in a tensor that torch calls contiguous, too; a view as bytes needs 1.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)
