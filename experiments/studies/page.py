"""What a study found: figures of all runs, a table with the spread over seeds, a figure, sentences, one page."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.studies.values import Study, argv
from purelm import track

__all__ = ["concluded", "draw", "of_run", "page", "spread", "summarised", "table", "write"]

LAST = 20  # rollout batches whose reward, entropy, ... are averaged at the end
SHOWN = ("final", "over_the_run", "start", "entropy", "clipped", "seconds")
HEADER = "| variation | seeds | held-out reward, before | after | lowest, highest | mean over the run | entropy | clipped | seconds |"  # noqa: E501


def of_run(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of one run from its metrics.jsonl.

    curve: [batch, held-out reward] of each evaluation; start and final are its ends, over_the_run the mean of those
    after the start. reward, entropy, clipped, grad_norm and sampler_gap_largest: means of the last 20 batches.
    """
    curve = [[row["step"], row["heldout_reward"]] for row in rows if "heldout_reward" in row]
    batches = [row for row in rows if "reward" in row]
    if len(curve) < 2 or not batches:
        raise ValueError("metrics.jsonl: has no held-out reward before and after")
    last, after = batches[-LAST:], [y for _, y in curve[1:]]
    out: dict[str, Any] = {"curve": curve, "start": curve[0][1], "final": curve[-1][1]}
    out["over_the_run"] = statistics.fmean(after)
    clipped = [
        {**row, "clipped": row.get("clipped_low", 0.0) + row.get("clipped_high", 0.0)}
        for row in last
        if "clipped_low" in row or "clipped_high" in row
    ]
    for name in ("reward", "entropy", "grad_norm", "sampler_gap_largest", "clipped"):
        values = [row[name] for row in (clipped if name == "clipped" else last) if name in row]
        if values:
            out[name] = statistics.fmean(values)
    out["seconds"] = sum(row.get("seconds_sampling", 0.0) + row.get("seconds_training", 0.0) for row in batches)
    return out


