"""One training step of an 8B model with a context of 32,768 on two GPUs: the course's leaderboard.

    torchrun --nproc-per-node 2 -m -- experiments.bench.step_8b [--keep attention|inputs|all] [--profile] [--json FILE]

34 layers, d_model 4096, d_ff 11,008, 32 heads, vocabulary 151,936, one sequence of 32,768 tokens on each rank; causal,
bf16 compute, AdamW with fp32 masters and state (CS336, assignment 2). Parameters, gradients and state are sharded over
the ranks (dist.fsdp); flash attention, loss without logits, norms and AdamW are purelm.kernels'. --keep says which of a
block's activations are kept for backward: its input ("inputs"), also o and log-sum-exp ("attention"), or "all".

A step is forward, backward and update, from a batch on the device to new parameters; its time is the slowest rank's,
its peak memory that of the rank with most. MFU counts attention over visible pairs alone.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

# An update allocates and frees blocks of 30 GiB; without this setting, fragments of freed ones cannot be reused.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from experiments.bench.report import publish, row
from experiments.console import program, say
from experiments.ops import OpsName, ops_named
from experiments.remat_strategies import is_attention
from purelm import accounting, random
from purelm.dist import fsdp, world
from purelm.dist.ddp import with_global_denominator
from purelm.kernels.adamw import adamw, adamw_step
from purelm.models import transformer
from purelm.transforms import jit, remat

Keep = Literal["inputs", "attention", "all"]
LR = 3e-5  # small enough for the loss to fall without warm-up
PACKAGES = ("torch", "triton", "purelm")


@dataclass(frozen=True)
class Args:
    """The 8B step."""

    device: str = "auto"
    n_layers: int = 34
    d_model: int = 4096
    d_ff: int = 11_008
    n_heads: int = 32
    vocab_size: int = 151_936
    context_length: int = 32_768
    batch_size: int = 1
    """sequences on each rank"""
    keep: Keep = "attention"
    chunk: int | None = None
    """tokens whose logits are held at a time; default the kernel's own choice"""
    ops: OpsName = "fused"
    wire: Literal["fp32", "bf16"] = "fp32"
    """number format in which gradients are sent and summed"""
    compile: bool = False
    """compile the blocks by torch.compile"""
    warmup: int = 1
    steps: int = 3
    profile: bool = False
    """profile one more step and print the time of each kernel"""
    json: Path | None = None


def config(args: Args) -> transformer.Config:
    return transformer.Config(
        vocab_size=args.vocab_size, context_length=args.context_length, d_model=args.d_model, n_layers=args.n_layers,
        n_heads=args.n_heads, d_ff=args.d_ff,
    )  # fmt: skip


def wrapped(keep: Keep, compile: bool) -> Callable[[Any], Any]:
    """The `wrap_block` of this choice."""
    kept: dict[Keep, Callable[[Any], Any]] = {
        "all": transformer.identity,
        "inputs": remat,
        "attention": partial(remat, policy=is_attention),
    }
    return (lambda f: jit(kept[keep](f))) if compile else kept[keep]


def make_run(args: Args, here: world.World) -> Callable[[dict[str, Tensor]], Tensor]:
    """The function batch -> loss that runs a step; it holds parameters and state, and replaces them."""
    cfg, cuda = config(args), here.device.type == "cuda"
    params = transformer.init(random.key(0, device=here.device), cfg)
    plan = fsdp.plan(
        params,
        compute=torch.bfloat16 if cuda else None,
        reduce=torch.bfloat16 if args.wire == "bf16" else None,
    )
    params = plan.shard(params)  # the whole ones are freed
    options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    opt_state, update = adamw(**options).init(params), adamw_step(**options, donate=True)
    lr = torch.tensor(LR, device=here.device)
    wrap = wrapped(args.keep, args.compile)
    model = transformer.make(cfg, fsdp.ops(ops_named(args.ops)), lambda f: fsdp.gathered(wrap(f)))
    gradient = fsdp.differentiate(partial(model.loss, chunk=args.chunk), plan)

    def run(batch: dict[str, Tensor]) -> Tensor:
        nonlocal params, opt_state
        (value, _), grads = gradient(params, with_global_denominator(batch))
        params, opt_state = update(grads, opt_state, params, lr)
        return value

    return run


def batch_of(args: Args, here: world.World) -> dict[str, Tensor]:
    """This rank's sequences: the same ones each step, so that the loss falls."""
    x = random.randint(random.key(1 + here.rank), (args.batch_size, args.context_length + 1), 0, args.vocab_size)
    x = x.to(here.device)
    return {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}


def timed(run: Callable[[], Tensor], here: world.World) -> tuple[float, Tensor]:
    """Seconds of the slowest rank, and the result."""

    def wait() -> None:
        if here.device.type == "cuda":
            torch.cuda.synchronize()

    if here.size > 1:
        dist.barrier()
    wait()
    start = time.perf_counter()
    out = run()
    wait()
    return largest(time.perf_counter() - start, here), out


def largest(x: float, here: world.World) -> float:
    """The largest x of all ranks."""
    t = torch.tensor(x, dtype=torch.float64, device=here.device)
    if here.size > 1:
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.item()


def profiled(run: Callable[[], Tensor], here: world.World) -> str:
    """A table of the kernels that took most of a step."""
    from torch.profiler import ProfilerActivity, profile

    cuda = here.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        timed(run, here)
    events = profiler.key_averages()
    took = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total, e.count) for e in events}
    most = sorted(took.items(), key=lambda item: -item[1][0])[:25]
    return "\n".join(f"{us / 1e3:10.1f} ms {n:6}  {name[:110]}" for name, (us, n) in most)


@program
def main(args: Args) -> None:
    with world.start(args.device) as here:
        cuda, first = here.device.type == "cuda", here.rank == 0
        cfg = config(args)
        n = accounting.n_params(cfg)
        if first:
            size = f"{here.size * args.batch_size} x {args.context_length} tokens"
            say(f"{n:,} parameters, {size}, {here.size} ranks, keep {args.keep}")
        run = make_run(args, here)
        batch = batch_of(args, here)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for i in range(args.warmup + args.steps):
            took, value = timed(partial(run, batch), here)
            if first:
                say(f"step {i + 1}: {took:.3f} s, loss {value.item():.4f}")
            seconds += [took] if i >= args.warmup else []
        median = statistics.median(seconds)
        peak = largest(torch.cuda.max_memory_allocated() / 2**30, here) if cuda else None
        if args.profile:
            text = profiled(partial(run, batch), here)
            if first:
                print(text, flush=True)
        if not first:
            return
        name = f"{here.size} x {torch.cuda.get_device_name() if cuda else 'cpu'}"
        what = f"{n / 1e9:.2f}B, {args.context_length} tokens a sequence"
        flops = accounting.train_flops(cfg, args.batch_size, skip_masked=True)  # of one rank
        rows = [row(f"{what}, step", median, "s", device=name, packages=PACKAGES)]
        if peak is not None:
            most = accounting.peak_flops(torch.cuda.get_device_name())
            rows.append(row(f"{what}, peak memory", peak, "GiB", device=name, packages=PACKAGES))
            if most is not None:
                percent = 100 * accounting.mfu(flops, median, most)
                rows.append(row(f"{what}, MFU", percent, "%", device=name, packages=PACKAGES))
        tokens = here.size * args.batch_size * args.context_length / median
        rows.append(row(f"{what}, throughput", tokens, "tokens/s", device=name, packages=PACKAGES))
        publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
