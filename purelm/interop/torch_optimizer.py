"""A purelm optimizer as a class of torch.optim, for programs that are written against it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.dist import zero
from purelm.interop.torch_state import from_torch, to_torch
from purelm.optim import Optimizer, apply_updates
from purelm.optim.checks import check_optimizer
from purelm.optim.parts import check_sees_all

__all__ = ["TorchOptimizer"]

Params = Iterable[Any]  # as of torch.optim: tensors, (name, tensor) pairs, or dicts with "params" and options

# What a param group may have: its parameters, lr, and what torch.optim.lr_scheduler and swa_utils keep there.
OPTIONS = {"params", "param_names", "lr", "initial_lr", "min_lr", "max_lr", "swa_lr"}


class TorchOptimizer(torch.optim.Optimizer):
    """A purelm optimizer as a torch.optim.Optimizer.

    Each param group is one tree with one state: a dict by name where (name, parameter) pairs are given, as by
    model.named_parameters(), so that masks see names; else a list. lr is the group's, so that torch's schedulers work.
    A norm over all gradients is over those of the group. A group has no other options (ValueError): use the optimizer's
    mask for weight decay, and `optim.labelled` for several optimizers.

    With `fsdp` a process holds parts of parameters: the first step refuses an optimizer that clips by their norm.
    Frozen parameters keep their values, but have moments too: leave them out of params to save that memory.
    It can be copied and pickled if `purelm.optim` made the optimizer and its arguments can be pickled (no lambdas).

    >>> from purelm.optim import adamw, chain, clip_by_global_norm
    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = TorchOptimizer(model.named_parameters(), chain(clip_by_global_norm(1.0), adamw()), lr=1e-3)
    >>> sorted(optimizer.state_dict()["state"][0])
    ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(self, params: Params, optimizer: Optimizer, lr: float | Tensor = 1e-3):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer)
        if issubclass(kind, torch.optim.Optimizer):
            raise ValueError(
                f"TorchOptimizer: optimizer is {kind.__module__}.{kind.__qualname__}, which is torch's already; a pair "
                "of purelm.optim is needed, such as adamw()"
            )
        check_optimizer("TorchOptimizer: optimizer", optimizer)
        self.optimizer = optimizer
        self.trees: list[Any] = []  # the optimizer's state of each group
        self.is_tried = False  # whether `_check_norms` has run
        super().__init__(params, {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        """torch.optim.Optimizer leaves the attributes of a subclass out of copies and pickles."""
        names = ("optimizer", "trees", "is_tried")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; ValueError for an option other than lr and those that torch's schedulers add."""
        for name in param_group.keys() - OPTIONS:
            raise ValueError(
                f"TorchOptimizer: param group {len(self.param_groups)} has {name}={param_group[name]!r}; groups have "
                f"params and lr, the rest is said to the optimizer (mask=, optim.labelled) or to another TorchOptimizer"
            )
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
        """torch's form: "state" is {number of the parameter: {name: tensor}}, with torch.optim's names (`torch_state`).

        torch.optim.AdamW loads the state of `adamw`, with "param_groups" of its own, and goes on from there.
        """
        state: dict[int, Any] = {}
        for group, one in zip(self.param_groups, self.trees, strict=True):
            state |= to_torch(one, _tree_of(group, torch.Tensor.detach), start=len(state))
        return {**super().state_dict(), "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of such an optimizer, or of its counterpart in torch.optim: AdamW for `adamw`.

        From the groups, lr and what schedulers keep there is taken; other options (betas, weight_decay) are ignored:
        they stay as this optimizer was made. ValueError, with nothing changed, for the state of another optimizer or of
        other parameters.
        """
        groups = state_dict["param_groups"]
        sizes, own = ([len(g["params"]) for g in some] for some in (groups, self.param_groups))
        if sizes != own:
            raise ValueError(f"load_state_dict: the state has groups of {sizes} parameters, this optimizer of {own}")
        new: list[Any] = []
        for saved, group in zip(groups, self.param_groups, strict=True):
            params, state = _tree_of(group, torch.Tensor.detach), self.trees[len(new)]
            if not all(state_dict["state"].get(number) for number in saved["params"]):
                state = self.optimizer.init(params)
            new.append(from_torch(state_dict["state"], state, params, saved["params"]))
        kept = [{k: v for k, v in g.items() if k in OPTIONS} for g in groups]
        super().load_state_dict({**state_dict, "state": {}, "param_groups": kept})
        self.trees = new


def _tree_of(group: dict[str, Any], f: Callable[[Tensor], Any]) -> Any:
    """f of each parameter of a group: by name if they have names."""
    values = [f(p) for p in group["params"]]
    return dict(zip(group["param_names"], values, strict=True)) if "param_names" in group else values
