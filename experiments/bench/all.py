"""Every benchmark that the device can run, one after another, each in a process of its own.

python -m experiments.bench.all [--device cuda] [--data FOLDER] [--json FOLDER]

With two GPUs or more, also the benchmarks of several processes, under torchrun.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from experiments.console import pick_device, program, say


@dataclass(frozen=True)
class Args:
    """Run all benchmarks of a device."""

    device: str = "cpu"
    data: Path | None = None
    """folder of English text for the tokenizer's benchmarks, which are left out without it; the first .jsonl, .jsonl.gz
    or .jsonl.zst in it is for the quality rules of web documents"""
    json: Path | None = None
    """folder for JSON files, one for each benchmark"""


def programs(args: Args) -> list[tuple[str, list[str]]]:
    """Module and arguments of each benchmark of one process."""
    if args.device != "cpu":
        on = ["--device", args.device]
        sizes = [*on, "--sizes", "small", "medium", "large", "xl"]  # without 10B, which runs out of 80 GB, slowly
        names = ("attention", "linear_cross_entropy", "norms", "train_step", "generate", "policy_losses")
        return [*((name, on) for name in names), ("course_sizes", sizes)]
    data = [] if args.data is None else ["--data", str(args.data)]
    tokenizer = [("tokenizer_encode", data), ("tokenizer_train", data)] if data else []
    web = sorted(args.data.glob("*.jsonl*")) if args.data is not None else []
    return [
        *tokenizer,
        *(("curate", ["--data", str(path)]) for path in web[:1]),
        ("import_time", []),
        ("graders", []),
        ("near_duplicates", []),
        ("clusters", []),
        ("repeated_text", data),
        ("fsdp_host", []),
        ("decode", []),
        ("generate", ["--device", "cpu"]),
        ("train_step", ["--device", "cpu", "--sizes", "3m", "22m", "--steps", "12"]),
    ]


def programs_of_many(n: int) -> list[tuple[str, list[str]]]:
    """Module and arguments of each benchmark of n processes, with a GPU each."""
    if n < 2:
        return []
    xl = ["--sizes", "xl", "--ops", "fused"]
    return [
        ("collectives", []),
        ("data_parallel", ["--sizes", "134m", "xl", "--ops", "fused"]),
        ("memory", xl),
        *([("step_8b", [])] if n == 2 else []),
    ]


def launcher(n: int) -> list[str]:
    """The command before the name of a module: Python, or torchrun for n > 1 processes."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(n), "-m", "--"]
    return [sys.executable, *(torchrun if n > 1 else ["-m"])]


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    n = torch.cuda.device_count() if device.type == "cuda" else 1
    failed = []
    if args.device == "cpu" and args.data is None:
        say("tokenizer benchmarks left out: give --data FOLDER (make bench DATA=FOLDER)")
    for name, flags, ranks in [*((*p, 1) for p in programs(args)), *((*p, n) for p in programs_of_many(n))]:
        print(f"\n## {name}\n", flush=True)
        json = [] if args.json is None else ["--json", str(args.json / f"{name}.json")]
        if subprocess.run([*launcher(ranks), f"experiments.bench.{name}", *flags, *json]).returncode:
            failed.append(name)
    if failed:
        raise ValueError(f"these benchmarks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
