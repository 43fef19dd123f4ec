"""Profile training steps of a Transformer: where the time goes, memory over time, tensors saved for backward.

    python -m experiments.profile --size 22m --out runs/profile
    python -m experiments.profile --model.d-model 256 --model.n-layers 4 --ops fused --out runs/profile

The program writes into the folder:

    trace.json.gz    a Chrome trace (chrome://tracing, ui.perfetto.dev) of eager steps after warm-up, with ranges
                     around forward, backward, optimizer, each block's attention and feed-forward, and each op
    memory.png       bytes allocated over time, from the first parameter on, with the phases marked
    memory.pickle    on a GPU: the allocator's history, for pytorch.org/memory_viz
    report.md        the tables that are printed

The tables: the longest ops or kernels, groups of them by phase (with the share of matrix products in forward alone
and in the whole step), peaks of memory by phase, and the bytes that each block saves for backward with reference
ops, SDPA and kernels, beside the formula of purelm.accounting. Profiling slows the host: without it, shares on a CPU
and gaps between kernels on a GPU differ.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from experiments.bench.report import row
from experiments.bench.train_step import batches, synchronize
from experiments.console import in_bf16, pick_device, program, say
from experiments.limits import Count, Whole
from experiments.memory import (
    PHASE,
    SMALL,
    Phase,
    Saved,
    chosen,
    columns,
    human,
    memory_profile,
    peak_of,
    phase,
    phases,
    record_saved,
    timeline,
)
from experiments.ops import OpsName, ops_named
from experiments.ranges import Ranges, addresses, around_ops, block_of, path_of
from experiments.trace import GROUPS, Entry, entries, share
from purelm import accounting, random, tree
from purelm.models import transformer
from purelm.models.config import Config
from purelm.ops import Ops
from purelm.optim import adamw, schedules
from purelm.train import FULL, MIXED, Precision, TrainState, init_state, make_step

STAGES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Args:
    """Profile training steps of a Transformer."""

    out: Path
    """folder for the trace, the picture and the report"""
    size: str | None = None
    """a size of experiments.bench.train_step (3m, 22m, 134m, 374m); default the --model flags"""
    model: Config = field(default_factory=lambda: SMALL)
    batch_size: Count | None = None
    """sequences in a batch; default that of the size, or 4"""
    ops: OpsName = "sdpa"
    """the maths of the profiled steps"""
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU with units for it, else fp32"""
    steps: Count = 3
    """profiled steps"""
    warmup: Whole = 3
    """steps before the profiled ones"""
    top: Count = 15
    """number of lines in the table of ops"""
    device: str = "auto"
    json: Path | None = None
    """write rows to this file, as the programs under bench/ do"""


def ranged_step(
    cfg: Config, ops: Ops, precision: Precision, ranges: Ranges, *, inner: bool
) -> tuple[Callable[..., Any], Callable[[Any], TrainState]]:
    """(step, init): an eager training step with a range around each phase; inner: around blocks and ops, too."""
    plain = adamw(betas=(0.9, 0.95), weight_decay=0.1)

    def loss_fn(params: Any, batch: Any) -> Any:
        extra = {"ops": ranges.ops(ops, params), "wrap_block": ranges.wrap_block(params)} if inner else {"ops": ops}
        out = transformer.loss(params, batch, cfg, **extra)  # type: ignore[arg-type]
        ranges.phase.switch(PHASE + "backward")
        return out

    def update(*args: Any) -> Any:
        ranges.phase.switch(PHASE + "optimizer")
        return plain.update(*args)

    optimizer = plain._replace(update=update)
    step = make_step(loss_fn, optimizer, schedules.constant(3e-4), precision=precision)

    def run(state: TrainState, batch: Any) -> Any:
        ranges.phase.switch(PHASE + "forward")
        out = step(state, batch)
        ranges.phase.switch(None)
        return out

    return run, lambda params: init_state(params, optimizer, precision)


