"""A torch module with 1/N of every matrix on each rank: dist.fsdp around its submodules.

    model = fsdp(module, compute_dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())

    model(x).square().mean().backward()
    model.finish_gradient_synchronization()            # .grad is now the mean over ranks, of this rank's parts
    optimizer.step()

Every rank makes the wrapper, which copies rank 0's parameters and buffers to all, and calls the same things in the
same order.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from purelm import tree
from purelm.dist import fsdp as sharded
from purelm.dist.messages import Pending
from purelm.dist.sharding import unshard
from purelm.dist.world import Group, size_of
from purelm.interop.modules import _Means, _same_everywhere

__all__ = ["FullySharded", "fsdp"]

Named = dict[str, Tensor]  # a module's own parameters, by their names in it


def fsdp(module: nn.Module, group: Group = None, *, compute_dtype: torch.dtype | None = None) -> "FullySharded":
    """The module, with 1/N of every matrix on each rank (`dist.fsdp`); it is changed, and is `.module` of the result.

    Each floating parameter of 2 axes or more is replaced by this rank's rows of it (`sharding.part_of`), in its own
    dtype; tied ones stay tied. Vectors stay whole. A submodule with matrices of its own gathers them when its forward
    runs, drops them after it, gathers them again for backward and reduce-scatters their gradients. While it runs, the
    matrices of the next submodule are gathered, "next" being as in the previous forward (the first forward gathers
    nothing ahead). So two submodules have whole matrices at a time, and so does each module with matrices that is
    calling them.

    compute_dtype: parameters are cast to it, matrices before they are sent; so are floating inputs of submodules with
    matrices. Outputs stay in it. Buffers are left alone. Gradients are summed and kept in the parameters' own dtype.

    Messages and bytes a rank sends a step, of n bytes of matrices in compute_dtype: an all_gather for each use of a
    submodule forward and one backward, (N - 1) / N n; a reduce_scatter for each use, (N - 1) / N of their own bytes;
    and in finish_gradient_synchronization() an all_reduce a dtype of the vectors.

    Only .backward() gives gradients of matrices, not torch.autograd.grad. Every rank must run the same submodules in
    the same order, forward and backward. A matrix is whole only in the forward of the module that holds it, and no
    other module may read it (so nn.MultiheadAttention, which reads the matrix of its out_proj, fails).
    torch.utils.checkpoint works, but with use_reentrant=False it keeps the inputs of submodules with matrices.
    ValueError where a module without forward (ParameterList, say) has matrices, or one module's differ in dtype.
    """
    return FullySharded(module, group, compute_dtype)


class FullySharded(nn.Module):
    """What `fsdp` returns."""

    def __init__(self, module: nn.Module, group: Group, compute_dtype: torch.dtype | None):
        super().__init__()
        whole = {name: p for name, p in module.named_parameters() if p.ndim > 1 and tree.is_floating(p)}
        owners = [(path, one, dict(one.named_parameters("", False, False))) for path, one in module.named_modules()]
        for path, one, own in owners:
            _check_matrices(path, one, [p for p in own.values() if p.ndim > 1 and tree.is_floating(p)])
        _same_everywhere(module, group)
        self.module = module
        self._plan = sharded.plan(whole, group, compute=compute_dtype, check=False)  # all that is the same on all ranks
        parts = self._plan.shard(whole)
        self._parts = {name: nn.Parameter(parts[name], p.requires_grad) for name, p in whole.items()}
        for part in self._parts.values():
            part.is_part = size_of(group) > 1  # type: ignore[attr-defined]  # TorchOptimizer looks for it
        part_of = {p: self._parts[name] for name, p in whole.items()}
        for _, one, own in owners:
            matrices: Named = {name: part_of[p] for name, p in own.items() if p in part_of}
            vectors: Named = {name: p for name, p in own.items() if p not in part_of and tree.is_floating(p)}
            if matrices or (vectors and compute_dtype is not None):
                one.forward = partial(self._run, _Original(one), matrices, vectors)
            for name, p in matrices.items():
                setattr(one, name, p)
        kept = [p for p in module.parameters() if p.requires_grad and p not in set(self._parts.values())]
        self._means = _Means(kept, group, math.inf, None)
        self._order: list[Named] | None = None  # matrices in the order in which the last forward used them
        self._ran: list[Named] | None = None  # the same for the forward that is running
        self._bound: sharded.Bound | None = None  # for the forward that is running, once the order is known
        self._under_way: list[tuple[list[Tensor], Pending]] = []
        self._sums: dict[Tensor, Tensor] = {}  # of gradients that have arrived, over ranks and uses of a parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with matrices gathered as its submodules need them."""
        ran: list[Named] = []
        self._ran = ran
        self._bound = None if self._order is None else self._bind(self._order)
        try:
            out = self.module(*args, **kwargs)
        finally:
            self._bound = self._ran = None
        self._order = ran
        return out

    def _bind(self, order: list[Named] | None = None) -> sharded.Bound:
        return self._plan.bind(self._parts, order or (), self._deliver)

    def _run(self, original: "_Original", matrices: Named, vectors: Named, /, *args: Any, **kwargs: Any) -> Any:
        """The forward of a submodule whose own parameters are these."""
        dtype = self._plan.compute
        cast = {} if dtype is None else {name: p.to(dtype) for name, p in vectors.items()}

        def call(wholes: Named, *args: Any, **kwargs: Any) -> Any:
            named = {f"module.{name}": x for name, x in {**cast, **wholes}.items()}
            return functional_call(original, named, args, kwargs, tie_weights=False)  # tied ones under each name

        if not matrices:
            return call({}, *args, **kwargs)
        if dtype is not None:
            args, kwargs = tree.cast((args, kwargs), dtype)
        if self._ran is not None:
            self._ran.append(matrices)
        # Nothing is gathered ahead where the order is not known yet, or where torch's checkpoint repeats a forward.
        bound = self._bind() if self._bound is None else self._bound
        return bound.gathered(call)(matrices, *args, **kwargs)

    def _deliver(self, parts: list[Tensor], pending: Pending) -> None:
        self._under_way.append((parts, pending))
        while len(self._under_way) > 2:  # frees the memory of older messages
            self._take(*self._under_way.pop(0))

    @torch.no_grad()
    def _take(self, parts: list[Tensor], pending: Pending) -> None:
        for p, g in zip(parts, pending.wait(), strict=True):
            if p.requires_grad:
                self._sums[p] = self._sums[p] + g if p in self._sums else g

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        """Waits for all messages, and adds to .grad the means over ranks of all backward passes since the last call.

        Parts have the shape and dtype of their parameter; gradients of vectors are the same bits on all ranks. A vector
        that some ranks do not use counts as zeros there; one that none uses keeps .grad None.
        """
        while self._under_way:
            self._take(*self._under_way.pop(0))
        for p, total in self._sums.items():
            mean = total / size_of(self._plan.group)
            p.grad = mean if p.grad is None else p.grad + mean
        self._sums = {}
        self._means.finish()

    @torch.no_grad()
    def gather_full_params(self) -> dict[str, Any]:
        """module.state_dict() with whole matrices, on every rank; one message for each matrix.

        Values are copies in the parameters' own dtype; tied names have the same tensor. All ranks must call it.
        """
        state = self.module.state_dict(keep_vars=True)
        values = {x: x.detach() for x in state.values() if isinstance(x, Tensor)}
        for name, p in self._parts.items():
            values[p] = unshard([p.detach()], [self._plan.like[name]], self._plan.group)[0]
        values = {x: value.clone() for x, value in values.items()}
        return {name: values.get(x, x) if isinstance(x, Tensor) else x for name, x in state.items()}


class _Original(nn.Module):
    """A module with its original forward: functional_call of the module itself would run hooks and the new forward."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self._forward = module, module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def _check_matrices(path: str, module: nn.Module, matrices: list[Tensor]) -> None:
    what = f"fsdp: {path or 'the module'} ({type(module).__name__})"
    if matrices and type(module).forward is nn.Module.forward:
        raise ValueError(f"{what} holds matrices, but has no forward for which to gather them")
    if len(dtypes := {x.dtype for x in matrices}) > 1:
        raise ValueError(f"{what} has matrices of {len(dtypes)} dtypes, {sorted(map(str, dtypes))}: one is needed")
