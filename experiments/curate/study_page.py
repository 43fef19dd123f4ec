"""The page, the figure and the figures of `experiments.curate.study`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.curate.board_page import render
from purelm import track

__all__ = ["differences", "write"]


def write(
    results: Path, rows: Sequence[Mapping[str, Any]], meanings: Mapping[str, str],
    variants: Mapping[str, Mapping[str, Any]], conclusion: str,
) -> None:  # fmt: skip
    """data_study.json, .png and .md."""
    told = {"variants": {name: {"what": meanings[name], **variants[name]} for name in variants},
            "against raw": differences(rows), "rows": list(rows)}  # fmt: skip
    track.write_json(results / "data_study.json", told)
    _draw(results / "data_study.png", rows)
    track.write_text(results / "data_study.md", _page(rows, meanings, variants, conclusion))


def differences(rows: Sequence[Mapping[str, Any]], base: str = "raw") -> dict[str, dict[str, Any]]:
    """Of each variant, mean over the reference texts less raw's with the same seed: mean over seeds, lowest, highest.

    A seed draws the same parameters for all variants, so that differences spread less than the figures.
    """
    means = {row["name"]: dict(zip(row["seeds"], row["mean"]["values"], strict=True)) for row in rows}
    if base not in means:
        return {}
    out = {}
    for name, values in means.items():
        found = [values[seed] - means[base][seed] for seed in values if seed in means[base]]
        if name != base and found:
            out[name] = {"mean": sum(found) / len(found), "low": min(found), "high": max(found), "seeds": len(found)}
    return out


def _page(
    rows: Sequence[Mapping[str, Any]], meanings: Mapping[str, str], variants: Mapping[str, Mapping[str, Any]],
    conclusion: str,
) -> str:  # fmt: skip
    lines = [
        "# Data decisions: what each step of the pipeline does to a model", "",
        "Every variant trains the same model with the same budget of tokens (below), so that smaller ones are gone "
        "over more often. Seeds draw parameters and order anew.", "",
        "| variant | what | documents | characters | duplicates dropped |", "|---|---|---|---|---|",
        *(f"| {name} | {meanings[name]} | {x['documents']:,} | {x['characters']:,} | {x['duplicates']:,} |"
          for name, x in variants.items()), "",
        "![bits per byte](data_study.png)", "",
        "| variant | bits per byte less raw's, mean over seeds | lowest, highest |", "|---|---|---|",
        *(f"| {name} | {x['mean']:+.4f} | {x['low']:+.4f}, {x['high']:+.4f} |"
          for name, x in differences(rows).items()), "",
        *([conclusion, ""] if conclusion else []),
    ]  # fmt: skip
    return "\n".join([*lines, ""]) + render(rows).replace("# Bits per byte", "## Bits per byte", 1)


def _draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A panel for each reference text: each seed a dot, the mean a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(rows[0]["reference"])
    figure = Figure(figsize=(3.2 * len(names) + 1, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, names, strict=True):
        for y, row in enumerate(rows):
            found = row["bits_per_byte"][name]
            panel.plot(found["values"], [y] * len(found["values"]), "o", color="C0", alpha=0.6)
            panel.plot([found["mean"]] * 2, [y - 0.3, y + 0.3], color="C1")
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("bits per byte")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    panels[0].invert_yaxis()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(path)
