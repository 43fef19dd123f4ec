"""A training run on several processes: what each mode does with parameters, the step, evaluation and checkpoints.

`layout(...)` gives a run its functions, so that experiments.loop is the same for one process and many. Batches, losses
and checkpoints are those of one process, whatever the number of ranks and the mode: a run saved on four ranks by fsdp
goes on alone, or on two by ddp. The functions hold no parameters: what a run holds is the state that its loop has.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from experiments.limits import Range
from purelm import checkpoint as one_process
from purelm import tree
from purelm.dist import checkpoint, ddp, fsdp, zero
from purelm.dist.agreement import check_equal
from purelm.dist.collectives import all_reduce, broadcast
from purelm.dist.sharding import part_of
from purelm.dist.world import World
from purelm.evals import Score, score
from purelm.models import transformer
from purelm.ops import Ops
from purelm.optim import Optimizer, chain, clip_by_global_norm
from purelm.optim.clip import clip
from purelm.train import Precision, TrainState, init_state, make_step
from purelm.transforms import cuda_graph, jit

Wrap = Callable[[transformer.BlockFn], transformer.BlockFn]
Trees = dict[str, Any]


@dataclass(frozen=True)
class Parallel:
    """What several processes share (torchrun --nproc-per-node N -m experiments.pretrain ...); alone it says nothing."""

    mode: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """ddp: gradients are summed while backward runs. zero1: and each rank holds 1/N of the optimizer's state, and of
    the sums (Muon: of its state). fsdp: and 1/N of the parameters, gathered block by block"""
    bucket_mb: Annotated[float, Range(0, 1e6, open_low=True)] | None = None
    """ddp, zero1: of one message of gradients; by default 25, or 1/64 of the model where that is more"""
    wire: Literal["fp32", "bf16"] = "fp32"
    """of gradients under way"""
    timeout: Annotated[float, Range(0.1, 1e7)] = 600.0
    """seconds after which a process that waits for another one gives up"""


class Job(NamedTuple):
    """What is trained, as one process would."""

    model: transformer.Config
    init: Callable[[], Any]  # whole parameters, on the host; the same on all ranks
    core: Optimizer  # without clipping
    max_norm: float  # of gradients; 0: no clipping
    whole_matrices: bool  # whether the optimizer needs them (Muon)
    schedule: Callable[[Tensor], Tensor]
    ops: Ops
    wrap_block: Wrap
    precision: Precision
    microbatches: int


class Run(NamedTuple):
    """The functions of a run on this rank."""

    init: Callable[[], TrainState]  # the state of step 0
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Tensor]]]
    evaluate: Callable[[Any, Iterable[dict[str, Tensor]], int], Score]  # (params, batches of all ranks, bytes)
    whole: Callable[[Any], Any]  # params as one process has them, on every rank
    save: Callable[..., Any]  # (root, step, trees, meta=, keep_last=)
    load: Callable[[Path], tuple[Trees, dict[str, Any]]]


def layout(world: World, cfg: Parallel, job: Job, *, compiled: bool) -> Run:
    """The run of `cfg.mode`. compiled: each block is, and the update, but not what talks to other processes."""
    wrap = job.wrap_block
    job = job._replace(wrap_block=(lambda f: jit(wrap(f))) if compiled else wrap)
    run = (_fsdp if cfg.mode == "fsdp" else _replicated)(world, cfg, job)
    return run._replace(step=jit(run.step, donate=0)) if compiled else run


def alone(job: Job, device: torch.device, *, compiled: bool, graph: bool) -> Run:
    """The run of one process. graph: each step is a replay of a CUDA graph."""

    def loss_fn(params: Any, batch: Any) -> Any:
        return transformer.loss(params, batch, job.model, ops=job.ops, wrap_block=job.wrap_block)

    optimizer = _clipped(job.core, job.max_norm)
    step = make_step(loss_fn, optimizer, job.schedule, microbatches=job.microbatches, precision=job.precision)
    if compiled:
        step = jit(step, donate=0)
    if graph:
        step = cuda_graph(step, donate=0)

    def evaluate(params: Any, batches: Iterable[dict[str, Tensor]], n_bytes: int) -> Score:
        loss_fn = partial(transformer.loss, cfg=job.model, ops=job.ops)
        return score(loss_fn, params, batches, n_bytes, device=device)

    def init() -> TrainState:
        return init_state(tree.to(job.init(), device), optimizer, job.precision)

    load = partial(one_process.load, like=_like(job, optimizer), device=device)
    return Run(init, step, evaluate, lambda params: params, one_process.save, load)


def _replicated(world: World, cfg: Parallel, job: Job) -> Run:
    """ddp and zero1: every rank has all parameters."""
    optimizer = job.core
    parts = cfg.mode == "zero1" and not job.whole_matrices
    if parts:
        optimizer = zero.sharded(job.core, reduce="parts", check=False)
    elif cfg.mode == "zero1":
        optimizer = zero.whole_tensors(job.core, reduce=None, check=False)
    norm = zero.global_norm() if parts else tree.global_norm
    optimizer = _clipped(optimizer, job.max_norm, norm)
    step = make_step(
        lambda p, b: transformer.loss(p, b, job.model, ops=job.ops, wrap_block=job.wrap_block),
        optimizer,
        job.schedule,
        precision=job.precision,
        differentiate=partial(
            ddp.differentiate,
            microbatches=job.microbatches,
            bucket_bytes=None if cfg.bucket_mb is None else max(int(cfg.bucket_mb * 2**20), 1),
            wire=torch.bfloat16 if cfg.wire == "bf16" else None,
            compute=job.precision.compute,
            parts=parts,
        ),
        prepare=ddp.with_global_denominator,
        norm=norm,
    )

    def evaluate(params: Any, batches: Iterable[dict[str, Tensor]], n_bytes: int) -> Score:
        """Each rank takes every N-th batch."""
        mine = islice(batches, world.rank, None, world.size)
        loss_fn = partial(transformer.loss, cfg=job.model, ops=job.ops)
        one = score(loss_fn, params, mine, n_bytes, device=world.device)
        nats, tokens = _sum(world, one.nats, one.n_tokens)
        return Score(nats, tokens, n_bytes)

    def init() -> TrainState:
        params = tree.to(tree.cast(job.init(), job.precision.param), world.device)
        # Equal seeds make equal parameters, but not with other versions of a maths library.
        params = broadcast(params)
        check_equal(params, what="parameters")
        return init_state(params, optimizer)

    like = _like(job, _clipped(job.core, job.max_norm))
    # Of the optimizer's state each rank saves and loads what it has: its rows, or with whole_tensors its leaves.
    held = {f"opt_state.{path}" for path in tree.paths(optimizer.init(like["params"]))}

    def is_cut(path: str, x: Tensor) -> bool:
        return parts and path.startswith("opt_state.") and checkpoint.has_axes(path, x)

    def is_of_others(path: str, x: Tensor) -> bool:
        return path.startswith("opt_state.") and path not in held

    save = partial(checkpoint.save, like=like, sharded=is_cut)
    load = partial(checkpoint.load, like=like, sharded=is_cut, absent=is_of_others, device=world.device)
    return Run(init, step, evaluate, lambda params: params, save, load)


def _fsdp(world: World, cfg: Parallel, job: Job) -> Run:
    if job.whole_matrices:
        raise ValueError("optim.name muon needs whole matrices, which no rank has: use --parallel.mode zero1, or adamw")
    compute = None if job.precision.compute == job.precision.param else job.precision.compute
    reduce = torch.bfloat16 if cfg.wire == "bf16" else job.precision.reduce
    plan = fsdp.plan(_params_like(job), compute=compute, reduce=reduce)
    # Clipped before the optimizer, by a norm over ranks; in its place a link without state, as in the other modes.
    optimizer = chain(_nothing, job.core) if job.max_norm > 0 else job.core

    def clipped(grads: Any) -> Any:
        return clip(grads, job.max_norm, norm=plan.norm)[0] if job.max_norm > 0 else grads

    step = make_step(
        partial(fsdp.transformer_loss, cfg=job.model, plan=plan, ops=job.ops, wrap_block=job.wrap_block),
        optimizer,
        job.schedule,
        precision=Precision(*[job.precision.param] * 3),  # the plan casts what it sends
        differentiate=partial(fsdp.differentiate, microbatches=job.microbatches),
        prepare=ddp.with_global_denominator,
        reduce=clipped,
        norm=plan.norm,
    )

    def evaluate(params: Any, batches: Iterable[dict[str, Tensor]], n_bytes: int) -> Score:
        """In rounds of N batches, since all ranks must gather alike: one that has none left counts nothing."""

        def rounds() -> Iterable[dict[str, Tensor]]:
            group: list[dict[str, Tensor]] = []
            for batch in batches:
                group.append(batch)
                if len(group) == world.size:
                    yield group[world.rank]
                    group.clear()
            if group:
                yield group[world.rank] if world.rank < len(group) else _weightless(group[0])

        loss_fn = partial(fsdp.transformer_loss, cfg=job.model, plan=plan, ops=job.ops)
        one = score(loss_fn, params, rounds(), n_bytes, device=world.device)
        return Score(one.nats, _sum(world, one.n_tokens)[0], n_bytes)  # losses are sums over ranks already

    def is_cut(path: str, x: Tensor) -> bool:
        return x.ndim > 1

    def init() -> TrainState:
        """Leaf by leaf, as `_replicated` does: one at a time is whole on the device."""

        def part(path: str, x: Tensor, replicated: bool) -> Tensor:
            x = broadcast({path: x.to(world.device, job.precision.param)})[path]
            check_equal({path: x}, what="parameters")
            return x if replicated else part_of(x, world.rank, world.size)

        return init_state(tree.map_with_path(part, job.init(), plan.replicated), optimizer)

    like = _like(job, optimizer)
    save = partial(checkpoint.save, like=like, sharded=is_cut)
    load = partial(checkpoint.load, like=like, sharded=is_cut, device=world.device)
    return Run(init, step, evaluate, plan.unshard, save, load)


_nothing = Optimizer(lambda params: (), lambda grads, state, params, lr: (grads, state))


def _clipped(
    optimizer: Optimizer, max_norm: float, norm: Callable[[Any], Tensor] = tree.global_norm
) -> Optimizer:
    return chain(clip_by_global_norm(max_norm, norm=norm), optimizer) if max_norm > 0 else optimizer


def _params_like(job: Job) -> Any:
    """The whole parameters on the meta device: shapes and dtypes."""

    def like(node: Any) -> Any:
        if isinstance(node, tuple):
            return torch.empty(node, dtype=job.precision.param, device="meta")
        return {k: like(v) for k, v in node.items()} if isinstance(node, dict) else [like(v) for v in node]

    return like(transformer.param_shapes(job.model))


def _like(job: Job, optimizer: Optimizer) -> Trees:
    """What one process would save, likewise."""
    params = _params_like(job)
    return {"params": params, "opt_state": optimizer.init(params)}


def _weightless(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "weights": torch.zeros(batch["targets"].shape, device=batch["targets"].device)}


def _sum(world: World, *numbers: float) -> list[float]:
    return all_reduce(torch.tensor(numbers, dtype=torch.float64, device=world.device), check=False).tolist()
