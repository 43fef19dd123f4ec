"""What a Transformer costs: parameters, FLOPs by part, memory, days of training.

    python -m experiments.accounting                       # the course's worked answers for the GPT-2 family
    python -m experiments.accounting --run runs/quickstart # the model of a run
    python -m experiments.accounting --model.d-model 768 --model.n-layers 12 --model.n-heads 12 --model.d-ff None

With any --model flag the tables are those of that model, not the course's; flags that are not given have GPT-2 XL's
values. k, M, G and T are powers of 1000. FLOPs are those of matrix products, with attention over all T^2 pairs of
positions; --skip-masked counts only the pairs that a causal mask leaves.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.console import program
from experiments.limits import Count, Range
from purelm import accounting
from purelm.models.config import Config, config_from_dict


def gpt2(d_model: int, n_layers: int, n_heads: int, d_ff: int, context_length: int = 1024) -> Config:
    """A GPT-2 shape in the course's architecture: RMSNorm, RoPE, SwiGLU, no biases, untied head."""
    return Config(50257, context_length, d_model, n_layers, n_heads, d_ff=d_ff)


def nearest_64(d_model: int) -> int:
    """The multiple of 64 nearest to 8/3 d_model, the d_ff of the handout of 2026."""
    return round(8 * d_model / 3 / 64) * 64


SIZES = {"small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 36, 20), "XL": (1600, 48, 25)}
NEW = {name: gpt2(*size, d_ff=nearest_64(size[0])) for name, size in SIZES.items()}  # handout of 2026
OLD = {name: gpt2(*size, d_ff=4 * size[0]) for name, size in SIZES.items()}  # handout of 2025: d_ff = 6,400 for XL

Large = Annotated[float, Range(0, 1e30, open_low=True)]


@dataclass(frozen=True)
class Args:
    """What to account for; without --run and --model the course's worked answers."""

    run: Path | None = None
    """folder of a run (its config.json)"""
    model: Config = field(default_factory=lambda: NEW["XL"])
    batch_size: Count = 1
    """sequences in one training step"""
    length: Count | None = None
    """positions in a sequence; default the model's context_length"""
    tokens: Large | None = None
    """training tokens, for the estimate of training time; default 20 per parameter"""
    device: str = "NVIDIA H100 80GB HBM3"
    """name of the device, as torch has it; unknown ones need --peak"""
    precision: str = "bf16"
    """number format whose peak FLOP/s is taken: bf16, fp16, tf32, fp32, fp8"""
    peak: Large | None = None
    """FLOP/s of the device, instead of the table's"""
    mfu: Annotated[float, Range(0, 1, open_low=True)] = 0.5
    """share of the peak that training reaches"""
    memory: Large = 80e9
    """memory of the device, bytes"""
    bytes_per_element: Annotated[int, Range(1, 8)] = 4
    """bytes of one number of an activation: 4 for fp32, 2 for bf16"""
    flash: bool = False
    """attention that keeps no T x T matrix"""
    remat: bool = False
    """keep only the inputs of blocks, and recompute the other activations in backward"""
    skip_masked: bool = False
    """count only the (query, key) pairs that the causal mask leaves"""
    json: Path | None = None
    """write rows {model, metric, value, unit} to this file"""


Rows = list[dict[str, Any]]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns: text to the left, the rest to the right."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    out = []
    for line in (header, ["-" * w for w in widths], *lines):
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def prefix(x: float) -> tuple[float, str]:
    """The largest power of 1000 that is not above x, and its SI prefix; T at most."""
    found = [(scale, name) for scale, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if x >= scale]
    return found[0] if found else (1.0, "")


def quantity(x: float, unit: str) -> list[str]:
    """A number with its unit, as two cells."""
    scale, name = prefix(x)
    return [f"{x / scale:,.4g}", name + unit]


def parts_table(parts: dict[str, int], unit: str, title: str) -> str:
    """Each part, in one unit, and as a share of the whole; without a unit, numbers in full."""
    whole = sum(parts.values())
    scale, name = prefix(whole) if unit else (1.0, "number")
    number = (lambda x: f"{x / scale:,.3f}") if unit else (lambda x: f"{x:,}")
    lines = [[part, number(x), f"{100 * x / whole:.2f}"] for part, x in parts.items() if x]
    return table([title, name + unit, "%"], [*lines, ["total", number(whole), "100.00"]])


def rows_of(model: str, metric: str, parts: dict[str, int], unit: str) -> Rows:
    rows = [{"model": model, "metric": f"{metric}: {name}", "value": x, "unit": unit} for name, x in parts.items()]
    return [*rows, {"model": model, "metric": metric, "value": sum(parts.values()), "unit": unit}]


def duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds:,.3g} s"
    return f"{seconds / 3600:,.1f} h" + (f" = {seconds / 86400:,.1f} days" if seconds >= 86400 else "")


