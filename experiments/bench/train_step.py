"""Time and peak memory of one optimisation step: purelm's compiled pure step beside a compiled nn.Module.

    python -m experiments.bench.train_step [--device cuda] [--sizes 22m 134m] [--json FILE]

All run the same maths: forward, backward, AdamW, fp32 masters; bf16 compute on a GPU, fp32 on a CPU. The peer's
attention is SDPA. purelm runs with SDPA, and on a GPU also with the kernels (purelm.kernels.fused.FUSED), and with the
kernels in one CUDA graph. Times are medians over rounds in which all variants take turns in one process, so that the
machine's drift affects all alike. Memory is the peak of steps after compilation: on a GPU by torch's allocator, less
what the other variants hold; on a CPU the peak resident set, in a process for each variant. The first three steps,
compilation included, are timed in a process for each variant, with empty caches of compiled code.
"""

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

from experiments.bench.module_baseline import Module, step_of
from experiments.bench.report import publish, row
from experiments.console import pick_device, program, say
from experiments.ops import SDPA, ops_named
from purelm import accounting, random, tree
from purelm.kernels import adamw as kernels
from purelm.models import transformer
from purelm.ops import Ops
from purelm.optim import adamw, schedules
from purelm.train import FULL, MIXED, init_state, make_step
from purelm.transforms import cuda_graph, jit

# vocab, d_model, layers, heads, d_ff, context, batch on a GPU, batch on a CPU
SIZES = {
    "3m": (1024, 192, 4, 6, 512, 256, 64, 16),
    "22m": (10_000, 512, 4, 16, 1344, 256, 128, 4),
    "134m": (32_000, 768, 12, 12, 2048, 1024, 32, 1),
    "374m": (32_000, 1024, 24, 16, 2816, 1024, 16, 1),
}


@dataclass
class Args:
    """Compiled pure step against compiled nn.Module + fused AdamW."""

    device: str = "auto"
    sizes: tuple[str, ...] = ("22m", "134m")
    variants: tuple[Literal["purelm", "fused", "graph"], ...] = ("purelm", "fused", "graph")
    """purelm: SDPA and the compiled references; fused: the kernels; graph: the kernels in one CUDA graph. The last two
    on a GPU only"""
    steps: int = 30
    """timed steps of each variant"""
    json: Path | None = None
    first: bool = True
    """also the time to the third step, compilation included, each in a process of its own with empty caches"""
    memory_of: str | None = None
    """internal: measure the memory of one variant and print it"""
    first_of: str | None = None
    """internal: measure the first steps of one variant and print them"""


def shapes(size: str, device: torch.device) -> tuple[transformer.Config, int]:
    if size not in SIZES:
        raise ValueError(f"sizes: {size!r} is not one of {', '.join(SIZES)}")
    V, D, L, H, F, T, gpu_batch, cpu_batch = SIZES[size]
    cfg = transformer.Config(vocab_size=V, context_length=T, d_model=D, n_layers=L, n_heads=H, d_ff=F)
    return cfg, gpu_batch if device.type == "cuda" else cpu_batch


def pure_step(
    cfg: transformer.Config, device: torch.device, ops: Ops = SDPA, graph: bool = False
) -> Callable[[dict], torch.Tensor]:
    # On a GPU one launch for all leaves; its table of addresses cannot be part of a CUDA graph.
    one_launch = device.type == "cuda" and not graph
    optimizer = (kernels.adamw if one_launch else adamw)(betas=(0.9, 0.95), weight_decay=0.1)

    precision = MIXED if device.type == "cuda" else FULL
    loss = transformer.make(cfg, ops).loss
    step = jit(make_step(loss, optimizer, schedules.constant(3e-4), precision=precision), donate=0)
    if graph:
        step = cuda_graph(step, donate=0, n_warmup=2)
    state = init_state(transformer.init(random.key(0, device=device), cfg), optimizer)

    def run(batch: dict) -> torch.Tensor:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return run


