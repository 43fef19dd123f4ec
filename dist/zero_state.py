"""Optimizer state of `zero`: from the ranks' parts to the whole that one process would hold, and back."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from purelm import tree
from purelm.dist.messages import from_owners, stand_in
from purelm.dist.sharding import part_of, unshard
from purelm.dist.world import Group, device_of, rank_of, size_of

__all__ = ["cut_state", "gather_state"]


def gather_state(state: Any, like: Any, group: Group = None) -> Any:
    """The whole optimizer state, from each rank's state of `sharded`, `whole_tensors` or a combination of both.

    For a checkpoint that any number of ranks can load. like: has the whole state's shapes, as `init` of the wrapped
    optimizer returns it (meta tensors will do). A leaf that some rank lacks is taken from the first that has it; of
    leaves that all ranks have, 0-d ones are taken to be equal, and others to be parts.
    """
    N = size_of(group)
    if N == 1:
        return state
    mine, holders, wanted = _by_path(state), _holders(state, group), _by_path(like)
    if set(wanted) != set(holders):
        raise ValueError(f"gather_state: ranks hold {sorted(holders)}, `like` has {sorted(wanted)}")
    everywhere = [path for path in wanted if len(holders[path]) == N]
    whole = {path: mine[path] for path in everywhere if mine[path].ndim == 0}
    cut = [path for path in everywhere if mine[path].ndim > 0]
    whole |= zip(cut, unshard([mine[p] for p in cut], [wanted[p] for p in cut], group), strict=True)
    owned = [path for path in wanted if len(holders[path]) < N]
    device = next((x.device for x in mine.values() if x.ndim), device_of(group))
    sent = [mine[p] if p in mine else stand_in(wanted[p], wanted[p].dtype, device) for p in owned]
    whole |= zip(owned, from_owners(sent, [holders[p][0] for p in owned], group), strict=True)
    return tree.unflatten(tree.structure(like), [whole[path] for path in wanted])


def cut_state(whole: Any, like: Any, group: Group = None) -> Any:
    """This rank's part of a whole state, the inverse of `gather_state`; sends only each rank's list of paths.

    like: a state of this rank, as `sharded(optimizer, group).init(params)` gives it.
    """
    rank, N = rank_of(group), size_of(group)
    if N == 1:
        return whole
    given, holders = _by_path(whole), _holders(like, group)
    if set(given) != set(holders):
        raise ValueError(f"cut_state: the state has {sorted(given)}, the ranks hold {sorted(holders)}")
    out = []
    for path, x in _by_path(like).items():
        is_cut = len(holders[path]) == N and x.ndim > 0
        out.append(part_of(given[path], rank, N) if is_cut else given[path])
        if out[-1].shape != x.shape:
            raise ValueError(f"cut_state: {path} has shape {tuple(out[-1].shape)}, rank {rank} needs {tuple(x.shape)}")
    return tree.unflatten(tree.structure(like), out)


def _by_path(values: Any) -> dict[str, Tensor]:
    return dict(zip(tree.paths(values), tree.leaves(values), strict=True))


def _holders(values: Any, group: Group) -> dict[str, list[int]]:
    """Path -> the ranks that have it; sends each rank's list of paths."""
    everyone: list[Any] = [None] * size_of(group)
    dist.all_gather_object(everyone, list(tree.paths(values)), group=group)
    found: dict[str, list[int]] = {}
    for rank, paths in enumerate(everyone):
        for path in paths:
            found.setdefault(path, []).append(rank)
    return found