def one_model(cfg: Config, name: str, args: Args) -> Rows:
    """Everything for one model, printed and as rows."""
    B, T = args.batch_size, cfg.context_length if args.length is None else args.length
    n = accounting.n_params(cfg)
    flops = accounting.forward_flops(cfg, B, T, skip_masked=args.skip_masked)
    step = accounting.train_flops(cfg, B, T, remat=args.remat, skip_masked=args.skip_masked)
    useful = accounting.train_flops(cfg, B, T, skip_masked=args.skip_masked)
    kept: dict[str, Any] = {"bytes_per_element": args.bytes_per_element, "flash": args.flash, "remat": args.remat}
    memory = accounting.train_bytes(cfg, B, T, **kept)
    activations = accounting.activation_bytes(cfg, B, T, **kept)
    most = accounting.max_batch_size(cfg, args.memory, T, **kept)
    cache = accounting.kv_cache_bytes(cfg, B, T)
    print(f"{name}: {B} x {T:,} tokens a step\n")
    print(parts_table(accounting.params(cfg), "", "parameters"), end="\n\n")
    print(parts_table(flops, "FLOP", "forward pass"), end="\n\n")
    print(parts_table(activations, "B", "activations"), end="\n\n")
    print(parts_table(memory, "B", "training step, AdamW, fp32 states"), end="\n\n")
    tokens = 20 * n if args.tokens is None else args.tokens
    peak = accounting.peak_flops(args.device, args.precision) if args.peak is None else args.peak
    facts = [
        ["a training step", *quantity(step, "FLOP")],
        ["6 N D for as many tokens", *quantity(accounting.six_n_d(n, B * T), "FLOP")],
        [f"largest batch in {' '.join(quantity(args.memory, 'B'))}", f"{most:,}", "sequences"],
        ["KV cache, bf16", *quantity(cache, "B")],
    ]
    rows: Rows = [
        *rows_of(name, "parameters", accounting.params(cfg), "parameters"),
        *rows_of(name, f"forward FLOPs, {B} x {T}", flops, "FLOP"),
        *rows_of(name, f"activations, {B} x {T}", activations, "bytes"),
        *rows_of(name, f"training step, {B} x {T}", memory, "bytes"),
        {"model": name, "metric": "train FLOPs", "value": step, "unit": "FLOP"},
        {"model": name, "metric": "largest batch", "value": most, "unit": "sequences"},
        {"model": name, "metric": "KV cache", "value": cache, "unit": "bytes"},
    ]
    if peak is None:
        facts.append([f"training time on {args.device}", "unknown", f"no {args.precision} peak: give --peak"])
    else:
        seconds = accounting.train_seconds(useful / (B * T) * tokens, peak, args.mfu)
        what = f"{' '.join(quantity(tokens, ' tokens'))} at {100 * args.mfu:.0f} % of {peak / 1e12:,.1f} TFLOP/s"
        facts.append([what, duration(seconds), ""])
        rows.append({"model": name, "metric": what, "value": seconds, "unit": "s"})
    print(table(["", "value", "unit"], facts))
    return rows


def shares(models: dict[str, Config]) -> str:
    """Forward FLOPs of each model in groups, as numbers and as percentages."""
    groups = {
        "attention projections": ("qkv", "output"),
        "attention scores, values": ("scores", "values"),
        "ffn": ("ffn_w1", "ffn_w3", "ffn_w2"),
        "lm_head": ("lm_head",),
    }
    flops = {name: accounting.forward_flops(cfg) for name, cfg in models.items()}
    total = {name: sum(parts.values()) for name, parts in flops.items()}
    lines = []
    for group, names in groups.items():
        sums = {m: sum(parts[n] for n in names) for m, parts in flops.items()}
        lines.append([group, *[f"{x / 1e12:,.3f} ({100 * x / total[m]:5.2f} %)" for m, x in sums.items()]])
    lines.append(["total", *[f"{x / 1e12:,.3f} (  100 %)" for x in total.values()]])
    lines.append(["d_ff", *[f"{cfg.ff_width:,}          " for cfg in models.values()]])
    lines.append(["parameters, million", *[f"{accounting.n_params(c) / 1e6:,.1f}          " for c in models.values()]])
    return table(["TFLOP (share)", *models], lines)


def course() -> Rows:
    """The worked answers of assignment 1: transformer_accounting (a) to (e), adamw_accounting (a) to (d)."""
    new = answers("GPT-2 XL, d_ff 4,288 (handout of 2026)", NEW, ("NVIDIA H100 80GB HBM3", "tf32"))
    old = answers("GPT-2 XL, d_ff 6,400 (handout of 2025)", OLD, ("NVIDIA A100-SXM4-80GB", "fp32"))
    return [*new, *old]


