"""Time and bandwidth of the memory-bound kernels, beside torch.compile of the reference.

    python -m experiments.bench.norms [--device cuda] [--ops rms_norm rope] [--tokens N] [--json FILE]

rms_norm, add_rms_norm, swiglu, rope (q and k) and weighted_sum, forward and backward separately, and adamw over a tree.
Each has a row of milliseconds for each peer, and one of GB/s whose peer is a plain copy of a large tensor in the same
run: that ratio is the fraction of the attainable bandwidth. Bytes are the fewest that the maths allows: each input read
once, each result written once.

On a GPU the device sleeps while the host launches all calls, so launches cost nothing, neither ours nor the peers'; and
each call has other inputs, so that none is still in the cache. On a CPU, where a kernel's op is the reference,
the figures say only that the program runs.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

from experiments.bench.report import Lines, plot_panels, publish, row
from experiments.console import pick_device, program, say
from purelm import tree
from purelm.kernels.adamw import adamw, adamw_step
from purelm.kernels.rms_norm import add_rms_norm, rms_norm
from purelm.kernels.rope import rope_qk
from purelm.kernels.swiglu import swiglu
from purelm.kernels.weighted_sum import reference as weighted_sum_reference
from purelm.kernels.weighted_sum import weighted_sum
from purelm.ops.glu import swiglu as swiglu_reference
from purelm.ops.rms_norm import rms_norm as rms_norm_reference
from purelm.ops.rope import rope, rope_tables
from purelm.optim import apply_updates
from purelm.optim.adamw import adamw as adamw_reference

OPS = ("rms_norm", "add_rms_norm", "swiglu", "rope_qk", "weighted_sum", "adamw")
CACHE_BYTES = 200 << 20  # bytes of inputs and results before an input is used again: four times the L2 cache of an H100


@dataclass(frozen=True)
class Args:
    """Kernels that memory limits, against torch.compile."""

    device: str = "auto"
    ops: tuple[str, ...] = OPS
    tokens: int | None = None
    """number of rows; default 32,768 on a GPU, 64 on a CPU"""
    widths: tuple[int, ...] = ()
    """widths of a row; default 768 2048 4096 8192 on a GPU, 64 on a CPU"""
    dtype: str | None = None
    """default bfloat16 on a GPU, float32 on a CPU; always float32 for adamw"""
    compile: bool | None = None
    """compile the reference; default on a GPU only, since on a CPU compilation takes longer than the benchmark"""
    repeats: int = 7
    json: Path | None = None
    plot: Path | None = None
    """GB/s against width, a panel for each op and direction"""


class Case(NamedTuple):
    """One op at one size."""

    name: str
    width: int
    kernel: Callable[..., Any]  # tensors -> tensor or tuple of tensors
    peers: dict[str, Callable[..., Any]]
    inputs: Callable[[], tuple[Tensor, ...]]  # makes new inputs; differentiable ones come first
    n_inputs: int  # number of differentiable inputs
    forward_bytes: int
    backward_bytes: int


def milliseconds(f: Callable[[int], Any], device: torch.device, repeats: int) -> float:
    """Milliseconds of one call f(i): median over repeats, each of several calls in a row."""
    cuda = device.type == "cuda"
    count = itertools.count()
    for _ in range(3):
        f(next(count))
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    f(next(count))
    launch = time.perf_counter() - start  # the host's time for a call
    calls = 10 if cuda else 3
    times = []
    for _ in range(repeats):
        if not cuda:
            start = time.perf_counter()
            for _ in range(calls):
                f(next(count))
            times.append(1e3 * (time.perf_counter() - start) / calls)
            continue
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(2e9 * (2 * calls * launch + 1e-3)))  # cycles, of about 2e9 a second
        begin.record()
        for _ in range(calls):
            f(next(count))
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """GB/s of a copy, read and write."""
    n = (1 << 30) if device.type == "cuda" else (1 << 22)
    source = torch.ones(n // 4, device=device)
    target = torch.empty_like(source)
    return 2 * n / 1e6 / milliseconds(lambda i: target.copy_(source), device, repeats)


def differentiate(f: Callable[..., Any], n: int) -> Callable[[tuple[Tensor, ...]], Callable[[], Any]]:
    """inputs -> a function that runs the backward pass of f alone, again and again."""

    def prepare(inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
        leaves = tuple(x.detach().requires_grad_() for x in inputs[:n])
        out = f(*leaves, *inputs[n:])
        outs = out if isinstance(out, tuple) else (out,)
        upstream = [torch.randn_like(y) for y in outs]
        return lambda: torch.autograd.grad(outs, leaves, upstream, retain_graph=True)

    return prepare


def cases(args: Args, device: torch.device, dtype: torch.dtype, compiled: Callable[..., Any]) -> list[Case]:
    cuda = device.type == "cuda"
    N = args.tokens or (32768 if cuda else 64)
    widths = args.widths or ((768, 2048, 4096, 8192) if cuda else (64,))
    e = dtype.itemsize

    def numbers(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.randn(s, device=device, dtype=dtype) for s in shapes)

    def rows_and_weight(n_rows: int, D: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: numbers(*[(N, D)] * n_rows, (D,))

    def rows(n_rows: int, D: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: numbers(*[(N, D)] * n_rows)

    def add_reference(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        return rms_norm_reference(total, w), total

    def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, cos, sin), rope(k, cos, sin)

    def functional(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, w.shape, w, 1e-5)

    found = []
    for D in widths:
        size, tensor = f"{N} x {D}", N * D * e
        if "rms_norm" in args.ops:
            peers = {**compiled(rms_norm_reference), "torch.nn.functional.rms_norm, eager": functional}
            found.append(
                Case(f"rms_norm {size}", D, rms_norm, peers, rows_and_weight(1, D), 2, 2 * tensor, 3 * tensor)
            )
        if "add_rms_norm" in args.ops:
            peers = compiled(add_reference)
            found.append(
                Case(f"add_rms_norm {size}", D, add_rms_norm, peers, rows_and_weight(2, D), 3, 4 * tensor, 4 * tensor)
            )
        if "swiglu" in args.ops:
            peers = compiled(swiglu_reference)
            found.append(Case(f"swiglu {size}", D, swiglu, peers, rows(2, D), 2, 3 * tensor, 5 * tensor))
        if "weighted_sum" in args.ops:
            peers = compiled(weighted_sum_reference)
            found.append(
                Case(f"weighted_sum {size}", D, weighted_sum, peers, rows_and_weight(1, D), 2, tensor, 2 * tensor)
            )
        if "rope_qk" in args.ops:
            K = 64 if D < 2048 else 128
            B, T, H = max(1, N // 1024), min(N, 1024), max(1, D // K)
            G = max(1, H // 4)
            cos, sin = rope_tables(torch.arange(T, device=device), K)

            def heads(B=B, T=T, H=H, G=G, K=K, cos=cos, sin=sin) -> tuple[Tensor, ...]:
                return *numbers((B, T, H, K), (B, T, G, K)), cos, sin

            moved = 2 * B * T * (H + G) * K * e
            name = f"rope_qk {B} x {T}, {H} and {G} heads of {K}"
            found.append(Case(name, D, rope_qk, compiled(rope_reference), heads, 2, moved, moved))
    return found


def measure(case: Case, device: torch.device, copy: float, args: Args, device_name: str) -> list[dict[str, Any]]:
    rows = []
    torch._dynamo.reset()
    for way, n_bytes in (("forward", case.forward_bytes), ("backward", case.backward_bytes)):
        n_sets = max(1, min(8, 1 + CACHE_BYTES // n_bytes)) if device.type == "cuda" else 1
        sets = [case.inputs() for _ in range(n_sets)]

        def timed(f: Callable[..., Any], way=way, sets=sets) -> float:
            if way == "forward":
                with torch.no_grad():
                    return milliseconds(lambda i: f(*sets[i % len(sets)]), device, args.repeats)
            runs = [differentiate(f, case.n_inputs)(s) for s in sets]
            return milliseconds(lambda i: runs[i % len(runs)](), device, args.repeats)

        mine = timed(case.kernel)
        for peer, f in case.peers.items():
            one = row(f"{case.name}, {way}", mine, "ms", peer=peer, peer_value=timed(f), device=device_name)
            rows.append(one | {"op": case.name.split()[0], "way": way, "width": case.width, "bytes": n_bytes})
        rate = n_bytes / 1e6 / mine
        rows.append(
            row(f"{case.name}, {way}", rate, "GB/s", peer="copy", peer_value=copy, device=device_name)
        )
        say(f"{case.name}, {way}: {mine:.4f} ms, {rate:.0f} GB/s, {rate / copy:.2f} of a copy's")
    return rows


def measure_adamw(device: torch.device, copy: float, args: Args, device_name: str, compile_: bool) -> list[dict]:
    """The tree of a Transformer of 134 M parameters (a small one on a CPU), fp32, decay on matrices."""
    V, D, L, F = (32000, 768, 12, 2048) if device.type == "cuda" else (256, 32, 2, 64)
    layer = [(D, D)] * 4 + [(F, D)] * 2 + [(D, F)] + [(D,)] * 2
    shapes = [(V, D), (V, D), (D,), *(layer * L)]
    params, grads = ({str(i): torch.randn(s, device=device) for i, s in enumerate(shapes)} for _ in range(2))
    hyper: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "mask": lambda path, p: p.ndim >= 2}
    lr = torch.tensor(3e-4, device=device)
    mine, plain = adamw(**hyper), adamw_reference(**hyper)
    state = mine.init(params)

    def whole(optimizer: Any) -> Callable[..., Any]:
        def step(params: Any, grads: Any, state: Any, lr: Tensor) -> Any:
            updates, state = optimizer.update(grads, state, params, lr)
            return apply_updates(params, updates), state

        return step

    def timed(f: Callable[..., Any], *args_: Any) -> float:
        torch._dynamo.reset()
        return milliseconds(lambda i: f(*args_), device, args.repeats)

    maybe = torch.compile if compile_ else (lambda f: f)
    suffix = "torch.compile of the reference" if compile_ else "the reference, eager"
    update = timed(mine.update, grads, state, params, lr)
    step = timed(adamw_step(**hyper), grads, state, params, lr)
    peer_update = timed(maybe(plain.update), grads, state, params, lr)
    peer_step = timed(maybe(whole(plain)), params, grads, state, lr)
    own = [p.clone().requires_grad_() for p in params.values()]
    for p, g in zip(own, grads.values(), strict=True):
        p.grad = g
    fused = torch.optim.AdamW(own, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    peer_fused = timed(fused.step)
    n = tree.n_params(params)
    name, rate = f"adamw, {n / 1e6:.0f} M parameters", 28 * n / 1e6 / update
    say(f"{name}: {update:.3f} ms, {rate:.0f} GB/s, {rate / copy:.2f} of a copy's")
    entries = [
        (f"{name}, update", update, "ms", suffix, peer_update),
        (f"{name}, update", rate, "GB/s", "copy", copy),
        (f"{name}, update and apply", step, "ms", suffix, peer_step),
        (f"{name}, update and apply", 28 * n / 1e6 / step, "GB/s", "copy", copy),
        (f"{name}, update and apply", step, "ms", "torch.optim.AdamW(fused=True), in place", peer_fused),
    ]
    return [
        row(metric, value, unit, peer=peer, peer_value=peer_value, device=device_name)
        for metric, value, unit, peer, peer_value in entries
    ]


def plot(rows: list[dict[str, Any]], path: Path, copy: float) -> None:
    panels: dict[str, Lines] = {}
    for r in rows:
        if "op" in r:
            lines = panels.setdefault(f"{r['op']}, {r['way']}", {})
            lines.setdefault("purelm", {})[r["width"]] = r["bytes"] / 1e6 / r["value"]
            lines.setdefault(r["peer"], {})[r["width"]] = r["bytes"] / 1e6 / r["peer_value"]
            lines.setdefault("copy", {})[r["width"]] = copy
    plot_panels(panels, path, "width", "GB/s", 4)


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    unknown = set(args.ops) - set(OPS)
    if unknown:
        raise ValueError(f"ops: {', '.join(sorted(unknown))} is not one of {', '.join(OPS)}")
    cuda = device.type == "cuda"
    compile_ = cuda if args.compile is None else args.compile
    dtype_name = args.dtype or ("bfloat16" if cuda else "float32")
    if dtype_name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype_name!r}")
    device_name = torch.cuda.get_device_name() if cuda else "cpu"

    def compiled(f: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        return {"torch.compile of the reference": torch.compile(f)} if compile_ else {"the reference, eager": f}

    copy = copy_bandwidth(device, args.repeats)
    say(f"copy: {copy:.0f} GB/s")
    rows = [row("copy", copy, "GB/s", device=device_name)]
    for case in cases(args, device, getattr(torch, dtype_name), compiled):
        rows += measure(case, device, copy, args, device_name)
    if "adamw" in args.ops:
        rows += measure_adamw(device, copy, args, device_name, compile_)
    publish(rows, args.json)
    if args.plot is not None:
        plot(rows, args.plot, copy)


if __name__ == "__main__":
    main(tyro.cli(Args))
