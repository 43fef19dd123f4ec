"""torch's class-based interfaces over purelm's functions, for programs that are written against torch.optim.

Optimizers here change parameters in place, as torch.optim does: that is what such programs expect. The arithmetic is
that of the optimizer that they wrap. `functional`, `ddp` and `fsdp` take modules (modules, fully_sharded).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from purelm import tree
from purelm.dist import messages, zero
from purelm.dist.agreement import check_same_kind
from purelm.dist.world import Group, rank_of, size_of
from purelm.interop.fully_sharded import fsdp
from purelm.interop.modules import ddp, functional
from purelm.optim import Optimizer, apply_updates
from purelm.optim.parts import check_sees_all

__all__ = [
    "ShardedOptimizer",
    "TorchOptimizer",
    "ddp",
    "fsdp",
    "functional",
    "sharded_optimizer",
    "whole_state_dict",
]

Params = Iterable[Any]  # as of torch.optim: tensors, (name, tensor) pairs, or dicts with "params" and options


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
        return {**super().__getstate__(), **_own(self)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
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
            added.setdefault(name, value)  # the class's defaults, which schedulers may look for

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


class TorchOptimizer(torch.optim.Optimizer):
    """A purelm optimizer as a torch.optim.Optimizer.

    Each param group is a tree of its own with a state of its own: a dict by name where (name, parameter) pairs are
    given, as model.named_parameters(), so that masks see names; else a list. lr is the group's, so that torch's
    schedulers work; a norm over all gradients is that of the group. Of what `fsdp` returns a process holds parts: the
    first step refuses an optimizer that clips by the norm of these. Frozen parameters keep their values; leave them out
    to save their state.

    >>> from purelm.optim import adamw, chain, clip_by_global_norm
    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = TorchOptimizer(model.named_parameters(), chain(clip_by_global_norm(1.0), adamw()), lr=1e-3)
    """

    def __init__(self, params: Params, optimizer: Optimizer, lr: float | Tensor = 1e-3):
        self.optimizer = optimizer
        self.trees: list[Any] = []  # the optimizer's state of each group
        self.is_tried = False  # whether its norms are of all that processes hold
        super().__init__(params, {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **_own(self)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.trees.append(self.optimizer.init(_tree_of(self.param_groups[-1], torch.Tensor.detach)))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates all parameters in place; the loss of closure, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.is_tried:
            self._check_norms()
            self.is_tried = True
        for i, group in enumerate(self.param_groups):
            params, grads = _tree_of(group, torch.Tensor.detach), _tree_of(group, lambda p: p.grad)
            updates, self.trees[i] = self.optimizer.update(grads, self.trees[i], params, group["lr"])
            tree.map(lambda p, new: p.copy_(new), params, apply_updates(params, updates))
        return loss

    def _check_norms(self) -> None:
        """ValueError where the optimizer clips by the norm of the parts that `fsdp` leaves this process."""
        for group in self.param_groups:
            if any(getattr(p, "is_part", False) for p in group["params"]):
                advice = "clip_by_global_norm(max_norm, norm=...) of a sum over processes"
                params = _tree_of(group, torch.Tensor.detach)
                check_sees_all(self.optimizer, params, zero.global_norm(), "TorchOptimizer.step", advice)

    def state_dict(self) -> dict[str, Any]:
        """torch's form, "state" being path -> tensor over all groups."""
        return {
            **super().state_dict(),
            "state": dict(zip(tree.paths(self.trees), tree.leaves(self.trees), strict=True)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError, with nothing changed, where the state is that of another optimizer or of other parameters."""
        saved, (old, treedef) = state_dict["state"], tree.flatten(self.trees)
        paths = tree.paths(self.trees)
        if set(saved) != set(paths):
            raise ValueError(f"load_state_dict: the state has {sorted(saved)}, this optimizer {sorted(paths)}")
        for path, x in zip(paths, old, strict=True):
            if saved[path].shape != x.shape:
                shapes = f"{tuple(saved[path].shape)}, this optimizer has {tuple(x.shape)}"
                raise ValueError(f"load_state_dict: {path} has shape {shapes}")
        super().load_state_dict({**state_dict, "state": {}})
        self.trees = tree.unflatten(treedef, [saved[p].to(x.device, x.dtype) for p, x in zip(paths, old, strict=True)])


def _own(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What torch.optim.Optimizer leaves out of copies and pickles: attributes of a subclass."""
    names = ("group", "_class", "_options", "_owners", "_loads", "_local", "optimizer", "trees", "is_tried")
    return {name: getattr(optimizer, name) for name in names if hasattr(optimizer, name)}


def _tree_of(group: dict[str, Any], f: Callable[[Tensor], Any]) -> Any:
    """f of each parameter of a group: by name if they have names."""
    values = [f(p) for p in group["params"]]
    return dict(zip(group["param_names"], values, strict=True)) if "param_names" in group else values
