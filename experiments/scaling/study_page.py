"""What a study leaves: a page of Markdown and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from purelm.scaling.bootstrap import interval
from purelm.scaling.laws import FLOPS, Law, loss
from purelm.scaling.runs import Runs

__all__ = ["draw", "page"]


def page(result: Mapping[str, Any], runs: Runs, law: Law) -> str:
    """The Markdown page of study.json; runs: those that the law was fitted to."""
    low, high = result["predicted"][1:]
    final, speed, budget = result["final"], result["speed"], result["budget"]
    a, residuals = final["architecture_config"], np.log(runs.loss / loss(law, runs.parameters, runs.tokens))
    rate = result["rate"]
    simulated = " Its losses are simulated: the back end is a surrogate." if result["backend"] == "surrogate" else ""
    lines = [
        f"# Scaling study: {result['name']}",
        "",
        f"{budget['used_seconds']:,.0f} of {budget['total_budget_seconds']:,.0f} device-seconds were spent on "
        f"{len(result['experiments'])} experiments{' on ' + result['device'] if result['device'] else ''}.{simulated}",
        "",
        "| | |",
        "|---|---|",
        f"| law of loss, {len(runs.loss)} runs | {law.E:.4f} + {law.A:.5g} / N^{law.alpha:.4f} + "
        f"{law.B:.5g} / D^{law.beta:.4f}; N without token embeddings, nats a token |",
        f"| its relative residuals | root mean square {100 * float(np.sqrt((residuals**2).mean())):.2f} %, "
        f"largest {100 * float(np.abs(residuals).max()):.2f} % |",
        f"| speed | {speed['a_token']:.3g} + {speed['a_parameter']:.3g} N seconds a token |",
        f"| learning rate | {rate['coefficient']:.4g} N^{-rate['parameters']:.3f} D^{rate['tokens']:.3f} |",
        f"| final run | {a['num_hidden_layers']} layers of width {a['hidden_size']}, {result['final_parameters']:,} "
        f"parameters, {final['total_train_tokens']:,} tokens, at most {final['max_runtime_seconds']:,.0f} s; "
        f"{6 * result['final_parameters'] * final['total_train_tokens'] / float(runs.flops.max()):.1f} times the FLOPs "
        f"of the largest run of the fit |",
        f"| predicted | **{result['predicted'][0]:.4f}**, {100 * result['coverage']:.0f} % within {low:.4f} and "
        f"{high:.4f} |",
    ]
    if result["measured"] is None:
        lines.append("| measured | the final run did not complete |")
    else:
        measured, seconds = result["measured"]
        error = 100 * (measured / result["predicted"][0] - 1)
        held = "held" if result["held"] else "did not hold"
        lines.append(f"| measured | **{measured:.4f}** after {seconds:,.0f} s: {error:+.2f} %, the interval {held} |")
    if revealed := (result["final_run"] or {}).get("revealed"):
        lines += ["", "Revealed afterwards:", "", *_revealed(revealed)]
    lines += ["", "![](study.png)", "", "| experiment | width | layers | tokens | learning rate | seconds | loss |"]
    lines.append("|---|---|---|---|---|---|---|")
    for x in result["experiments"]:
        cfg, status = x["training_config"], x["status"]
        done = status["status_type"] == "completed"
        value = f"{status['val_losses'][-1]:.4f}" if done else status.get("reason", {}).get("reason", "failed")
        lines.append(
            f"| {x['experiment_id']} | {cfg['architecture_config']['hidden_size']} | "
            f"{cfg['architecture_config']['num_hidden_layers']} | {cfg['total_train_tokens']:,} | "
            f"{cfg['optimizer_config']['lr_scheduler']['peak_value']:.3g} | "
            f"{status.get('used_runtime_seconds', 0.0):.1f} | {value} |"
        )
    return "\n".join(lines) + "\n"


def _revealed(told: Mapping[str, Any]) -> list[str]:
    """What a surrogate hid."""
    law, best, regret = told["law"], told["best"], told["regret"]
    lines = [
        f"- law: {law['E']:.4f} + {law['A']:.5g} / N^{law['alpha']:.4f} + {law['B']:.5g} / D^{law['beta']:.4f}; "
        f"N {law['parameters']}"
    ]
    if best is not None:
        lines.append(
            f"- best run: {best['parameters']:,} parameters so counted, {best['tokens']:,} tokens, {best['loss']:.4f}"
        )
    if regret is not None:
        lines.append(f"- regret, without noise: {regret:.4f}")
    return lines


def draw(
    path: Path, runs: Runs, law: Law, laws: Law, final: tuple[float, float], predicted: tuple[float, float, float],
    measured: float | None,
) -> None:  # fmt: skip
    """Losses over FLOPs for each size, the law with its band up to the final run, and the residuals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    n, d = final
    for i, size in enumerate(np.unique(runs.parameters)):
        some = runs.parameters == size
        fine = np.geomspace(runs.tokens[some].min(), max(d, runs.tokens.max()), 60)
        left.plot(FLOPS * size * fine, loss(law, size, fine), color=f"C{i}", lw=0.8)
        left.plot(runs.flops[some], runs.loss[some], "o", color=f"C{i}", ms=4, label=f"{size:.3g}")
    fine = np.geomspace(runs.tokens.min(), d, 60)
    bands = [interval(loss(laws, n, x), 0.9) for x in fine]
    left.fill_between(FLOPS * n * fine, *zip(*bands, strict=True), color="k", alpha=0.15, lw=0)
    left.plot(FLOPS * n * fine, loss(law, n, fine), "k--", lw=1, label=f"{n:.3g}")
    value, low, high = predicted
    left.errorbar([FLOPS * n * d], [value], [[value - low], [high - value]], color="k", capsize=3, fmt="s", ms=4)
    if measured is not None:
        left.plot([FLOPS * n * d], [measured], "r*", ms=10, label="measured")
    left.set(xscale="log", xlabel="FLOPs (6 N D)", ylabel="loss, nats a token", title="runs, the law, the final run")
    left.legend(title="parameters", fontsize=7)
    right.axhline(0, color="grey", lw=1)
    right.scatter(runs.flops, 100 * np.log(runs.loss / loss(law, runs.parameters, runs.tokens)),
                  c=np.log10(runs.parameters), s=18)  # fmt: skip
    right.set(xscale="log", xlabel="FLOPs", ylabel="%", title="measured over fitted, less 1; darker: smaller models")
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=110)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)
