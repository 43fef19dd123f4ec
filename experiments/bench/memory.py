"""Memory of a rank, with and without sharding: after initialisation, before the optimizer's step, and after it.

    torchrun --nproc-per-node 2 -m -- experiments.bench.memory [--sizes xl] [--ways unsharded zero1 ...] [--plot FILE]

Ways: unsharded (ddp: every rank holds all), zero1 (the optimizer's state is sharded), fsdp (parameters and gradients
too); the peers torch_ddp, torch_zero (ZeroRedundancyOptimizer) and torch_fsdp2. All run the same maths:
AdamW, fp32 masters, bf16 compute on a GPU. The step runs eagerly, phase by phase, and is measured at three points:

    init     parameters, and the optimizer's state where it is made at once (the peers make theirs in the first update)
    before   loss and gradients of the second step are done; the gradients are held, summed over ranks
    after    the second update is done; the gradients are still held

At each point: bytes of the storages of parameters, optimizer state and gradients; "held", the bytes that the allocator
has handed out, and "rest", held less those three (tables, buckets of messages); and the allocator's peak since the last
point, which includes activations and an update's new tensors. Beside them the formula, `parallel.rank_bytes`. A CPU has
no such allocator: held is the sum of the three, and peaks are missing. All figures are those of the rank that holds
most. purelm's update makes new parameters and state before the old ones are freed; with --compile it writes in place,
as the peers do.
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import tyro

from experiments.bench import data_parallel
from experiments.bench.memory_ways import KINDS, Phases, Reading, ours, peer, read
from experiments.bench.report import publish, row, write
from experiments.console import program, say
from experiments.memory import columns, human
from experiments.ops import OpsName, ops_named
from purelm import random
from purelm.accounting.parallel import rank_bytes
from purelm.dist import world
from purelm.models import transformer
from purelm.transforms import remat

Way = Literal["unsharded", "zero1", "fsdp", "torch_ddp", "torch_zero", "torch_fsdp2"]
WAYS: tuple[Way, ...] = get_args(Way)
PEER = {"unsharded": "torch_ddp", "zero1": "torch_zero", "fsdp": "torch_fsdp2"}
SCHEME: dict[str, Any] = {"unsharded": "ddp", "zero1": "zero1", "fsdp": "fsdp"}
SCHEME |= {PEER[way]: scheme for way, scheme in SCHEME.items()}
STAGES = ("init", "before", "after")
MIB = 2**20


@dataclass(frozen=True)
class Args:
    """Memory of a training step by kind, with and without sharding."""

    device: str = "auto"
    sizes: tuple[str, ...] = ()
    """sizes of bench.data_parallel; default xl on GPUs, else 3m"""
    ways: tuple[Way, ...] = WAYS
    batch_size: int | None = None
    """sequences on each rank; default that of the size"""
    context_length: int | None = None
    bucket_mb: float | None = None
    """size of purelm's buckets; default dist.messages.default_bucket_bytes"""
    ops: OpsName = "sdpa"
    remat: bool = False
    compile: bool = False
    """compile purelm's update, which then writes new parameters and state over the old ones"""
    json: Path | None = None
    plot: Path | None = None
    """draw the last size into this file"""


def measure(way: str, cfg: transformer.Config, batch: dict, args: Args, here: world.World) -> dict[str, Reading]:
    """Readings by stage, of the rank that holds most."""
    base = 0
    if here.device.type == "cuda":
        _workspaces(here.device)
        gc.collect()
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with data_parallel.enough_memory(way, here):
        phases = _ours(way, cfg, args, here) if way in PEER else peer(way, cfg, here)
        found = {"init": read(phases, base, here.device)}
        phases.differentiate(batch)  # the first step makes state, buckets and workspaces
        phases.update()
        read(phases, base, here.device)
        phases.differentiate(batch)
        found["before"] = read(phases, base, here.device)
        phases.update()
        found["after"] = read(phases, base, here.device)
    everyone: list[Any] = [None] * here.size
    dist.all_gather_object(everyone, found)
    return max(everyone, key=lambda of: of["after"].held)


def _ours(way: str, cfg: transformer.Config, args: Args, here: world.World) -> Phases:
    wrap: Any = remat if args.remat else transformer.identity
    bucket_bytes = None if args.bucket_mb is None else int(args.bucket_mb * MIB)
    return ours(
        way, cfg, here, ops=ops_named(args.ops), wrap=wrap, bucket_bytes=bucket_bytes, compiled=args.compile
    )


def _workspaces(device: torch.device) -> None:
    """Let cuBLAS allocate its workspaces (one for each thread), which would else count as the first way's memory."""
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.ones(64, 64, dtype=dtype, device=device, requires_grad=True)
        (w @ w).sum().backward()


def formula(
    cfg: transformer.Config, way: str, stage: str, batch_size: int, n_ranks: int, args: Args, cuda: bool
) -> tuple[int, int | None]:
    """(held, peak) by `rank_bytes`. The peak is known for "before" only: all activations and all gradients at once.

    During forward and backward there is a bf16 copy of the parameters: all of them, or with fsdp those of two blocks.
    """
    of = rank_bytes(
        cfg,
        batch_size,
        scheme=SCHEME[way],
        n_data=n_ranks,
        copy_bytes=2 if cuda else 0,
        bytes_per_element=2 if cuda else 4,
        flash=args.ops != "reference",
        remat=args.remat and way in PEER,
    )
    held = of["parameters"]
    if stage != "init" or way in PEER:
        held += of["optimizer"]
    if stage != "init":
        held += of["gradients"]
    return held, sum(of.values()) if stage == "before" else None


