"""A training step on several processes: purelm's ways of sharing work beside PyTorch's, in one run.

    torchrun --nproc-per-node 2 -m -- experiments.bench.data_parallel [--sizes 134m xl] [--ways overlapped fsdp ...]

Ways: per_leaf, flat and bucketed (gradients are sent after backward), overlapped (sent while it runs), zero1
(also with optimizer state sharded), zero2 (gradient sums sharded too; with --ops fused its update is in place), fsdp;
and the peers torch_ddp (DistributedDataParallel) and torch_fsdp2 (fully_shard on each block). All run the same maths:
forward, backward, AdamW, fp32 masters, bf16 compute on a GPU; each rank has its own batch. "alone" is one rank's step
without any message: the time that a way takes in addition is its exposed communication, and alone / way its weak
scaling. Times are medians of the slowest rank; memory is the peak of rank 0. With --ops fused the update is purelm's
kernel, in place, and only blocks are compiled; else the update is compiled too. Blocks are compiled one by one, the
peers' as purelm's.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from experiments.bench.course_sizes import SIZES as COURSE
from experiments.bench.module_baseline import Module, on_many, step_of
from experiments.bench.report import publish, row, write
from experiments.bench.train_step import SIZES
from experiments.console import program, say
from experiments.ops import OpsName, ops_named
from purelm import random, tree
from purelm.dist import ddp, fsdp, world, zero
from purelm.dist.ddp import all_reduce_mean
from purelm.kernels.adamw import adamw as kernels_adamw
from purelm.kernels.adamw import adamw_step
from purelm.models import transformer
from purelm.optim import adamw, schedules
from purelm.train import FULL, MIXED, Loss, Precision, Strategy, TrainState, init_state, make_step
from purelm.transforms import jit, remat, value_and_grad

OURS = ("alone", "per_leaf", "flat", "bucketed", "overlapped", "zero1", "zero2", "fsdp")
PEERS = ("torch_ddp", "torch_fsdp2")
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
PEER_OF = {"fsdp": "torch_fsdp2"}  # all other ways have torch_ddp


@dataclass(frozen=True)
class Args:
    """Data parallelism, timed."""

    device: str = "auto"
    sizes: tuple[str, ...] = ()
    """sizes of bench.train_step (3m, 22m, 134m, 374m) or bench.course_sizes (small ... xl); default 134m on GPUs, else
    3m"""
    ways: tuple[str, ...] = (*OURS, *PEERS)
    batch_size: int | None = None
    """sequences on each rank; default that of the size"""
    context_length: int | None = None
    steps: int = 10
    bucket_mb: float | None = None
    """size of purelm's buckets; default dist.messages.default_bucket_bytes"""
    ops: OpsName = "sdpa"
    remat: bool = False
    compile: bool | None = None
    """compile blocks and updates, and the peers' blocks; default on GPUs only"""
    json: Path | None = None


def shape(args: Args, size: str, cuda: bool) -> tuple[transformer.Config, int]:
    if size in SIZES:
        V, D, L, H, F, T, gpu_batch, cpu_batch = SIZES[size]
    elif size in COURSE:
        D, F, L, H = COURSE[size]
        V, T, gpu_batch, cpu_batch = 10_000, 512, 4, 1
    else:
        raise ValueError(f"sizes: {size!r} is not one of {', '.join([*SIZES, *COURSE])}")
    T = args.context_length or T
    cfg = transformer.Config(vocab_size=V, context_length=T, d_model=D, n_layers=L, n_heads=H, d_ff=F)
    return cfg, args.batch_size or (gpu_batch if cuda else cpu_batch)


def our_step(
    way: str, cfg: transformer.Config, args: Args, here: world.World, compiled: bool
) -> Callable[[dict], Tensor]:
    cuda, ops = here.device.type == "cuda", ops_named(args.ops)
    precision = MIXED if cuda else FULL
    params = transformer.init(random.key(0, device=here.device), cfg)
    optimizer = (kernels_adamw if args.ops == "fused" else adamw)(**ADAMW)
    inner = remat if args.remat else transformer.identity
    wrap: Any = (lambda f: jit(inner(f))) if compiled else inner
    bucket_bytes = None if args.bucket_mb is None else int(args.bucket_mb * 2**20)

    model = transformer.make(cfg, ops, wrap)
    if way == "fsdp":
        model = transformer.make(cfg, fsdp.ops(ops), lambda f: fsdp.gathered(wrap(f)))
        strategy = fsdp.strategy(model)
    elif way == "zero2":
        strategy = zero.strategy(bucket_bytes=bucket_bytes)
    elif way in ("overlapped", "zero1"):
        strategy = ddp.strategy(bucket_bytes=bucket_bytes)
        if way == "zero1":
            strategy = strategy._replace(optimizer=partial(zero.sharded, reduce=None, check=False))
    else:
        strategy = Strategy(differentiate=_plain)
        if way != "alone":
            messages = cast(Any, way)
            reduce = partial(all_reduce_mean, strategy=messages, bucket_bytes=bucket_bytes, check=False)
            strategy = strategy._replace(reduce=reduce)
    step = make_step(model.loss, optimizer, schedules.constant(3e-4), strategy=strategy, precision=precision)
    if compiled and args.ops != "fused":
        step = jit(step, donate=0)
    state = init_state(params, optimizer, strategy=strategy)
    del params
    if args.ops == "fused" and way != "zero1":
        update = adamw_step(**ADAMW, donate=True)
        update = zero.sharded_step(update, donate=True) if way == "zero2" else update
        return _by_kernels(state, model.loss, strategy, precision, update)

    def run(batch: dict) -> Tensor:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return run


