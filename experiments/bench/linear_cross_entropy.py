"""Time and peak memory of linear + cross-entropy, and of cross-entropy on given logits, beside their peers.

    python -m experiments.bench.linear_cross_entropy [--device cuda] [--tokens N --d-model D --vocab V] [--json FILE]

Peers: torch.nn.functional.cross_entropy of whole logits, under torch.compile; torch's own linear_cross_entropy with
chunks, if this torch has it; purelm.ops in chunks of 4096 tokens with checkpoint, under torch.compile. "forward and
backward" computes the sum of losses and the gradients of both inputs; "forward" runs under no_grad. Times are medians
over interleaved rounds (CUDA events on a GPU). Memory is the allocator's peak above inputs and returned gradients (GPU
only). TFLOP/s counts 6 N V D for forward and backward, 2 N V D for forward alone, whatever a variant recomputes. A
variant that does not fit into memory is reported as OOM.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from experiments.bench.report import publish, row
from experiments.console import can_compile, pick_device, program, say
from purelm import random
from purelm.kernels.cross_entropy import cross_entropy
from purelm.kernels.linear_cross_entropy import linear_cross_entropy
from purelm.ops.linear_cross_entropy import linear_cross_entropy as reference

Loss = Callable[..., Tensor]  # of the inputs and the targets


@dataclass
class Args:
    """linear_cross_entropy and cross_entropy against torch."""

    device: str = "auto"
    tokens: int | None = None
    """N; 32,768 on a GPU, 512 on a CPU"""
    d_model: int | None = None
    """D; 4096 on a GPU, 64 on a CPU"""
    vocab: int | None = None
    """V; 128,256 on a GPU, 1000 on a CPU"""
    chunk: int | None = None
    """tokens in one of purelm's chunks; default its own choice"""
    rounds: int = 7
    json: Path | None = None


class Sizes(NamedTuple):
    N: int
    D: int
    V: int


def sizes(args: Args, device: torch.device) -> Sizes:
    default = Sizes(32_768, 4096, 128_256) if device.type == "cuda" else Sizes(512, 64, 1000)
    given = (args.tokens, args.d_model, args.vocab)
    found = Sizes(*(d if g is None else g for g, d in zip(given, default, strict=True)))
    if min(found) < 1:
        raise ValueError(f"tokens, d_model and vocab must be at least 1, got {tuple(found)}")
    return found


def normal(key: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, drawn in parts, since the generator needs several times the memory of its result."""
    out = torch.empty(rows, columns, dtype=dtype, device=key.device)
    for i in range(0, rows, 1024):
        out[i : i + 1024] = random.normal(random.fold_in(key, i), (min(1024, rows - i), columns))
    return out


def materialised(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ unembedding.t()).float(), targets, reduction="sum")


def torchs_own() -> Loss | None:
    """torch.nn.functional.linear_cross_entropy with its chunks; None if this torch does not have it."""
    function, options = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        return None
    chunked = options()
    return lambda h, w, t: function(h, w, t, reduction="sum", options=chunked)


def variants(args: Args, device: torch.device) -> dict[str, Loss | None]:
    compiled = torch.compile if can_compile(device) else lambda f: f
    note = "" if can_compile(device) else " (no compiler: eager)"
    return {
        "purelm": lambda h, w, t: linear_cross_entropy(h, w, t, chunk=args.chunk)[0],
        f"materialised logits, torch.compile{note}": compiled(materialised),
        "torch.nn.functional.linear_cross_entropy": torchs_own(),
        f"purelm.ops, chunk=4096, torch.compile{note}": compiled(lambda h, w, t: reference(h, w, t, chunk=4096)[0]),
    }


def gradients(loss: Loss, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves, targets), leaves)


def alone(loss: Loss, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    with torch.no_grad():
        return loss(*inputs, targets)


def milliseconds(call: Callable[[], object], device: torch.device, inner: int) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(inner):
            call()
        return 1e3 * (time.perf_counter() - start) / inner
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(inner):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / inner


def extra_mib(call: Callable[[], tuple[Tensor, ...]]) -> float:
    """Peak of the allocator during the call, above what was there before and what the call returns."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = sum(x.numel() * x.element_size() for x in call())
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - returned) / 2**20


