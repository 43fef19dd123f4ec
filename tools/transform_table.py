"""docs/transforms.md: which op works under which transform, on a CPU and on a GPU, by the laws of check_op.

    python tools/transform_table.py            # writes the section of this machine's device anew
    python tools/transform_table.py --check    # says which lines of it differ from what is found, and fails if any do

Exit status 1 also if an op is wrong: a law fails that is neither obeyed nor refused by name.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm.kernels.cross_entropy import cross_entropy as kernel_cross_entropy
from purelm.kernels.fused import FUSED
from purelm.kernels.rms_norm import add_rms_norm
from purelm.kernels.rope import rope_qk
from purelm.kernels.weighted_sum import reference as weighted_sum_reference
from purelm.kernels.weighted_sum import weighted_sum
from purelm.ops import REFERENCE
from purelm.ops.attention_bias import alibi_bias
from purelm.ops.cross_entropy import cross_entropy
from purelm.ops.rope import rope_tables
from purelm.ops.sdpa import sdpa_attention
from purelm.ops.softmax import log_softmax, softmax
from purelm.testing import LawError, check_op

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "transforms.md"
# column -> the law behind it
COLUMNS = {
    "autograd": "gradient",
    "func.grad": "func_grad",
    "vmap": "vmap",
    "vmap(grad)": "per_sample",
    "jvp": "jvp",
    "jacrev": "jacrev",
    "double backward": "double_backward",
    "Hessian product": "hessian_product",
    "checkpoint": "checkpoint",
    "compile": "compile",
    "strides": "strides",
    "bf16": "dtypes",
}
EVERYWHERE = ("value", "slope", "each_gradient", "upstream", "pure", "modes")  # run too; what breaks one is wrong
REFUSALS = ("ops=REFERENCE",)  # what the message of a refusal says
T, H, G, K, D, V = 5, 4, 2, 16, 32, 11


class Row(NamedTuple):
    """An op with its reference, on arguments of these shapes, or that are these tensors of integers."""

    op: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: list[tuple[int, ...] | Tensor]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)


def rows(device: torch.device) -> dict[str, Row]:
    """All rows of the table."""
    ids = torch.tensor([[1, 1, 2, 2, 0]], device=device)
    targets = torch.tensor([[1, 2, -100, 4, 10]], device=device)
    weights = torch.tensor([[1.0, 0.5, 0.0, 1.0, 2.0]], device=device)
    tables = rope_tables(torch.arange(T, device=device), K)
    qkv = [(1, T, H, K), (1, T, G, K), (1, T, G, K)]
    short = [(1, T, H, K), (1, 2, G, K), (1, 2, G, K)]  # the first queries see no key
    bias = alibi_bias(H, T, T, device=device)
    losses = dict(weights=weights, softcap=2.0, z_loss=0.1)

    def with_options(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *xs: f(*xs, **options)

    def rotated(f: Callable[..., Any], *more: Any) -> Callable[..., Any]:
        return lambda *xs: f(*xs, *tables, *more)

    def loss(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """The loss alone: the second result is a metric, and detached."""
        return lambda *xs: f(*xs, ignore_index=-100, **options)[0]

    def packed(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *xs: f(*xs[:3], segment_ids=xs[3], window=2, scale=0.5, **options)

    def added(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return REFERENCE.rms_norm(x + r, w), x + r

    both = lambda q, k: (REFERENCE.rope(q, *tables), REFERENCE.rope(k, *tables))  # noqa: E731
    attention, fused = REFERENCE.attention, FUSED.attention
    linear_loss, fused_loss = REFERENCE.linear_cross_entropy, FUSED.linear_cross_entropy
    logits, flat, documents = [(1, T, V), targets], [(1, T, D), (V, D), targets], [*qkv, ids]
    own = {
        "linear": (REFERENCE.linear, [(1, T, D), (7, D), (7,)]),
        "embedding": (REFERENCE.embedding, [ids, (V, D)]),
        "rms_norm": (REFERENCE.rms_norm, [(1, T, D), (D,)]),
        "layer_norm": (REFERENCE.layer_norm, [(1, T, D), (D,), (D,)]),
        "rope": (rotated(REFERENCE.rope), [(1, T, H, K)]),
        "rope, half": (rotated(REFERENCE.rope, "half"), [(1, T, H, K)]),
        "attention": (attention, qkv),
        "attention, fewer keys": (attention, short),
        "attention, packed, window, softcap": (packed(attention, softcap=1.0), documents),
        "attention, ALiBi": (with_options(attention, bias=bias), qkv),
        "swiglu": (REFERENCE.swiglu, [(T, D), (T, D)]),
        "geglu": (REFERENCE.geglu, [(T, D), (T, D)]),
        "silu": (REFERENCE.silu, [(T, D)]),
        "gelu": (REFERENCE.gelu, [(T, D)]),
        "relu2": (REFERENCE.relu2, [(T, D)]),
        "softmax": (softmax, [(T, V)]),
        "log_softmax": (log_softmax, [(T, V)]),
        "cross_entropy": (loss(cross_entropy), logits),
        "linear_cross_entropy": (loss(linear_loss, **losses), flat),
        "linear_cross_entropy, chunks": (loss(linear_loss, chunk=2, **losses), flat),
        "log_probs": (with_options(REFERENCE.log_probs, ignore_index=-100), flat),
    }
    return {
        **{name: Row(f, f, shapes) for name, (f, shapes) in own.items()},
        "sdpa_attention": Row(sdpa_attention, attention, qkv),
        "sdpa_attention, packed, window": Row(packed(sdpa_attention), packed(attention), documents),
        "sdpa_attention, fewer keys": Row(sdpa_attention, attention, short),
        "FUSED rms_norm": Row(FUSED.rms_norm, REFERENCE.rms_norm, [(1, T, D), (D,)]),
        "kernel add_rms_norm": Row(add_rms_norm, added, [(T, D), (T, D), (D,)]),
        "FUSED rope": Row(rotated(FUSED.rope), rotated(REFERENCE.rope), [(1, T, H, K)]),
        "kernel rope_qk": Row(lambda q, k: rope_qk(q, k, *tables), both, qkv[:2]),
        "FUSED attention": Row(fused, attention, qkv),
        "FUSED attention, fewer keys": Row(fused, attention, short),
        "FUSED attention, packed, window, softcap": Row(
            packed(fused, softcap=1.0), packed(attention, softcap=1.0), documents
        ),
        "FUSED attention, ALiBi": Row(with_options(fused, bias=bias), with_options(attention, bias=bias), qkv),
        "FUSED swiglu": Row(FUSED.swiglu, REFERENCE.swiglu, [(T, D), (T, D)]),
        "kernel weighted_sum": Row(weighted_sum, weighted_sum_reference, [(T, D), (D,)]),
        "kernel cross_entropy": Row(loss(kernel_cross_entropy), loss(cross_entropy), logits),
        "FUSED linear_cross_entropy": Row(loss(fused_loss, **losses), loss(linear_loss, **losses), flat),
        "FUSED log_probs": Row(
            with_options(FUSED.log_probs, ignore_index=-100), with_options(REFERENCE.log_probs, ignore_index=-100), flat
        ),
    }


def arguments(row: Row, device: torch.device) -> tuple[Tensor, ...]:
    """Standard normal, but for integers; float64 on a CPU, where all ops take it, and float32 on a GPU."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    drawn = (s if isinstance(s, Tensor) else torch.randn(s, generator=g, dtype=torch.float64) for s in row.shapes)
    return tuple(x if x.dtype == torch.int64 else x.to(device, dtype) for x in drawn)