def spread(values: Sequence[float]) -> dict[str, float]:
    """Number, mean, standard deviation (of one value 0), lowest, highest."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"n": len(values), "mean": statistics.fmean(values), "sd": sd, "low": min(values), "high": max(values)}


def summarised(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """{label: {name: spread over seeds}} of {label: {seed: figures}}; a variation without runs is left out."""
    out: dict[str, dict[str, Any]] = {}
    for label, seeds in runs.items():
        if seeds:
            found = {name: [run[name] for run in seeds.values() if name in run] for name in SHOWN}
            out[label] = {name: spread(values) for name, values in found.items() if values}
    return out


def table(result: Mapping[str, Any]) -> str:
    """In Markdown, a row for each variation, mean +- standard deviation over seeds."""
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    for label in result["runs"]:
        n, all_of = len(result["runs"][label]), len(result["seeds"])
        seeds = str(n) if n == all_of else f"{n} of {all_of}"
        s = result["summary"].get(label)
        if s is None:
            lines.append(f"| {label} | {seeds} | | | | | | | |")
            continue
        final, clipped = s["final"], s.get("clipped")
        cells = [
            label, seeds, _with_sd(s["start"]), _with_sd(final), f"{final['low']:.3f}, {final['high']:.3f}",
            _with_sd(s["over_the_run"]), f"{s['entropy']['mean']:.3f}" if "entropy" in s else "",
            f"{clipped['mean']:.2g}" if clipped else "", f"{s['seconds']['mean']:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_sd(x: Mapping[str, float]) -> str:
    return f"{x['mean']:.3f} +- {x['sd']:.3f}"


def concluded(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """What the held-out rewards at the end say, in sentences: the best, and from which it can be told apart.

    Two variations are told apart where all seeds of one are above all seeds of the other. Two equal ones with n seeds
    each come out so in 2 of C(2n, n) cases, of which the page speaks: with several pairs that is no proof.
    """
    if len(summary) < 2:
        return "There are not two variations to compare."
    order = sorted(summary, key=lambda label: -summary[label]["final"]["mean"])
    best = summary[order[0]]["final"]
    said = [f"Highest at the end: {order[0]}, {best['mean']:.3f} ({best['low']:.3f} to {best['high']:.3f} over seeds)."]
    below = [x for x in order[1:] if summary[x]["final"]["high"] < best["low"]]
    beside = [x for x in order[1:] if x not in below]
    n = min(x["final"]["n"] for x in summary.values())
    if n < 2:
        said.append("With one seed of a variation nothing can be told apart.")
    elif below:
        said.append("All of its seeds end above all seeds of: " + _listed(summary, below) + ".")
        said.append(f"(Two equal variations come out so in 1 of {math.comb(2 * n, n) // 2} pairs.)")
    if beside and n > 1:
        said.append("Not told apart from it by these seeds: " + _listed(summary, beside) + ".")
    fastest = max(summary, key=lambda label: summary[label]["over_the_run"]["mean"])
    mean = summary[fastest]["over_the_run"]["mean"]
    said.append(f"Highest in the mean over the run, where learning fast counts: {fastest}, {mean:.3f}.")
    if fallen := [x for x in order if summary[x]["final"]["high"] <= summary[x]["start"]["low"]]:
        said.append("No seed ends above its start: " + _listed(summary, fallen) + ".")
    return " ".join(said)


def _listed(summary: Mapping[str, Mapping[str, Any]], labels: Sequence[str]) -> str:
    return ", ".join(f"{label} ({summary[label]['final']['mean']:.3f})" for label in labels)


def page(study: Study, result: Mapping[str, Any], conclusion: str) -> str:
    """The study on one page, in Markdown. conclusion: what a reader adds to the sentences of `concluded`."""
    kinds = (("task", "prepare_task"), ("sft", "sft"), ("grpo", "grpo"))
    commands = [f"    {program:13} {' '.join(map(_quoted, argv(result[kind])))}" for kind, program in kinds]
    changed = [
        f"| {x.label} | `{' '.join(map(_quoted, argv({**x.task, **x.sft, **x.grpo})))}` |" for x in study.variations
    ]
    of = result["versions"]
    failed = [f"- {name}: {said}" for name, said in result["failed"].items()]
    parts = [
        f"# {study.name.replace('_', ' ').capitalize()}", study.question,
        "## Setup", "A small model learns the form of answers from examples, then from rewards of its own answers "
        f"(`experiments.grpo`). Seeds {', '.join(map(str, result['seeds']))}: of the examples' order and of everything "
        f"in the run; the problems are the same. {study.note}".rstrip(), "\n".join(commands),
        "\n".join(["| variation | flags |", "|---|---|", *changed]),
        "## Results", "Greedy answers to the held-out problems, mean +- standard deviation over seeds; entropy and the "
        f"share of tokens clipped are means of the last {LAST} batches.", table(result),
        *(["Runs that failed, and are in no mean:\n\n" + "\n".join(failed)] if failed else []),
        f"![held-out reward over rollout batches](rl_{study.name}.png)",
        "Lines are means over seeds, bands go from the lowest to the highest.",
        "## Conclusion", *([conclusion] if conclusion else []), concluded(result["summary"]),
        "## Command", f"    {result['command']}",
        f"{result['device']}; Python {of['python']}, torch {of['torch']}, purelm {of['purelm']}. "
        f"Figures of every run: rl_{study.name}.json.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _quoted(word: str) -> str:
    return f'"{word}"' if not word or set(word) & set(" {}<>|&*") else word


def draw(path: Path, runs: Mapping[str, Mapping[Any, Mapping[str, Any]]], title: str) -> None:
    """A PNG of held-out reward over rollout batches: a line for each mean over seeds, a band from lowest to highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for label, seeds in runs.items():
        curves = [dict(map(tuple, run["curve"])) for run in seeds.values()]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        if not steps:
            continue
        at = [spread([curve[x] for curve in curves]) for x in steps]
        (line,) = axis.plot(steps, [x["mean"] for x in at], marker="o", markersize=3, label=label)
        low, high = [x["low"] for x in at], [x["high"] for x in at]
        axis.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axis.set(xlabel="rollout batches", ylabel="held-out reward, greedy", title=title, ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)


def write(folder: Path, study: Study, result: dict[str, Any], conclusion: str) -> None:
    """rl_NAME.json, rl_NAME.png and rl_NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / f"rl_{study.name}.png", result["runs"], study.name.replace("_", " "))
    track.write_json(folder / f"rl_{study.name}.json", result)
    track.write_text(folder / f"rl_{study.name}.md", page(study, result, conclusion))
