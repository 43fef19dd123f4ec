"""What a run leaves behind: config.json, metrics.jsonl, curves.png and a self-contained report.html.

A sink is any function of one row (a dict of plain numbers and strings); a run may write to several. The JSON-lines
file is the record: the plot and the report are made from it, and can be made again at any time.
"""

import base64
import contextlib
import html
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "drop_rows",
    "jsonl_sink",
    "plot_curves",
    "read_rows",
    "show",
    "tensorboard_sink",
    "truncate_rows",
    "wandb_sink",
    "write_json",
    "write_report",
]

Row = Mapping[str, Any]
Sink = Callable[[Row], None]


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old text or the new one; on an error, such as a full disk, the old."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None  # a write alone does not name its file
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically (paths as strings)."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), json.dumps(value, indent=1, default=str) + "\n")


def jsonl_sink(path: str | Path) -> Sink:
    """A sink that appends one JSON object a line, flushed at once so that a killed run keeps its rows."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def sink(row: Row) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(_line(row))

    return sink


def _line(row: Row) -> str:
    # JSON has no NaN: a diverged loss is stored as null, which read_rows gives back as nan.
    clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
    return json.dumps(clean) + "\n"


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics file. A last line cut short by a kill is left out; any other bad line is a ValueError."""
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        rows.append({k: (math.nan if v is None else v) for k, v in row.items()})
    return rows


def truncate_rows(path: str | Path, step: int) -> None:
    """Drop the rows after `step`, atomically: a run resumed at `step` writes them again."""
    drop_rows(path, lambda row: row.get("step", 0) > step)


def drop_rows(path: str | Path, unwanted: Callable[[Row], bool]) -> None:
    """Drop the rows for which `unwanted` is true, and a last line that a kill cut short; atomically."""
    path = Path(path)
    if not path.is_file():
        return
    text = "".join(_line(row) for row in read_rows(path) if not unwanted(row))
    write_text(path, text)


def tensorboard_sink(folder: str | Path) -> Sink:
    """A sink to TensorBoard (needs the package `tensorboard`)."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def sink(row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(name, value, int(row["step"]))

    return sink


def wandb_sink(project: str, config: Mapping[str, Any], **kwargs: Any) -> Sink:
    """A sink to Weights & Biases (needs the package `wandb`)."""
    import wandb

    run = wandb.init(project=project, config=dict(config), **kwargs)

    def sink(row: Row) -> None:
        run.log(dict(row), step=int(row["step"]))

    return sink


def _series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    pairs = [(float(r["step"]), float(r[name])) for r in rows if name in r and "step" in r]
    return [p[0] for p in pairs], [p[1] for p in pairs]


PANELS = (
    ("loss", "training loss, nats per token"),
    ("heldout_bits_per_byte", "held-out bits per byte"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
)


def plot_curves(
    rows: Sequence[Row],
    path: str | Path,
    *,
    panels: Sequence[tuple[str, str]] = PANELS,
    floor: float | None = None,
    floor_label: str = "entropy of the source",
) -> None:
    """curves.png: four panels, (name in the rows, title) each; by default loss, held-out bits per byte (with the floor,
    where it is known), learning rate and gradient norm. Names that begin with heldout_, or "reward", have few points.
    """
    if len(panels) != 4:
        raise ValueError(f"panels: {len(panels)} are given, and four are drawn")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ModuleNotFoundError(f"{path}: drawing curves needs matplotlib: pip install 'purelm[report]'") from None

    # Figure and canvas are made here, because pyplot keeps global state.
    figure = Figure(figsize=(11, 7))
    FigureCanvasAgg(figure)
    # Margins that fit these labels: matplotlib's automatic layout takes as long as drawing.
    axes = figure.subplots(2, 2, gridspec_kw={"left": 0.08, "right": 0.98, "bottom": 0.07, "top": 0.95, "hspace": 0.28})
    for axis, (name, title) in zip(axes.flat, panels, strict=True):
        x, y = _series(rows, name)
        if name.startswith("heldout_") or name == "reward":
            axis.plot(x, y, marker="o", markersize=3)
            if floor is not None and name == "heldout_bits_per_byte":
                axis.axhline(floor, color="black", linestyle="--", linewidth=1, label=f"{floor_label}: {floor:.4f}")
                axis.legend()
        else:
            axis.plot(x, y, linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if name in ("loss", "heldout_bits_per_byte") and y and min(y) > 0 and max(y) / min(y) > 4:
            axis.set_yscale("log")
    temporary = Path(path).with_name(f".{Path(path).name}.tmp.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem}img{max-width:100%}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left}"
    "td:nth-child(2){font-variant-numeric:tabular-nums}"
    "pre{background:#f6f6f6;padding:1rem;white-space:pre-wrap;overflow-wrap:anywhere}"
)


def show(value: Any) -> str:
    """A value as text: 4 significant digits, thousands separated by commas."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if type(value) is int else str(value)


def _table(pairs: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(show(v))}</td></tr>" for k, v in pairs)
    return f"<table>{cells}</table>"


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flat(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    curves: str | Path | None = None,
    samples: Sequence[tuple[str, str]] = (),
) -> None:
    """report.html: result, curves, samples and configuration in one file that opens offline."""
    parts = [f"<h1>{html.escape(title)}</h1>", "<h2>Result</h2>", _table(summary.items())]
    if curves is not None and Path(curves).is_file():
        data = base64.b64encode(Path(curves).read_bytes()).decode("ascii")
        parts += ["<h2>Curves</h2>", f'<img alt="curves" src="data:image/png;base64,{data}">']
    if samples:
        parts.append("<h2>Samples</h2>")
        parts += [f"<p><b>{html.escape(prompt)}</b></p><pre>{html.escape(text)}</pre>" for prompt, text in samples]
    parts += ["<h2>Configuration</h2>", _table(_flat(config))]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    write_text(Path(path), page)
