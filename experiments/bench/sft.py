"""Fine-tuning beside pretraining: a step at equal shapes, and the memory of a loss over a large vocabulary.

    python -m experiments.bench.sft [--device cuda] [--size 134m] [--json FILE]

The step is the same function, compiled; what differs is the batch. pretraining: tokens and targets. responses: weights,
0 on the first half of each row. packed: segment ids as well, of eight examples in a row. Medians over rounds in which
all take turns. Throughput counts positions, padding and prompts among them.

Memory is the peak of loss and gradients less parameters, gradients and batch, of a model of one layer on one row
of --memory-context tokens: with all logits at once, and by chunks, as experiments.sft does from 1 GiB of logits on. Its
floor is one chunk's logits. On a GPU torch's allocator counts; on a CPU the resident set of a process for each.
"""

import gc
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from experiments import limits
from experiments.bench.report import publish, row
from experiments.bench.train_step import batches, pure_step, resident_peak, shapes, synchronize
from experiments.console import pick_device, program, say
from experiments.finetune.setup import tokens_at_a_time
from experiments.limits import Count
from experiments.ops import OpsName, ops_named
from purelm import random, tree
from purelm.models import transformer
from purelm.transforms import value_and_grad

KINDS = ("pretraining", "responses", "packed")


@dataclass(frozen=True)
class Args:
    """Speed and memory of fine-tuning."""

    device: str = "auto"
    size: str | None = None
    """3m, 22m, 134m or 374m; default 3m on a CPU, else 134m"""
    ops: tuple[OpsName, ...] = ("sdpa", "fused")
    """fused on a GPU only"""
    rounds: Count = 10
    memory_context: Count = 4096
    memory_vocabulary: Count = 150_000
    json: Path | None = None
    memory_of: int | None = None
    """internal: print the memory with this chunk, 0 for all"""


def of_kind(kind: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with what this kind adds."""
    if kind == "pretraining":
        return batch
    B, T = batch["tokens"].shape
    at_T = torch.arange(T, device=batch["tokens"].device)
    n = max(T // 8, 2)  # of an example
    within_T = at_T % n if kind == "packed" else at_T
    weights = (within_T >= (n if kind == "packed" else T) // 2).float().expand(B, T).contiguous()
    segments = {"segment_ids": (1 + at_T // n).expand(B, T).contiguous()} if kind == "packed" else {}
    return {**batch, "weights": weights, **segments}


def seconds_of_steps(args: Args, size: str, ops: OpsName, device: torch.device) -> dict[str, float]:
    """Median seconds of a step by kind of batch."""
    cfg, batch_size = shapes(size, device)
    data = {kind: [of_kind(kind, b) for b in batches(cfg, batch_size, device)] for kind in KINDS}
    steps = {}
    for kind in KINDS:
        steps[kind] = pure_step(cfg, device, ops_named(ops))
        for i in range(3):
            steps[kind](data[kind][i])
    inner = 5 if device.type == "cuda" else 1
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(args.rounds):
        for kind in sorted(KINDS, reverse=bool(i % 2)):
            synchronize(device)
            begin = time.perf_counter()
            for j in range(inner):
                steps[kind](data[kind][(i + j) % len(data[kind])])
            synchronize(device)
            found[kind].append((time.perf_counter() - begin) / inner)
    return {kind: statistics.median(x) for kind, x in found.items()}


def memory(args: Args, chunk: int | None, device: torch.device) -> int:
    """Peak bytes of loss and gradients, beyond parameters, gradients and batch."""
    V, T = args.memory_vocabulary, args.memory_context
    cfg = transformer.Config(vocab_size=V, context_length=T, d_model=256, n_layers=1, n_heads=4)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    params = tree.cast(transformer.init(random.key(0, device=device), cfg), dtype)
    ids = random.randint(random.key(1), (1, T + 1), 0, V).to(device)
    batch = of_kind("responses", {"tokens": ids[:, :-1], "targets": ids[:, 1:]})
    model = transformer.make(cfg, ops_named("sdpa"))

    def loss(params: Any) -> Any:
        return model.loss(params, batch, chunk=chunk)[0]

    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    else:
        resident_peak(reset=True)
        base = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    _, grads = value_and_grad(loss)(params)
    peak = torch.cuda.max_memory_allocated() if cuda else resident_peak()
    return peak - base - tree.n_bytes(grads)


def memory_in_own_process(args: Args, chunk: int) -> int:
    command = [
        sys.executable, "-m", "experiments.bench.sft", "--device", "cpu", "--memory-of", str(chunk),
        "--memory-context", str(args.memory_context), "--memory-vocabulary", str(args.memory_vocabulary),
    ]  # fmt: skip
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise ValueError(f"memory with chunk {chunk}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


@program
def main(args: Args) -> None:
    limits.check(args)
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    if args.memory_of is not None:
        print(memory(args, args.memory_of or None, device))
        return
    size = args.size or ("134m" if cuda else "3m")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    rows = []
    for ops in args.ops if cuda else ("sdpa",):
        found = seconds_of_steps(args, size, ops, device)
        cfg, batch_size = shapes(size, device)
        rate = {kind: batch_size * cfg.context_length / s for kind, s in found.items()}
        say(f"{size}, {ops}: ms a step: " + ", ".join(f"{k} {1e3 * s:.1f}" for k, s in found.items()))
        for kind in KINDS[1:]:
            what: dict[str, Any] = dict(peer="pretraining step", peer_value=rate["pretraining"], device=name)
            rows.append(row(f"{size}, {ops}: {kind}", rate[kind], "tokens/s", **what))
    chunk = tokens_at_a_time(args.memory_vocabulary)
    peaks = [memory(args, c or None, device) if cuda else memory_in_own_process(args, c) for c in (chunk, 0)]
    where = f"{args.memory_context} tokens, vocabulary {args.memory_vocabulary:,}"
    what = dict(peer="all logits at once", peer_value=peaks[1] / 2**20, device=name)
    rows.append(row(f"loss and gradients, {where}: peak memory, chunks of {chunk}", peaks[0] / 2**20, "MiB", **what))
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