Table = Mapping[str, Mapping[str, tuple[Reading, tuple[int, int | None]]]]  # way -> stage -> (measured, formula)


def table(found: Table) -> str:
    header = ("way", "point", *KINDS, "rest", "held", "formula", "peak", "formula")
    lines = []
    for way, stages in found.items():
        for stage, (reading, expected) in stages.items():
            rest = reading.held - sum(reading.parts.values())
            sizes = [*(reading.parts[kind] for kind in KINDS), rest, reading.held, expected[0], reading.peak]
            cells = ["missing" if x is None else human(x) for x in sizes]
            lines.append([way, stage, *cells, "" if expected[1] is None else human(expected[1])])
    return columns(header, lines)


def to_rows(found: Table, what: str, device: str) -> list[dict[str, Any]]:
    """Rows of purelm's ways, each beside its peer, with the formula's MiB as another field."""
    out = []
    for way, stages in found.items():
        if way not in PEER:
            continue
        for stage, (reading, expected) in stages.items():
            other = found.get(PEER[way], {}).get(stage)
            theirs = None if other is None else _figures(other[0])
            formulas = {"held": expected[0], "peak": expected[1]}
            for kind, value in _figures(reading).items():
                metric, peer_value = f"{what}, {way}, {stage}, {kind}", _mib(None if theirs is None else theirs[kind])
                one = row(metric, value / MIB, "MiB", peer=PEER[way], peer_value=peer_value, device=device)
                out.append(one | {"formula_MiB": _mib(formulas.get(kind))})
    return out


def _figures(reading: Reading) -> dict[str, int]:
    peak = {} if reading.peak is None else {"peak": reading.peak}
    return {**reading.parts, "held": reading.held, **peak}


def _mib(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / MIB


def plot(found: Table, path: Path, title: str) -> None:
    """A panel for each point, a bar for each way: bytes held by kind, the peak as a hollow bar, formulas as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    gib = 2.0**-30
    width = max(3.4, 0.7 * len(found) + 1.2)
    figure, axes = plt.subplots(1, len(STAGES), figsize=(width * len(STAGES), 4), sharey=True, layout="constrained")
    for axis, stage in zip(axes, STAGES, strict=True):
        for x, of in enumerate(found.values()):
            reading, (held, peak) = of[stage]
            bottom = 0
            sizes = [*(reading.parts[kind] for kind in KINDS), reading.held - sum(reading.parts.values())]
            for i, (kind, size) in enumerate(zip((*KINDS, "rest"), sizes, strict=True)):
                axis.bar(x, size * gib, bottom=bottom * gib, color=f"C{i}", label=kind)
                bottom += size
            if reading.peak is not None:
                above = (reading.peak - reading.held) * gib
                axis.bar(x, above, bottom=bottom * gib, fill=False, edgecolor="gray", linestyle=":", label="peak")
            axis.hlines(held * gib, x - 0.45, x + 0.45, color="black", label="formula, held")
            if peak is not None:
                axis.hlines(peak * gib, x - 0.45, x + 0.45, color="black", linestyle="--", label="formula, peak")
        axis.set_title(stage, fontsize=9)
        axis.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
    axes[0].set_ylabel("GiB of one rank")
    labels: dict[str, Any] = {}
    for axis in axes:
        labels |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title, fontsize=9)
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=len(labels), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@program
def main(args: Args) -> None:
    with world.start(args.device) as here:
        if here.size < 2:
            raise ValueError("one process has nobody to share with: torchrun --nproc-per-node 2 -m -- ...")
        cuda = here.device.type == "cuda"
        name = f"{here.size} x {torch.cuda.get_device_name() if cuda else 'cpu'}"
        rows: list[dict] = []
        found: dict[str, dict[str, Any]] = {}
        what = ""
        for size in args.sizes or ("xl" if cuda else "3m",):
            # Sizes are those of bench.data_parallel; its Args carry batch and length alone.
            sizes = data_parallel.Args(batch_size=args.batch_size, context_length=args.context_length)
            cfg, batch_size = data_parallel.shape(sizes, size, cuda)
            x = random.randint(random.key(1 + here.rank), (batch_size, cfg.context_length + 1), 0, cfg.vocab_size)
            x = x.to(here.device)
            batch = {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}
            found, what = {}, f"{size}, {batch_size} x {cfg.context_length} a rank"
            for way in args.ways:
                found[way] = {
                    stage: (reading, formula(cfg, way, stage, batch_size, here.size, args, cuda))
                    for stage, reading in measure(way, cfg, batch, args, here).items()
                }
                if here.rank == 0:
                    say(f"{what}, {way}: done")
                    if args.json is not None:  # kept, should a later way fail
                        write(rows + to_rows(found, what, name), args.json)
            rows += to_rows(found, what, name)
            if here.rank == 0:
                print(f"{what}, {name}\n\n{table(found)}\n")
        if here.rank == 0:
            publish(rows, args.json)
            if args.plot is not None and found:
                plot(found, args.plot, f"{what}, {name}")


if __name__ == "__main__":
    main(tyro.cli(Args))
