"""Fully sharded parameters as a loss sees them: tensors that look whole, and what gathers them in one evaluation."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from purelm import tree
from purelm.caches import memo
from purelm.dist.collectives import alike, all_gather
from purelm.dist.fsdp_units import Arrive, Deliver, Gather, Replicated, Schedule, Unit, unpack
from purelm.dist.sharding import whole_of
from purelm.dist.world import size_of

if TYPE_CHECKING:
    from purelm.dist.fsdp import Plan

__all__ = ["Bound", "Part"]


class Part(Tensor):
    """A matrix of which this rank has some rows. It has the shape of the whole, and is gathered where it is used.

    Each torch function that is given Parts gathers them as a unit of its own, by a message of its own; under `gathered`
    all of a function's Parts are one unit. Functions that write to their argument are refused.
    """

    bound: "Bound"
    local: Tensor
    _shape: torch.Size

    @staticmethod
    def of(bound: "Bound", local: Tensor, shape: Sequence[int], dtype: torch.dtype) -> "Part":
        """A Part of this shape and dtype, of which `local` has this rank's rows."""
        part = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            Part, shape, dtype=dtype, device=local.device, requires_grad=local.requires_grad
        )
        part.bound, part.local, part._shape = bound, local, torch.Size(shape)
        return part

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Of the whole matrix."""
        return self._shape

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Part(shape={tuple(self.shape)}, dtype={self.dtype}, rows here: {self.local.shape[0]})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _asks():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "detach":
            return args[0].bound.part(args[0].local.detach(), args[0].shape)
        if name == "to" and not kwargs and args[1:] in ((args[0].dtype,), (args[0].device,)):
            return args[0]
        if name.endswith("_") and not name.endswith("__"):
            raise ValueError(f"fsdp: {name} writes to a parameter of which this rank has only a part")
        leaves, treedef = tree.flatten((list(args), kwargs))
        at = [i for i, x in enumerate(leaves) if isinstance(x, Part)]

        def whole(parts: list[Tensor]) -> Any:
            for i, x in zip(at, parts, strict=True):
                leaves[i] = x
            args, kwargs = tree.unflatten(treedef, leaves)
            return func(*args, **kwargs)

        return leaves[at[0]].bound.gathered(whole)([leaves[i] for i in at])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        raise ValueError(
            f"fsdp: {func} got a parameter of which this rank has only a part: make the model with ops=fsdp.ops(...), "
            "or use the parameter inside of fsdp.gathered(f)"
        )


@memo(1)
def _asks() -> frozenset[Any]:
    """Attributes and functions of a tensor that a Part answers without being gathered."""
    attributes = "dtype device layout ndim requires_grad is_leaf is_cuda is_cpu is_meta grad".split()
    methods = "dim numel nelement size is_floating_point is_complex element_size get_device".split()
    asked = [getattr(Tensor, name).__get__ for name in attributes] + [getattr(Tensor, name) for name in methods]
    return frozenset([*asked, torch.is_floating_point, torch.numel, torch.is_complex])


class Bound:
    """A plan with the tensors of one evaluation: makes `params` of them, and functions that gather these."""

    def __init__(
        self, plan: "Plan", local: Any, order: Sequence[Sequence[Tensor]] = (), deliver: Deliver | None = None
    ):
        self.plan, self.schedule = plan, Schedule(plan.group, plan.compute, plan.reduce, deliver)
        leaves, treedef = tree.flatten(local)
        if len(leaves) != len(plan._leaves):
            raise ValueError(f"the plan is for {len(plan._leaves)} leaves, got {len(leaves)}")
        self.shapes: dict[int, torch.Size] = {}  # id of a part -> shape of the whole leaf
        self.numbers = {id(x): i for i, x in enumerate(leaves)}
        whole = []
        for i, (x, (replicated, shape, expected)) in enumerate(zip(leaves, plan._leaves, strict=True)):
            if x.shape != expected:
                what = f"{list(tree.paths(local))[i]} has shape {tuple(x.shape)}"
                raise ValueError(f"{what}, the plan's is {expected}: give plan.shard(params)")
            if not replicated:
                self.shapes[id(x)] = shape
            elif tree.is_floating(x):
                whole.append(i)
        self.leaves = list(leaves)  # held, so that no other tensor gets their ids
        self.inputs: dict[int, Tensor] = {}  # id of a part -> the tensor that Gather takes in its place
        cut = [x for x in self.leaves if id(x) in self.shapes and x.requires_grad]
        is_waited_for = deliver is None and not self.is_transformed and torch.is_grad_enabled()
        if cut and is_waited_for and size_of(plan.group) > 1:
            self.inputs = dict(zip(map(id, cut), Arrive.apply(self.schedule, *cut), strict=True))
        self.treedef, self.seen = treedef, list(leaves)
        for i, x in zip(whole, self._replicated([leaves[i] for i in whole]), strict=True):
            self.seen[i] = x
        self.units: list[Unit] = []
        for parts in order:
            self._add([x for x in parts if id(x) in self.shapes])
        self.position = 0  # index of the unit that is expected next
        self.used: list[list[int]] = []  # indices of the leaves of each unit that was gathered

    @property
    def params(self) -> Any:
        """The tree with a new `Part` for each leaf that is cut. Parts hold this object, which holds none: no cycle."""
        leaves = [self.part(x, self.shapes[id(x)]) if id(x) in self.shapes else x for x in self.seen]
        return tree.unflatten(self.treedef, leaves)

    @property
    def is_transformed(self) -> bool:
        """Whether a torch.func transform or forward mode is active: these have no hooks on saved tensors."""
        is_forward = torch.autograd.forward_ad._current_level >= 0  # type: ignore[attr-defined]
        return is_forward or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]

    def part(self, local: Tensor, shape: torch.Size) -> Part:
        """`local` as a Part of this shape."""
        if id(local) not in self.shapes:  # no leaf of the tree, but derived from one (detached, say)
            self.shapes[id(local)] = shape
            self.leaves.append(local)
        return Part.of(self, local, shape, self.plan.compute or local.dtype)

    def _replicated(self, leaves: list[Tensor]) -> Sequence[Tensor]:
        compute, group = self.plan.compute, self.plan.group
        if not leaves or size_of(group) == 1:
            return [x if compute is None else x.to(compute) for x in leaves]
        if self.is_transformed:
            return [alike(x, group).to(compute or x.dtype) for x in leaves]
        return Replicated.apply(group, compute, *leaves)

    def _add(self, parts: list[Tensor]) -> "Unit":
        unit = Unit(self.schedule, parts, [self.shapes[id(p)] for p in parts])
        self.units.append(unit)
        return unit

    def _unit(self, parts: list[Tensor]) -> "Unit":
        """The next unused unit of these parts (tied embeddings have two), or a new one, put last in the order."""
        n = len(self.units)
        for i in [*range(self.position, n), *range(self.position)]:
            unit = self.units[i]
            if not unit.used and [id(p) for p in unit.parts] == [id(p) for p in parts]:
                self.position = i + 1
                break
        else:
            unit = self._add(parts)
        unit.used = True
        self.used.append([self.numbers[id(p)] for p in parts if id(p) in self.numbers])
        return unit

    def gathered(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """f(params, ...), which gathers params first: a subtree of `self.params`, or of the local tensors."""

        def whole(params: Any, *args: Any, **kwargs: Any) -> Any:
            leaves, treedef = tree.flatten(params)
            leaves = [x.local if isinstance(x, Part) else x for x in leaves]
            at = [i for i, x in enumerate(leaves) if id(x) in self.shapes]
            if not at:
                return f(params, *args, **kwargs)
            parts = [leaves[i] for i in at]
            if size_of(self.plan.group) == 1 or self.is_transformed:
                for i, x in zip(at, parts, strict=True):
                    leaves[i] = self._whole(x)
                return f(tree.unflatten(treedef, leaves), *args, **kwargs)
            unit = self._unit(parts)
            inputs = [self.inputs.get(id(x), x) for x in parts]
            for i, x in zip(at, Gather.apply(unit, *inputs), strict=True):
                leaves[i] = x
            params = tree.unflatten(treedef, leaves)
            del leaves, x
            unit.prefetch(+1)
            with saved_tensors_hooks(unit.pack, unpack):
                out = f(params, *args, **kwargs)
            unit.drop()
            return out

        return whole

    def _whole(self, part: Tensor) -> Tensor:
        lower = part.to(self.plan.compute or part.dtype)
        return whole_of(all_gather(lower, self.plan.group, check=False), self.shapes[id(part)])
