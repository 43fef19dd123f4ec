"""Measure tile sizes of flash attention on this GPU and make the table that is shipped.

python -m experiments.tune_kernels [--head-dims 64 128] [--dtypes bf16] [--write] [--json FILE]

Candidates are compiled in several processes at once, which share Triton's cache on disk, and timed one by one: the
median of many launches. --write puts the best into kernels/flash_attention_table.py and leaves its entries for other
architectures, head dims and dtypes.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments.console import program, say
from purelm.kernels.flash_attention_tuned import LENGTHS, PASSES, TABLE, Blocks, architecture

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_BYTES = 227 << 10  # shared memory of one program on Hopper
HEADER = '''"""Measured tiles: made by `python -m experiments.tune_kernels --write`, not by hand."""

# (architecture, pass, padded head dim, bytes of an element, causal, length) -> (m, n, warps, stages)
TABLE: dict[tuple[str, str, int, int, bool, int], tuple[int, int, int, int]] = '''


@dataclass(frozen=True)
class Args:
    """Tune flash attention."""

    head_dims: tuple[int, ...] = (16, 32, 64, 128, 256)
    dtypes: tuple[str, ...] = ("bf16",)
    passes: tuple[str, ...] = PASSES
    causal: tuple[bool, ...] = (True, False)
    length: int = 4096
    """sequence length; the table has 1024 (used up to twice that) and 4096 (used for longer)"""
    tokens: int = 16384
    heads: int = 16
    n_processes: int = 14
    write: bool = False
    json: Path | None = None
    """write every measurement to this file"""
    worker: str | None = None
    """internal: "i/n", the part of the candidates that this process compiles"""


Case = tuple[str, int, str, bool]  # pass, head dim, dtype, causal


def cases(args: Args) -> list[Case]:
    return list(product(args.passes, args.head_dims, args.dtypes, args.causal))


def candidates(which: str, D: int, size: int) -> list[Blocks]:
    """Tiles that may fit, without those known to be slow (few rows for many warps)."""
    out = []
    sides = (16, 32, 64, 128) if size == 4 or D == 256 else (32, 64, 128)
    for m, n, warps, stages in product(sides, sides, (4, 8), (1, 2, 3, 4)):
        rows, others = (n, m) if which == "backward_kv" else (m, n)  # a program keeps `rows`, loops over `others`
        if size < 4 and D == 256 and which == "backward_kv":  # two sums of D columns: only warps side by side hold them
            if rows in (32, 64) and others in (32, 64) and stages <= 2:
                out.append(Blocks(m, n, warps, stages))
            continue
        if size == 4 and (stages > 2 or others > 64 or rows > 64):  # fp32 is three tf32 products: registers
            continue
        if rows < (16 * warps if size < 4 else 32) or (stages == 1 and size < 4) or others < (16 if size == 4 else 32):
            continue
        if rows * D > 128 * 256 or (warps == 8 and rows < 128):
            continue
        n_resident = 1 if which == "forward" else 2
        shared = (n_resident * rows + 2 * stages * others) * D * size
        registers = (rows * D * (2 if which == "backward_kv" else 1) + rows * others * (1 if which == "forward" else 2))
        if shared > SHARED_BYTES or registers > 255 * 32 * warps * 1.1:
            continue
        out.append(Blocks(m, n, warps, stages))
    return out


def launcher(case: Case, args: Args) -> Any:
    """A function of Blocks that launches one pass on fixed tensors."""
    from purelm.kernels.flash_attention_launch import Request, backward, forward

    which, D, dtype, causal = case
    batch = max(args.tokens // args.length, 2)
    torch.manual_seed(0)
    shape = (batch, args.length, args.heads, D)
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=DTYPES[dtype]) for _ in range(4))
    request = Request(None, 0 if causal else None, D**-0.5)
    if which == "forward":
        return lambda blocks: forward(q, k, v, None, None, request, blocks)
    o, lse = torch.randn_like(q), torch.full((batch, args.heads, args.length), 10.0, device="cuda")
    only = {"only_q": True} if which == "backward_q" else {"only_kv": True}
    return lambda blocks: backward(do, None, q, k, v, o, lse, None, request, blocks, blocks, **only)


def work(args: Args) -> list[tuple[Case, Blocks]]:
    return [(c, b) for c in cases(args) for b in candidates(c[0], c[1], DTYPES[c[2]].itemsize)]


def compile_part(args: Args, part: int, n: int) -> None:
    last: Case | None = None
    launch: Any = None
    for case, blocks in work(args)[part::n]:
        if case != last:
            last, launch = case, launcher(case, args)
        try:
            launch(blocks)
            torch.cuda.synchronize()
        except Exception as error:  # too large for this GPU: the measuring process will find the same
            if "out of resource" not in str(error):
                print(f"{case} {blocks}: {type(error).__name__}: {error}", file=sys.stderr)


def measure(args: Args) -> dict[Case, list[tuple[float, Blocks]]]:
    from triton.testing import do_bench

    found: dict[Case, list[tuple[float, Blocks]]] = {}
    last: Case | None = None
    launch: Any = None
    for case, blocks in work(args):
        if case != last:
            last, launch = case, launcher(case, args)
        try:
            ms = do_bench(lambda b=blocks, f=launch: f(b), warmup=3, rep=15, return_mode="median")
        except Exception as error:
            if "out of resource" not in str(error):
                say(f"{case} {blocks}: {type(error).__name__}: {str(error)[:200]}")
            continue
        found.setdefault(case, []).append((ms, blocks))
    return {case: sorted(times) for case, times in found.items()}


def flops(case: Case, args: Args) -> float:
    """FLOPs of the pass: two products forward, three for dq, four for dk and dv; half of that if causal."""
    which, D, _, causal = case
    products = {"forward": 2, "backward_q": 3, "backward_kv": 4}[which]
    batch = max(args.tokens // args.length, 2)
    return products * 2.0 * batch * args.heads * args.length**2 * D * (0.5 if causal else 1.0)


def write_table(found: dict[Case, list[tuple[float, Blocks]]], arch: str, length: int) -> None:
    new = dict(TABLE)
    for (which, D, dtype, causal), times in found.items():
        best = times[0][1]
        new[(arch, which, D, DTYPES[dtype].itemsize, causal, length)] = (best.m, best.n, best.n_warps, best.n_stages)
    path = Path(__file__).resolve().parents[1] / "kernels" / "flash_attention_table.py"
    lines = "".join(f"    {key!r}: {tuple(value)!r},\n" for key, value in sorted(new.items())).replace("'", '"')
    path.write_text(HEADER + "{\n" + lines + "}\n")
    say(f"wrote {path}")


@program
def main(args: Args) -> None:
    if not torch.cuda.is_available():
        raise ValueError("tune_kernels needs a GPU")
    if args.write and args.length not in LENGTHS:
        raise ValueError(f"length: the table has {LENGTHS}, not {args.length}; leave out --write to measure only")
    if args.worker is not None:
        compile_part(args, *map(int, args.worker.split("/")))
        return
    say(f"{len(work(args))} candidates for {len(cases(args))} cases")
    command = [sys.executable, "-m", "experiments.tune_kernels", *sys.argv[1:]]
    n = args.n_processes
    for process in [subprocess.Popen([*command, "--worker", f"{i}/{n}"]) for i in range(n)]:
        process.wait()
    found = measure(args)
    for case, times in found.items():
        which, D, dtype, causal = case
        say(f"{which} d{D} {dtype} {'causal' if causal else 'full'}:")
        for ms, blocks in times[:4]:
            say(f"    {ms:8.3f} ms {flops(case, args) / ms / 1e9:6.0f} TFLOP/s  {tuple(blocks)}")
    if args.json is not None:
        rows = [{"case": case, "ms": ms, "blocks": b} for case, times in found.items() for ms, b in times]
        args.json.write_text(json.dumps(rows) + "\n")
    if args.write:
        write_table(found, architecture(torch.device("cuda", torch.cuda.current_device())), args.length)


if __name__ == "__main__":
    main(tyro.cli(Args))
