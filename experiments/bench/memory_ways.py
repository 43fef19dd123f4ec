"""Training steps in two parts, purelm's and PyTorch's, and the bytes held between the parts; for bench.memory."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from experiments.bench.module_baseline import Module, on_many
from purelm import random, tree
from purelm.dist import ddp, fsdp, world, zero
from purelm.dist.ddp import with_global_denominator
from purelm.models import transformer
from purelm.ops import Ops
from purelm.optim import adamw, apply_updates
from purelm.train import FULL, MIXED, TrainState, init_state
from purelm.transforms import jit

KINDS = ("parameters", "optimizer", "gradients")


class Phases(NamedTuple):
    """A training step in two parts, and the tensors held between them."""

    differentiate: Callable[[dict], None]  # drops the last gradients, and holds those of a batch
    update: Callable[[], None]
    held: Callable[[], dict[str, list[Tensor]]]  # tensors by kind


class Reading(NamedTuple):
    """Bytes at one point of the step."""

    parts: dict[str, int]  # parameters, optimizer, gradients
    held: int
    peak: int | None  # since the last point


def storage_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of the storages on the device, each once; of a DTensor that of its local part.

    >>> x = torch.zeros(2, 3)
    >>> storage_bytes([x, x[0], x.new_zeros(()).expand(5)], torch.device("cpu"))
    28
    """
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    storages = [x.untyped_storage() for x in local if x.device.type == device.type]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def ours(
    way: str,
    cfg: transformer.Config,
    here: world.World,
    *,
    ops: Ops,
    wrap: Callable[[transformer.BlockFn], transformer.BlockFn] = transformer.identity,
    bucket_bytes: int | None = None,
    compiled: bool = False,
) -> Phases:
    """unsharded, zero1 or fsdp: the pieces of `make_step`; compiled: the update, which then writes over its state."""
    cuda = here.device.type == "cuda"
    precision = MIXED if cuda else FULL
    params = transformer.init(random.key(0, device=here.device), cfg)
    optimizer = adamw(betas=(0.9, 0.95), weight_decay=0.1)
    if way == "zero1":
        optimizer = zero.sharded(optimizer, reduce=None, check=False)
    if way == "fsdp":
        model = transformer.make(cfg, fsdp.ops(ops), lambda f: fsdp.gathered(wrap(f)))
        plan = fsdp.plan(params, compute=precision.compute if cuda else None)
        gradient = fsdp.differentiate(model.loss, plan)
        params = plan.shard(params)
    else:
        model = transformer.make(cfg, ops, wrap)
        gradient = ddp.differentiate(model.loss, bucket_bytes=bucket_bytes, compute=precision.compute)
    state, grads = init_state(params, optimizer), None
    del params
    lr = torch.tensor(3e-4, device=here.device)

    def advance(state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, lr)
        return TrainState(apply_updates(state.params, updates), opt_state, state.step + 1)

    if compiled:
        advance = jit(advance, donate=0)

    def differentiate(batch: dict) -> None:
        nonlocal grads
        grads = None
        _, grads = gradient(state.params, with_global_denominator(batch))

    def update() -> None:
        nonlocal state
        state = advance(state, grads)

    return Phases(
        differentiate, update, lambda: dict(zip(KINDS, map(tree.leaves, (*state[:2], grads)), strict=True))
    )


def peer(way: str, cfg: transformer.Config, here: world.World) -> Phases:
    """PyTorch's phases; its optimizers write in place and make their state in the first update."""
    cuda = here.device.type == "cuda"
    torch.manual_seed(0)
    with here.device:
        model: Any = Module(cfg, cfg.ff_width)
    model = on_many(model, way, here.device)
    options: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    if way == "torch_zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)
        inner = optimizer.optim  # of this rank's parameters
    else:
        inner = optimizer = torch.optim.AdamW(model.parameters(), **options)

    def differentiate(batch: dict) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(here.device.type, torch.bfloat16, enabled=cuda and way != "torch_fsdp2"):
            loss = model(batch["tokens"], batch["targets"])
        loss.backward()

    def held() -> dict[str, list[Tensor]]:
        params = list(model.parameters())
        state = [x for of in inner.state.values() for x in of.values() if isinstance(x, Tensor)]
        return dict(zip(KINDS, (params, state, [p.grad for p in params if p.grad is not None]), strict=True))

    return Phases(differentiate, optimizer.step, held)


def read(phases: Phases, base: int, device: torch.device) -> Reading:
    """Bytes held now, less `base`; resets the peak."""
    parts = {kind: storage_bytes(tensors, device) for kind, tensors in phases.held().items()}
    if device.type != "cuda":
        return Reading(parts, sum(parts.values()), None)
    torch.cuda.synchronize()
    found = Reading(parts, torch.cuda.memory_allocated() - base, torch.cuda.max_memory_allocated() - base)
    torch.cuda.reset_peak_memory_stats()
    return found
