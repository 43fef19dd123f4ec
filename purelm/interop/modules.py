"""torch modules and purelm's functions: a module as a function of its parameters, and data parallel modules.

    params, apply = functional(module)       # apply(params, x) is module(x)

    model = ddp(module)                      # or fully_sharded.fsdp(module)
    model(x).square().mean().backward()
    model.finish_gradient_synchronization()  # .grad is now the mean over ranks
    optimizer.step()                         # any of torch.optim, over model.parameters()

Every rank makes the wrapper, which copies rank 0's parameters and buffers to all, and calls the same things in the
same order.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from purelm.dist.agreement import check_same_kind
from purelm.dist.collectives import broadcast
from purelm.dist.ddp import check_options
from purelm.dist.messages import Pending, cut, default_bucket_bytes, send_bucket
from purelm.dist.world import Group, size_of

__all__ = ["DataParallel", "ddp", "functional"]


def functional(module: nn.Module) -> tuple[dict[str, Tensor], Callable[..., Any]]:
    """(params, apply) with apply(params, *args, **kwargs) = module(*args, **kwargs) of these parameters.

    params: name -> copy of the value, as in module.named_parameters(): tied parameters once, frozen ones included (a
    mask keeps an optimizer off them). apply is pure, except that dropout draws from torch's generator: it keeps the
    buffers and the mode (train or eval) that the module has now, discards what forward writes to buffers, and neither
    uses nor changes the module. ValueError from apply where the names are not those of params.

    >>> params, apply = functional(torch.nn.Linear(2, 1))
    >>> {name: tuple(x.shape) for name, x in params.items()}, apply(params, torch.ones(3, 2)).shape
    ({'weight': (1, 2), 'bias': (1,)}, torch.Size([3, 1]))
    """
    named = dict(module.named_parameters())
    params = {name: p.detach().clone() for name, p in named.items()}
    # A copy, so that forward cannot change the caller's module, nor the caller this function. Its parameters have no
    # memory (meta device), since each call supplies their values.
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in named.values()}
    frame = copy.deepcopy(module, dict(empty))
    buffers, names = dict(frame.named_buffers()), frozenset(named)

    def apply(params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if params.keys() != names:
            missing, unknown = names - params.keys(), params.keys() - names
            raise ValueError(f"params lacks {sorted(missing)} and has unknown {sorted(unknown)}")
        # Clones, because forward may write to buffers.
        return functional_call(frame, (params, {name: x.clone() for name, x in buffers.items()}), args, kwargs)

    return params, apply


def ddp(
    module: nn.Module, group: Group = None, *, bucket_bytes: int | None = None, wire: torch.dtype | None = None
) -> "DataParallel":
    """The module, with gradients that are means over ranks, sent while backward runs; `.module` is the module itself.

    Parameters and buffers of all ranks are set to rank 0's here, once; later changes of buffers stay on their rank.
    Gradients are sent in buckets of bucket_bytes (by default `dist.messages.default_bucket_bytes`), one message each.
    All ranks send buckets in the same order, those of the last registered parameters first: a bucket is sent when its
    gradients are ready and all earlier buckets are sent. A rank sends 2 (N - 1) / N of the gradients' bytes a step.
    wire: a dtype to which gradients are rounded, and in which they are sent and added.

    A parameter that some ranks do not use counts as zeros there; one that none uses keeps .grad None. Parameters that
    do not require gradients now are left out for good. ValueError on all ranks, naming the parameter, where their
    modules differ.
    """
    return DataParallel(module, group, bucket_bytes, wire)


class DataParallel(nn.Module):
    """What `ddp` returns."""

    def __init__(self, module: nn.Module, group: Group, bucket_bytes: int | None, wire: torch.dtype | None):
        super().__init__()
        check_options("mean", bucket_bytes)
        _same_everywhere(module, group)
        self.module = module
        self._sends = True
        params = [p for p in module.parameters() if p.requires_grad]
        self._means = _Means(params, group, bucket_bytes or default_bucket_bytes(params), wire)
        if size_of(group) > 1:
            for i, p in enumerate(self._means.params):
                p.register_post_accumulate_grad_hook(partial(self._arrived, i))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return self.module(*args, **kwargs)

    def _arrived(self, i: int, p: Tensor) -> None:
        if self._sends:
            self._means.arrived(i)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which backward() only adds to .grad; the first backward() after it sends the sums."""
        before, self._sends = self._sends, False
        try:
            yield
        finally:
            self._sends = before

    def finish_gradient_synchronization(self) -> None:
        """Sends what is left and waits for all messages; to be called after the last backward of a step.

        Afterwards .grad is the mean over ranks, the same bits on all of them. On a GPU only the stream waits; the host
        waits too where this rank did not use a parameter.
        """
        self._means.finish()


class _Means:
    """Means over ranks of the .grad of parameters, in buckets that every rank sends in the same order."""

    def __init__(self, params: list[nn.Parameter], group: Group, bucket_bytes: float, wire: torch.dtype | None):
        self.params, self.group, self.wire = params, group, wire
        self.buckets = cut(params, bucket_bytes, range(len(params))[::-1])
        self.here: set[int] = set()
        self.under_way: list[tuple[list[bool], Pending]] = []

    def arrived(self, i: int) -> None:
        if i in self.here:
            raise RuntimeError(
                "a second backward() before finish_gradient_synchronization(): to add up gradients, run all but the "
                "last one under no_sync()"
            )
        self.here.add(i)
        while len(self.under_way) < len(self.buckets) and self.here.issuperset(self.buckets[len(self.under_way)]):
            self._send_next()

    @torch.no_grad()
    def _send_next(self) -> None:
        params = [self.params[i] for i in self.buckets[len(self.under_way)]]
        used = [p.grad is not None for p in params]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        # One number for each parameter says whether any rank has its gradient. They are made on the device, because
        # copying a list there would wait for it.
        flags = grads[0].new_ones(len(used)) if all(used) else grads[0].new_tensor(used)
        self.under_way.append((used, send_bucket([*grads, flags], self.group, "mean", self.wire)))
        for p in params:
            p.grad = None  # the message has it

    @torch.no_grad()
    def finish(self) -> None:
        if size_of(self.group) == 1:
            return
        while len(self.under_way) < len(self.buckets):
            self._send_next()
        for bucket, (used, message) in zip(self.buckets, self.under_way, strict=True):
            *means, flags = message.wait()
            anywhere = used if all(used) else (flags > 0).tolist()
            for i, mean, keep in zip(bucket, means, anywhere, strict=True):
                self.params[i].grad = mean if keep else None
        self.here, self.under_way = set(), []


def _same_everywhere(module: nn.Module, group: Group) -> None:
    """Copies rank 0's parameters and buffers to the other ranks; one message for each."""
    params = dict(module.named_parameters())
    tensors = {**params, **dict(module.named_buffers())}
    check_same_kind(tensors, group, "module")
    check_same_kind({name: p.requires_grad for name, p in params.items()}, group, "requires_grad")
    if size_of(group) > 1:
        with torch.no_grad():
            for x in tensors.values():
                x.copy_(broadcast(x.detach(), 0, group, check=False))
