"""Whether muP holds: sizes of activations over widths while a model trains, and the best learning rate of each width.

    python -m experiments.scaling.mup_check --out results/mup
    python -m experiments.scaling.mup_check --out results/mup --base 128 --widths 128 256 512 1024 2048 --device cuda

Models of one depth and several widths are trained on synthetic stories, byte by byte, by AdamW: once by
`purelm.scaling.mup` from the narrowest, and once with the initial values and the one learning rate of standard
parametrisation. First a few steps, after which the change of the residual stream and of the logits since the start,
mean |x|, is compared over widths: it stays with muP and grows without. Then --steps for each learning rate, and the
held-out loss. It leaves mup.json, mup.md and mup.png in OUT.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import purelm
from experiments.console import line_progress, pick_device, program, say
from experiments.limits import Count, Place, Positive, Range, Seed, Text
from purelm import random, track
from purelm.data import synthetic
from purelm.models import transformer
from purelm.models.model import Model
from purelm.models.transformer import Config
from purelm.optim import Optimizer, adamw, constant, cosine
from purelm.scaling import mup
from purelm.train import init_state, make_step

Way = Literal["muP", "standard"]
WAYS: tuple[Way, ...] = ("muP", "standard")
VOCABULARY = 256
PARTS = ("stream", "states", "logits")


@dataclass(frozen=True)
class Args:
    """Check muP over widths."""

    out: Place
    widths: tuple[Annotated[int, Range(2, 65_536)], ...] = (32, 64, 128, 256)
    base: Annotated[int, Range(2, 65_536)] = 32
    """width at which both ways are one"""
    head_dim: Annotated[int, Range(2, 1024)] = 16
    """of the base; wider models have more heads of this width, or with --heads wider as many as the base"""
    heads: Literal["more", "wider"] = "more"
    layers: Annotated[int, Range(1, 1000)] = 2
    context: Annotated[int, Range(2, 65_536)] = 64
    batch: Count = 16
    steps: Count = 200
    lrs: tuple[Positive, ...] = tuple(2.0**-k for k in range(3, 12))
    """peak learning rates, warmed up over a tenth of the steps and decayed to a tenth along a cosine"""
    check_steps: Count = 5
    """of the first comparison"""
    check_lr: Positive = 2**-7
    check_widths: tuple[Annotated[int, Range(2, 65_536)], ...] = (32, 64, 128, 256, 512, 1024)
    stories: Count = 2000
    device: Text = "auto"
    seed: Seed = 0


@program
def main(args: Args) -> None:
    if args.base not in args.widths:
        raise ValueError(f"widths must contain the base's, {args.base}, got {args.widths}")
    if not args.lrs or len(set(args.check_widths)) < 2:
        raise ValueError(f"lrs needs one, check_widths two different ones, got {args.lrs} and {args.check_widths}")
    configs = {w: config_of(args, w) for w in (*args.widths, *args.check_widths)}
    device = pick_device(args.device)
    data = _data(args, device)
    base = configs[args.base]
    checks: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    update = line_progress("models", (len(args.check_widths) + len(args.widths) * len(args.lrs)) * len(WAYS))
    done = 0
    for way in WAYS:
        for width in args.check_widths:
            model, optimizer = made(configs[width], base, way)
            batches = _batches(args, data, args.check_steps)
            sizes = coordinates(model, optimizer, batches, args.check_lr, random.key(args.seed, device))
            checks.append({"way": way, "width": width, **sizes})
            update(done := done + 1)
        for width in args.widths:
            cfg = configs[width]
            for lr in args.lrs:
                losses.append({"way": way, "width": width, "lr": lr, "loss": _trained(args, cfg, base, way, data, lr)})
                update(done := done + 1, f"{way} {width} {lr:.2g}: {losses[-1]['loss']:.4f}")
    result = {
        "purelm": purelm.__version__, "torch": torch.__version__, "device": str(device),
        "settings": {k: v for k, v in dataclasses.asdict(args).items() if k != "out"}, "coordinates": checks,
        "losses": [{**row, "loss": row["loss"] if math.isfinite(row["loss"]) else None} for row in losses],
        "best": [best(losses, way, width) for way in WAYS for width in args.widths],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    text = report(result)
    track.write_json(args.out / "mup.json", result)
    track.write_text(args.out / "mup.md", text + "\n![losses and sizes](mup.png)\n")
    _draw(result, args.out / "mup.png")
    print(text)
    say(f"{args.out}: mup.json, mup.md, mup.png")


def config_of(args: Args, width: int) -> Config:
    """The model of this width, before muP."""
    n_heads = (width if args.heads == "more" else args.base) // args.head_dim
    if width % args.head_dim or not n_heads or width % n_heads:
        raise ValueError(f"widths must be multiples of head_dim {args.head_dim} and of the heads, got {width}")
    return Config(VOCABULARY, args.context, width, args.layers, n_heads, d_ff=4 * width, ffn="silu")


def made(
    cfg: Config, base: Config, way: Way, make: Callable[[float], Optimizer] = lambda f: adamw(weight_decay=0.0),
    rule: mup.Rule = "adam",
) -> tuple[Model, Optimizer]:  # fmt: skip
    """(model, optimizer) by this way. The head begins at 0 in both, so that what is compared is what was learned."""
    small = transformer.leaves(base)
    if way == "muP":
        rule_of_std = mup.std(small, head=0.0)
        model = transformer.make(mup.config(cfg, base), std=rule_of_std)
        return model, mup.optimizer(make, model.leaves, small, rule)

    def standard(path: str, leaf: transformer.Leaf) -> float:
        return 0.0 if leaf.kind == "head" else transformer.course_init(path, leaf)

    return transformer.make(cfg, std=standard), make(1.0)


def coordinates(
    model: Model, optimizer: Optimizer, batches: list[dict[str, Tensor]], lr: float, key: random.Key
) -> dict[str, float]:
    """mean |x after the steps - x before|, of the stream before the final norm, of `model.hidden` and of the logits.

    One step a batch; x are of the first batch's tokens.
    """
    params = model.init(key)
    before = _activations(model, params, batches[0]["tokens"])
    state = init_state(params, optimizer)
    step = make_step(model.loss, optimizer, constant(lr))
    for batch in batches:
        state, _ = step(state, batch)
    after = _activations(model, state.params, batches[0]["tokens"])
    return {name: float((after[name] - before[name]).abs().mean()) for name in PARTS}


def _activations(model: Model, params: Any, tokens: Tensor) -> dict[str, Tensor]:
    stream: list[Tensor] = []

    def wrap(f: Callable[..., Any]) -> Callable[..., Any]:
        def block(*args: Any) -> Any:
            y = f(*args)
            stream.append(y)
            return y

        return block

    with torch.no_grad():
        states = transformer.make(model.config, wrap_block=wrap).hidden(params, tokens)
        return {"stream": stream[-1], "states": states, "logits": model.apply(params, tokens)}


def _data(args: Args, device: torch.device) -> Tensor:
    """Bytes of stories; the last tenth is held out."""
    text = "".join(synthetic.sample(args.seed, args.stories)).encode()
    if len(text) // 10 < 4 * (args.context + 1):
        raise ValueError(f"stories: {args.stories} have {len(text)} bytes, too few for context {args.context}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def _rows(data: Tensor, starts: Tensor, context: int) -> dict[str, Tensor]:
    rows = data[starts[:, None] + torch.arange(context + 1, device=data.device)].long()
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def _batches(args: Args, data: Tensor, n: int) -> list[dict[str, Tensor]]:
    """n batches of random windows of the first nine tenths, the same for every model."""
    most = len(data) * 9 // 10 - args.context
    key = random.fold_in(random.key(args.seed, data.device), 1)
    starts = random.randint(key, (n, args.batch), 0, most)
    return [_rows(data, s, args.context) for s in starts]


def _trained(args: Args, cfg: Config, base: Config, way: Way, data: Tensor, lr: float) -> float:
    """Held-out loss after training, inf where it is no number."""
    model, optimizer = made(cfg, base, way)
    schedule = cosine(lr, args.steps, n_warmup=args.steps // 10, lr_final=lr / 10)
    state = init_state(model.init(random.key(args.seed, data.device)), optimizer)
    step = make_step(model.loss, optimizer, schedule, max_norm=None)
    for batch in _batches(args, data, args.steps):
        state, _ = step(state, batch)
    held = torch.arange(len(data) * 9 // 10, len(data) - args.context, args.context + 1, device=data.device)[:256]
    with torch.no_grad():
        value = float(model.loss(state.params, _rows(data, held, args.context))[0])
    return value if math.isfinite(value) else math.inf


def best(losses: list[dict[str, Any]], way: Way, width: int) -> dict[str, Any]:
    """The learning rate of the least loss among those tried, and the minimum of a parabola in ln lr through it and its
    neighbours: None at the end of the range, where the best may lie beyond it.
    """
    rows = sorted((r for r in losses if r["way"] == way and r["width"] == width), key=lambda r: r["lr"])
    at = min(range(len(rows)), key=lambda i: rows[i]["loss"])
    least = rows[at]["loss"]
    found = {"way": way, "width": width, "lr": rows[at]["lr"], "loss": least if math.isfinite(least) else None}
    found["between"] = None
    if 0 < at < len(rows) - 1 and all(math.isfinite(r["loss"]) for r in rows[at - 1 : at + 2]):
        near = rows[at - 1 : at + 2]
        x, y = np.array([math.log(r["lr"]) for r in near]), np.array([r["loss"] for r in near])
        a, b, _ = np.polyfit(x - x[1], y, 2)
        found["between"] = float(np.exp(x[1] - b / (2 * a))) if a > 0 else rows[at]["lr"]
    return found


def slope(widths: list[int], sizes: list[float]) -> float:
    """The exponent of the power of width that sizes follow, by least squares of logarithms."""
    x, y = np.log(widths), np.log(np.maximum(sizes, 1e-30))
    return float(((x - x.mean()) * (y - y.mean())).sum() / np.square(x - x.mean()).sum())


def report(result: dict[str, Any]) -> str:
    """The page in Markdown."""
    s, rows = result["settings"], result["coordinates"]
    widths, checked = list(s["widths"]), list(s["check_widths"])
    lines = [
        "# muP over widths", "",
        f"{s['layers']} layers, base width {s['base']}, {s['heads']} heads, AdamW, {s['batch']} x {s['context']} bytes "
        f"a step. Mean size of the change since the start, after {s['check_steps']} steps at {s['check_lr']:.3g}:", "",
        "| way | part | " + " | ".join(map(str, checked)) + " | exponent of width |",
        "|---" * (len(checked) + 3) + "|",
    ]  # fmt: skip
    for way in WAYS:
        for part in PARTS:
            sizes = [r[part] for r in rows if r["way"] == way]
            cells = " | ".join(f"{x:.3f}" for x in sizes)
            lines.append(f"| {way} | {part} | {cells} | {slope(checked, sizes):+.2f} |")
    lines += ["", f"Held-out loss, nats a byte, after {s['steps']} steps; in bold the best of a width.", ""]
    for way in WAYS:
        lines += [f"| {way}: lr | " + " | ".join(map(str, widths)) + " |", "|---" * (len(widths) + 1) + "|"]
        least = {r["width"]: r["lr"] for r in result["best"] if r["way"] == way}
        for lr in sorted(s["lrs"], reverse=True):
            row = []
            for w in widths:
                y = next(r["loss"] for r in result["losses"] if (r["way"], r["width"], r["lr"]) == (way, w, lr))
                text = "not finite" if y is None else f"{y:.4f}"
                row.append(f"**{text}**" if least[w] == lr else text)
            lines.append(f"| {lr:.3g} | {' | '.join(row)} |")
        between = [r["between"] for r in result["best"] if r["way"] == way]
        lines += [f"| parabola | {' | '.join('at the end' if b is None else f'{b:.3g}' for b in between)} |", ""]
    return "\n".join(lines)


def _draw(result: dict[str, Any], path: Path) -> None:
    """Needs matplotlib (extra `report`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    widths = list(result["settings"]["widths"])
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for axis, way in zip(axes, WAYS, strict=False):
        for i, w in enumerate(widths):
            rows = sorted((r["lr"], r["loss"]) for r in result["losses"] if (r["way"], r["width"]) == (way, w))
            drawn = np.array([(x, y) for x, y in rows if y is not None], np.float64).reshape(-1, 2)
            axis.plot(drawn[:, 0], drawn[:, 1], "o-", color=f"C{i}", label=str(w), ms=4)
        axis.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss, nats a byte", title=way)
        axis.legend(title="width", fontsize=8)
    finite = [r["loss"] for r in result["losses"] if r["loss"] is not None]
    if finite:
        low, high = min(finite), float(np.quantile(finite, 0.8))
        for axis in axes[:2]:
            axis.set_ylim(low - 0.05 * (high - low), high + 1e-6)
    for i, part in enumerate(PARTS):
        for way, style in zip(WAYS, ("o-", "s--"), strict=True):
            sizes = [r[part] for r in result["coordinates"] if r["way"] == way]
            axes[2].plot(result["settings"]["check_widths"], sizes, style, color=f"C{i}", label=f"{part}, {way}", ms=4)
    axes[2].set(xscale="log", yscale="log", xlabel="width", title="mean size of the change after a few steps")
    axes[2].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))