def trace_steps(
    args: Args, cfg: Config, batch_size: int, precision: Precision, device: torch.device
) -> list[Entry]:
    """Profile `args.steps` steps, write the trace, return the times."""
    step, init = ranged_step(cfg, ops_named(args.ops), precision, Ranges(device), inner=True)
    state = init(transformer.init(random.key(0, device=device), cfg))
    data = batches(cfg, batch_size, device)
    for i in range(args.warmup):
        state, _ = step(state, data[i % len(data)])
    synchronize(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as prof:
        for i in range(args.steps):
            state, _ = step(state, data[i % len(data)])
        synchronize(device)
    prof.export_chrome_trace(str(args.out / "trace.json.gz"))
    return entries(prof, cuda)


def memory_steps(
    args: Args, cfg: Config, batch_size: int, precision: Precision, device: torch.device
) -> tuple[list[tuple[int, int]], list[Phase]]:
    """(timeline, phases) of initialisation and two steps."""
    cuda = device.type == "cuda"
    step, init = ranged_step(cfg, ops_named(args.ops), precision, Ranges(device), inner=False)
    data = batches(cfg, batch_size, device)
    if cuda:
        base = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    with memory_profile() as prof:
        with phase("init"):
            state = init(transformer.init(random.key(0, device=device), cfg))
        for i in range(2):
            state, _ = step(state, data[i])
        synchronize(device)
        del state
    if cuda:
        torch.cuda.memory._dump_snapshot(str(args.out / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
        counted = torch.cuda.max_memory_allocated(device) - base
        say(f"peak by the allocator's counter: {human(counted)}")
    return timeline(prof, device), phases(prof)


def saved_by_block(cfg: Config, batch_size: int, ops: Ops, dtype: torch.dtype, device: torch.device) -> list[Saved]:
    """What the loss saves for backward, labelled "block 3/ln1 rms_norm", "head/...", "tables" (of the rotation)."""
    params = tree.cast(transformer.init(random.key(0, device=device), cfg), dtype)
    params = tree.map(lambda x: x.detach().requires_grad_(), params)
    batch = batches(cfg, batch_size, device, n=1)[0]
    names = addresses(params)
    where = ["embedding", ""]  # the block and the op that are running
    tables: dict[int, Tensor] = {}  # shared by all blocks, so counted for none

    @contextmanager
    def around(name: str, op_args: tuple[Any, ...]) -> Iterator[None]:
        path = path_of(op_args, names)
        which = "" if path is None else path.removesuffix(".weight").split(".")[-1] + " "
        where[1] = which + name
        yield
        where[1] = "between ops"

    def wrap_block(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def block(layer: Any, x: Tensor, ctx: Any) -> Tensor:
            where[:] = f"block {block_of(names[tree.leaves(layer)[0].data_ptr()])}", "between ops"
            tables.update((t.untyped_storage()._cdata, t) for t in ctx if isinstance(t, Tensor))
            y = f(layer, x, ctx)
            where[:] = "head", "between ops"
            return y

        return block

    def label(x: Tensor) -> str:
        return "tables" if x.untyped_storage()._cdata in tables else "/".join(where)

    with record_saved(label, known=[*tree.leaves(params), *batch.values()]) as saved:
        transformer.loss(params, batch, cfg, ops=around_ops(ops, around), wrap_block=wrap_block)
    return saved


def place(x: Saved) -> str:
    return x.label.split("/")[0]


def block_bytes(saved: Sequence[Saved], i: int) -> int:
    """Bytes that block i saves, its input included (the first norm saves it)."""
    return sum(x.bytes for x in saved if place(x) == f"block {i}")


def times_tables(found: Sequence[Entry], args: Args, cuda: bool) -> str:
    """The longest ops, and the groups by phase in percent of the phase."""
    total = sum(x.us for x in found)
    ms = 1e-3 / args.steps
    longest = []
    for x in found[: args.top]:
        numbers = [f"{x.us * ms:.3f}", f"{100 * x.us / total:.1f}", f"{x.calls / args.steps:g}"]
        longest.append([f"`{x.name[:80]}`", x.group, x.phase, *numbers])
    what = "kernel" if cuda else "op"
    by_group = []
    for group in GROUPS:
        percents = [f"{share(found, group, [s]):.1f}" for s in STAGES]
        if any(x.group == group for x in found):
            us = sum(x.us for x in found if x.group == group)
            by_group.append([group, f"{us * ms:.3f}", f"{share(found, group):.1f}", *percents])
    stages = [sum(x.us for x in found if x.phase == s) for s in STAGES]
    by_group.append(["all", f"{total * ms:.3f}", "100", *(f"100 ({us * ms:.3f} ms)" for us in stages)])
    return "\n".join(
        [
            f"## The longest {what}s\n",
            columns((what, "group", "phase", "ms/step", "% of step", "calls/step"), longest),
            f"\n## Groups of {what}s: percent of the step and of each phase\n",
            columns(("group", "ms/step", "% of step", *(f"% of {s}" for s in STAGES)), by_group),
            f"\nMatrix products take {share(found, 'matmul', ['forward']):.1f} % of forward and "
            f"{share(found, 'matmul'):.1f} % of the whole step.\n",
        ]
    )


def peaks(line: Sequence[tuple[int, int]], parts: Sequence[Phase]) -> dict[str, int]:
    """Most bytes allocated in each kind of phase."""
    out: dict[str, int] = {}
    for part in parts:
        out[part.name] = max(out.get(part.name, 0), peak_of(line, part))
    return out


def draw(line: Sequence[tuple[int, int]], parts: Sequence[Phase], path: Path, title: str) -> None:
    """Bytes allocated over time, the phases as shades."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    begin = parts[0].start_ns
    figure, axis = plt.subplots(figsize=(9, 4))
    colours = dict(zip(("init", *STAGES), ("tab:gray", "tab:blue", "tab:orange", "tab:green"), strict=True))
    seen: set[str] = set()
    for part in parts:
        x = (part.start_ns - begin) / 1e6, (part.end_ns - begin) / 1e6
        axis.axvspan(*x, alpha=0.15, color=colours[part.name], label=None if part.name in seen else part.name)
        seen.add(part.name)
    axis.step([(at - begin) / 1e6 for at, _ in line], [b / 2**20 for _, b in line], where="post", lw=0.8, color="black")
    axis.set(xlabel="ms", ylabel="MiB allocated", title=title, ylim=(0, None))
    axis.legend(loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def formula_bytes(cfg: Config, batch_size: int, name: str, element: int) -> tuple[float, int]:
    """(bytes of one block, bytes of the head) by `accounting.activation_bytes`."""
    parts = accounting.activation_bytes(cfg, batch_size, bytes_per_element=element, flash=name != "reference")
    of_head = sum(parts.pop(k) for k in ("final_norm", "lm_head", "cross_entropy"))
    return sum(parts.values()) / cfg.n_layers, of_head


def saved_tables(by_ops: dict[str, list[Saved]], cfg: Config, batch_size: int, element: int) -> str:
    """Bytes by block for each bundle of ops, then what one block keeps."""
    lines = []
    for i in range(cfg.n_layers):
        lines.append([f"block {i}", *(human(block_bytes(saved, i)) for saved in by_ops.values())])
    for other in ("embedding", "head", "tables"):
        lines.append([other, *(human(sum(x.bytes for x in s if place(x) == other)) for s in by_ops.values())])
    formulas = {name: formula_bytes(cfg, batch_size, name, element) for name in by_ops}
    lines.append(["a block by accounting", *(human(f[0]) for f in formulas.values())])
    ratios = [f"{block_bytes(s, 0) / formulas[name][0]:.2f}" for name, s in by_ops.items()]
    lines.append(["block 0 / accounting", *ratios])
    out = ["## Bytes saved for backward\n", columns(("where", *by_ops), lines)]
    for name, saved in by_ops.items():
        kinds: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for x in saved:
            if place(x) == "block 0":
                kinds[x.label.split("/")[1], str(x.shape), str(x.dtype).removeprefix("torch.")].append(x.bytes)
        body = [[*key, f"{len(sizes)}", human(sum(sizes))] for key, sizes in kinds.items()]
        header = ("op that saves it first", "shape", "dtype", "tensors", "bytes")
        out += [f"\n### Block 0 with {name} ops\n", columns(header, body)]
    return "\n".join(out) + "\n"


def as_rows(
    found: Sequence[Entry], most: dict[str, int], by_ops: dict[str, list[Saved]], args: Args, cfg: Config,
    batch_size: int, element: int, device: str,
) -> list[dict[str, Any]]:  # fmt: skip
    rows = []
    for s in STAGES:
        ms = sum(x.us for x in found if x.phase == s) * 1e-3 / args.steps
        rows.append(row(f"{s}: time in ops", ms, "ms", device=device))
        rows += [row(f"{s}: {g}", share(found, g, [s]), "%", device=device) for g in GROUPS]
    rows += [row(f"step: {g}", share(found, g), "%", device=device) for g in GROUPS]
    rows += [row(f"{name}: peak memory", n, "bytes", device=device) for name, n in most.items()]
    for name, saved in by_ops.items():
        said = formula_bytes(cfg, batch_size, name, element)[0]
        for i in range(cfg.n_layers):
            rows.append(
                row(
                    f"{name} ops, block {i}: saved", block_bytes(saved, i), "bytes",
                    peer="accounting", peer_value=said, device=device,
                )
            )  # fmt: skip
    return rows


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    cfg, batch_size = chosen(args.size, args.model, args.batch_size, device)
    args.out.mkdir(parents=True, exist_ok=True)
    precision = MIXED if in_bf16(args.compute, device) else FULL
    n = accounting.n_params(cfg)
    say(f"{n:,} parameters, {batch_size} x {cfg.context_length} tokens, {args.ops} ops, {precision.compute}")

    found = trace_steps(args, cfg, batch_size, precision, device)
    line, parts = memory_steps(args, cfg, batch_size, precision, device)
    most = peaks(line, parts)
    draw(line, parts, args.out / "memory.png", f"{n:,} parameters, {batch_size} x {cfg.context_length} tokens")
    by_ops = {
        name: saved_by_block(cfg, batch_size, ops_named(name), precision.compute, device)
        for name in ("reference", "sdpa", "fused")
    }
    element = precision.compute.itemsize
    device_name = torch.cuda.get_device_name(device) if cuda else "cpu"
    report = "\n".join(
        [
            f"# Profile: {n:,} parameters, {batch_size} x {cfg.context_length} tokens, {device_name}\n",
            times_tables(found, args, cuda),
            "## Peaks of memory by phase\n",
            columns(("phase", "peak"), [[name, human(b)] for name, b in most.items()]) + "\n",
            saved_tables(by_ops, cfg, batch_size, element),
        ]
    )
    print(report)
    (args.out / "report.md").write_text(report)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        rows = as_rows(found, most, by_ops, args, cfg, batch_size, element, device_name)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    say(f"trace, picture and report: {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
