"""The end of a run that learns from rewards: curves.png, report.html, and what the terminal shows."""

from typing import Any

from experiments.rl.config import FromRewards
from purelm import track

PANELS = (
    ("reward", "mean reward of rollouts"),
    ("heldout_reward", "mean reward of held-out problems, greedy"),
    ("entropy", "entropy of the policy, nats a token"),
    ("length", "tokens of an answer"),
)
SHOWN = 12  # rollouts in the report


def finish(cfg: FromRewards, config: dict[str, Any], title: str) -> None:
    """Curves and report from metrics.jsonl and rollouts.jsonl; the last rows on the terminal."""
    rows = track.read_rows(cfg.run / "metrics.jsonl")
    curves = cfg.run / "curves.png"
    track.plot_curves(rows, curves, panels=PANELS)
    summary: dict[str, Any] = {"rollout batches": cfg.steps}
    for name in ("heldout_reward", "reward", "length", "entropy"):
        found = [row[name] for row in rows if name in row]
        if found:
            summary[name] = f"{track.show(found[0])} at first, {track.show(found[-1])} at the end"
    shown = track.read_rows(cfg.run / "rollouts.jsonl")[-SHOWN:]
    samples = [
        (row["prompt"], f"{row['response']}\n\n[reward {row['reward']}, right is {row['gold']}]") for row in shown
    ]
    track.write_report(
        cfg.run / "report.html", title=f"{title} {cfg.run.name}", summary=summary, config=config,
        curves=curves, samples=samples,
    )  # fmt: skip
    track.write_json(cfg.run / "summary.json", summary)
    for name, value in summary.items():
        print(f"{name:18} {value}")
    names = "config.json, metrics.jsonl, rollouts.jsonl, curves.png, report.html, checkpoints/"
    print(f"{cfg.run}: {names}{', export/' * cfg.export}")