def works(name: str, call: Callable[[], object]) -> bool:
    """Run it twice for warm-up (compilation, caches); print a line and return False if it does not fit into memory."""
    try:
        call(), call()
        return True
    except torch.OutOfMemoryError:
        say(f"  {name}: OOM")
    gc.collect()
    torch.cuda.empty_cache()
    return False


def medians(calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median ms of each call that works; in each round all calls take turns, in every second one in reverse order."""
    calls = {name: call for name, call in calls.items() if works(name, call)}
    inner = 3
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(max(rounds, 1)):
        for name in sorted(calls, reverse=bool(i % 2)):
            times[name].append(milliseconds(calls[name], device, inner))
    for name, found in times.items():
        say(f"  {name}: {statistics.median(found):.3f} ms (max - min {max(found) - min(found):.3f})")
    return {name: statistics.median(found) for name, found in times.items()}


def compare(
    metric: str, found: dict[str, float], peers: list[str], missing: set[str], unit: str, device: str
) -> list[dict]:
    """A row for each peer, with OOM for one that did not fit into memory."""
    rows: list[dict[str, Any]] = []
    if "purelm" not in found:
        say(f"{metric}: purelm OOM")
        return rows
    for peer in peers:
        failed = peer not in found and peer not in missing
        rows.append(
            row(
                metric,
                found["purelm"],
                unit,
                peer=f"{peer}: OOM" if failed else peer,
                peer_value=found.get(peer),
                device=device,
            )
        )
    return rows


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "cpu"
    N, D, V = sizes(args, device)
    dtype = torch.bfloat16 if cuda else torch.float32
    say(f"{N:,} tokens, D {D:,}, V {V:,}, {dtype}")
    k1, k2, k3 = random.split(random.key(0, device=device), 3)
    hidden, unembedding = normal(k1, N, D, dtype), normal(k2, V, D, dtype).mul_(D**-0.5)
    targets = random.randint(k3, (N,), 0, V)
    if cuda:
        torch.cuda.empty_cache()
    rows: list[dict[str, Any]] = []
    losses = variants(args, device)
    present = {k: f for k, f in losses.items() if f is not None}
    peers, missing = [k for k in losses if k != "purelm"], set(losses) - set(present)
    both = {k: partial(gradients, f, (hidden, unembedding), targets) for k, f in present.items()}

    say("linear + cross-entropy, forward and backward")
    found = medians(both, device, args.rounds)
    rows += compare("linear cross-entropy: forward + backward", found, peers, missing, "ms", name)
    tflops = {k: 6e-9 * N * V * D / v for k, v in found.items()}
    rows += compare("linear cross-entropy: forward + backward", tflops, peers, missing, "TFLOP/s", name)
    if cuda:
        memory = {k: extra_mib(both[k]) for k in found}
        rows += compare("linear cross-entropy: peak extra memory", memory, peers, missing, "MiB", name)

    say("linear + cross-entropy, forward alone")
    forward = {k: partial(alone, f, (hidden, unembedding), targets) for k, f in present.items()}
    found = medians(forward, device, args.rounds)
    rows += compare("linear cross-entropy: forward alone", found, peers, missing, "ms", name)

    del hidden, unembedding, both, forward
    n = min(N, 8192)
    logits = normal(k1, n, V, dtype)
    if cuda:
        torch.cuda.empty_cache()
    peer = "torch.nn.functional.cross_entropy, torch.compile"
    compiled = torch.compile if can_compile(device) else lambda f: f
    given = {
        "purelm": lambda x, t: cross_entropy(x, t)[0],
        peer: compiled(lambda x, t: F.cross_entropy(x.float(), t, reduction="sum")),
    }
    size = n * V * logits.element_size()
    for what, passes, run in (("forward + backward", 3, gradients), ("forward alone", 1, alone)):
        say(f"cross-entropy of {n:,} x {V:,} logits, {what}")
        calls = {k: partial(run, f, (logits,), targets[:n]) for k, f in given.items()}
        found = medians(calls, device, args.rounds)
        metric = f"cross-entropy of given logits: {what}"
        rows += compare(metric, found, [peer], set(), "ms", name)
        # bytes that must move: forward reads the logits, backward reads them and writes their gradient
        speed = {k: 1e-6 * passes * size / v for k, v in found.items()}
        rows += compare(metric, speed, [peer], set(), "GB/s", name)
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
