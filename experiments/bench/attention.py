"""Flash attention beside PyTorch's: milliseconds and TFLOP/s of forward, backward and both.

python -m experiments.bench.attention [--grid speed|course] [--json FILE] [--plot FILE.png]

--grid speed: common shapes with long sequences in bf16. --grid course: the grid of the course, batch 1 and 8, head dims
16 to 128, lengths 128 to 65,536, causal, fp32 and bf16, one head. Peers, all timed in the same run: SDPA with the flash
backend (FlashAttention-2), SDPA with cuDNN, FlexAttention (compiled). A case that does not fit into memory is reported
as OOM; a shape that a backend refuses, as missing. FLOPs: 4 B H T S K forward, halved where causal, and 2.5 times that
backward.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from experiments.bench.report import Lines, plot_panels, publish, row
from experiments.console import pick_device, program, say
from purelm.kernels.flash_attention import flash_attention

PACKAGES = ("torch", "triton", "purelm")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Shape(NamedTuple):
    """One cell of the grid."""

    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool
    dtype: str = "bf16"

    def label(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"B{self.batch} H{self.heads} T{self.length} d{self.head_dim} {kind} {self.dtype}"


SPEED = [
    *(Shape(b, 16, t, d, c) for d, c, (b, t) in product((64, 128), (True, False), ((16, 1024), (4, 4096), (1, 16384)))),
    *(Shape(8, 32, 256, d, True) for d in (64, 128)),
]
COURSE = [
    Shape(b, 1, t, d, True, dtype)
    for dtype, b, d, t in product(("fp32", "bf16"), (1, 8), (16, 32, 64, 128), [2**n for n in range(7, 17)])
]
SMALL = [Shape(1, 2, 64, 16, True, "fp32"), Shape(2, 1, 48, 24, False, "fp32")]  # where there is no GPU


@dataclass(frozen=True)
class Args:
    """Attention beside its peers."""

    grid: Literal["speed", "course"] = "speed"
    device: str = "auto"
    peers: tuple[str, ...] = ("fa2", "cudnn", "flex")
    parts: tuple[Literal["forward", "backward", "both"], ...] = ("forward", "backward")
    match: str = ""
    """only shapes whose label ("B4 H16 T4096 d64 causal bf16", say) contains this"""
    rep: int = 60
    """milliseconds that one measurement lasts"""
    clock: Literal["wall", "device"] = "wall"
    """wall: time of a call, the host's part included; device: time of the kernels alone, as in a CUDA graph"""
    json: Path | None = None
    plot: Path | None = None


def flops(shape: Shape, part: str) -> float:
    one = 4.0 * shape.batch * shape.heads * shape.length**2 * shape.head_dim * (0.5 if shape.causal else 1.0)
    return one * {"forward": 1.0, "backward": 2.5, "both": 3.5}[part]


