"""The end of a fine-tuning run: curves.png, report.html, and what the terminal shows."""

from typing import Any

from experiments.finetune.config import FineTuning
from purelm import track

Panels = tuple[tuple[str, str], ...]  # (name in metrics.jsonl, title)
SHOWN = 12  # generations in the report


def finish(cfg: FineTuning, config: dict[str, Any], panels: Panels, extra: str = "") -> None:
    """Curves and report from metrics.jsonl and generations.jsonl; the last rows on the terminal."""
    rows = track.read_rows(cfg.run / "metrics.jsonl")
    made = track.read_rows(cfg.run / "generations.jsonl")
    evaluated = [row for row in rows if "heldout_loss" in row]
    summary: dict[str, Any] = {"steps": cfg.steps}
    for name in sorted({name for row in evaluated for name in row} - {"step"}):
        found = [row[name] for row in evaluated if name in row]
        if found:
            summary[name] = f"{track.show(found[0])} at first, {track.show(found[-1])} at the end"
    curves = cfg.run / "curves.png"
    track.plot_curves(rows, curves, panels=panels)
    last = [row for row in made if row["step"] == cfg.steps][:SHOWN]
    samples = [(row["prompt"], f"{row['response']}\n\n[wanted]\n{row['wanted']}") for row in last]
    track.write_report(
        cfg.run / "report.html", title=f"fine-tuning {cfg.run.name}", summary=summary, config=config, curves=curves,
        samples=samples,
    )  # fmt: skip
    for row in rows[-2:]:
        print("  ".join(f"{name} {track.show(value)}" for name, value in row.items()))
    names = "config.json, metrics.jsonl, generations.jsonl, curves.png, report.html, checkpoints/" + extra
    print(f"{cfg.run}: {names}{', export/' * cfg.export}")
