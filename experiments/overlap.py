"""How much of a step's communication hides behind computation: a profile of every rank, and a picture of rank 0.

    torchrun --nproc-per-node 2 -m -- experiments.overlap --plot overlap.png [--ways per_leaf overlapped fsdp torch_ddp]

The steps are those of bench.data_parallel. Each profile has two lanes: NCCL's kernels, and all other kernels (copies on
the device included); on a CPU, the spans of Gloo's messages and ATen's operators. With C and K the times at which
communication and computation run,

    comm = |C|    exposed = |C - K|    hidden = 1 - exposed / comm

A collective's kernel also waits for the slowest rank, and work on what is sent (packing, casts) counts as computation.
Each step begins with a barrier and ends with a wait for the device, so no communication runs into the next step. Table
and picture show the step of median length. A profiler slows the host: bench.data_parallel has times without one. Traces
hold `steps` steps; the profiler drops one before them. The last bucket is sent when nothing is left to compute: a model
that fits into one bucket (3m; --bucket-mb 1 helps) shows no overlap.
"""

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import tyro
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from experiments.bench import data_parallel
from experiments.bench.report import publish, row
from experiments.capacity import check_fits, on_this_host
from experiments.console import pick_device, program, say
from experiments.limits import Count, Range, Whole
from experiments.memory import PHASE, columns
from experiments.ops import OpsName
from purelm import random
from purelm.dist import world

# The ways of bench.data_parallel, without "alone", which sends nothing.
Way = Literal["per_leaf", "flat", "bucketed", "overlapped", "zero1", "zero2", "fsdp", "torch_ddp", "torch_fsdp2"]
STEP = PHASE + "step"
Interval = tuple[float, float]  # begin and end, in us in this file


@dataclass(frozen=True)
class Args:
    """Communication behind computation, as a picture and in percent."""

    device: str = "auto"
    size: str | None = None
    """a size of bench.data_parallel; default 134m on GPUs, else 3m"""
    ways: tuple[Way, ...] = ("per_leaf", "overlapped", "fsdp", "torch_ddp")
    batch_size: Count | None = None
    """sequences on each rank; default that of the size"""
    context_length: Count | None = None
    steps: Count = 3
    """profiled steps"""
    warmup: Whole = 3
    """steps before the profiled ones"""
    bucket_mb: Annotated[float, Range(0, 1e6, open_low=True)] | None = None
    ops: OpsName = "sdpa"
    remat: bool = False
    compile: bool | None = None
    """compile the blocks; default on GPUs only"""
    plot: Path | None = None
    traces: Path | None = None
    """a folder for Chrome traces of every way and rank"""
    json: Path | None = None


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as disjoint ones in order; empty ones are dropped, and ones that touch are joined.

    >>> merged([(5, 6), (0, 2), (1, 3), (3, 4), (9, 9)])
    [(0, 4), (5, 6)]
    """
    out: list[Interval] = []
    for begin, end in sorted(i for i in intervals if i[0] < i[1]):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((begin, end))
    return out


def intersection(a: Iterable[Interval], b: Iterable[Interval]) -> list[Interval]:
    """The intersection of two unions of disjoint intervals.

    >>> intersection([(0, 4), (6, 9)], [(3, 7)])
    [(3, 4), (6, 7)]
    """
    left, right = merged(a), merged(b)
    out, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            out.append((begin, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return out


def length(intervals: Iterable[Interval]) -> float:
    """Total length of the union of intervals."""
    return sum(end - begin for begin, end in merged(intervals))


class Lanes(NamedTuple):
    """When communication and computation ran, as disjoint intervals; `of_step` counts time from the step's begin."""

    compute: list[Interval]
    comm: list[Interval]


class Times(NamedTuple):
    """Times of one step, in us."""

    step: float
    compute: float
    comm: float
    exposed: float  # of comm, while nothing computes

    @property
    def hidden(self) -> float | None:
        """Percent of communication during which something computes; None where there was none."""
        return 100 * (1 - self.exposed / self.comm) if self.comm else None


def lanes(events: Iterable[Any], cuda: bool) -> Lanes:
    """The lanes of a finished profile's events (`prof.events()`).

    On a GPU: kernels, copies and fills, without the ranges that the profiler copies there from the host (they have the
    same names, "nccl:all_reduce" for instance). On a CPU: an event "gloo:..." spans a message from begin to end.
    """
    events = list(events)
    ranges = {e.name for e in events if e.is_user_annotation}
    found = Lanes([], [])
    for e in events:
        on_device = str(e.device_type).endswith("CUDA")
        interval = e.time_range.start, e.time_range.end
        if cuda and on_device and e.name not in ranges and not e.name.startswith("nccl:"):
            (found.comm if "nccl" in e.name.lower() else found.compute).append(interval)
        elif not cuda and e.name.startswith("gloo:"):
            found.comm.append(interval)
        elif not cuda and e.name.startswith("aten::"):
            found.compute.append(interval)
    return Lanes(*map(merged, found))


def steps_of(events: Iterable[Any]) -> list[Interval]:
    """The host's ranges of steps, in order."""
    marks = [e for e in events if e.name == STEP and str(e.device_type).endswith("CPU")]
    return sorted((e.time_range.start, e.time_range.end) for e in marks)


def of_step(found: Lanes, step: Interval) -> Lanes:
    """The part of the lanes within the step, in time from its begin."""
    return Lanes(*([(b - step[0], e - step[0]) for b, e in intersection(lane, [step])] for lane in found))


def times(found: Lanes, step_us: float) -> Times:
    comm = length(found.comm)
    return Times(step_us, length(found.compute), comm, comm - length(intersection(found.comm, found.compute)))