def answers(title: str, models: dict[str, Config], asked: tuple[str, str]) -> Rows:
    """One handout's answers; `asked` is the device and precision that its last question names."""
    xl = models["XL"]
    long = dataclasses.replace(xl, context_length=16384)
    n = accounting.n_params(xl)
    print(f"== {title}: SwiGLU, RMSNorm, RoPE, no biases, untied head ==\n")
    print(parts_table(accounting.params(xl), "", "(a) parameters"))
    print(f"{n:,} parameters = {n / 1e9:.2f} billion; {4 * n / 1e9:.2f} GB in fp32\n")
    print(parts_table(accounting.forward_flops(xl), "FLOP", "(b, c) forward, 1 x 1,024"), end="\n\n")
    print(f"(d) forward over 1,024 tokens\n{shares({f'GPT-2 {k}': c for k, c in models.items()})}\n")
    more = sum(accounting.forward_flops(long).values()) / sum(accounting.forward_flops(xl).values())
    print(f"(e) GPT-2 XL at context 16,384: {more:.1f} times the FLOPs of 1,024")
    print(shares({"XL at 1,024": xl, "XL at 16,384": long}), end="\n\n")

    activations, memory = accounting.activation_bytes(xl), accounting.train_bytes(xl)
    print("AdamW (a) bytes of a training step, fp32, batch 1")
    print(parts_table(activations, "B", "activations"), end="\n\n")
    print(parts_table(memory, "B", "training step"))
    most = {
        "all in fp32": accounting.max_batch_size(xl, 80e9),
        "bf16 activations": accounting.max_batch_size(xl, 80e9, bytes_per_element=2),
        "bf16 activations, flash attention": accounting.max_batch_size(xl, 80e9, bytes_per_element=2, flash=True),
    }
    fixed = sum(memory.values()) - memory["activations"]
    print(f"(b) {memory['activations'] / 1e9:.2f} GB x batch + {fixed / 1e9:.2f} GB; largest batch in 80 GB:", end=" ")
    print(", ".join(f"{v} ({k})" for k, v in most.items()))
    print(f"(c) one AdamW step: 14 N = {accounting.adamw_flops(n) / 1e9:,.1f} GFLOP, element-wise")
    step = accounting.train_flops(xl, batch_size=1024)
    times = {}
    for device, precision in (asked, ("NVIDIA H100 80GB HBM3", "bf16")):
        peak = accounting.peak_flops(device, precision)
        assert peak is not None
        seconds = accounting.train_seconds(400_000 * step, peak, 0.5)
        times[f"400,000 steps of batch 1,024 at 50 % MFU, {device}, {precision}"] = seconds
        print(f"(d) 400,000 steps of batch 1,024 at 50 % of {peak / 1e12:,.1f} TFLOP/s", end=" ")
        print(f"({device}, {precision}): {duration(seconds)}")
    six = accounting.six_n_d(n, 1024 * 1024)
    print(f"    3 x forward = {step / 1e15:,.3f} PFLOP a step; 6 N D says {six / 1e15:,.3f}\n")

    rows: Rows = []
    for size, cfg in {**models, "XL at 16,384": long}.items():
        name = f"GPT-2 {size}, d_ff {cfg.ff_width}"
        rows += rows_of(name, "parameters", accounting.params(cfg), "parameters")
        rows += rows_of(name, "forward FLOPs", accounting.forward_flops(cfg), "FLOP")
    name = f"GPT-2 XL, d_ff {xl.ff_width}"
    rows += rows_of(name, "activations, batch 1, fp32", activations, "bytes")
    rows += rows_of(name, "training step, batch 1, fp32", memory, "bytes")
    for k, v in most.items():
        rows.append({"model": name, "metric": f"largest batch in 80 GB, {k}", "value": v, "unit": "sequences"})
    for k, seconds in times.items():
        rows.append({"model": name, "metric": k, "value": seconds, "unit": "s"})
    rows.append({"model": name, "metric": "AdamW step", "value": accounting.adamw_flops(n), "unit": "FLOP"})
    return rows


def config_of_run(run: Path) -> Config:
    """The model in the run's config.json."""
    path = run / "config.json"
    try:
        fields = json.loads(path.read_text())["model"]
    except (ValueError, KeyError, TypeError) as error:  # no JSON, or JSON of something else
        raise ValueError(f"{path} is not the config.json of a run: {type(error).__name__}: {error}") from None
    return config_from_dict(fields)


@program
def main(args: Args) -> None:
    if args.run is not None:
        if args.json is not None and args.json.resolve() == (args.run / "config.json").resolve():
            raise ValueError(f"json {args.json}: is what --run is read from, and would be written over")
        rows = one_model(config_of_run(args.run), args.run.name, args)
    elif args.model != NEW["XL"]:
        rows = one_model(args.model, "model", args)
    else:
        rows = course()
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
