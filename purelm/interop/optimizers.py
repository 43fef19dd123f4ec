"""A torch.optim optimizer whose state is spread over processes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from purelm import tree
from purelm.dist import messages, zero
from purelm.dist.agreement import check_same_kind
from purelm.dist.world import Group, rank_of, size_of
from purelm.interop.torch_optimizer import Params

__all__ = ["ShardedOptimizer", "sharded_optimizer", "whole_state_dict"]


def sharded_optimizer(
    params: Params, optimizer_cls: type[torch.optim.Optimizer], *, group: Group = None, **kwargs: Any
) -> torch.optim.Optimizer:
    """optimizer_cls(params, **kwargs) with its state spread over the group's ranks, parameter by parameter.

    step() steps the parameters that this rank owns (`zero.assign`, by number of elements) and broadcasts them: p bytes
    of parameters, a message for each owner, dtype and bucket. Gradients are used as they are: reduce them before (DDP
    does). Every rank must take part in the constructor, add_param_group and step, and parameters must be equal at the
    start. The result is that of optimizer_cls alone, to the last bit, if that treats each parameter by itself.

    state_dict() is torch's, with the state of this rank's parameters only; `whole_state_dict` has all.
    """
    return ShardedOptimizer(params, optimizer_cls, group, kwargs)


class ShardedOptimizer(torch.optim.Optimizer):
    """What `sharded_optimizer` returns. param_groups are those of all parameters: schedulers change lr there."""

    def __init__(
        self, params: Params, optimizer_cls: type[torch.optim.Optimizer], group: Group, options: dict[str, Any]
    ):
        self.group, self._class, self._options = group, optimizer_cls, options
        self._owners: dict[Tensor, int] = {}
        self._loads = [0] * size_of(group)
        self._local: torch.optim.Optimizer | None = None  # over this rank's parameters, a group for each of ours
        super().__init__(params, dict(options))

    def __getstate__(self) -> dict[str, Any]:
        """torch.optim.Optimizer leaves the attributes of a subclass out of copies and pickles."""
        names = ("_class", "_options", "_owners", "_loads", "_local")
        return {**super().__getstate__(), **{n: getattr(self, n) for n in names}, "group": _Shared(self.group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        group = state.get("group")
        super().__setstate__({**state, "group": group.group} if isinstance(group, _Shared) else state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; all ranks must call it."""
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        check_same_kind(added["params"], self.group, f"parameter group {len(self.param_groups) - 1}")
        new = [p for p in dict.fromkeys(added["params"]) if p not in self._owners]
        for p, owner in zip(new, zero.assign([p.numel() for p in new], len(self._loads), self._loads), strict=True):
            self._owners[p] = owner
            self._loads[owner] += p.numel()
        if self._local is None:
            self._local = self._class([self._own_part(added)], **self._options)
            self.defaults = {**self._local.defaults}
            self.state = self._local.state
        else:
            self._local.add_param_group(self._own_part(added))
        for name, value in self._local.param_groups[-1].items():
            added.setdefault(name, value)  # optimizer_cls's defaults, which schedulers may read

    def _own_part(self, group: dict[str, Any]) -> dict[str, Any]:
        rank = rank_of(self.group)
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        return {**options, "params": [p for p in group["params"] if self._owners[p] == rank]}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps this rank's parameters and sends them; the loss of closure, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self._local is not None
        for local, group in zip(self._local.param_groups, self.param_groups, strict=True):
            local.update({k: v for k, v in group.items() if k not in ("params", "param_names")})
        self._local.step()
        with torch.no_grad():
            changed = [p for p in self._owners if p.requires_grad or p.grad is not None]
            sent = messages.from_owners(changed, [self._owners[p] for p in changed], self.group)
            for p, new in zip(changed, sent, strict=True):
                if self._owners[p] != rank_of(self.group):
                    p.copy_(new)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From state_dict() of this rank, `whole_state_dict`, or optimizer_cls's own over all parameters."""
        assert self._local is not None
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = {i for i, p in zip(numbers, params, strict=False) if self._owners[p] == rank_of(self.group)}
        super().load_state_dict({**state_dict, "state": {i: s for i, s in state_dict["state"].items() if i in own}})
        self._local.state = self.state


def whole_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state_dict that optimizer_cls alone would have, on every rank, from that of each rank's part.

    All ranks must call it. Copied through the host and pickled: for checkpoints. It loads on any number of ranks.
    """
    mine = optimizer.state_dict()
    if not isinstance(optimizer, ShardedOptimizer) or size_of(optimizer.group) == 1:
        return mine
    everyone: list[Any] = [None] * size_of(optimizer.group)
    dist.all_gather_object(everyone, tree.to(mine["state"], "cpu"), group=optimizer.group)
    return {**mine, "state": dict(sorted((i, s) for one in everyone for i, s in one.items()))}


class _Shared:
    """A process group, which copies of an optimizer share, and which cannot be pickled."""

    def __init__(self, group: Group):
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None:
            raise ValueError("sharded_optimizer: a process group cannot be pickled; save whole_state_dict(optimizer)")
        return _Shared, (None,)