def time_major(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For a peer that wants heads before time: the tensors are laid out for it beforehand, nothing is copied."""
    return lambda q, k, v: f(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def causal_blocks(length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=str(device))


def functions(shape: Shape, peers: tuple[str, ...], device: torch.device) -> dict[str, Callable[..., Tensor]]:
    def sdpa(backend: Any) -> Callable[..., Tensor]:
        def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=shape.causal)

        return f

    out: dict[str, Callable[..., Tensor]] = {"purelm": partial(flash_attention, causal=shape.causal)}
    if device.type != "cuda":
        return out | {"sdpa": time_major(sdpa(SDPBackend.MATH))}
    half = shape.dtype != "fp32"
    if "fa2" in peers and half:
        out["fa2"] = time_major(sdpa(SDPBackend.FLASH_ATTENTION))
    if "cudnn" in peers and half:
        out["cudnn"] = time_major(sdpa(SDPBackend.CUDNN_ATTENTION))
    if "efficient" in peers or not half:
        out["efficient"] = time_major(sdpa(SDPBackend.EFFICIENT_ATTENTION))
    if "flex" in peers and half:
        torch.compiler.reset()  # else dynamo runs it eagerly after eight shapes, with all scores in memory
        mask = causal_blocks(shape.length, device) if shape.causal else None
        attend = flex()
        out["flex"] = time_major(lambda q, k, v: attend(q, k, v, block_mask=mask))
    return out


def busy_milliseconds(run: Callable[[], Any], calls: int = 10) -> float:
    """Milliseconds that the device spends in kernels in one call."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e3 / calls


def milliseconds(run: Callable[[], Any], device: torch.device, rep: int) -> float:
    """Milliseconds of one call; rep 0: of its kernels alone (`busy_milliseconds`)."""
    if device.type == "cuda" and rep == 0:
        return busy_milliseconds(run)
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=max(rep // 3, 5), rep=rep, return_mode="median")
    import time

    run()
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def measure(f: Callable[..., Tensor], tensors: list[Tensor], part: str, device: torch.device, rep: int) -> float | str:
    """Milliseconds, "OOM" or "missing"."""
    q, k, v, do = tensors
    try:
        if part == "forward":
            with torch.no_grad():
                return milliseconds(lambda: f(q, k, v), device, rep)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        if part == "both":
            return milliseconds(lambda: torch.autograd.grad(f(*leaves), leaves, do), device, rep)
        o = f(*leaves)
        return milliseconds(lambda: torch.autograd.grad(o, leaves, do, retain_graph=True), device, rep)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "OOM"
    except (RuntimeError, ValueError) as error:
        if "No available kernel" in str(error) or "not support" in str(error):
            return "missing"
        raise


def cell(shape: Shape, args: Args, device: torch.device) -> list[dict[str, Any]]:
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(size, generator=generator, device=device, dtype=DTYPES[shape.dtype]) for _ in range(4)]
    rows, found = [], {}
    compared = functions(shape, args.peers, device)
    for part in args.parts:
        for name, f in compared.items():
            found[name] = measure(f, tensors, part, device, 0 if args.clock == "device" else args.rep)
        texts = []
        for name, ms in found.items():
            rate = f"{flops(shape, part) / ms / 1e9:.0f}" if isinstance(ms, float) else ms
            texts.append(f"{name} {rate}")
        mine = found["purelm"]
        say(f"{shape.label():38} {part:8} TFLOP/s: {', '.join(texts)}")
        for name, ms in found.items():
            if name == "purelm":
                continue
            value = flops(shape, part) / mine / 1e9 if isinstance(mine, float) else math.nan
            peer_value = flops(shape, part) / ms / 1e9 if isinstance(ms, float) else None
            peer = name if isinstance(ms, float) else f"{name}: {ms}"
            one = row(
                f"{shape.label()} {part}", value, "TFLOP/s",
                peer=peer, peer_value=peer_value, device=device_name(device), packages=PACKAGES,
            )  # fmt: skip
            rows.append(one | {"shape": shape._asdict(), "part": part, "ms": mine, "peer_ms": ms})
    return rows


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """TFLOP/s against length: rows of panels are parts, panels are head dims and masks, lines are libraries."""
    parts = sorted({r["part"] for r in rows}, reverse=True)
    kinds = sorted({(r["shape"]["head_dim"], r["shape"]["causal"], r["shape"]["dtype"]) for r in rows})
    panels: dict[str, Lines] = {}
    for part, (dim, causal, dtype) in product(parts, kinds):
        lines = panels.setdefault(f"{part}, d{dim}, {'causal' if causal else 'full'}, {dtype}", {})
        for r in rows:
            shape = r["shape"]
            if (r["part"], shape["head_dim"], shape["causal"], shape["dtype"]) != (part, dim, causal, dtype):
                continue
            if not math.isnan(r["value"]):
                lines.setdefault("purelm", {})[shape["length"]] = r["value"]
            if r["peer_value"] is not None:
                lines.setdefault(r["peer"], {})[shape["length"]] = r["peer_value"]
    plot_panels(panels, path, "length", "TFLOP/s", len(kinds))


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    grid = SMALL if device.type != "cuda" else SPEED if args.grid == "speed" else COURSE
    rows = [r for shape in grid if args.match in shape.label() for r in cell(shape, args, device)]
    publish(rows, args.json)
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main(tyro.cli(Args))