def median_step(events: Iterable[Any], cuda: bool) -> tuple[Lanes, Times]:
    """The step of median length (of an even number, the shorter of the two)."""
    events = list(events)
    both = lanes(events, cuda)
    steps = sorted(steps_of(events), key=lambda s: s[1] - s[0])
    if not steps:
        raise RuntimeError(f"the profile has no range {STEP!r}")
    begin, end = steps[(len(steps) - 1) // 2]
    found = of_step(both, (begin, end))
    return found, times(found, end - begin)


def profiled(way: str, run: Any, batch: dict, args: Args, here: world.World) -> Any:
    """A profile of this rank's steps; a barrier stands before each."""
    cuda = here.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(args.warmup):
        run(batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    plan = schedule(wait=0, warmup=1, active=args.steps, repeat=1)
    with profile(activities=activities, schedule=plan) as prof:
        for _ in range(1 + args.steps):
            dist.barrier()
            wait()
            with record_function(STEP):
                run(batch)
                wait()
            prof.step()
    if args.traces is not None:
        args.traces.mkdir(parents=True, exist_ok=True)
        prof.export_chrome_trace(str(args.traces / f"{way}_rank{here.rank}.json.gz"))
    return prof


def table(found: Mapping[str, Times]) -> str:
    lines = []
    for way, t in found.items():
        hidden = "none sent" if t.hidden is None else f"{t.hidden:.1f}"
        lines.append([way, *(f"{us / 1e3:.3f}" for us in t), hidden])
    return columns(("way", "step, ms", "compute, ms", "comm, ms", "exposed, ms", "hidden, %"), lines)


def to_rows(found: Mapping[str, Times], what: str, device: str) -> list[dict[str, Any]]:
    """Rows of purelm's ways, each beside the peer that bench.data_parallel gives it."""
    out = []
    for way, t in found.items():
        if way in data_parallel.PEERS:
            continue
        name = data_parallel.PEER_OF.get(way, "torch_ddp")
        other = found.get(name)
        for kind in (*Times._fields, "hidden"):
            value, peer_value = getattr(t, kind), getattr(other, kind, None)
            unit, scale = ("%", 1.0) if kind == "hidden" else ("ms", 1e-3)
            if value is not None:
                peer_value = None if peer_value is None else peer_value * scale
                metric = f"{what}, {way}, {kind}"
                out.append(row(metric, value * scale, unit, peer=name, peer_value=peer_value, device=device))
    return out


def plot(found: Mapping[str, tuple[Lanes, Times]], path: Path, title: str) -> None:
    """A panel for each way: computation above communication, exposed parts of which are red; one axis of time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(found), 1, figsize=(10, 1.3 * len(found) + 0.8), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (way, (both, t)) in zip(axes.flat, found.items(), strict=True):
        hidden = "nothing sent" if t.hidden is None else f"{t.hidden:.0f} % of {t.comm / 1e3:.1f} ms hidden"
        axis.set_title(f"{way}: step {t.step / 1e3:.1f} ms, communication: {hidden}", fontsize=9)
        behind = intersection(both.comm, both.compute)
        for y, spans, color in ((1, both.compute, "C0"), (0, both.comm, "C3"), (0, behind, "C2")):
            axis.broken_barh([(b / 1e3, (e - b) / 1e3) for b, e in spans], (y - 0.4, 0.8), color=color, linewidth=0)
        axis.axvline(t.step / 1e3, color="black", linewidth=0.8)
        axis.set_yticks([0, 1], ["communication", "computation"], fontsize=8)
        axis.set_ylim(-0.5, 1.5)
    axes[-1, 0].set_xlabel("ms from the begin of the step (green: hidden, red: exposed)")
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@program
def main(args: Args) -> None:
    pick_device(args.device)  # a device that does not exist is an error now
    with world.start(args.device) as here:
        if here.size < 2:
            raise ValueError("one process has nobody to talk to: torchrun --nproc-per-node 2 -m -- ...")
        cuda = here.device.type == "cuda"
        compiled = cuda if args.compile is None else args.compile
        size = args.size or ("134m" if cuda else "3m")
        steps = data_parallel.Args(
            batch_size=args.batch_size, context_length=args.context_length, bucket_mb=args.bucket_mb, ops=args.ops,
            remat=args.remat,
        )  # fmt: skip
        cfg, batch_size = data_parallel.shape(steps, size, cuda)
        check_fits(cfg, batch_size, here.device, processes=1 if cuda else on_this_host())
        x = random.randint(random.key(1 + here.rank), (batch_size, cfg.context_length + 1), 0, cfg.vocab_size)
        x = x.to(here.device)
        batch = {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}
        found: dict[str, tuple[Lanes, Times]] = {}
        for way in args.ways:
            torch._dynamo.reset()
            if way in data_parallel.PEERS:
                run = data_parallel.peer_step(way, cfg, here, compiled)
            else:
                run = data_parallel.our_step(way, cfg, steps, here, compiled)
            prof = profiled(way, run, batch, args, here)
            if here.rank == 0:
                found[way] = median_step(prof.events(), cuda)
                say(f"{way}: {found[way][1]}")
            del run, prof
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
        if here.rank == 0:
            device = f"{here.size} x {torch.cuda.get_device_name() if cuda else 'cpu'}"
            what = f"{size}, {batch_size} x {cfg.context_length} a rank"
            only_times = {way: t for way, (_, t) in found.items()}
            print(f"{what}, {device}, rank 0's step of median length\n\n{table(only_times)}\n")
            publish(to_rows(only_times, what, device), args.json)
            if args.plot is not None:
                plot(found, args.plot, f"{what}, {device}")


if __name__ == "__main__":
    main(tyro.cli(Args))