def _plain(loss: Loss, *, microbatches: int = 1, compute: torch.dtype | None = None) -> Callable[[Any, Any], Any]:
    """A strategy's `differentiate` without communication: gradients of this process's batch."""
    return value_and_grad(loss, has_aux=True)


def _by_kernels(
    state: TrainState, loss: Loss, strategy: Strategy, precision: Precision, update: Callable[..., Any]
) -> Callable[[dict], Tensor]:
    """A step as make_step's, but in place and without the norm of gradients, which the peers do not compute either."""
    assert strategy.differentiate is not None
    cast_loss = lambda params, batch: loss(tree.cast(params, precision.compute), batch)  # noqa: E731
    gradient = strategy.differentiate(cast_loss, microbatches=1, compute=precision.compute)
    prepare, reduce = strategy.prepare, strategy.reduce
    params, opt_state = state.params, state.opt_state
    lr = torch.tensor(3e-4, device=state.step.device)

    def run(batch: dict) -> Tensor:
        nonlocal params, opt_state
        (value, _), grads = gradient(params, prepare(batch))
        params, opt_state = update(reduce(grads), opt_state, params, lr)
        return value

    return run


def peer_step(way: str, cfg: transformer.Config, here: world.World, compiled: bool) -> Callable[[dict], Tensor]:
    torch.manual_seed(0)
    cuda = here.device.type == "cuda"
    model: Any = Module(cfg, cfg.ff_width).to(here.device)
    if compiled:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block)  # not block.compile(): fully_shard's hooks stay outside of this
    model = on_many(model, way, here.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, **ADAMW, fused=True)
    return step_of(model, optimizer, here.device, autocast=cuda and way == "torch_ddp")


def seconds(run: Callable[[dict], Tensor], batch: dict, here: world.World, steps: int) -> float:
    """Median over steps of the slowest rank's seconds."""
    times = []
    for _ in range(steps):
        dist.barrier()
        _wait(here)
        start = time.perf_counter()
        run(batch)
        _wait(here)
        times.append(time.perf_counter() - start)
    slowest = torch.tensor(times, device=here.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def _wait(here: world.World) -> None:
    if here.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def enough_memory(way: str, here: world.World) -> Iterator[None]:
    """ValueError if memory runs out: the other ranks would wait for this one in a collective, so the program ends."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{way} does not fit into the memory of rank {here.rank}: leave it out of --ways, or give --remat or a "
            f"smaller --batch-size or --context-length ({str(error).partition('. ')[0]})"
        ) from error


def measure(way: str, cfg: transformer.Config, batch: dict, args: Args, here: world.World, compiled: bool) -> dict:
    cuda = here.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    with enough_memory(way, here):
        run = peer_step(way, cfg, here, compiled) if way in PEERS else our_step(way, cfg, args, here, compiled)
        for _ in range(3):
            run(batch)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found = {"ms": 1e3 * seconds(run, batch, here, args.steps)}
    if cuda:
        found["MiB"] = torch.cuda.max_memory_allocated() / 2**20
    del run
    gc.collect()
    return found


def to_rows(size: str, shape: str, found: dict[str, dict[str, float]], device: str) -> list[dict]:
    """Rows of each of purelm's ways, beside its peer if that was measured, and beside one rank alone."""
    rows = []
    for way in found:
        if way in PEERS:
            continue
        peer = PEER_OF.get(way, "torch_ddp")
        for unit, value in found[way].items():
            other = found.get(peer, {}).get(unit)
            rows.append(row(f"{size}, {shape}, {way}", value, unit, peer=peer, peer_value=other, device=device))
        if way != "alone" and "alone" in found:
            ours, alone = found[way]["ms"], found["alone"]["ms"]
            rows.append(row(f"{size}, {way}, exposed communication", ours - alone, "ms", device=device))
            rows.append(row(f"{size}, {way}, weak scaling", 100 * alone / ours, "%", device=device))
    return rows


@program
def main(args: Args) -> None:
    unknown = set(args.ways) - {*OURS, *PEERS}
    if unknown:
        raise ValueError(f"ways: {', '.join(sorted(unknown))} is not one of {', '.join((*OURS, *PEERS))}")
    with world.start(args.device) as here:
        if here.size < 2:
            raise ValueError("one process has nobody to talk to: torchrun --nproc-per-node 2 -m -- ...")
        cuda = here.device.type == "cuda"
        compiled = cuda if args.compile is None else args.compile
        name = f"{here.size} x {torch.cuda.get_device_name() if cuda else 'cpu'}"
        done: list[dict] = []
        for size in args.sizes or ("134m" if cuda else "3m",):
            cfg, batch_size = shape(args, size, cuda)
            x = random.randint(random.key(1 + here.rank), (batch_size, cfg.context_length + 1), 0, cfg.vocab_size)
            x = x.to(here.device)
            batch = {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}
            found: dict[str, dict[str, float]] = {}
            rows: list[dict] = []
            for way in args.ways:
                torch._dynamo.reset()
                found[way] = measure(way, cfg, batch, args, here, compiled)
                rows = to_rows(size, f"{batch_size} x {cfg.context_length} a rank", found, name)
                if here.rank == 0:
                    say(f"{size} {way}: {found[way]}")
                    if args.json is not None:  # kept, should a later way fail
                        write(done + rows, args.json)
            done += rows
        if here.rank == 0:
            publish(done, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
