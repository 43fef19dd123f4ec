"""Collectives by size: seconds, algorithm and bus bandwidth.

    torchrun --nproc-per-node 2 -m experiments.bench.collectives [--mib 1 16 256] [--json FILE]

Over NCCL where there are GPUs, else over Gloo; without torchrun there is one process, which sends nothing. Definitions
are those of nccl-tests (its doc/PERFORMANCE.md): the size S is that of the larger of a rank's two buffers, algorithm
bandwidth S / seconds, and bus bandwidth is the algorithm bandwidth times the bytes that a ring sends for each byte of
S: 2 (N - 1)/N for all_reduce, (N - 1)/N for all_gather and reduce_scatter, 1 for broadcast. Seconds are those of the
slowest rank, the median over runs of several calls. purelm's functions (purelm.dist.collectives) make new tensors; the
peer is torch.distributed, in place on buffers that exist already. Bandwidths are computed from the peer's seconds,
since they describe the link.

gather_parts and scatter_sums are fsdp's messages: a layer's matrices in one message, packed and unpacked; the peer
sends the same number of bytes as one flat tensor.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro

from experiments.bench.report import publish, row
from experiments.console import pick_device, program, say
from purelm.dist import collectives
from purelm.dist.sharding import gather_parts, scatter_sums
from purelm.dist.world import all_gather_single, reduce_scatter_single, start

Call = Callable[[], Any]

NAMES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "gather_parts", "scatter_sums")
N_LEAVES = 7  # matrices of a layer: q, k, v, o, w1, w2, w3


@dataclass(frozen=True)
class Args:
    """Collectives by size."""

    device: str = "auto"
    names: tuple[str, ...] = NAMES
    mib: tuple[float, ...] = (1, 4, 16, 64, 256, 1024)
    """sizes, in 2^20 bytes"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    runs: int = 5
    calls: int = 20
    """calls in one run; fewer for large sizes: at most 2 GiB in a run, but at least 2 calls"""
    json: Path | None = None


def bus_factor(name: str, n_ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth.

    >>> bus_factor("all_reduce", 4), bus_factor("all_gather", 4), bus_factor("broadcast", 4)
    (1.5, 0.75, 1.0)
    """
    share = (n_ranks - 1) / n_ranks
    if n_ranks == 1:
        return 0.0
    return {"all_reduce": 2 * share, "broadcast": 1.0}.get(name, share)


def calls(name: str, n_bytes: int, dtype: torch.dtype, device: torch.device) -> tuple[int, Call, Call]:
    """(bytes of the larger buffer, purelm's call, torch.distributed's). Buffers are zeros: all sums stay finite."""
    N = dist.get_world_size()
    if name not in NAMES:
        raise ValueError(f"names: {name!r} is not one of {', '.join(NAMES)}")
    n_leaves = N_LEAVES if name in ("gather_parts", "scatter_sums") else 1
    part = torch.zeros(n_leaves * max(1, n_bytes // dtype.itemsize // N // n_leaves), dtype=dtype, device=device)
    whole = part.new_zeros(N * len(part))
    size = whole.nbytes
    if name == "all_reduce":
        return size, partial(collectives.all_reduce, whole, check=False), partial(dist.all_reduce, whole)
    if name == "all_gather":
        engine = partial(all_gather_single, whole, part)
        return size, partial(collectives.all_gather, part, check=False), engine
    if name == "reduce_scatter":
        engine = partial(reduce_scatter_single, part, whole)
        return size, partial(collectives.reduce_scatter, whole, check=False), engine
    if name == "gather_parts":
        parts, shapes = part.chunk(N_LEAVES), [(len(whole) // N_LEAVES,)] * N_LEAVES
        return size, lambda: gather_parts(parts, shapes).wait(), partial(all_gather_single, whole, part)
    if name == "scatter_sums":
        wholes = whole.chunk(N_LEAVES)
        return size, lambda: scatter_sums(wholes).wait(), partial(reduce_scatter_single, part, whole)
    return size, partial(collectives.broadcast, whole, check=False), partial(dist.broadcast, whole, 0)


def seconds(f: Call, n_calls: int, n_runs: int, device: torch.device) -> list[float]:
    """Seconds of one call in each run, on the slowest rank; all ranks get the same list."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = []
    for run in range(n_runs + 1):  # the first warms up
        dist.barrier()
        wait()
        begin = time.perf_counter()
        for _ in range(n_calls if run else 2):
            f()
        wait()
        found.append((time.perf_counter() - begin) / n_calls)
    slowest = torch.tensor(found[1:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def measure(name: str, mib: float, args: Args, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one collective at one size."""
    size, ours, engine = calls(name, int(mib * 2**20), getattr(torch, args.dtype), device)
    n_calls = max(2, min(args.calls, 2**31 // size))
    times = {who: seconds(f, n_calls, args.runs, device) for who, f in (("purelm", ours), ("peer", engine))}
    value, peer = (statistics.median(times[who]) for who in ("purelm", "peer"))
    N = dist.get_world_size()
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    where = f"{N} x {what}, {dist.get_backend()}"
    if dist.get_rank() == 0:
        spread = ", ".join(f"{who} {min(t):.3g} to {max(t):.3g} s" for who, t in times.items())
        say(f"{name} {mib:g} MiB: {args.runs} runs of {n_calls} calls: {spread}")
    rate = size / peer / 1e9
    return [
        row(f"{name} {mib:g} MiB", value, "s", peer="torch.distributed", peer_value=peer, device=where),
        row(f"{name} {mib:g} MiB: algorithm bandwidth", rate, "GB/s", device=where),
        row(f"{name} {mib:g} MiB: bus bandwidth", rate * bus_factor(name, N), "GB/s", device=where),
    ]


@program
def main(args: Args) -> None:
    for name, values in (("mib", args.mib), ("runs", (args.runs,)), ("calls", (args.calls,))):
        if min(values, default=0) <= 0:
            raise ValueError(f"{name} must be above 0, got {values}")
    with start(pick_device(args.device).type) as w:
        alone = not dist.is_initialized()
        if alone:
            backend = "nccl" if w.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            rows = [r for name in args.names for mib in args.mib for r in measure(name, mib, args, w.device)]
        finally:
            if alone:
                dist.destroy_process_group()
    if w.rank == 0:
        publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
