"""The state of a purelm optimizer in torch's form, {number of the parameter: {name: tensor}}, and back.

In a purelm state some subtrees have the form of the parameters (moments), and other leaves belong to all parameters
(counters). torch has a dict for each parameter, with its moments and a copy of each counter. Names are torch.optim's
where it has such an optimizer, so that state dicts can be exchanged:

    adamw   m, v, step   exp_avg, exp_avg_sq, step (fp32, on the CPU)
    lion    m, step      exp_avg, step
    sgd     m, step      momentum_buffer, step
    muon    m, step      momentum_buffer, step
    rmsprop v, m, b, step   square_avg, momentum_buffer, grad_avg, step (fp32, on the CPU)

Other entries are named after their fields, or by their whole paths ("yes.step") where two fields have one name.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import tree
from purelm.optim import AdamWState, LionState, MuonState, RMSpropState, SGDState

__all__ = ["from_torch", "to_torch"]

NAMES: dict[type, dict[str, str]] = {
    AdamWState: {"m": "exp_avg", "v": "exp_avg_sq"},
    LionState: {"m": "exp_avg"},
    SGDState: {"m": "momentum_buffer"},
    MuonState: {"m": "momentum_buffer"},
    RMSpropState: {"v": "square_avg", "m": "momentum_buffer", "b": "grad_avg"},
}
ONLY_COUNTED = (LionState, SGDState, MuonState)  # nothing depends on their step, and torch's SGD and Muon keep none

State = dict[int, dict[str, Any]]


class _Entry(NamedTuple):
    """A leaf of the state, as it belongs to one parameter."""

    leaf: str  # its path
    name: str  # torch's
    is_shared: bool  # by all parameters of the group
    is_needed: bool  # when a state is read


def to_torch(state: Any, params: Any, start: int = 0) -> State:
    """The state of a group whose parameters are the dict or list `params`, numbered from `start`."""
    leaves = tree.to_flat(state)
    return {
        start + i: {e.name: _written(e, leaves[e.leaf]) for e in entries}
        for i, entries in enumerate(_entries(state, params))
    }


def from_torch(saved: Mapping[int, Mapping[str, Any]], like: Any, params: Any, numbers: Sequence[int]) -> Any:
    """The state from torch's form; `numbers` are those of the parameters in `saved`, `like` a state of the form.

    A parameter that `saved` lacks keeps what it has in `like`. torch has no state for parameters that never had a
    gradient, so `like` should be optimizer.init(params). ValueError for other names or shapes, and where parameters'
    counters differ, since here they have one in common.
    """
    leaves = tree.to_flat(like)
    new: dict[str, Tensor] = {}
    for number, entries in zip(numbers, _entries(like, params), strict=True):
        found = saved.get(number)
        if not found:
            continue
        names = {e.name for e in entries}
        if not {e.name for e in entries if e.is_needed} <= found.keys() <= names:
            what = f"parameter {number} has {sorted(found)}, this optimizer needs {sorted(names)}"
            raise ValueError(f"load_state_dict: the state of {what}")
        for e in entries:
            if e.name not in found:
                continue
            x, old = torch.as_tensor(found[e.name]), leaves[e.leaf]
            if x.shape != old.shape:
                shapes = f"{tuple(x.shape)}, this optimizer has {tuple(old.shape)}"
                raise ValueError(f"load_state_dict: {e.name} of parameter {number} has shape {shapes}")
            value = x.detach().to(old.device, old.dtype, copy=True)
            if e.is_shared and e.leaf in new and not torch.equal(new[e.leaf], value):
                differing = f"{value.tolist()} of parameter {number}, {new[e.leaf].tolist()} of others"
                raise ValueError(f"load_state_dict: {e.name} is {differing}; a group has one for all (one group each)")
            new[e.leaf] = value
    return tree.map_with_path(new.get, like)


def _written(entry: _Entry, x: Tensor) -> Tensor:
    """A leaf as torch keeps it: a counter is copied for each parameter, because torch adds to it in place."""
    if entry.name == "step" and x.ndim == 0:
        return x.to("cpu", torch.float32, copy=True)
    return x.clone() if entry.is_shared else x


def _entries(state: Any, params: Any) -> list[list[_Entry]]:
    """For each parameter, what of the state belongs to it."""
    keys = list(params) if isinstance(params, dict) else list(range(len(params)))
    own: list[list[tuple[str, str]]] = [[] for _ in keys]  # (path, short name)
    shared: list[tuple[str, str, bool]] = []

    def visit(path: str, name: str, needed: bool, node: Any) -> None:
        if _is_like(params, node):
            for i, key in enumerate(keys):
                if node[key] is not None:
                    own[i].append((_join(path, key), name))
        elif isinstance(node, tuple) and hasattr(node, "_fields"):
            names = NAMES.get(type(node), {})
            for field, child in zip(node._fields, node, strict=True):
                counts_only = field == "step" and isinstance(node, ONLY_COUNTED)
                visit(_join(path, field), names.get(field, field), not counts_only, child)
        elif isinstance(node, dict | list | tuple):
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                visit(_join(path, key), str(key), needed, child)
        elif node is not None:
            shared.append((path, name, needed))

    visit("", "state", True, state)
    out = []
    for key, mine in zip(keys, own, strict=True):
        times = Counter([name for _, name in mine] + [name for _, name, _ in shared])
        suffix = f".{key}"
        out.append(
            [_Entry(p, n if times[n] == 1 else p.removesuffix(suffix), False, True) for p, n in mine]
            + [_Entry(p, n if times[n] == 1 else p, True, needed) for p, n, needed in shared]
        )
    return out


def _is_like(params: Any, node: Any) -> bool:
    """Whether a node of the state has the form of params: tensors, or None, under the same keys."""
    if type(node) is not type(params) or len(node) != len(params) or not len(node):
        return False
    if isinstance(node, dict):
        return node.keys() == params.keys() and all(x is None or isinstance(x, Tensor) for x in node.values())
    return all(x is None or isinstance(x, Tensor) for x in node)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
