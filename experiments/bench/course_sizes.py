"""Forward, forward + backward and the whole step at the course's sizes: milliseconds, spread and peak memory.

python -m experiments.bench.course_sizes [--sizes small medium] [--dtypes fp32 bf16] [--warmups 5] [--compiled no yes]

The sizes of the course's assignment 2 (vocabulary 10,000, context 512, batch 4). Each cell of the table begins
anew: `warmups` calls, then `steps` timed ones, each with a wait for the device. With few warm-ups the first timed calls
include what is done once (cuBLAS handles, allocations, compilation); --warmups 0 shows how much that is. bf16 means
compute in bf16 with fp32 masters. A cell that does not fit into memory is reported as OOM. The peer of a row is eager
code in fp32.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from experiments.bench.report import publish, row
from experiments.console import pick_device, program, say
from experiments.ops import OpsName, ops_named
from purelm import accounting, random, tree
from purelm.devices import multiplies_natively
from purelm.models import transformer
from purelm.ops import Ops
from purelm.optim import adamw, schedules
from purelm.train import FULL, MIXED, init_state, make_step
from purelm.transforms import jit, value_and_grad

# d_model, d_ff, layers, heads: CS336 assignment 2, handout of 2026; tiny is for machines without a GPU
SIZES = {
    "tiny": (64, 192, 2, 2),
    "small": (768, 3072, 12, 12),
    "medium": (1024, 4096, 24, 16),
    "large": (1280, 5120, 36, 20),
    "xl": (2560, 10240, 32, 32),
    "10B": (4608, 12288, 50, 36),
}
Part = Literal["forward", "forward_backward", "step"]


@dataclass(frozen=True)
class Args:
    """The course's table of step times."""

    device: str = "auto"
    sizes: tuple[str, ...] = ()
    """default: small medium large xl 10B on a GPU, tiny on a CPU"""
    parts: tuple[Part, ...] = ("forward", "forward_backward", "step")
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ()
    """default: fp32, and bf16 where the device has units for it"""
    warmups: tuple[int, ...] = (5,)
    compiled: tuple[Literal["no", "yes"], ...] = ("no", "yes")
    ops: OpsName = "sdpa"
    batch_size: int = 4
    context_length: int = 512
    vocab_size: int = 10_000
    steps: int = 10
    json: Path | None = None


def function(
    cfg: transformer.Config, part: str, dtype: str, compiled: bool, ops: Ops, device: torch.device
) -> Callable[[dict], Any]:
    """A function of a batch that computes one `part` and drops the result, except a step's state."""
    precision = MIXED if dtype == "bf16" else FULL
    params = transformer.init(random.key(0, device=device), cfg)

    def loss_fn(p: Any, batch: dict) -> Any:
        return transformer.loss(p, batch, cfg, ops=ops)

    wrap: Callable[..., Any] = torch.compile if compiled else lambda f: f
    if part == "forward":
        low = tree.cast(params, precision.compute)
        forward = wrap(loss_fn)
        return torch.no_grad()(lambda batch: forward(low, batch))
    if part == "forward_backward":
        differentiated = value_and_grad(lambda p, b: loss_fn(tree.cast(p, precision.compute), b), has_aux=True)
        both = jit(differentiated) if compiled else differentiated
        return lambda batch: both(params, batch)
    optimizer = adamw(weight_decay=0.1)
    step = make_step(loss_fn, optimizer, schedules.constant(1e-4), precision=precision)
    step = jit(step, donate=0) if compiled else step
    state = init_state(params, optimizer)

    def run(batch: dict) -> None:
        nonlocal state
        state, _ = step(state, batch)

    return run


def measure(f: Callable[[dict], Any], batch: dict, warmups: int, steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each timed call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for i in range(warmups + steps):
        start = time.perf_counter()
        f(batch)
        wait()
        if i >= warmups:
            times.append(1e3 * (time.perf_counter() - start))
    return times


def cell(cfg: transformer.Config, args: Args, device: torch.device, which: tuple) -> tuple[list[float], float] | str:
    """(milliseconds, peak MiB or nan), or "OOM"."""
    part, dtype, compiled, warmups = which
    cuda = device.type == "cuda"
    x = random.randint(random.key(1, device=device), (args.batch_size, cfg.context_length + 1), 0, cfg.vocab_size)
    batch = {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        f = function(cfg, part, dtype, compiled == "yes", ops_named(args.ops), device)
        times = measure(f, batch, warmups, args.steps, device)
        return times, torch.cuda.max_memory_allocated() / 2**20 if cuda else float("nan")
    except torch.OutOfMemoryError:
        return "OOM"


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "cpu"
    native = multiplies_natively(torch.bfloat16, device)
    dtypes = args.dtypes or (("fp32", "bf16") if native else ("fp32",))
    rows: list[dict[str, Any]] = []
    for size in args.sizes or (tuple(SIZES)[1:] if cuda else ("tiny",)):
        if size not in SIZES:
            raise ValueError(f"sizes: {size!r} is not one of {', '.join(SIZES)}")
        D, F, L, H = SIZES[size]
        cfg = transformer.Config(
            vocab_size=args.vocab_size, context_length=args.context_length, d_model=D, n_layers=L, n_heads=H, d_ff=F
        )
        say(f"{size}: {accounting.n_params(cfg):,} parameters")
        plain: dict[tuple, float] = {}
        for which in product(args.parts, dtypes, args.compiled, args.warmups):
            part, dtype, compiled, warmups = which
            found = cell(cfg, args, device, which)
            gc.collect()
            torch.compiler.reset()
            if cuda:
                torch.cuda.empty_cache()
            label = f"{size}, {part}, {dtype}, {'compiled' if compiled == 'yes' else 'eager'}, {warmups} warm-ups"
            if isinstance(found, str):
                say(f"  {label}: {found}")
                rows.append(row(f"{label}: {found}", float("nan"), "ms", device=name))
                continue
            times, mib = found
            ms = statistics.mean(times)
            spread = statistics.stdev(times) if len(times) > 1 else 0.0
            say(f"  {label}: {ms:.2f} ms (std {spread:.2f})" + (f", {mib:,.0f} MiB" if cuda else ""))
            if (dtype, compiled) == ("fp32", "no"):
                plain[part, warmups] = ms
            base = plain.get((part, warmups))
            one = row(label, ms, "ms", peer="eager fp32" if base else None, peer_value=base, device=name)
            rows.append(one | {"std_ms": spread, "peak_mib": None if mib != mib else mib})
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
