"""Rows of a benchmark: a printed table and, on request, a JSON file.

A row is {metric, value, unit, peer, peer_value, ratio, device, versions}; ratio is how many times better purelm is:
peer_value / value where less is better (seconds, bytes), value / peer_value where more is better (MB/s).
"""

import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LESS_IS_BETTER = ("s", "ms", "us", "bytes", "MB", "MiB", "GiB", "CPU s")


def versions(packages: Iterable[str] = ("torch", "numpy", "purelm")) -> dict[str, str]:
    """Installed versions; "missing" for a package that is not installed."""
    out = {"python": platform.python_version()}
    for name in packages:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "missing"
    return out


LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # of a CPU's instruction sets
SETS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}  # by Linux's name


@functools.cache
def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """ "cpu", with the number of cores, the model, the instruction sets in `SETS`, and variables that limit them."""
    try:
        lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
    except OSError:
        return "cpu"
    facts = {key.strip(): value.strip() for key, value in lines}
    flags = facts.get("flags", "").split()
    sets = [name for flag, name in SETS.items() if flag in flags] or ["no AVX2"]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return f"cpu, {os.cpu_count()} x {facts.get('model name', 'unknown')} ({', '.join([*sets, *limits])})"


def row(
    metric: str,
    value: float,
    unit: str,
    *,
    peer: str | None = None,
    peer_value: float | None = None,
    device: str = "cpu",
    packages: Iterable[str] = ("torch", "numpy", "purelm"),
) -> dict[str, Any]:
    """One row. A peer without a value is one that is not installed. For device "cpu" the row names the CPU."""
    ratio = None
    if peer_value is not None and value and peer_value:
        ratio = peer_value / value if unit in LESS_IS_BETTER else value / peer_value
    return {
        "metric": metric,
        "value": value,
        "unit": unit,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": ratio,
        "device": cpu_name() if device == "cpu" else device,
        "versions": versions(packages),
    }


def _number(x: Any) -> str:
    return "missing" if x is None else f"{x:,.4g}" if isinstance(x, float) else str(x)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| metric | purelm | unit | peer | peer's | ratio |", "|---|---|---|---|---|---|"]
    for r in rows:
        peer = r["peer"] or ""
        peer_value = _number(r["peer_value"]) if r["peer"] else ""
        ratio = f"{r['ratio']:.3g}" if r["ratio"] is not None else ""
        lines.append(
            f"| {r['metric']} | {_number(float(r['value']))} | {r['unit']} | {peer} | {peer_value} | {ratio} |"
        )
    return "\n".join(lines)


def publish(rows: Sequence[Mapping[str, Any]], json_path: Path | None = None) -> None:
    """Print the table, the device and the versions; write the rows to `json_path`."""
    print(table(rows))
    if rows:
        print(f"\ndevice: {rows[0]['device']}; " + ", ".join(f"{k} {v}" for k, v in rows[0]["versions"].items()))
    if json_path is not None:
        write(rows, json_path)


def write(rows: Sequence[Mapping[str, Any]], json_path: Path) -> None:
    """The rows as JSON."""
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(list(rows), indent=1) + "\n")


Lines = dict[str, dict[float, float]]  # name -> x -> y


def plot_panels(panels: Mapping[str, Lines], path: Path, x_label: str, y_label: str, columns: int) -> None:
    """A panel for each title, a line for each library; x on a log2 scale, y from 0, the same for a row of panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n_rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        n_rows, columns, figsize=(3.4 * columns, 3.2 * n_rows), squeeze=False, sharey="row", layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name in sorted(lines, key=lambda name: (name != "purelm", name)):
            points = sorted(lines[name].items())
            (handles[name],) = axis.plot(
                *zip(*points, strict=True), marker="o", color=f"C{len(handles)}" if name not in handles else
                handles[name].get_color(),
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    for row_of_axes in axes:
        row_of_axes[0].set_ylim(bottom=0)  # for the whole row; after plotting, since it turns off automatic limits
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