def cell(row: Row, law: str, args: tuple[Tensor, ...]) -> tuple[str, str]:
    """("yes", "refused" or "WRONG", why)."""
    try:
        check_op(row.op, args, reference=row.reference, laws=[law], dtypes=row.dtypes)
    except LawError as error:
        why = str(error.failures[law]).splitlines()[0]
        refused = not isinstance(error.failures[law], AssertionError) and any(x in why for x in REFUSALS)
        return "refused" if refused else "WRONG", why
    return "yes", ""


def found(device: torch.device, names: list[str] | None = None) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(row -> cells, what was refused or is wrong -> where)."""
    cells: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    for name, row in rows(device).items():
        if names is not None and name not in names:
            continue
        args = arguments(row, device)
        for column, law in {**{law: law for law in EVERYWHERE}, **COLUMNS}.items():
            kind, why = cell(row, law, args)
            if column in COLUMNS:
                cells.setdefault(name, []).append(kind)
            if kind != "yes":
                notes.setdefault(f"{kind}: {why}", []).append(f"{name}: {column}")
    return cells, notes


def section(device: torch.device, cells: dict[str, list[str]], notes: dict[str, list[str]]) -> str:
    """The Markdown of one device."""
    head = [f"| op | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    body = [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    said = [f"- {why}" for why in sorted(notes)]
    what = "CPU, float64" if device.type == "cpu" else "GPU, float32"
    return "\n".join([f"## {what}", "", *head, *body, "", *said]).rstrip() + "\n"


def between(device: torch.device) -> tuple[str, str]:
    """The lines of the page between which the device's section lies."""
    return f"<!-- {device.type} -->\n", f"<!-- end of {device.type} -->\n"


def main(argv: list[str] | None = None) -> int:
    """Runs the laws and writes the page, or compares it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--check", action="store_true", help="compare with the page and write nothing")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    cells, notes = found(device)
    page, (first, last) = PAGE.read_text(), between(device)
    before, rest = page.split(first)
    old, after = rest.split(last)
    new = section(device, cells, notes)
    for why, where in notes.items():
        print(f"{why}\n    {'; '.join(where)}")
    if args.check and new != old:
        changed = set(new.splitlines()) ^ set(old.splitlines())
        print(f"{PAGE}: {len(changed)} lines differ:", *sorted(changed), sep="\n  ")
        return 1
    if not args.check:
        PAGE.write_text(before + first + new + last + after)
    return int(any(why.startswith("WRONG") for why in notes))


if __name__ == "__main__":
    sys.exit(main())