def module_step(cfg: transformer.Config, device: torch.device) -> Callable[[dict], torch.Tensor]:
    torch.manual_seed(0)
    model = Module(cfg, cfg.ff_width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return step_of(torch.compile(model), optimizer, device, autocast=device.type == "cuda")


def fused_step(cfg: transformer.Config, device: torch.device) -> Callable[[dict], torch.Tensor]:
    return pure_step(cfg, device, ops_named("fused"))


def graph_step(cfg: transformer.Config, device: torch.device) -> Callable[[dict], torch.Tensor]:
    return pure_step(cfg, device, ops_named("fused"), graph=True)


VARIANTS = {"purelm": pure_step, "module": module_step, "fused": fused_step, "graph": graph_step}
PEER = "module"


def variants(args: Args, device: torch.device) -> list[str]:
    """Names of what is measured: the peer always, the kernels on GPUs only."""
    return [*(v for v in args.variants if v == "purelm" or device.type == "cuda"), PEER]


def graph_bytes() -> int:
    """Memory of CUDA graphs, which the allocator does not count as allocated."""
    pieces = torch.cuda.memory_snapshot()
    return sum(piece["total_size"] for piece in pieces if tuple(piece["segment_pool_id"]) != (0, 0))


def batches(cfg: transformer.Config, batch_size: int, device: torch.device, n: int = 4) -> list[dict]:
    out = []
    for i in range(n):
        x = random.randint(random.fold_in(random.key(1), i), (batch_size, cfg.context_length + 1), 0, cfg.vocab_size)
        x = x.to(device)
        out.append({"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()})
    return out


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Measured(NamedTuple):
    """Measurements by name of the variant."""

    seconds: dict[str, list[float]]  # of each step
    peak_bytes: dict[str, int]  # on a GPU; empty on a CPU


def measure(size: str, device: torch.device, args: Args) -> Measured:
    cfg, batch_size = shapes(size, device)
    data = batches(cfg, batch_size, device)
    runs, held = {}, {}
    cuda = device.type == "cuda"
    for name in variants(args, device):
        before = torch.cuda.memory_allocated() + graph_bytes() if cuda else 0
        runs[name] = VARIANTS[name](cfg, device)
        for i in range(3):
            runs[name](data[i])
        synchronize(device)
        gc.collect()
        held[name] = torch.cuda.memory_allocated() + graph_bytes() - before if cuda else 0
    # On a GPU several steps form one reading, so that the host's launches overlap with the device as in training.
    inner = 5 if cuda else 1
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    for i in range(max(args.steps // inner, 3)):
        for name in sorted(runs, reverse=bool(i % 2)):
            synchronize(device)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated() + graph_bytes() - held[name]
            start = time.perf_counter()
            for j in range(inner):
                runs[name](data[(i + j) % len(data)])
            synchronize(device)
            times[name].append((time.perf_counter() - start) / inner)
            if cuda:
                peaks[name] = torch.cuda.max_memory_allocated() + graph_bytes() - others
    return Measured(times, peaks)


def resident_peak(reset: bool = False) -> int:
    """Peak resident set in bytes since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
        return 0
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def resident_growth(variant: str, size: str) -> int:
    """Peak resident bytes of three compiled steps on the CPU, less those of the process before them."""
    device = torch.device("cpu")
    cfg, batch_size = shapes(size, device)
    data = batches(cfg, batch_size, device)
    base = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    run = VARIANTS[variant](cfg, device)
    for i in range(3):
        run(data[i])
    gc.collect()
    resident_peak(reset=True)
    for i in range(3):
        run(data[i])
    return resident_peak() - base


def first_steps(variant: str, size: str, device: torch.device) -> float:
    """Seconds from a model's configuration to the end of its third step: parameters, compilation and three steps."""
    cfg, batch_size = shapes(size, device)
    data = batches(cfg, batch_size, device)  # also initialises the device
    synchronize(device)
    start = time.perf_counter()
    run = VARIANTS[variant](cfg, device)
    for i in range(3):
        run(data[i]).item()
    return time.perf_counter() - start


def first_in_own_process(variant: str, size: str, device: torch.device) -> float:
    """`first_steps` in a new process with empty caches of compiled code."""
    command = [sys.executable, "-m", "experiments.bench.train_step", "--device", str(device)]
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        env = {**os.environ, **caches}
        command += ["--sizes", size, "--first-of", variant]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise ValueError(f"first steps of {variant} at {size}: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def resident_in_own_process(variant: str, size: str) -> int:
    command = [sys.executable, "-m", "experiments.bench.train_step", "--device", "cpu"]
    # Otherwise glibc keeps freed pieces of up to 32 MB, and the peak would be that of its heap.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
    done = subprocess.run([*command, "--sizes", size, "--memory-of", variant], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise ValueError(f"memory of {variant} at {size}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    if args.memory_of is not None:
        print(resident_growth(args.memory_of, args.sizes[0]))
        return
    if args.first_of is not None:
        print(first_steps(args.first_of, args.sizes[0], device))
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    rows = []
    for size in args.sizes:
        cfg, batch_size = shapes(size, device)
        n_params = tree.n_params(transformer.init(random.key(0), cfg))
        say(f"{size}: {n_params:,} parameters, {batch_size} x {cfg.context_length} tokens")
        measured = measure(size, device, args)
        times = measured.seconds
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        ms = {k: 1e3 * statistics.median(v) for k, v in times.items()}
        spread = {k: 1e3 * (max(v) - min(v)) for k, v in times.items()}
        say("  ms/step (max - min): " + ", ".join(f"{k} {ms[k]:.2f} ({spread[k]:.2f})" for k in ms))
        first = {v: first_in_own_process(v, size, device) for v in variants(args, device)} if args.first else {}
        peer = "nn.Module + torch.compile + fused AdamW"
        peaks = measured.peak_bytes or {n: resident_in_own_process(n, size) for n in variants(args, device)}
        memory = {n: peak / 2**20 for n, peak in peaks.items()}
        for variant in variants(args, device):
            if variant == PEER:
                continue
            what = f"{size}: " + ("" if variant == "purelm" else f"{variant} ops, ")
            rows.append(row(what + "step", ms[variant], "ms", peer=peer, peer_value=ms[PEER], device=name))
            rows.append(
                row(what + "peak memory", memory[variant], "MiB", peer=peer, peer_value=memory[PEER], device=name)
            )
            if first:
                rows.append(
                    row(
                        what + "first three steps",
                        first[variant],
                        "s",
                        peer=peer,
                        peer_value=first[PEER],
                        device=name,
                    )
                )
            tokens = batch_size * cfg.context_length / (ms[variant] / 1e3)
            rows.append(row(what + "throughput", tokens, "tokens/s", device=name))
            peak_flops = accounting.peak_flops(device)
            if peak_flops is not None:
                used = accounting.train_flops(cfg, batch_size, cfg.context_length) / (ms[variant] / 1e3) / peak_flops
                rows.append(row(what + "MFU", 100 * used, "%", device=name))
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
