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
from purelm.models.leaves import like
from purelm.ops import Ops
from purelm.optim import Optimizer, chain
from purelm.train import ALONE, Differentiate, Loss, Precision, Strategy, TrainState, init_state, make_step, state_of
from purelm.transforms import cuda_graph, jit

Wrap = Callable[[transformer.BlockFn], transformer.BlockFn]
Trees = dict[str, Any]


@dataclass(frozen=True)
class Parallel:
    """How processes share the work (torchrun --nproc-per-node N -m -- experiments.pretrain ...)."""

    mode: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """ddp: gradients are summed while backward runs. zero1: also, each rank holds 1/N of the optimizer's state and of
    the summed gradients (Muon: of the state alone). fsdp: also 1/N of the parameters, gathered block by block"""
    bucket_mb: Annotated[float, Range(0, 1e6, open_low=True)] | None = None
    """ddp, zero1: megabytes of gradients in one message; default 25, or 1/64 of the model if that is more"""
    wire: Literal["fp32", "bf16"] = "fp32"
    """number format in which gradients are sent"""
    timeout: Annotated[float, Range(0.1, 1e7)] = 600.0
    """seconds after which a process that waits for another one gives up"""


class Job(NamedTuple):
    """What is trained: the same for one process and for many."""

    model: transformer.Config
    init: Callable[[], Any]  # whole parameters, on the host; the same on all ranks
    core: Optimizer  # without clipping
    max_norm: float  # of gradients; 0: no clipping
    whole_matrices: bool  # whether the optimizer needs whole matrices (Muon)
    schedule: Callable[[Tensor], Tensor]
    ops: Ops
    wrap_block: Wrap
    precision: Precision
    microbatches: int
    loss_chunk: int | None = None  # tokens whose logits are held at a time; None: all
    loss: Callable[[transformer.Model, int | None], Loss] | None = None  # of the model and loss_chunk; None: its own


class Run(NamedTuple):
    """The functions of a run on this rank."""

    init: Callable[[], TrainState]  # the state of step 0
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Tensor]]]
    evaluate: Callable[[Any, Iterable[dict[str, Tensor]], int], Score]  # (params, batches of all ranks, bytes)
    whole: Callable[[Any], Any]  # params as one process has them, on every rank
    save: Callable[..., Any]  # (root, step, trees, meta=, keep_last=)
    load: Callable[[Path], tuple[Trees, dict[str, Any]]]


def layout(world: World, cfg: Parallel, job: Job, *, compiled: bool) -> Run:
    """The run of `cfg.mode`. compiled: blocks and the update are compiled, communication is not."""
    wrap = job.wrap_block
    job = job._replace(wrap_block=(lambda f: jit(wrap(f))) if compiled else wrap)
    run = (_fsdp if cfg.mode == "fsdp" else _replicated)(world, cfg, job)
    return run._replace(step=jit(run.step, donate=0)) if compiled else run


def alone(
    job: Job, device: torch.device, *, compiled: bool, graph: bool, differentiate: Differentiate | None = None
) -> Run:
    """The run of one process. graph: each step is a replay of a CUDA graph. differentiate: how gradients are computed,
    in place of `value_and_grad` and the job's microbatches."""
    model = transformer.make(job.model, job.ops, job.wrap_block)
    optimizer = _linked(job)
    step = _step(job, model, optimizer, ALONE._replace(differentiate=differentiate))
    if compiled:
        step = jit(step, donate=0)
    if graph:
        step = cuda_graph(step, donate=0)

    def evaluate(params: Any, batches: Iterable[dict[str, Tensor]], n_bytes: int) -> Score:
        return score(transformer.make(job.model, job.ops).loss, params, batches, n_bytes, device=device)

    def init() -> TrainState:
        return init_state(tree.to(job.init(), device), optimizer, job.precision)

    load = partial(one_process.load, like=_like(job, optimizer), device=device)
    return Run(init, step, evaluate, lambda params: params, one_process.save, load)


def loss_of(job: Job, model: transformer.Model) -> Loss:
    """The function (params, batch) -> (loss, metrics) that the job minimises."""
    return partial(model.loss, chunk=job.loss_chunk) if job.loss is None else job.loss(model, job.loss_chunk)


def _step(job: Job, model: transformer.Model, optimizer: Optimizer, strategy: Strategy) -> Any:
    return make_step(
        loss_of(job, model),
        optimizer,
        job.schedule,
        strategy=strategy,
        max_norm=job.max_norm if job.max_norm > 0 else None,
        microbatches=job.microbatches,
        precision=job.precision,
    )


def _replicated(world: World, cfg: Parallel, job: Job) -> Run:
    """ddp and zero1: every rank has all parameters."""
    options: dict[str, Any] = {
        "bucket_bytes": None if cfg.bucket_mb is None else max(int(cfg.bucket_mb * 2**20), 1),
        "wire": torch.bfloat16 if cfg.wire == "bf16" else None,
    }
    optimizer = _linked(job)
    if cfg.mode == "zero1":
        strategy = zero.strategy(whole=job.whole_matrices, **options)
    else:
        strategy = ddp.strategy(**options)
    parts = cfg.mode == "zero1" and not job.whole_matrices
    step = _step(job, transformer.make(job.model, job.ops, job.wrap_block), optimizer, strategy)

    def evaluate(params: Any, batches: Iterable[dict[str, Tensor]], n_bytes: int) -> Score:
        """Each rank takes every N-th batch."""
        mine = islice(batches, world.rank, None, world.size)
        one = score(transformer.make(job.model, job.ops).loss, params, mine, n_bytes, device=world.device)
        nats, tokens = _sum(world, one.nats, one.n_tokens)
        return Score(nats, tokens, n_bytes)

    def init() -> TrainState:
        params = tree.to(tree.cast(job.init(), job.precision.param), world.device)
        # Equal seeds give equal parameters only with the same version of the maths library.
        params = strategy.shard(params)
        check_equal(params, what="parameters")
        return state_of(params, optimizer, strategy)

    like = _like(job, optimizer)
    # Each rank saves and loads its own part of the optimizer's state: rows, or with whole_tensors leaves.
    held = {f"opt_state.{path}" for path in tree.paths(strategy.optimizer(optimizer).init(like["params"]))}

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
    model = transformer.make(job.model, fsdp.ops(job.ops), lambda f: fsdp.gathered(job.wrap_block(f)))
    reduce = torch.bfloat16 if cfg.wire == "bf16" else job.precision.reduce
    strategy, optimizer = fsdp.strategy(model, reduce=reduce), _linked(job)
    step = _step(job, model, optimizer, strategy)

    def evaluate(params: Any, batches: Iterable[dict[str, Tensor]], n_bytes: int) -> Score:
        """In rounds of N batches, since all ranks must gather together: a rank without a batch runs one of weight 0."""

        def rounds() -> Iterable[dict[str, Tensor]]:
            group: list[dict[str, Tensor]] = []
            for batch in batches:
                group.append(batch)
                if len(group) == world.size:
                    yield group[world.rank]
                    group.clear()
            if group:
                yield group[world.rank] if world.rank < len(group) else _weightless(group[0])

        plain = transformer.make(job.model, fsdp.ops(job.ops), fsdp.gathered)
        one = score(strategy.evaluate(plain.loss), params, rounds(), n_bytes, device=world.device)
        return Score(one.nats, _sum(world, one.n_tokens)[0], n_bytes)  # nats are summed over ranks already

    def is_cut(path: str, x: Tensor) -> bool:
        return x.ndim > 1

    def init() -> TrainState:
        """Leaf by leaf, as in `_replicated`: only one leaf at a time is whole on the device."""

        def part(path: str, x: Tensor) -> Tensor:
            x = broadcast({path: x.to(world.device, job.precision.param)})[path]
            check_equal({path: x}, what="parameters")
            return part_of(x, world.rank, world.size) if is_cut(path, x) else x

        return state_of(tree.map_with_path(part, job.init()), optimizer, strategy)

    like = _like(job, optimizer)
    save = partial(checkpoint.save, like=like, sharded=is_cut)
    load = partial(checkpoint.load, like=like, sharded=is_cut, device=world.device)
    return Run(init, step, evaluate, strategy.unshard, save, load)


_nothing = Optimizer(lambda params: (), lambda grads, state, params, lr: (grads, state))


def _linked(job: Job) -> Optimizer:
    """A chain of a link without state (it once clipped gradients) and the optimizer: the form that checkpoints have."""
    return chain(_nothing, job.core) if job.max_norm > 0 else job.core


def _like(job: Job, optimizer: Optimizer) -> Trees:
    """Trees like those that one process would save."""
    params = like(transformer.leaves(job.model), job.precision.param)
    return {"params": params, "opt_state": optimizer.init(params)}


def _weightless(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "weights": torch.zeros(batch["targets"].shape, device=batch["targets"].device)}


def _sum(world: World, *numbers: float) -> list[float]:
    return all_reduce(torch.tensor(numbers, dtype=torch.float64, device=world.device), check=False).tolist()
